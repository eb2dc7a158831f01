"""Several answers to one prompt, log-probabilities of prompts and answers, prompts without an answer."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from service.engines.base import RawText
from service.engines.base_model import BaseModel
from service.engines.local.engine import EngineCore
from service.engines.local.messages import Logprob
from tests.conftest import random_prompt
from tests.service.engines.local.driving import Collected, assert_idle, finish, register, step, submit
from tests.service.engines.local.oracle import Oracle

TEXT = "The house stood at the end of a long road, and"
SAMPLED = {"temperature": 1.0, "top_p": 0.95, "seed": 5}


@pytest.fixture
def ids(base: BaseModel) -> list[int]:
    return base.lay_out(RawText(TEXT))


def alone(core: EngineCore, ids: list[int], **options: object) -> list[list[int]]:
    submit(core, "alone", ids, **options)
    return finish(core).all_tokens("alone")


def test_seeded_answers_differ_from_each_other_and_are_the_same_in_any_company(
    make_core: Callable[..., EngineCore], ids: list[int]
) -> None:
    core = make_core(max_batch_tokens=16)
    expected = alone(core, ids, n=5, **SAMPLED)
    assert len({tuple(tokens) for tokens in expected}) == 5
    digest = register(core, random_prompt(2, 21))
    for number in range(4):
        submit(core, f"before {number}", ids[: 3 + number], digest, temperature=1.3, n=2)
    submit(core, "together", ids, n=5, **SAMPLED)
    submit(core, "fewer", ids, n=2, **SAMPLED)
    submit(core, "one", ids, **SAMPLED)
    collected = finish(core)
    assert collected.all_tokens("together") == expected
    assert collected.all_tokens("fewer") == expected[:2]
    assert collected.all_tokens("one") == expected[:1]
    assert_idle(core)


@pytest.mark.parametrize("length", [15, 16, 17])
def test_greedy_answers_are_equal_whether_or_not_their_prompt_fills_a_block(
    core: EngineCore, oracle: Oracle, ids: list[int], length: int
) -> None:
    prompt = random_prompt(1, 5)
    text = (ids * 3)[: length - 5]
    submit(core, "a", text, register(core, prompt), n=4)
    first, *others = finish(core).all_tokens("a")
    assert others == [first] * 3
    oracle.assert_equal(first, text, prompt)


def test_answers_that_find_no_room_to_fork_say_the_same(make_core: Callable[..., EngineCore], ids: list[int]) -> None:
    expected = alone(make_core(), ids, n=6, **SAMPLED)
    for tight in ({"max_sequences": 2}, {"blocks": 8}, {"blocks": 4, "max_batch_tokens": 5}):
        core = make_core(**tight)
        assert alone(core, ids, n=6, **SAMPLED) == expected
        assert_idle(core)


def test_an_answer_that_ends_with_its_first_token_leaves_the_others_alone(core: EngineCore, ids: list[int]) -> None:
    full = alone(core, ids, n=6, **SAMPLED)
    firsts = [tokens[0] for tokens in full]
    for ending in (firsts[0], firsts[2]):
        submit(core, "a", ids, n=6, stop_token_ids=[ending], **SAMPLED)
        got = finish(core).all_tokens("a")
        assert got == [tokens[: tokens.index(ending) + 1] if ending in tokens else tokens for tokens in full]
        assert_idle(core)


@pytest.mark.parametrize("steps", [0, 1, 2, 5])
def test_cancelling_takes_every_answer_back(make_core: Callable[..., EngineCore], ids: list[int], steps: int) -> None:
    core, collected = make_core(max_sequences=3), Collected()
    digest = register(core, random_prompt(1, 20), pinned=False)
    submit(core, "a", ids, digest, n=6)
    submit(core, "b", ids, digest, n=2)
    for _ in range(steps):
        step(core, collected)
    core.cancel("a")
    finish(core, collected)
    assert "a" not in collected.ended
    assert len(collected.all_tokens("b")) == 2
    assert_idle(core)


def test_what_is_not_streamed_comes_at_once(core: EngineCore, ids: list[int]) -> None:
    submit(core, "streamed", ids, n=2, logprobs=0)
    submit(core, "whole", ids, n=2, logprobs=0, stream=False)
    collected = finish(core)
    for index, whole in collected.choices["whole"].items():
        streamed = collected.choices["streamed"][index]
        assert (whole.news, whole.tokens, whole.text) == (1, streamed.tokens, streamed.text)
        assert [entry.token_id for entry in whole.logprobs] == whole.tokens
        assert streamed.news > 1


def expected_logprobs(oracle: Oracle, ids: list[int], prompt: object) -> torch.Tensor:
    """Float64 [T - 1, V]: what stands before each token but the first says of it."""
    rows = oracle.model(inputs_embeds=oracle.embeddings(ids, prompt)).logits[0, -len(ids) : -1]
    return rows.double().log_softmax(-1)


def assert_logprobs(got: list[Logprob | None], ids: list[int], expected: torch.Tensor) -> None:
    first, *others = got
    assert first is None
    assert [entry.token_id for entry in others] == ids[1:]
    for entry, row in zip(others, expected, strict=True):
        assert entry.logprob == pytest.approx(float(row[entry.token_id]), abs=1e-3)
        assert [value for _, value in entry.top] == pytest.approx(row.topk(2).values.tolist(), abs=1e-3)


@pytest.mark.parametrize("tight", [{}, {"max_batch_tokens": 5}, {"blocks": 9, "max_batch_tokens": 7}])
def test_a_prompts_logprobs_are_those_of_transformers_however_it_is_computed(
    make_core: Callable[..., EngineCore], oracle: Oracle, ids: list[int], tight: dict[str, int]
) -> None:
    core, collected = make_core(**tight), Collected()
    prompt, text = random_prompt(1, 20), ids * 3
    digest = register(core, prompt)
    submit(core, "long", ids * 4, max_tokens=60)  # decodes first, and takes the room of the others
    for _ in range(4):
        step(core, collected)
    submit(core, "with", text, digest, prompt_logprobs=2)
    submit(core, "without", text, prompt_logprobs=2, n=2)
    finish(core, collected)
    if "blocks" in tight:
        assert core.stats().preemptions
    assert_logprobs(collected.prompts["with"], text, expected_logprobs(oracle, text, prompt))
    assert_logprobs(collected.prompts["without"], text, expected_logprobs(oracle, text, None))
    oracle.assert_equal(collected.tokens["with"], text, prompt)


def test_a_prompt_may_be_measured_without_an_answer(core: EngineCore, oracle: Oracle, ids: list[int]) -> None:
    submit(core, "none", ids, max_tokens=0, prompt_logprobs=2, n=2)
    submit(core, "one", ids[:1], max_tokens=0, prompt_logprobs=2)
    submit(core, "echo", ids, max_tokens=0)
    collected = finish(core)
    assert_logprobs(collected.prompts["none"], ids, expected_logprobs(oracle, ids, None))
    assert collected.prompts["one"] == [None]
    assert "echo" not in collected.prompts
    for name, choices in (("none", 2), ("one", 1), ("echo", 1)):
        assert collected.all_tokens(name) == [[]] * choices
        assert collected.reasons[name] == "length"
    assert core.stats().tokens_generated == 0
    assert_idle(core)
