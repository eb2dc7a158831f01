from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from service.engines.local.scheduler import Scheduler, Sequence


def sequence(name: str, tokens: int) -> Sequence:
    return Sequence(name, list(range(tokens)), tokens)


def run(scheduler: Scheduler) -> list[tuple[str, int, int]]:
    """One step: admit, batch, advance; returns (id, start, count) of each chunk."""
    list(scheduler.admit())
    chunks = scheduler.next_batch()
    for chunk in chunks:
        scheduler.advance(chunk)
    return [(chunk.sequence.id, chunk.start, chunk.count) for chunk in chunks]


def test_a_long_prompt_is_prefilled_in_chunks_within_the_budget() -> None:
    scheduler = Scheduler(slots=2, max_batch_tokens=4)
    scheduler.add(sequence("long", 10))
    assert [run(scheduler) for _ in range(3)] == [[("long", 0, 4)], [("long", 4, 4)], [("long", 8, 2)]]


def test_decoding_sequences_go_on_while_a_long_prompt_is_prefilled() -> None:
    scheduler = Scheduler(slots=2, max_batch_tokens=4)
    short = sequence("short", 1)
    scheduler.add(short)
    run(scheduler)
    short.token_ids.append(7)
    scheduler.add(sequence("long", 9))
    assert run(scheduler) == [("short", 1, 1), ("long", 0, 3)]


def test_requests_beyond_the_slots_wait_and_come_in_order() -> None:
    scheduler = Scheduler(slots=1, max_batch_tokens=8)
    first, second, third = (sequence(name, 2) for name in "abc")
    for item in (first, second, third):
        scheduler.add(item)
    assert run(scheduler) == [("a", 0, 2)]
    scheduler.end(second)
    scheduler.end(first)
    assert run(scheduler) == [("c", 0, 2)]
    assert third.slot == 0


def test_ending_twice_frees_one_slot() -> None:
    scheduler = Scheduler(slots=2, max_batch_tokens=8)
    item = sequence("a", 2)
    scheduler.add(item)
    run(scheduler)
    scheduler.end(item)
    scheduler.end(item)
    assert scheduler.slots_used == 0


@given(st.lists(st.tuples(st.integers(1, 20), st.integers(0, 5)), max_size=12), st.integers(1, 4), st.integers(1, 9))
def test_every_sequence_computes_each_of_its_tokens_once_whatever_arrives(
    work: list[tuple[int, int]], slots: int, budget: int
) -> None:
    scheduler = Scheduler(slots=slots, max_batch_tokens=budget)
    computed: dict[str, list[int]] = {}
    left: dict[str, int] = {}
    for index, (tokens, new) in enumerate(work):
        scheduler.add(sequence(str(index), tokens))
        left[str(index)] = new
    steps = 0
    while scheduler.waiting or scheduler.running:
        steps += 1
        assert steps < 500
        list(scheduler.admit())
        assert len({item.slot for item in scheduler.running}) == len(scheduler.running) <= slots
        chunks = scheduler.next_batch()
        prefill = sum(chunk.count for chunk in chunks if chunk.sequence.phase == "prefill")
        assert prefill <= max(1, budget)
        for chunk in chunks:
            computed.setdefault(chunk.sequence.id, []).extend(range(chunk.start, chunk.start + chunk.count))
            scheduler.advance(chunk)
            if chunk.completes:
                if left[chunk.sequence.id]:
                    left[chunk.sequence.id] -= 1
                    chunk.sequence.token_ids.append(0)
                else:
                    scheduler.end(chunk.sequence)
    assert scheduler.slots_used == 0
    assert computed == {str(index): list(range(tokens + new)) for index, (tokens, new) in enumerate(work)}
