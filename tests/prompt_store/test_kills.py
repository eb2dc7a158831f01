"""kill -9 of a publisher: at every statement of a publish, and at moments that chance chooses."""

import os
import random
import signal
import time
from dataclasses import replace
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerContext

import pytest

from prompt_store.database import Database
from prompt_store.prompts.registry import Registry
from tests.prompt_store import processes
from tests.prompt_store.building import ANNA, BASE, publish, task
from tests.prompt_store.consistency import assert_consistent

LARGE = replace(BASE, fingerprint="c3" * 32, name="large", hidden_size=1024, context_length=512)

# Several times what a publish takes, so that a kill falls anywhere in it.
LONGEST_PAUSE_S = 0.03


def test_a_publisher_killed_at_any_statement_leaves_all_or_nothing(
    registry: Registry, children: ForkServerContext
) -> None:
    location = registry.database.location
    publish(registry, seed=0, alias="candidate")
    statements = 0
    died = True
    while died:
        # Each the same content, so what the one before left counts.
        numbers = {version.number for version in registry.versions("support_intents")}
        assert numbers == {1}
        statements += 1
        publisher = children.Process(target=processes.publish_until_statement, args=(location, statements))
        publisher.start()
        publisher.join(60)
        died = publisher.exitcode == -signal.SIGKILL
        assert died or publisher.exitcode == 0
        assert_consistent(location)
    assert [version.number for version in registry.versions("support_intents")] == [2, 1]
    assert registry.version("support_intents", "candidate").number == 2
    # The checks, the lock, version, tensor, log and alias.
    assert statements > 20


def kill_publishers(location: str, children: ForkServerContext, kills: int, generator: random.Random) -> None:
    """Has publishers killed one after the other; what they had acknowledged is there, whole, and so is all else."""
    with Database.open(location) as database:
        registry = Registry(database)
        registry.register_base(LARGE, ANNA)
        registry.apply_task(task("large"), ANNA)
    acknowledged: list[str] = []
    for kill in range(kills):
        answers, answer = children.Pipe(duplex=False)
        publisher = children.Process(target=processes.publish_until_killed, args=(location, 1000 * kill, answer))
        publisher.start()
        answer.close()
        acknowledged.append(answers.recv())
        until_s = time.monotonic() + generator.random() * LONGEST_PAUSE_S
        while answers.poll(max(0.0, until_s - time.monotonic())):
            acknowledged.append(answers.recv())
        assert publisher.pid is not None
        os.kill(publisher.pid, signal.SIGKILL)
        publisher.join()
        assert publisher.exitcode == -signal.SIGKILL
        acknowledged += drain(answers)
        if kill % 10 == 0:
            assert_consistent(location)
    assert_consistent(location)
    with Database.open(location) as database:
        registry = Registry(database)
        published = {version.digest for version in registry.versions("large")}
        assert set(acknowledged) <= published
        assert len(published) <= len(acknowledged) + kills
        assert publish(registry, seed=999_999).version.number == 1


def drain(answers: Connection) -> list[str]:
    """What was sent before the sender died; a message cut by its death counts as not sent."""
    received: list[str] = []
    try:
        while answers.poll():
            received.append(answers.recv())
    except (EOFError, OSError):
        return received
    finally:
        answers.close()
    return received


def test_publishers_killed_at_any_moment_leave_a_whole_store(registry: Registry, children: ForkServerContext) -> None:
    kill_publishers(registry.database.location, children, 12, random.Random(4))


@pytest.mark.slow
def test_publishers_killed_two_hundred_times_leave_a_whole_store(
    registry: Registry, children: ForkServerContext
) -> None:
    kill_publishers(registry.database.location, children, 200, random.Random())
