"""Blocks that are counted, and the prompts whose KV is kept in them."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.engines.local.blocks import BLOCK_TOKENS, BlockPool, CachedPrompt, PromptCache, blocks_for


def computed(cache: PromptCache, digest: str, *, pinned: bool = False, blocks: int = 2) -> CachedPrompt:
    """A prompt whose KV is whole."""
    prompt = cache.register(digest, blocks * BLOCK_TOKENS, pinned=pinned)
    assert cache.begin(prompt)
    cache.complete(prompt)
    return prompt


def kept(cache: PromptCache) -> set[str]:
    return {prompt.digest for prompt in cache.cached()}


def test_positions_take_whole_blocks() -> None:
    assert [blocks_for(positions) for positions in (0, 1, 16, 17, 32, 33)] == [0, 1, 1, 2, 2, 3]


def test_a_block_is_free_again_when_its_last_user_gives_it_back() -> None:
    pool = BlockPool(4)
    taken = pool.take(3)
    pool.share(taken[:2])
    pool.give_back(taken)
    assert (pool.used, pool.free) == (2, 2)
    pool.give_back(taken[:2])
    assert (pool.used, pool.free) == (0, 4)


def test_mistakes_in_counting_are_found_where_they_are_made() -> None:
    pool = BlockPool(2)
    (block,) = pool.take(1)
    with pytest.raises(AssertionError, match="2 blocks wanted, 1 free"):
        pool.take(2)
    pool.give_back([block])
    with pytest.raises(AssertionError, match="is free"):
        pool.share([block])
    with pytest.raises(AssertionError, match="given back twice"):
        pool.give_back([block])


@given(st.lists(st.tuples(st.sampled_from(["take", "share", "give back"]), st.integers(0, 7)), max_size=60))
def test_a_block_is_never_given_to_two_who_do_not_share_it(work: list[tuple[str, int]]) -> None:
    pool = BlockPool(8)
    users = dict.fromkeys(range(8), 0)
    for act, number in work:
        if act == "take" and pool.free:
            (block,) = pool.take(1)
            assert users[block] == 0
            users[block] = 1
        elif act == "share" and users[number]:
            pool.share([number])
            users[number] += 1
        elif act == "give back" and users[number]:
            pool.give_back([number])
            users[number] -= 1
        assert pool.used == sum(count > 0 for count in users.values())


def test_a_prompt_takes_blocks_when_it_is_begun_and_not_before() -> None:
    cache = PromptCache(BlockPool(4))
    prompt = cache.register("a", 17, pinned=True)
    assert (cache.pool.used, cache.held_blocks, len(cache)) == (0, 0, 0)
    assert cache.begin(prompt)
    assert (cache.pool.used, cache.held_blocks, len(cache)) == (2, 2, 0)
    cache.complete(prompt)
    assert len(cache) == 1


def test_the_least_recently_used_prompt_goes_first_and_pinned_ones_last() -> None:
    cache = PromptCache(BlockPool(8))
    computed(cache, "pinned", pinned=True)
    first = computed(cache, "first")
    computed(cache, "second")
    computed(cache, "third")
    cache.use(first)
    cache.leave(first)
    assert cache.make_room(2)
    assert kept(cache) == {"pinned", "first", "third"}
    assert cache.make_room(6)
    assert kept(cache) == {"pinned"}
    assert cache.make_room(8)
    assert (kept(cache), cache.pool.used) == (set(), 0)


def test_among_pinned_prompts_too_the_least_recently_used_goes_first() -> None:
    cache = PromptCache(BlockPool(4))
    first = computed(cache, "first", pinned=True)
    computed(cache, "second", pinned=True)
    cache.use(first)
    cache.leave(first)
    computed(cache, "third", pinned=True)
    assert kept(cache) == {"first", "third"}


def test_prompts_that_are_used_or_being_computed_stay_and_nothing_goes_in_vain() -> None:
    cache = PromptCache(BlockPool(6))
    used = computed(cache, "used")
    cache.use(used)
    computed(cache, "idle")
    begun = cache.register("begun", 2 * BLOCK_TOKENS, pinned=False)
    assert cache.begin(begun)
    assert not cache.make_room(3)
    assert kept(cache) == {"used", "idle"}
    assert cache.make_room(2)
    assert kept(cache) == {"used"}
    cache.leave(used)
    assert not cache.make_room(5)
    cache.complete(begun)
    assert cache.make_room(6)


def test_a_prompt_for_which_there_is_no_room_is_not_begun() -> None:
    cache = PromptCache(BlockPool(2))
    cache.use(computed(cache, "used", blocks=1))
    wide = cache.register("wide", 2 * BLOCK_TOKENS, pinned=True)
    assert not cache.begin(wide)
    assert (wide.blocks, cache.pool.used) == ([], 1)


def test_registering_again_may_pin_and_never_unpins() -> None:
    cache = PromptCache(BlockPool(2))
    prompt = cache.register("a", 5, pinned=False)
    assert cache.register("a", 5, pinned=True) is prompt
    cache.register("a", 5, pinned=False)
    assert prompt.pinned


def test_a_forgotten_prompt_gives_its_blocks_back_and_one_in_use_is_not_forgotten() -> None:
    cache = PromptCache(BlockPool(4))
    computed(cache, "idle")
    cache.use(computed(cache, "used"))
    cache.forget("idle")
    cache.forget("idle")
    assert (cache.get("idle"), cache.pool.used, kept(cache)) == (None, 2, {"used"})
    with pytest.raises(AssertionError, match="prompt used is in use"):
        cache.forget("used")
