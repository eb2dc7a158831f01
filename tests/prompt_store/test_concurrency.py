"""Many writers, readers beside a writer, and writers killed at any moment."""

import multiprocessing
import os
import random
import signal
import sqlite3
from contextlib import closing
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest

from prompt_store.database import Database
from prompt_store.prompts.registry import Registry
from tests.prompt_store import processes
from tests.prompt_store.building import ANNA, BASE, prompt, publish, task

SPAWN = multiprocessing.get_context("spawn")


@pytest.fixture(scope="module")
def server() -> multiprocessing.context.ForkServerContext:
    """Starts children in milliseconds, from a process that has imported the store and opened nothing."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.prompt_store.processes"])
    return context


def assert_consistent(path: Path) -> Registry:
    """Whatever happened: dense numbers, every tensor whole, history in step with aliases, no gap in the log."""
    with closing(sqlite3.connect(path)) as connection:
        assert connection.execute("PRAGMA integrity_check").fetchone() == ("ok",)
        assert connection.execute("PRAGMA foreign_key_check").fetchall() == []
        assert (
            connection.execute("SELECT count(*) FROM audit").fetchone()
            == connection.execute("SELECT sequence FROM change_counter").fetchone()
        )
    with Database.open(path) as database:
        registry = Registry(database)
        snapshot = registry.snapshot()
        assert [change.sequence for change in registry.changes_since(0)] == list(range(1, snapshot.sequence + 1))
        for name, numbers in snapshot.numbers.items():
            assert sorted(numbers) == list(range(1, len(numbers) + 1))
            for alias, target in snapshot.aliases[name].items():
                history = registry.alias_history(name, alias)
                assert history[0].previous is None
                assert all(later.previous == earlier.target for earlier, later in pairwise(history))
                assert history[-1].target == target
        for digest in snapshot.versions:
            registry.soft_prompt(digest)
    return registry


def test_two_processes_publishing_at_once_lose_nothing(registry: Registry) -> None:
    path = registry.database.path
    start = SPAWN.Barrier(2)
    publishers = [
        SPAWN.Process(target=processes.publish_many, args=(path, start, first_seed, 20)) for first_seed in (0, 100)
    ]
    for publisher in publishers:
        publisher.start()
    for publisher in publishers:
        publisher.join()
    assert [publisher.exitcode for publisher in publishers] == [0, 0]
    assert_consistent(path)
    assert [version.number for version in registry.versions("support_intents")] == list(range(40, 0, -1))
    moves = registry.alias_history("support_intents", "candidate")
    assert sorted(move.reason for move in moves) == sorted(f"seed {seed}" for seed in [*range(20), *range(100, 120)])


def test_processes_that_open_a_new_store_at_once_agree(
    tmp_path: Path, server: multiprocessing.context.ForkServerContext
) -> None:
    path = tmp_path / "softcue.db"
    start = server.Barrier(4)
    answers, answer = server.Pipe(duplex=False)
    openers = [server.Process(target=processes.open_at_once, args=(path, start, answer)) for _ in range(4)]
    for opener in openers:
        opener.start()
    for opener in openers:
        opener.join()
    assert [opener.exitcode for opener in openers] == [0] * 4
    assert len({answers.recv() for _ in openers}) == 1
    assert list(tmp_path.glob("*.backup")) == []


def test_a_reader_never_sees_half_a_version(
    registry: Registry, server: multiprocessing.context.ForkServerContext
) -> None:
    registry.register_base(
        replace(BASE, fingerprint="c3" * 32, name="large", hidden_size=1024, context_length=512), ANNA
    )
    registry.apply_task(task("large"), ANNA)
    go, done = server.Event(), server.Event()
    writer = server.Process(target=processes.publish_large, args=(registry.database.path, go, done, 12))
    writer.start()
    seen = [registry.snapshot().sequence]
    go.set()
    checked: set[str] = set()
    finished = False
    while not finished:
        # Read once more after the writer has finished.
        finished = done.is_set() or writer.exitcode is not None
        snapshot = registry.snapshot()
        seen.append(snapshot.sequence)
        versions = list(snapshot.numbers["large"].values())
        # A version and the alias that it was published under appear together.
        assert snapshot.aliases["large"].get("candidate") == (versions[-1] if versions else None)
        assert list(snapshot.numbers["large"]) == list(range(1, len(versions) + 1))
        for digest in set(versions) - checked:
            number = snapshot.versions[digest].number
            assert registry.soft_prompt(digest) == prompt(number - 1, length=256, hidden_size=1024)
            checked.add(digest)
    writer.join()
    assert writer.exitcode == 0
    assert len(checked) == 12
    assert seen == sorted(seen)
    assert seen[-1] == seen[0] + 24


def test_a_publisher_killed_at_any_moment_leaves_a_whole_store(
    registry: Registry, server: multiprocessing.context.ForkServerContext
) -> None:
    path = registry.database.path
    registry.database.close()
    generator = random.Random(4)
    acknowledged: list[str] = []
    for round_number in range(12):
        answers, answer = server.Pipe(duplex=False)
        publisher = server.Process(target=processes.publish_until_killed, args=(path, 1000 * round_number, answer))
        publisher.start()
        answer.close()
        acknowledged.append(answers.recv())
        # Waits for at most a moment, so that the kill falls anywhere in a publish.
        if answers.poll(generator.random() * 0.02):
            acknowledged.append(answers.recv())
        assert publisher.pid is not None
        os.kill(publisher.pid, signal.SIGKILL)
        publisher.join()
        assert publisher.exitcode == -signal.SIGKILL
        acknowledged += drain(answers)
        assert_consistent(path)
    with Database.open(path) as database:
        reopened = Registry(database)
        published = {version.digest for version in reopened.versions("support_intents")}
        assert set(acknowledged) <= published
        assert len(published) <= len(acknowledged) + 12
        assert publish(reopened, seed=999_999).version.number == len(published) + 1


def drain(answers: multiprocessing.connection.Connection) -> list[str]:
    """What was sent before the sender died; a message cut by its death counts as not sent."""
    received: list[str] = []
    try:
        while answers.poll():
            received.append(answers.recv())
    except (EOFError, OSError):
        pass
    answers.close()
    return received
