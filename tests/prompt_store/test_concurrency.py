"""Many writers, and readers beside a writer."""

import multiprocessing
from dataclasses import replace
from multiprocessing.context import ForkServerContext
from pathlib import Path

import pytest

from prompt_store.prompts.registry import Registry
from tests.prompt_store import processes
from tests.prompt_store.building import ANNA, BASE, prompt, publish, task
from tests.prompt_store.consistency import assert_consistent
from tests.prompt_store.processes import finished

WRITERS = 16
ROUNDS = 5


def test_two_processes_publishing_at_once_lose_nothing(registry: Registry) -> None:
    spawn = multiprocessing.get_context("spawn")
    location = registry.database.location
    start = spawn.Barrier(2)
    publishers = [spawn.Process(target=processes.publish_many, args=(location, start, seed, 20)) for seed in (0, 100)]
    for publisher in publishers:
        publisher.start()
    finished(publishers)
    assert_consistent(location)
    assert [version.number for version in registry.versions("support_intents")] == list(range(40, 0, -1))
    moves = registry.alias_history("support_intents", "candidate")
    assert sorted(move.reason for move in moves) == sorted(f"seed {seed}" for seed in [*range(20), *range(100, 120)])


def test_many_processes_publishing_and_moving_one_alias_lose_nothing(
    registry: Registry, children: ForkServerContext
) -> None:
    location = registry.database.location
    first = publish(registry, seed=999, alias="candidate").version.digest
    start = children.Barrier(WRITERS)
    writers = [
        children.Process(target=processes.publish_and_move, args=(location, start, number, ROUNDS))
        for number in range(WRITERS)
    ]
    for writer in writers:
        writer.start()
    finished(writers)
    assert_consistent(location)
    assert len(registry.versions("support_intents")) == WRITERS * ROUNDS + 1
    moves = registry.alias_history("support_intents", "candidate")
    # Each published under the alias, and pointed it back at the first unless another had done so just before.
    published = [move.reason for move in moves if move.target != first]
    assert sorted(published) == sorted(f"{number} {turn}" for number in range(WRITERS) for turn in range(ROUNDS))
    assert [move.at for move in moves] == sorted(move.at for move in moves)


def test_many_processes_moving_one_alias_by_compare_and_set_never_undo_each_other(
    registry: Registry, children: ForkServerContext
) -> None:
    location = registry.database.location
    for seed in range(WRITERS):
        publish(registry, seed=seed)
    publish(registry, seed=WRITERS, alias="production")
    start = children.Barrier(WRITERS)
    lost, lose = children.Pipe(duplex=False)
    movers = [
        children.Process(target=processes.move_as_expected, args=(location, start, number, ROUNDS, lose))
        for number in range(WRITERS)
    ]
    for mover in movers:
        mover.start()
    finished(movers)
    assert_consistent(location)
    moves = registry.alias_history("support_intents", "production")[1:]
    # What each read before its move is what its move then took the place of, and all succeeded in the end.
    assert sorted(move.reason for move in moves) == sorted(f"from {move.previous}" for move in moves)
    assert len(moves) == WRITERS * ROUNDS
    assert sum(lost.recv() for _ in movers) > 0


@pytest.mark.parametrize("kind", ["sqlite", "postgresql"])
def test_processes_that_open_a_new_store_at_once_agree(
    kind: str, children: ForkServerContext, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    location = str(tmp_path / "softcue.db") if kind == "sqlite" else request.getfixturevalue("empty_postgresql")
    start = children.Barrier(4)
    answers, answer = children.Pipe(duplex=False)
    openers = [children.Process(target=processes.open_at_once, args=(location, start, answer)) for _ in range(4)]
    for opener in openers:
        opener.start()
    finished(openers)
    assert len({answers.recv() for _ in openers}) == 1
    assert list(tmp_path.glob("*.backup")) == []


def test_a_reader_never_sees_half_a_version(registry: Registry, children: ForkServerContext) -> None:
    registry.register_base(
        replace(BASE, fingerprint="c3" * 32, name="large", hidden_size=1024, context_length=512), ANNA
    )
    registry.apply_task(task("large"), ANNA)
    go, done = children.Event(), children.Event()
    writer = children.Process(target=processes.publish_large, args=(registry.database.location, go, done, 12))
    writer.start()
    seen = [registry.snapshot().sequence]
    go.set()
    checked: set[str] = set()
    over = False
    while not over:
        # Read once more after the writer has finished.
        over = done.is_set() or writer.exitcode is not None
        snapshot = registry.snapshot()
        seen.append(snapshot.sequence)
        large = snapshot.tasks["large"]
        versions = list(large.versions)
        # A version and the alias that it was published under appear together.
        assert large.aliases.get("candidate") == (versions[-1] if versions else None)
        assert list(large.numbers) == list(range(1, len(versions) + 1))
        for digest in set(versions) - checked:
            number = large.versions[digest].number
            assert registry.soft_prompt(digest) == prompt(number - 1, length=256, hidden_size=1024)
            checked.add(digest)
    finished([writer])
    assert len(checked) == 12
    assert seen == sorted(seen)
    assert seen[-1] == seen[0] + 24
