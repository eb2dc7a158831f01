"""Little memory: sequences that wait, are preempted and begin again; allocations that fail. Answers do not change."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch

from prompt_store.prompts.soft_prompt import SoftPrompt
from service.engines.base import RawText
from service.engines.base_model import BaseModel
from service.engines.local.engine import EngineCore
from service.engines.local.pacing import Ceiling
from service.engines.local.scheduler import Batch
from tests.conftest import random_prompt
from tests.service.engines.local.driving import Collected, assert_idle, finish, register, score, step, submit
from tests.service.engines.local.oracle import Oracle

SENTENCE = "The house stood at the end of a long road, and nobody had lived there for years. "


@pytest.fixture
def ids(base: BaseModel) -> list[int]:
    return base.lay_out(RawText(SENTENCE * 3))


def mixed_work(core: EngineCore, ids: list[int]) -> list[str]:
    """Sixteen requests: greedy and seeded, with and without prompts, some of several answers."""
    digests = [register(core, random_prompt(seed, 13 + 9 * seed), pinned=False) for seed in range(3)]
    for number in range(16):
        digest = digests[number % 4] if number % 4 < 3 else None
        how = {"temperature": 1.0, "seed": number} if number % 2 else {}
        size = 5 + 2 * number
        submit(
            core,
            str(number),
            ids[number : number + size],
            digest,
            max_tokens=20,
            n=1 + number % 3,
            task=str(number % 2),
            **how,
        )
    return [str(number) for number in range(16)]


@pytest.mark.parametrize(("blocks", "budget"), [(8, 512), (12, 9), (20, 64)])
def test_preempted_sequences_say_the_same(
    make_core: Callable[..., EngineCore], ids: list[int], blocks: int, budget: int
) -> None:
    roomy, tight = make_core(), make_core(blocks=blocks, max_batch_tokens=budget)
    names = mixed_work(roomy, ids)
    mixed_work(tight, ids)
    expected, got = finish(roomy), Collected()
    while tight.has_work:
        step(tight, got)
        assert tight.stats().kv_bytes <= tight.stats().kv_budget_bytes
    assert (roomy.stats().preemptions, tight.stats().preemptions > 0) == (0, True)
    assert not got.failures
    for name in names:
        assert got.all_tokens(name) == expected.all_tokens(name)
    assert_idle(tight)


def test_labels_are_scored_alike_in_any_memory_and_beside_streams(
    base: BaseModel, make_core: Callable[..., EngineCore], ids: list[int]
) -> None:
    labels = [base.continuation(text) for text in ("a", "a b", "refund", "refund my order please " * 3, "x y z")]
    expected = make_core()
    prompt = random_prompt(1, 21)
    for index, label in enumerate(labels):
        score(expected, str(index), ids, register(expected, prompt), [label])
    one_by_one = finish(expected).scores
    for tight in ({}, {"blocks": 9}, {"max_batch_tokens": 3}, {"blocks": 9, "max_batch_tokens": 10}):
        core, collected = make_core(**tight), Collected()
        submit(core, "stream", ids[:20], max_tokens=70)
        for _ in range(3):
            step(core, collected)
        for name in ("all", "again"):
            score(core, name, ids, register(core, prompt, pinned=False), labels)
        finish(core, collected)
        for name in ("all", "again"):
            assert collected.scores[name] == pytest.approx([one_by_one[str(i)][0] for i in range(5)], abs=1e-4)
        assert len(collected.tokens["stream"]) == 70
        assert_idle(core)


def test_equal_labels_and_labels_that_begin_alike_are_told_apart(core: EngineCore, ids: list[int]) -> None:
    labels = [[5], [5, 6], [5, 6, 7], [5, 6], [7, 6, 5]]
    score(core, "together", ids, None, labels)
    for index, label in enumerate(labels):
        score(core, str(index), ids, None, [label])
    scores = finish(core).scores
    assert scores["together"] == pytest.approx([scores[str(index)][0] for index in range(5)], abs=1e-4)
    assert scores["together"][1] == scores["together"][3]
    assert scores["together"][0] > scores["together"][1] > scores["together"][2]


class Scarce:
    """Memory for so many tokens in a pass. `tried` are the sizes of all passes, those that failed included."""

    def __init__(self, most: int, error: type[Exception] = torch.OutOfMemoryError) -> None:
        self.most = most
        self.tried: list[int] = []
        self._error = error

    def __call__(self, batch: Batch) -> None:
        tokens = sum(chunk.count for chunk in batch.chunks)
        self.tried.append(tokens)
        if tokens > self.most:
            raise self._error("[enforce fail at alloc_cpu.cpp:124] DefaultCPUAllocator: can't allocate memory")

    @property
    def failed(self) -> int:
        return sum(tokens > self.most for tokens in self.tried)


@pytest.mark.parametrize("error", [torch.OutOfMemoryError, RuntimeError, MemoryError])
@pytest.mark.parametrize("most", [1, 7, 40])
def test_where_memory_runs_out_less_is_computed_at_once_and_everything_ends_as_it_should(
    make_core: Callable[..., EngineCore], ids: list[int], most: int, error: type[Exception]
) -> None:
    expected, scarce = make_core(), Scarce(most, error)
    core = make_core(before=scarce)
    names = mixed_work(expected, ids)
    mixed_work(core, ids)
    wanted, got = finish(expected), finish(core)
    assert not got.failures
    for name in names:
        assert got.all_tokens(name) == wanted.all_tokens(name)
    assert 0 < scarce.failed < 20 + len(scarce.tried) // 32, "it was tried again and again"
    assert_idle(core)


def test_labels_too_are_scored_where_memory_runs_out(
    base: BaseModel, make_core: Callable[..., EngineCore], ids: list[int]
) -> None:
    labels = [base.continuation(text) for text in ("refund", "cancel the order", "x")]
    core = make_core(before=Scarce(10))
    score(core, "scarce", ids, register(core, random_prompt(1, 21)), labels)
    plain = make_core()
    score(plain, "plain", ids, register(plain, random_prompt(1, 21)), labels)
    assert finish(core).scores["scarce"] == pytest.approx(finish(plain).scores["plain"], abs=1e-4)


def test_a_label_that_memory_does_not_hold_fails_its_request_alone(
    make_core: Callable[..., EngineCore], oracle: Oracle, ids: list[int]
) -> None:
    core = make_core(before=Scarce(10))
    score(core, "long", ids, None, [[5], list(range(3, 30))])
    score(core, "short", ids, None, [[5], [6, 7]])
    submit(core, "beside", ids)
    collected = finish(core)
    assert set(collected.failures) == {"long"}
    assert len(collected.scores["short"]) == 2
    oracle.assert_equal(collected.tokens["beside"], ids, None)
    assert_idle(core)


def test_memory_that_does_not_hold_one_token_fails_whoever_meets_it_and_the_engine_goes_on(
    make_core: Callable[..., EngineCore], oracle: Oracle, ids: list[int]
) -> None:
    scarce = Scarce(0)
    core = make_core(before=scarce)
    submit(core, "a", ids)
    score(core, "b", ids, None, [[5, 6]])
    assert "can't allocate memory" in finish(core).failures["a"]
    assert_idle(core)
    scarce.most = 1000
    submit(core, "later", ids)
    oracle.assert_equal(finish(core).tokens["later"], ids, None)


def test_the_ceiling_halves_what_was_too_much_and_doubles_while_memory_holds() -> None:
    ceiling = Ceiling()
    assert ceiling.tokens > 2**30
    for tried, left in ((512, 256), (256, 128), (100, 50), (3, 1), (1, 1)):
        ceiling.lower(tried)
        assert ceiling.tokens == left
    grown = []
    for _ in range(256):
        ceiling.held()
        grown.append(ceiling.tokens)
    assert [grown[at] for at in (62, 63, 126, 127, 255)] == [1, 2, 2, 4, 16]


def test_a_ceiling_that_memory_has_outgrown_is_forgotten(make_core: Callable[..., EngineCore], ids: list[int]) -> None:
    scarce = Scarce(8)
    core = make_core(before=scarce)
    submit(core, "a", ids, max_tokens=2)
    finish(core)
    scarce.most = 10_000
    submit(core, "b", ids[:3], max_tokens=250, ignore_eos=True)
    finish(core)
    scarce.tried.clear()
    submit(core, "c", ids, max_tokens=1)
    finish(core)
    assert scarce.tried == [len(ids)]


def test_registered_prompts_cost_their_tensors_and_no_kv_until_they_are_used(
    base: BaseModel, make_core: Callable[..., EngineCore]
) -> None:
    core = make_core()
    known = [random_prompt(seed, 5) for seed in range(300)]
    half = known[0].to_float32().astype(np.float16)
    for prompt in known:
        register(core, prompt, pinned=False)
    register(core, SoftPrompt("F16", known[0].shape, half.tobytes()), pinned=False)
    assert (core.stats().kv_bytes, core.stats().prompts, core.has_work) == (0, 0, False)
    assert sum(tensor.nbytes for tensor in core._tensors.values()) == 300 * known[0].size_bytes + half.nbytes
    submit(core, "one", base.lay_out(RawText("hello")), known[7].digest)
    finish(core)
    assert core.stats().prompts == 1
    assert_idle(core)
