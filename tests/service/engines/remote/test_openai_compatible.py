from __future__ import annotations

import asyncio
import dataclasses
import math
from collections.abc import AsyncIterator
from contextlib import aclosing, asynccontextmanager
from pathlib import Path
from typing import Any, cast

import pytest

from prompt_store.prompts.task import Message
from service.engines.base import (
    Delta,
    Engine,
    Finish,
    GenerationRequest,
    Messages,
    RawText,
    ResponseFormat,
    Sampling,
    ScoreRequest,
    SoftPromptReference,
    Usage,
)
from service.engines.build import build_backends
from service.engines.collecting import collect
from service.engines.errors import (
    BackendError,
    DeadlineExceeded,
    EngineError,
    EngineUnavailable,
    InvalidRequest,
    ProviderDenied,
    ProviderMisbehaved,
    ProviderRateLimited,
    ProviderRefused,
    ProviderUnavailable,
    UnsupportedFeature,
)
from service.engines.remote.backend_settings import OpenAICompatibleSettings
from tests.conftest import random_prompt
from tests.providers import (
    DONE,
    HANG_UP,
    STREAM_END,
    UNTIL_LEFT,
    ScriptedProvider,
    error_answer,
    event,
    event_stream,
    json_answer,
    stream_head,
    text_answer,
)
from tests.providers import (
    chunk as sent_chunk,
)
from tests.service.engines.remote.answers import chat, choice, chunk, completion, piece, stream, token

KEY = "sk-very-secret"
CHAT = Messages((Message(role="user", content="where is my order"),))
ASKED = GenerationRequest("id", CHAT, remote_model="ft:m", sampling=Sampling(16), stream=False)
STREAMED = dataclasses.replace(ASKED, stream=True)
LABELS = ("get refund", "track order", "greeting")
SCORED = ScoreRequest("id", CHAT, LABELS, remote_model="ft:m")


@asynccontextmanager
async def engine_at(provider: ScriptedProvider, **settings: Any) -> AsyncIterator[Engine]:
    """A started engine that asks `provider` once a request."""
    given = {"flavour": "openai", "url": provider.url, "key_env": "KEY", "retries": {"attempts": 1}, **settings}
    backend = OpenAICompatibleSettings(kind="openai_compatible", **given)
    (engine,) = build_backends({"remote": backend}, {"KEY": KEY}).values()
    await engine.start()
    try:
        yield engine
    finally:
        await engine.close()


async def events_of(engine: Engine, request: GenerationRequest) -> list[Any]:
    return [event async for event in engine.generate(request)]


async def test_a_whole_answer_is_asked_for_and_read() -> None:
    async with (
        ScriptedProvider([json_answer(chat(), headers={"x-request-id": "req_1"})]) as provider,
        engine_at(provider) as engine,
    ):
        answers = await collect(engine.generate(ASKED))
        assert engine.stats().tokens_generated == 4
    assert answers.answers[0].text == "Hello there"
    assert (answers.usage, answers.provider_request_id) == (Usage(19, 4, 0, 16), "req_1")
    (asked,) = provider.requests
    assert (asked.path, asked.headers["authorization"]) == ("/v1/chat/completions", f"Bearer {KEY}")
    assert asked.document()["model"] == "ft:m"


async def test_deltas_come_as_the_provider_sends_them() -> None:
    go_on = asyncio.Event()
    first, *others = [event(document) for document in stream("Hel", "lo")[1:]]
    script = [stream_head({"x-request-id": "req_2"}), first, go_on, *others, DONE, STREAM_END]
    async with ScriptedProvider([script]) as provider, engine_at(provider) as engine:
        events = engine.generate(STREAMED)
        assert await anext(events) == Delta("Hel")
        go_on.set()
        rest = [event async for event in events]
    assert rest == [Delta("lo"), Delta("", finish_reason="stop"), Finish("stop", Usage(19, 4, 0, 16), "req_2")]
    assert provider.requests[0].document()["stream_options"] == {"include_usage": True}


async def test_raw_text_goes_to_completions() -> None:
    async with ScriptedProvider([json_answer(completion("upon a time"))]) as provider, engine_at(provider) as engine:
        request = dataclasses.replace(ASKED, prompt=RawText("Once"))
        assert (await collect(engine.generate(request))).answers[0].text == "upon a time"
    assert provider.requests[0].path == "/v1/completions"


async def test_the_default_model_answers_where_a_request_names_none() -> None:
    unnamed = dataclasses.replace(ASKED, remote_model=None)
    async with ScriptedProvider([json_answer(chat())]) as provider:
        async with engine_at(provider, default_model="gpt-small") as engine:
            await collect(engine.generate(unnamed))
            await collect(engine.generate(ASKED))
        async with engine_at(provider) as engine:
            with pytest.raises(UnsupportedFeature, match="no model of its own"):
                await events_of(engine, unnamed)
    assert [asked.document()["model"] for asked in provider.requests] == ["gpt-small", "ft:m"]


@pytest.mark.parametrize(
    ("version", "deployment", "path"),
    [
        (None, None, "/openai/v1/chat/completions"),
        ("2024-10-21", None, "/openai/deployments/ft:m/chat/completions?api-version=2024-10-21"),
        ("2024-10-21", "mine", "/openai/deployments/mine/chat/completions?api-version=2024-10-21"),
    ],
)
async def test_azure_is_asked_at_its_own_addresses(version: str | None, deployment: str | None, path: str) -> None:
    async with ScriptedProvider([json_answer(chat())]) as provider:
        azure: dict[str, Any] = {"flavour": "azure", "api_version": version, "deployment": deployment}
        async with engine_at(provider, **azure, url=provider.url.removesuffix("/v1")) as engine:
            await collect(engine.generate(ASKED))
    (asked,) = provider.requests
    assert (asked.path, asked.headers["api-key"]) == (path, KEY)
    assert "authorization" not in asked.headers


WRONG: dict[str, tuple[Any, type[EngineError]]] = {
    "an error": (error_answer(500), ProviderUnavailable),
    "a limit": (error_answer(429, headers={"retry-after": "7"}), ProviderRateLimited),
    "a refusal": (error_answer(400, "no such model", parameter="model"), ProviderRefused),
    "no right": (error_answer(401, f"wrong key {KEY}"), ProviderDenied),
    "a page": (text_answer("<html>hello</html>"), ProviderMisbehaved),
    "no JSON": (text_answer('{"choices": [', content_type="application/json"), ProviderMisbehaved),
    "an error as an answer": (json_answer({"error": {"message": "overloaded"}}), ProviderUnavailable),
    "no choices": (json_answer({"id": "x"}), ProviderMisbehaved),
    "no content": (json_answer(chat(choice(None))), ProviderMisbehaved),
    "another type": (json_answer(chat(choice(content=cast(Any, 3)))), ProviderMisbehaved),
    "nothing": ([HANG_UP], ProviderUnavailable),
}
WRONG_STREAMS: dict[str, tuple[Any, type[EngineError]]] = {
    "no event": ([stream_head(), STREAM_END], ProviderMisbehaved),
    "no choice": (event_stream([chunk()]), ProviderMisbehaved),
    "the marker alone": ([stream_head(), DONE, STREAM_END], ProviderMisbehaved),
    "another type": (event_stream([chunk(piece(content=3))]), ProviderMisbehaved),
    "no JSON": ([stream_head(), sent_chunk(b"data: {nothing\n\n"), DONE, STREAM_END], ProviderMisbehaved),
    "an error": (event_stream([{"error": {"message": "overloaded", "code": 503}}]), ProviderUnavailable),
    "a role and no more": ([stream_head(), event(stream()[0]), HANG_UP], ProviderUnavailable),
    "a whole answer": (json_answer(chat()), ProviderMisbehaved),
}


@pytest.mark.parametrize("case", WRONG)
@pytest.mark.parametrize("streamed", [False, True])
async def test_what_is_wrong_is_raised_before_the_first_event(case: str, streamed: bool) -> None:
    answer, expected = WRONG[case]
    if streamed and case == "an error as an answer":
        expected = ProviderMisbehaved  # it is no stream
    await _raised_first(answer, STREAMED if streamed else ASKED, expected)


@pytest.mark.parametrize("case", WRONG_STREAMS)
async def test_a_stream_that_is_wrong_from_the_start_is_raised_before_the_first_event(case: str) -> None:
    answer, expected = WRONG_STREAMS[case]
    await _raised_first(answer, STREAMED, expected)


async def _raised_first(answer: Any, request: GenerationRequest, expected: type[EngineError]) -> None:
    async with ScriptedProvider([answer]) as provider, engine_at(provider) as engine:
        with pytest.raises(expected) as raised:
            await anext(engine.generate(request))
        assert KEY not in str(raised.value)
        assert engine.stats().running == 0


async def test_a_stream_that_breaks_off_ends_in_an_error_and_never_in_a_finish() -> None:
    for script in (
        [stream_head(), event(stream("Hel")[1]), HANG_UP],
        [stream_head(), event(stream("Hel")[1]), DONE, STREAM_END],
        [stream_head(), event(stream("Hel")[1]), event({"error": {"message": "lost it"}}), DONE, STREAM_END],
    ):
        async with ScriptedProvider([script]) as provider, engine_at(provider) as engine:
            events = engine.generate(STREAMED)
            assert await anext(events) == Delta("Hel")
            with pytest.raises((ProviderUnavailable, ProviderMisbehaved)):
                await anext(events)


@pytest.mark.parametrize("request_", [ASKED, STREAMED])
@pytest.mark.parametrize("script", [[UNTIL_LEFT], [stream_head(), UNTIL_LEFT]])
async def test_a_deadline_bounds_a_provider_that_says_nothing(request_: GenerationRequest, script: Any) -> None:
    async with ScriptedProvider([script]) as provider, engine_at(provider) as engine:
        with pytest.raises((DeadlineExceeded, ProviderMisbehaved)) as raised:
            await events_of(engine, dataclasses.replace(request_, deadline_s=0.05))
        # A stream where none was asked for is refused by its head.
        assert isinstance(raised.value, DeadlineExceeded) or (not request_.stream and len(script) > 1)


async def test_a_deadline_bounds_a_stream_that_stops() -> None:
    script = [stream_head(), event(stream("Hel")[1]), UNTIL_LEFT]
    async with ScriptedProvider([script]) as provider, engine_at(provider) as engine:
        events = engine.generate(dataclasses.replace(STREAMED, deadline_s=0.2))
        assert await anext(events) == Delta("Hel")
        with pytest.raises(DeadlineExceeded):
            await anext(events)


async def test_who_leaves_a_stream_hangs_up_on_the_provider() -> None:
    script = [stream_head(), event(stream("Hel")[1]), UNTIL_LEFT]
    async with ScriptedProvider([script]) as provider, engine_at(provider) as engine:
        async with aclosing(cast(Any, engine.generate(STREAMED))) as events:
            await anext(events)
            assert engine.stats().running == 1
        await provider.requests[0].left.wait()
        assert engine.stats().running == 0


async def test_a_closing_engine_lets_running_requests_finish_and_takes_no_more() -> None:
    go_on = asyncio.Event()
    script = [stream_head(), event(stream("Hel")[1]), go_on, *map(event, stream("lo")[1:]), DONE, STREAM_END]
    async with ScriptedProvider([script]) as provider, engine_at(provider) as engine:
        events = engine.generate(STREAMED)
        await anext(events)
        closing = asyncio.create_task(engine.close(grace_s=30.0))
        await asyncio.sleep(0)
        with pytest.raises(EngineUnavailable, match="is stopping"):
            await events_of(engine, ASKED)
        go_on.set()
        assert isinstance([event async for event in events][-1], Finish)
        await closing


async def test_a_closed_engine_hangs_up_on_what_has_not_finished_within_its_grace() -> None:
    script = [stream_head(), event(stream("Hel")[1]), UNTIL_LEFT]
    async with ScriptedProvider([script]) as provider, engine_at(provider) as engine:
        events = engine.generate(STREAMED)
        await anext(events)
        await engine.close(grace_s=0.0)
        with pytest.raises(EngineError):
            await anext(events)
        await provider.requests[0].left.wait()


async def test_a_choice_comes_out_of_its_json_and_in_one_piece() -> None:
    form = ResponseFormat("choice", choices=LABELS)
    async with (
        ScriptedProvider([json_answer(chat(choice('{"choice": "track order"}')))]) as provider,
        engine_at(provider) as engine,
    ):
        first, _ = await events_of(engine, dataclasses.replace(STREAMED, response_format=form))
    assert first == Delta("track order", finish_reason="stop")
    assert "stream" not in provider.requests[0].document()


async def test_what_a_backend_does_not_do_is_refused_and_nothing_is_asked() -> None:
    reference = SoftPromptReference.to(random_prompt(0, 4), "fingerprint")
    refused = [
        (dataclasses.replace(ASKED, soft_prompt=reference), "takes no soft prompts"),
        (dataclasses.replace(ASKED, echo=True), "echo is not served"),
        (dataclasses.replace(ASKED, prompt_logprobs=1), "prompt_logprobs is not served"),
        (dataclasses.replace(ASKED, logprobs=1), "logprobs is not served"),
    ]
    async with (
        ScriptedProvider([json_answer(chat())]) as provider,
        engine_at(provider, features=["n"]) as engine,
    ):
        for request, said in refused:
            with pytest.raises(UnsupportedFeature, match=said):
                await events_of(engine, request)
        with pytest.raises(UnsupportedFeature, match="labels are not scored"):
            await engine.score(SCORED)
        with pytest.raises(InvalidRequest, match="n is 0"):
            await events_of(engine, dataclasses.replace(ASKED, n=0))
    assert provider.requests == []


async def test_a_certificate_file_that_is_not_there_is_said_when_the_engine_starts() -> None:
    backend = OpenAICompatibleSettings(kind="openai_compatible", flavour="openai", ca_file=Path("nowhere.pem"))
    (engine,) = build_backends({"remote": backend}, {}).values()
    with pytest.raises(BackendError, match=r"nowhere\.pem"):
        await engine.start()


# Scores


def labelled(text: str, *tokens: Any) -> Any:
    return json_answer(chat(choice(text, tokens=list(tokens) or None)), headers={"x-request-id": "req_3"})


async def test_labels_are_scored_by_what_stands_beside_a_constrained_answer() -> None:
    best, second, third = math.log(0.7), math.log(0.2), math.log(0.1)
    tokens = [
        token('{"choice":"', 0.0),
        token("track", best, track=best, get=second, greeting=third),
        token(" order", 0.0),
        token('"}', 0.0),
    ]
    async with (
        ScriptedProvider([labelled('{"choice":"track order"}', *tokens)]) as provider,
        engine_at(provider) as engine,
    ):
        scores = await engine.score(SCORED)
    assert [math.exp(score) for score in scores.log_probabilities] == pytest.approx([0.2, 0.7, 0.1])
    assert (scores.choice_only, scores.provider_request_id, scores.usage) == (False, "req_3", Usage(19, 4, 0, 16))
    body = provider.requests[0].document()
    assert body["response_format"]["json_schema"]["strict"] is True
    assert (body["logprobs"], body["top_logprobs"], body["temperature"]) == (True, 20, 0.0)


async def test_vllm_is_asked_for_a_plain_choice() -> None:
    tokens = [token("get", math.log(0.75), get=math.log(0.75), track=math.log(0.25)), token(" refund", 0.0)]
    async with (
        ScriptedProvider([labelled("get refund", *tokens)]) as provider,
        engine_at(provider, flavour="vllm") as engine,
    ):
        scores = await engine.score(dataclasses.replace(SCORED, continuations=LABELS[:2]))
    assert [math.exp(score) for score in scores.log_probabilities] == pytest.approx([0.75, 0.25])
    assert provider.requests[0].document()["structured_outputs"] == {"choice": list(LABELS[:2])}


@pytest.mark.parametrize("said", ["Track Order", "  track order\n", '{"choice": "track order"}'])
async def test_without_log_probabilities_only_the_choice_is_known(said: str) -> None:
    async with ScriptedProvider([labelled(said)]) as provider, engine_at(provider, flavour="mistral") as engine:
        scores = await engine.score(SCORED)
    assert (scores.log_probabilities, scores.choice_only) == ((-math.inf, 0.0, -math.inf), True)
    assert "logprobs" not in provider.requests[0].document()


async def test_tokens_that_do_not_spell_the_answer_leave_the_choice_alone() -> None:
    async with (
        ScriptedProvider([labelled('{"choice":"greeting"}', token("hm", -0.5))]) as provider,
        engine_at(provider) as engine,
    ):
        assert (await engine.score(SCORED)).choice_only


async def test_an_answer_that_is_no_label_is_asked_for_once_more() -> None:
    async with (
        ScriptedProvider([labelled("a refund, I think"), labelled("get refund")]) as provider,
        engine_at(provider, features=["scores"]) as engine,
    ):
        scores = await engine.score(SCORED)
    assert scores.log_probabilities == (0.0, -math.inf, -math.inf)
    assert scores.usage == Usage(38, 8, 0, 32)
    first, second = [asked.document()["messages"] for asked in provider.requests]
    assert second[:-1] == [*first, {"role": "assistant", "content": "a refund, I think"}]
    assert all(label in second[-1]["content"] for label in LABELS)


async def test_a_second_answer_that_is_no_label_is_the_providers_fault() -> None:
    async with ScriptedProvider([labelled("perhaps")]) as provider, engine_at(provider) as engine:
        with pytest.raises(ProviderMisbehaved, match="asked twice for one of the task's labels") as raised:
            await engine.score(SCORED)
    assert raised.value.request_id == "req_3"
    assert len(provider.requests) == 2


async def test_a_deadline_bounds_both_attempts_at_a_label() -> None:
    async with ScriptedProvider([labelled("perhaps"), [UNTIL_LEFT]]) as provider, engine_at(provider) as engine:
        with pytest.raises(DeadlineExceeded):
            await engine.score(dataclasses.replace(SCORED, deadline_s=0.2))
        assert engine.stats().running == 0


async def test_there_is_nothing_to_score_without_labels() -> None:
    async with ScriptedProvider([labelled("x")]) as provider, engine_at(provider) as engine:
        with pytest.raises(InvalidRequest, match="nothing to score"):
            await engine.score(dataclasses.replace(SCORED, continuations=()))
