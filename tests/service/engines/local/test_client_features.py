"""What a request can ask of the local engine, as it arrives at the service."""

from __future__ import annotations

from contextlib import aclosing

import numpy as np
import pytest

from service.engines.base import (
    Delta,
    Finish,
    Prefix,
    Prompted,
    RawText,
    ResponseFormat,
    Sampling,
    ScoreRequest,
    SoftPromptReference,
)
from service.engines.errors import DeadlineExceeded, GenerationFailed
from service.engines.local.client import LocalEngine
from tests.service.engines.local.asking import LONG, Blocked, answer, events_of, first, request, until


async def test_every_choice_ends_before_the_one_finish_that_counts_them_all(engine: LocalEngine) -> None:
    sampling = Sampling(6, temperature=1.0, seed=3)
    *deltas, finish = await events_of(engine, request("a", n=3, sampling=sampling, logprobs=2))
    assert isinstance(finish, Finish)
    texts: dict[int, str] = {}
    reasons: dict[int, str] = {}
    for delta in deltas:
        assert isinstance(delta, Delta)
        assert delta.index not in reasons, "news after the end of a choice"
        assert [entry.token_id for entry in delta.logprobs] == list(delta.token_ids)
        assert all(len(entry.top) == 2 and entry.top[0].logprob >= entry.logprob for entry in delta.logprobs)
        texts[delta.index] = texts.get(delta.index, "") + delta.text
        if delta.finish_reason is not None:
            reasons[delta.index] = delta.finish_reason
    assert sorted(reasons) == [0, 1, 2]
    assert finish.reason == reasons[0]
    assert finish.usage.completion_tokens == sum(len(delta.token_ids) for delta in deltas)
    assert texts[0] == await answer(engine, request("b", sampling=sampling))
    assert len(set(texts.values())) > 1


async def test_a_log_probability_says_its_tokens_text_and_bytes(engine: LocalEngine) -> None:
    (delta, _) = await events_of(engine, request("a", sampling=Sampling(8), logprobs=1, stream=False))
    assert isinstance(delta, Delta)
    assert b"".join(entry.data for entry in delta.logprobs).decode() == delta.text
    assert all(entry.top[0].token_id == entry.token_id for entry in delta.logprobs)
    assert all(entry.top[0].text == entry.text for entry in delta.logprobs)


async def test_an_answer_that_is_not_streamed_comes_as_one_delta_a_choice(engine: LocalEngine) -> None:
    first_choice, second, finish = await events_of(engine, request("a", n=2, sampling=Sampling(8), stream=False))
    assert isinstance(first_choice, Delta)
    assert isinstance(second, Delta)
    assert isinstance(finish, Finish)
    assert (first_choice.index, second.index) == (0, 1)
    assert first_choice.text == second.text == await answer(engine, request("b", sampling=Sampling(8)))
    assert finish.usage.completion_tokens == len(first_choice.token_ids) * 2


@pytest.mark.parametrize("prompt_logprobs", [None, 0, 2])
@pytest.mark.parametrize("max_tokens", [0, 3])
async def test_an_echoed_prompt_comes_first_with_what_was_asked_of_it(
    engine: LocalEngine, prompt_logprobs: int | None, max_tokens: int
) -> None:
    asked = request("a", echo=True, prompt_logprobs=prompt_logprobs, sampling=Sampling(max_tokens), n=2)
    prompted, *deltas, finish = await events_of(engine, asked)
    assert isinstance(prompted, Prompted)
    assert list(prompted.token_ids) == engine.base.lay_out(RawText("The house stood"))
    assert prompted.text == "The house stood"
    if prompt_logprobs is None:
        assert (prompted.logprobs, prompted.pieces) == ((), ())
    else:
        assert len(prompted.pieces) == len(prompted.token_ids)
        nothing, *known = prompted.logprobs
        assert nothing is None
        for token_id, entry in zip(prompted.token_ids[1:], known, strict=True):
            assert entry is not None
            assert (entry.token_id, len(entry.top)) == (token_id, prompt_logprobs)
            assert entry.logprob < 0.0
    assert isinstance(finish, Finish)
    assert finish.usage.completion_tokens <= 2 * max_tokens
    assert {delta.index for delta in deltas if isinstance(delta, Delta) and delta.finish_reason} == {0, 1}


async def test_prompt_logprobs_without_echo_bring_the_prompt_too(engine: LocalEngine) -> None:
    prompted, *_ = await events_of(engine, request("a", prompt_logprobs=1, sampling=Sampling(2)))
    assert isinstance(prompted, Prompted)
    assert len(prompted.logprobs) == len(prompted.token_ids)


async def test_a_deadline_that_passes_is_an_error_of_its_own_and_frees_what_was_held(engine: LocalEngine) -> None:
    with pytest.raises(DeadlineExceeded, match="allow more time"):
        await answer(engine, request("a", sampling=LONG, deadline_s=1e-9))
    with pytest.raises(DeadlineExceeded):
        await engine.score(ScoreRequest("b", RawText("hello"), ("yes", "no"), deadline_s=1e-9))
    await until(lambda: engine.stats().running == 0)
    assert await answer(engine, request("c", sampling=Sampling(3), deadline_s=60.0))


async def test_a_deadline_holds_while_a_prompt_is_read(engine: LocalEngine) -> None:
    blocked = Blocked(24, engine)
    with pytest.raises(DeadlineExceeded, match="before the engine could begin"):
        await answer(engine, request("a", soft_prompt=blocked.reference, deadline_s=0.02))
    blocked.go.set()
    assert await answer(engine, request("a", soft_prompt=blocked.reference))


async def test_an_answer_keeps_the_form_it_was_asked_in(engine: LocalEngine) -> None:
    form = ResponseFormat("choice", choices=("refund", "cancel order"))
    for name, sampling in (("greedy", Sampling(20)), ("sampled", LONG)):
        assert await answer(engine, request(name, sampling=sampling, response_format=form)) in form.choices


async def test_leaving_a_stream_of_several_choices_frees_them_all(engine: LocalEngine) -> None:
    async with aclosing(await first(engine, request("a", n=6, sampling=LONG))):
        await until(lambda: engine.stats().running == 4 and engine.stats().waiting == 2)
    await until(lambda: engine.stats().running == 0 and engine.stats().waiting == 0)
    stats = engine.stats()
    assert stats.kv_bytes == stats.prompt_bytes


async def test_a_prefix_is_brought_pinned_and_answered_behind_like_a_soft_prompt(engine: LocalEngine) -> None:
    shape = (5, 2, 6, 9, 32)
    values = np.random.default_rng(4).normal(0.0, 1.0, shape).astype(np.float32)
    prefix = Prefix("F32", shape, values.tobytes())
    reference = SoftPromptReference.to(prefix, engine.base.fingerprint)
    await engine.warm(reference)
    with_prefix = await answer(engine, request("a", soft_prompt=reference, sampling=Sampling(12)))
    assert with_prefix != await answer(engine, request("b", sampling=Sampling(12)))
    assert with_prefix == await answer(engine, request("c", soft_prompt=reference, sampling=Sampling(12)))
    (*_, finish) = await events_of(engine, request("d", soft_prompt=reference, sampling=Sampling(1)))
    assert isinstance(finish, Finish)
    assert finish.usage.virtual_tokens == 9
    await engine.release(reference.digest)


async def test_a_prefix_of_another_shape_is_refused_with_both_shapes(engine: LocalEngine) -> None:
    prefix = Prefix("F32", (4, 2, 6, 3, 32), bytes(4 * 4 * 2 * 6 * 3 * 32))
    with pytest.raises(GenerationFailed, match=r"prefix has shape \[4, 2, 6, 3, 32\].*takes \[5, 2, 6, P, 32\]"):
        await engine.warm(SoftPromptReference.to(prefix, engine.base.fingerprint))
