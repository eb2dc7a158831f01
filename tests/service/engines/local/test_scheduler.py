"""Admission, shares, preemption and branches, one subject a test; `test_scheduler_property.py` drives all at once."""

from __future__ import annotations

from collections import Counter

from service.engines.local.blocks import BLOCK_TOKENS, BlockPool, CachedPrompt, PromptCache
from service.engines.local.scheduler import Batch, Scheduler, Sequence

NEW = -1


def scheduler(*, blocks: int = 64, sequences: int = 4, budget: int = 64) -> Scheduler:
    return Scheduler(PromptCache(BlockPool(blocks)), max_sequences=sequences, max_batch_tokens=budget)


def sequence(name: str, tokens: int, task: str = "", prompt: CachedPrompt | None = None) -> Sequence:
    return Sequence(name, list(range(tokens)), task, prompt)


def known(into: Scheduler, digest: str, length: int) -> CachedPrompt:
    return into.prompts.register(digest, length, pinned=False)


def scoring(name: str, tokens: int, branches: list[list[int]], prompt: CachedPrompt | None = None) -> Sequence:
    made = sequence(name, tokens, prompt=prompt)
    made.branches = branches
    return made


def step(on: Scheduler, prefill: int = 10_000) -> Batch:
    """A step after which every sequence that can choose a token has chosen one."""
    batch = on.next_batch(prefill)
    for chunk in batch.chunks:
        on.advance(chunk)
        if chunk.completes and chunk.sequence.phase == "decode":
            chunk.sequence.token_ids.append(NEW)
    return batch


def made(item: Sequence) -> int:
    """Tokens that a sequence has made so far."""
    return item.token_ids.count(NEW)


def shape(batch: Batch) -> list[tuple[str, int, int]]:
    """(id, start, count) of each chunk."""
    return [(chunk.sequence.id, chunk.start, chunk.count) for chunk in batch.chunks]


def test_a_long_prompt_is_prefilled_in_chunks_within_the_budget() -> None:
    on = scheduler(budget=4)
    on.add(sequence("long", 10))
    assert [shape(step(on)) for _ in range(4)] == [
        [("long", 0, 4)],
        [("long", 4, 4)],
        [("long", 8, 2)],
        [("long", 10, 1)],
    ]


def test_decoding_sequences_go_on_while_a_long_prompt_is_prefilled_as_far_as_it_is_let() -> None:
    on = scheduler(budget=64)
    on.add(sequence("short", 1))
    step(on)
    on.add(sequence("long", 90))
    assert shape(step(on, 30)) == [("short", 1, 1), ("long", 0, 30)]
    assert shape(step(on)) == [("short", 2, 1), ("long", 30, 60)]


def test_prefill_goes_on_where_decoding_alone_fills_the_budget() -> None:
    on = scheduler(budget=2)
    for name in "ab":
        on.add(sequence(name, 1))
    step(on)
    on.add(sequence("c", 5))
    assert shape(step(on)) == [("a", 1, 1), ("b", 1, 1), ("c", 0, 1)]


def test_requests_beyond_the_limit_wait_and_come_in_order() -> None:
    on = scheduler(sequences=1)
    first, second, third = (sequence(name, 2) for name in "abc")
    for item in (first, second, third):
        on.add(item)
    assert shape(step(on)) == [("a", 0, 2)]
    on.end(second)
    on.end(first)
    assert shape(step(on)) == [("c", 0, 2)]
    on.end(third)
    on.end(third)
    assert (on.running, on.waiting, on.prompts.pool.used) == ([], 0, 0)


def test_a_prompt_is_computed_once_and_shared_by_all_who_stand_behind_it() -> None:
    on = scheduler()
    prompt = known(on, "p", 2 * BLOCK_TOKENS)
    for name in "abc":
        on.add(sequence(name, 3, prompt=prompt))
    assert shape(step(on)) == [("p", 0, 32)]
    batch = step(on)
    assert shape(batch) == [("a", 0, 3), ("b", 0, 3), ("c", 0, 3)]
    assert batch.copies == []
    assert {tuple(chunk.blocks[:2]) for chunk in batch.chunks} == {tuple(prompt.blocks)}
    assert on.prompts.pool.used == 2 + 3


def test_the_block_that_a_prompt_fills_in_part_is_copied_for_each() -> None:
    on = scheduler()
    prompt = known(on, "p", BLOCK_TOKENS + 5)
    for name in "ab":
        on.add(sequence(name, 3, prompt=prompt))
    step(on)
    batch = step(on)
    first, second = (chunk.blocks for chunk in batch.chunks)
    assert first[0] == second[0] == prompt.blocks[0]
    assert batch.copies == [(prompt.blocks[1], first[1]), (prompt.blocks[1], second[1])]
    assert len({prompt.blocks[1], first[1], second[1]}) == 3


def test_a_fork_shares_full_blocks_and_copies_the_one_in_use() -> None:
    on = scheduler()
    parent = sequence("a", BLOCK_TOKENS + 5)
    on.add(parent)
    step(on)
    child = on.fork(parent, [*range(BLOCK_TOKENS + 5), 7])
    batch = step(on)
    assert shape(batch) == [("a", 21, 1), ("a", 21, 1)]
    assert child.blocks[0] == parent.blocks[0]
    assert batch.copies == [(parent.blocks[1], child.blocks[1])]
    on.end(parent)
    assert on.prompts.pool.used == 2
    on.end(child)
    assert on.prompts.pool.used == 0


def test_a_fork_that_finds_no_room_waits_and_computes_its_tokens_anew() -> None:
    for on in (scheduler(blocks=2), scheduler(sequences=1)):
        parent = sequence("a", BLOCK_TOKENS + 5)
        on.add(parent)
        step(on)
        child = on.fork(parent, [*range(BLOCK_TOKENS + 5), 7])
        assert (child.phase, child.blocks, on.waiting) == ("waiting", [], 1)
        on.end(parent)
        assert shape(step(on)) == [("a", 0, 22)]


def test_the_copy_for_a_fork_that_ends_at_once_is_not_made() -> None:
    on = scheduler()
    parent = sequence("a", 5)
    on.add(parent)
    step(on)
    on.end(on.fork(parent, [*range(5), 7]))
    assert step(on).copies == []


def test_where_blocks_run_out_the_last_admitted_waits_and_the_first_goes_on() -> None:
    on = scheduler(blocks=4)
    first, last = sequence("first", 30), sequence("last", 30)
    on.add(first)
    on.add(last)
    for _ in range(4):
        step(on)
    assert (first.phase, last.phase, on.preemptions) == ("decode", "waiting", 1)
    assert (last.computed, last.blocks, last.length) == (0, [], 33)
    on.end(first)
    assert shape(step(on)) == [("last", 0, 33)]


def test_who_was_preempted_comes_before_others_of_its_task() -> None:
    on = scheduler(blocks=4, sequences=3)
    first, last = sequence("first", 30), sequence("last", 30)
    for item in (first, last, sequence("new", 30)):
        on.add(item)
    for _ in range(4):
        step(on)
    on.end(first)
    assert shape(step(on))[0][0] == "last"


def test_prompts_that_waiting_sequences_hold_never_block_the_one_that_runs() -> None:
    """Two prompts fill the pool, each held by a sequence that waits for the other's blocks."""
    on = scheduler(blocks=6, sequences=2)
    prompts = [known(on, name, 3 * BLOCK_TOKENS) for name in "pq"]
    items = [sequence(name, 20, name, prompt) for name, prompt in zip("ab", prompts, strict=True)]
    for item in items:
        on.add(item)
    ended = []
    for _ in range(40):
        step(on)
        for item in list(on.running):
            if item.length > 24:
                on.end(item)
                ended.append(item.id)
    assert sorted(ended) == ["a", "b"]
    assert on.prompts.pool.used == on.prompts.held_blocks


def test_a_score_request_finds_room_for_its_branches_in_prompts_that_only_wait() -> None:
    on = scheduler(blocks=8, sequences=2)
    held = known(on, "held", 5 * BLOCK_TOKENS)
    on.compute(held)
    step(on)
    step(on)
    scored = scoring("scored", 20, [[1] * 30])
    on.add(scored)
    step(on)
    on.add(sequence("waits", 40, "other", held))
    assert shape(step(on)) == [("scored", 20, 30)]


def test_branches_share_the_text_and_give_their_blocks_back() -> None:
    on = scheduler()
    scored = scoring("s", 20, [[1, 2], [3] * 20, [4]])
    on.add(scored)
    step(on)
    assert scored.phase == "score"
    batch = on.next_batch(64)
    assert [(chunk.start, chunk.count) for chunk in batch.chunks] == [(20, 2), (20, 20), (20, 1)]
    own = [chunk.blocks[1:] for chunk in batch.chunks]
    assert {chunk.blocks[0] for chunk in batch.chunks} == {scored.blocks[0]}
    assert batch.copies == [(scored.blocks[1], blocks[0]) for blocks in own]
    assert len({block for blocks in own for block in blocks} | set(scored.blocks)) == 2 + 1 + 2 + 1
    for chunk in batch.chunks:
        on.advance(chunk)
    assert (on.prompts.pool.used, scored.branches) == (2, [])


def test_more_branches_than_the_budget_or_the_memory_hold_take_several_steps() -> None:
    for on, most in ((scheduler(budget=4), 2), (scheduler(blocks=3), 2)):
        scored = scoring("s", 5, [[1, 2] for _ in range(5)])
        on.add(scored)
        counts = []
        while scored.phase != "score" or scored.branches:
            counts.append(sum(chunk.branch is not None for chunk in step(on).chunks))
        assert counts[-3:] == [most, most, 1]


def test_an_abandoned_branch_comes_again() -> None:
    on = scheduler()
    scored = scoring("s", 5, [[1, 2]])
    on.add(scored)
    step(on)
    (chunk,) = on.next_batch(64).chunks
    on.abandon(chunk)
    assert on.prompts.pool.used == 1
    (again,) = on.next_batch(64).chunks
    assert again.branch == [1, 2]


def test_two_score_requests_that_fill_the_memory_both_come_to_an_end() -> None:
    on = scheduler(blocks=5)
    items = [scoring(name, 20, [[1] * 25, [2] * 25]) for name in "ab"]
    for item in items:
        on.add(item)
    for _ in range(30):
        for item in items:
            if item.phase == "score" and not item.branches:
                on.end(item)
        step(on)
    assert [item.phase for item in items] == ["ended", "ended"]
    assert on.prompts.pool.used == 0


def served(on: Scheduler, until: str, new_tokens: int) -> int:
    """Steps until the sequence `until` ends, where each makes `new_tokens` tokens."""
    for steps in range(1, 10_000):
        for chunk in step(on).chunks:
            if made(chunk.sequence) >= new_tokens:
                on.end(chunk.sequence)
                if chunk.sequence.id == until:
                    return steps
    raise AssertionError(f"{until} never ended")


def test_a_flood_of_one_task_does_not_starve_another() -> None:
    """The other task waits until one of those that run ends, and for its own prefill and tokens: not for the flood."""
    on = scheduler(sequences=4, budget=32)
    for number in range(300):
        on.add(sequence(f"flood {number}", 24, "flood"))
    for _ in range(50):
        step(on)
    new_tokens = 10
    on.add(sequence("other", 24, "other"))
    assert served(on, "other", new_tokens) <= 2 * new_tokens + 4


def test_a_flood_that_takes_all_memory_does_not_starve_a_task_with_a_prompt_of_its_own() -> None:
    on = scheduler(blocks=12, sequences=8, budget=32)
    for number in range(300):
        on.add(sequence(f"flood {number}", 24, "flood"))
    for _ in range(20):
        step(on)
    on.add(sequence("other", 40, "other", known(on, "p", 40)))
    assert served(on, "other", 10) <= 60


def test_tasks_that_ask_for_more_than_there_is_get_equal_shares() -> None:
    on = scheduler(sequences=4, budget=32)
    for number in range(200):
        on.add(sequence(f"long {number}", 64, "long"))
        on.add(sequence(f"short {number}", 8, "short"))
    tokens: Counter[str] = Counter()
    for _ in range(200):
        for chunk in step(on).chunks:
            tokens[chunk.sequence.task] += chunk.count
            if made(chunk.sequence) == 8:
                on.end(chunk.sequence)
    assert 0.7 < tokens["long"] / tokens["short"] < 1.4


def test_absence_saves_nothing_up() -> None:
    """A task that was away takes turns with one that was served all the time; it does not shut it out."""
    on = scheduler(sequences=1, budget=32)
    busy = [sequence(f"busy {number}", 4, "busy") for number in range(40)]
    for item in busy:
        on.add(item)
    for item in busy[:20]:
        step(on)
        on.end(item)
    for number in range(20):
        on.add(sequence(f"new {number}", 4, "new"))
    order = []
    for _ in range(10):
        (chunk,) = step(on).chunks
        order.append(chunk.sequence.task)
        on.end(chunk.sequence)
    assert Counter(order) == {"busy": 5, "new": 5}
