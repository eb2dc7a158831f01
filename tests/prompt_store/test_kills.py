"""kill -9 of a publisher: at every statement of a publish, and at moments that chance chooses.

A dozen of the latter; SOFTCUE_KILLS=200 makes it that many on each database (see `make check-slow`).
"""

import os
import random
import signal
import time
from dataclasses import replace
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerContext

from prompt_store.prompts.registry import Registry
from tests.prompt_store import processes
from tests.prompt_store.building import ANNA, BASE, publish, task
from tests.prompt_store.consistency import assert_consistent

LARGE = replace(BASE, fingerprint="c3" * 32, name="large", hidden_size=1024, context_length=512)

KILLS = int(os.environ.get("SOFTCUE_KILLS", "12"))

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


def test_publishers_killed_at_any_moment_leave_a_whole_store(registry: Registry, children: ForkServerContext) -> None:
    location = registry.database.location
    registry.register_base(LARGE, ANNA)
    registry.apply_task(task("large"), ANNA)
    registry.database.close()
    generator = random.Random(KILLS)
    acknowledged: list[str] = []
    for kill in range(KILLS):
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
    published = {version.digest for version in registry.versions("large")}
    assert set(acknowledged) <= published
    # Of each at most the one that it was about.
    assert len(published) <= len(acknowledged) + KILLS
    assert publish(registry).version.number == 1


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
