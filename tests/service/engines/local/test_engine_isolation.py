"""Whatever goes wrong for one request, the others get the answer that they would have had."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from service.engines.base import RawText
from service.engines.base_model import BaseModel
from service.engines.local.engine import EngineCore
from service.engines.local.messages import Grammar
from service.engines.local.options import EngineOptions
from service.engines.local.scheduler import Batch
from tests.conftest import random_prompt
from tests.service.engines.local.bases import grouped_model
from tests.service.engines.local.driving import Collected, assert_idle, finish, register, score, step, submit
from tests.service.engines.local.oracle import Oracle
from tests.service.engines.local.tiny_models import save_base

TEXT = "I want my money back for the broken kettle"
UNKNOWN = 4096  # a token id that the vocabulary has not


@pytest.fixture
def ids(base: BaseModel) -> list[int]:
    return base.lay_out(RawText(TEXT))


class Broken:
    """Passes that raise whenever one of these requests or prompts is in them, but not before `after` passes."""

    def __init__(self, *names: str, after: int = 0) -> None:
        self._names = names
        self._left = after

    def __call__(self, batch: Batch) -> None:
        if self._left:
            self._left -= 1
            return
        for chunk in batch.chunks:
            if chunk.sequence.id in self._names:
                raise ArithmeticError(f"{chunk.sequence.id} is broken")


@pytest.mark.parametrize("after", [0, 1, 4])
def test_a_request_that_makes_the_forward_pass_raise_fails_alone(
    make_core: Callable[..., EngineCore], oracle: Oracle, ids: list[int], after: int
) -> None:
    core = make_core(before=Broken("bad", "worse", after=after))
    prompt = random_prompt(1, 21)
    digest = register(core, prompt, pinned=False)
    for name in ("first", "bad", "second", "worse", "third"):
        submit(core, name, ids, digest, n=2)
    collected = finish(core)
    assert set(collected.failures) == {"bad", "worse"}
    assert collected.failures["bad"] == "the forward pass failed: bad is broken"
    for name in ("first", "second", "third"):
        for tokens in collected.all_tokens(name):
            oracle.assert_equal(tokens, ids, prompt)
    assert_idle(core)


def test_a_pass_that_fails_once_loses_nobody_and_keeps_what_its_copies_brought(
    make_core: Callable[..., EngineCore], oracle: Oracle, ids: list[int]
) -> None:
    """Each half of a failed batch is computed after the copies of the whole, once: the second half's must not undo
    what the first half wrote into blocks that were copied."""

    def at_most_one_from_the_second_pass_on(batch: Batch) -> None:
        passes.append(len(batch.chunks))
        if len(batch.chunks) > 1:
            raise ArithmeticError("too many at once")

    passes: list[int] = []
    core = make_core(before=at_most_one_from_the_second_pass_on)
    prompts = [random_prompt(seed, 5 + 14 * seed) for seed in range(4)]
    for index, prompt in enumerate(prompts):
        submit(core, str(index), ids[: 4 + index], register(core, prompt), n=3, temperature=1.0, seed=index)
        submit(core, f"greedy {index}", ids[: 4 + index], register(core, prompt))
    collected = finish(core)
    plain = make_core()
    for index, prompt in enumerate(prompts):
        submit(plain, str(index), ids[: 4 + index], register(plain, prompt), n=3, temperature=1.0, seed=index)
    expected = finish(plain)
    assert not collected.failures
    assert max(passes) > 1
    for index, prompt in enumerate(prompts):
        assert collected.all_tokens(str(index)) == expected.all_tokens(str(index))
        oracle.assert_equal(collected.tokens[f"greedy {index}"], ids[: 4 + index], prompt)


def test_a_token_id_that_is_none_fails_its_request(core: EngineCore, oracle: Oracle, ids: list[int]) -> None:
    submit(core, "good", ids)
    submit(core, "bad", [5, UNKNOWN, 6])
    submit(core, "measured", [5, UNKNOWN], prompt_logprobs=0)
    collected = finish(core)
    assert set(collected.failures) == {"bad", "measured"}
    assert "forward pass failed" in collected.failures["bad"]
    oracle.assert_equal(collected.tokens["good"], ids, None)


@pytest.mark.parametrize("label", [[UNKNOWN], [5, UNKNOWN], [5, UNKNOWN, 6], [-5000, 6]])
def test_a_label_that_cannot_be_scored_fails_its_request_alone(
    core: EngineCore, oracle: Oracle, ids: list[int], label: list[int]
) -> None:
    labels = [[5], [6, 7], [8, 9, 10]]
    score(core, "before", ids, None, labels)
    score(core, "bad", ids, None, [[5, 6], label, [7, 8]])
    score(core, "after", ids, None, labels)
    submit(core, "beside", ids)
    collected = finish(core)
    assert set(collected.failures) == {"bad"}
    score(core, "alone", ids, None, labels)
    alone = finish(core).scores["alone"]
    assert collected.scores["before"] == pytest.approx(alone, abs=1e-4)
    assert collected.scores["after"] == pytest.approx(alone, abs=1e-4)
    oracle.assert_equal(collected.tokens["beside"], ids, None)
    assert_idle(core)


def test_a_grammar_that_cannot_be_followed_is_the_requests_own_fault(
    core: EngineCore, oracle: Oracle, ids: list[int]
) -> None:
    submit(core, "bad", ids, grammar=Grammar("regex", "("), n=2)
    submit(core, "good", ids)
    collected = finish(core)
    assert collected.kinds == {"bad": "invalid"}
    oracle.assert_equal(collected.tokens["good"], ids, None)
    assert_idle(core)


def test_a_pass_that_fails_among_labels_is_the_fault_of_one_request(
    make_core: Callable[..., EngineCore], ids: list[int]
) -> None:
    labels = [[5], [6, 7], [8, 9, 10], [11] * 20]
    core = make_core(before=Broken("bad", after=1))
    for name in ("before", "bad", "after"):
        score(core, name, ids, None, labels)
    collected = finish(core)
    assert set(collected.failures) == {"bad"}
    assert collected.scores["before"] == collected.scores["after"]
    assert_idle(core)


@pytest.mark.parametrize("pinned", [True, False])
def test_a_prompt_that_cannot_be_computed_fails_those_who_stand_behind_it(
    make_core: Callable[..., EngineCore], oracle: Oracle, ids: list[int], pinned: bool
) -> None:
    good, bad = random_prompt(1, 30), random_prompt(2, 30)
    core = make_core(before=Broken(bad.digest), max_batch_tokens=40)
    digests = [register(core, bad, pinned=pinned), register(core, good, pinned=True)]
    for name in "ab":
        submit(core, f"bad {name}", ids, digests[0])
        submit(core, f"good {name}", ids, digests[1])
    submit(core, "none", ids)
    collected = finish(core)
    assert set(collected.failures) == {"bad a", "bad b"}
    assert "the soft prompt could not be computed" in collected.failures["bad a"]
    for name, prompt in (("good a", good), ("good b", good), ("none", None)):
        oracle.assert_equal(collected.tokens[name], ids, prompt)
    assert (collected.registered.get(bad.digest) is not None) == pinned
    assert collected.registered[good.digest] is None
    assert_idle(core)
    submit(core, "again", ids, digests[0])
    said = "is not loaded" if pinned else "could not be computed"  # who was told of the failure brings it anew
    assert said in finish(core).failures["again"]


def test_a_prompt_whose_computation_failed_once_may_be_brought_again(
    make_core: Callable[..., EngineCore], oracle: Oracle, ids: list[int]
) -> None:
    prompt, failures = random_prompt(3, 20), [ArithmeticError("once")]

    def once(batch: Batch) -> None:
        if failures:
            raise failures.pop()

    core = make_core(before=once)
    register(core, prompt)
    assert "once" in str(finish(core).registered[prompt.digest])
    digest = register(core, prompt)
    submit(core, "a", ids, digest)
    collected = finish(core)
    assert collected.registered == {digest: None}
    oracle.assert_equal(collected.tokens["a"], ids, prompt)


def test_a_request_whose_arithmetic_breaks_fails_alone(tmp_path: Path) -> None:
    model = grouped_model()
    model.get_input_embeddings().weight.data[3000] = float("nan")
    base = save_base(tmp_path / "broken", model)
    core, oracle = EngineCore.load(base, EngineOptions()), Oracle.load(base)
    ids = base.lay_out(RawText(TEXT))
    submit(core, "good", ids)
    submit(core, "broken", [*ids, 3000, 5])
    score(core, "scored", [*ids, 3000], None, [[5], [6, 7]])
    score(core, "half scored", ids, None, [[5], [3000, 7]])
    submit(core, "other", ids[:5])
    collected = finish(core)
    for name in ("broken", "scored", "half scored"):
        assert "not finite" in collected.failures[name]
    oracle.assert_equal(collected.tokens["good"], ids, None)
    oracle.assert_equal(collected.tokens["other"], ids[:5], None)
    # These take the slots of broken ones. Beside longer rows their attention reads, masked, what was left there.
    later = {"a": ids[:3], "b": ids * 4, "c": ids[:2], "d": ids[:4], "e": ids}
    for name, tokens in later.items():
        submit(core, name, tokens)
    collected = finish(core)
    assert not collected.failures
    for name, tokens in later.items():
        oracle.assert_equal(collected.tokens[name], tokens, None)


def test_a_cancelled_prefill_leaves_nothing_in_its_slot(tmp_path: Path) -> None:
    model = grouped_model()
    model.get_input_embeddings().weight.data[3000] = float("nan")
    base = save_base(tmp_path / "broken", model)
    core, oracle = EngineCore.load(base, EngineOptions(max_batch_tokens=4)), Oracle.load(base)
    ids = base.lay_out(RawText(TEXT))
    submit(core, "broken", [3000] * 20)
    step(core, Collected())
    core.cancel("broken")
    submit(core, "short", ids[:2])
    submit(core, "long", ids * 3)
    collected = finish(core)
    oracle.assert_equal(collected.tokens["short"], ids[:2], None)
    oracle.assert_equal(collected.tokens["long"], ids * 3, None)
