"""The engine over vLLM, against a scripted one: what is sent, what is made of answers, what is refused."""

from __future__ import annotations

import asyncio
import functools
import threading
from contextlib import aclosing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import TypeAdapter

from prompt_store.prompts.prefix import Prefix
from prompt_store.prompts.soft_prompt import SoftPrompt
from prompt_store.prompts.task import Message
from service.engines.base import (
    Delta,
    Finish,
    Messages,
    Prompted,
    RawText,
    ResponseFormat,
    Sampling,
    ScoreRequest,
    SoftPromptReference,
    TokenIds,
    Usage,
)
from service.engines.base_model import BaseModel
from service.engines.build import build_backends, build_vllm
from service.engines.collecting import collect
from service.engines.errors import (
    BackendError,
    DeadlineExceeded,
    EngineError,
    EngineUnavailable,
    GenerationFailed,
    InvalidRequest,
    PromptTooLong,
    ProviderMisbehaved,
    ProviderRefused,
    ProviderUnavailable,
    UnsupportedFeature,
    WrongBase,
)
from service.engines.remote.backend_settings import BackendSettings
from service.engines.remote.options import TransportOptions
from service.engines.remote.vllm import VllmEngine
from service.engines.remote.vllm_options import VllmOptions
from tests.conftest import random_prompt
from tests.providers import (
    UNTIL_LEFT,
    Answer,
    Asked,
    ScriptedProvider,
    error_answer,
    event,
    json_answer,
    stream_head,
    whole,
)
from tests.service.engines.local.oracle import Oracle
from tests.service.engines.remote.vllm_answers import (
    answered,
    choice,
    embedded,
    next_tokens,
    request,
    served,
    shown,
    streamed,
)

PLAIN = answered(choice("ab", [70, 71]))


@pytest.fixture(scope="module")
def oracle(base: BaseModel) -> Oracle:
    return Oracle.load(base)


def reference(base: BaseModel, seed: int = 1, length: int = 5) -> SoftPromptReference:
    return SoftPromptReference.to(random_prompt(seed, length), base.fingerprint)


async def test_a_soft_prompt_stands_before_the_embeddings_of_every_token(base: BaseModel, oracle: Oracle) -> None:
    prompt = random_prompt(1, 5)
    messages = Messages((Message(role="user", content="Hello, where is it?"),))
    async with served(base, [PLAIN]) as (engine, vllm):
        for asked in (messages, RawText("Hello"), TokenIds((5, 6, 7))):
            wanted = replace(request(), prompt=asked, soft_prompt=reference(base))
            await collect(engine.generate(wanted))
            (sent,) = embedded(vllm.requests[-1].document())
            tokens = oracle.model.get_input_embeddings()(torch.tensor(base.lay_out(asked)))
            assert torch.equal(sent, torch.cat([torch.from_numpy(prompt.to_float32()), tokens]))
            assert "prompt" not in vllm.requests[-1].document()


async def test_a_prompt_without_a_soft_prompt_is_sent_as_token_ids(base: BaseModel) -> None:
    async with served(base, [PLAIN]) as (engine, vllm):
        await collect(engine.generate(request("Hello")))
    document = vllm.requests[0].document()
    assert document["prompt"] == [base.lay_out(RawText("Hello"))]
    assert "prompt_embeds" not in document
    assert "model" not in document


async def test_everything_that_vllm_would_take_from_the_base_is_said(base: BaseModel) -> None:
    async with served(base, [PLAIN], model="demo") as (engine, vllm):
        await collect(engine.generate(request()))
    document = vllm.requests[0].document()
    assert document.pop("prompt")
    assert document == {
        "model": "demo", "max_tokens": 128, "temperature": 0.0, "top_p": 1.0, "top_k": 0, "min_p": 0.0,
        "frequency_penalty": 0.0, "presence_penalty": 0.0, "repetition_penalty": 1.0, "min_tokens": 0,
        "ignore_eos": False, "stop": [], "stop_token_ids": sorted(base.eos_token_ids), "n": 1, "stream": False,
        "return_token_ids": True,
    }  # fmt: skip


async def test_every_parameter_reaches_vllm_under_its_own_name(base: BaseModel) -> None:
    sampling = Sampling(
        max_tokens=2**31 - 1, temperature=0.7, top_p=0.9, top_k=11, seed=-3, stop=("x",), min_p=0.1, min_tokens=2,
        ignore_eos=True, stop_token_ids=(9,), frequency_penalty=0.5, presence_penalty=-0.5, repetition_penalty=1.2,
        logit_bias={7: -5.0},
    )  # fmt: skip
    async with served(base, [answered(*(choice("", [1], index=i) for i in range(3)))]) as (engine, vllm):
        asked = request("Hello", sampling=sampling, n=3)
        assert len((await collect(engine.generate(asked), 3)).answers) == 3
    document = vllm.requests[0].document()
    room = base.context_length - len(base.lay_out(RawText("Hello")))
    expected = {
        "max_tokens": room, "temperature": 0.7, "top_p": 0.9, "top_k": 11, "seed": -3, "stop": ["x"], "min_p": 0.1,
        "min_tokens": 2, "ignore_eos": True, "stop_token_ids": [9], "frequency_penalty": 0.5,
        "presence_penalty": -0.5, "repetition_penalty": 1.2, "logit_bias": {"7": -5.0}, "n": 3,
    }  # fmt: skip
    assert {name: document[name] for name in expected} == expected


@pytest.mark.parametrize(
    ("form", "sent"),
    [
        (ResponseFormat("json_object"), {"json": {"type": "object"}}),
        (ResponseFormat("json_schema", {"type": "array"}), {"json": {"type": "array"}}),
        (
            ResponseFormat("json_schema", {"type": "array"}, lenient=True),
            {"json": {"type": "array", "x-guidance": {"lenient": True, "coerce_one_of": True}}},
        ),
        (ResponseFormat("regex", regex="a+"), {"regex": "a+"}),
        (ResponseFormat("choice", choices=("a", "b")), {"choice": ["a", "b"]}),
    ],
)
async def test_response_formats_are_structured_outputs(base: BaseModel, form: ResponseFormat, sent: object) -> None:
    async with served(base, [PLAIN]) as (engine, vllm):
        await collect(engine.generate(request(response_format=form)))
    assert vllm.requests[0].document()["structured_outputs"] == sent


async def test_usage_counts_our_tokens_and_not_the_rows_that_vllm_counted(base: BaseModel) -> None:
    async with served(base, [PLAIN]) as (engine, _):
        answers = await collect(engine.generate(request("Hello", soft_prompt=reference(base))))
        assert engine.stats().tokens_generated == 2
    assert answers.usage == Usage(len(base.lay_out(RawText("Hello"))), 2, 5)


async def test_a_stream_brings_each_chunk_as_a_delta(base: BaseModel) -> None:
    chunks = (choice("", [3], None), choice("ab", [4, 5], None), choice("c", [6], "stop"))
    async with served(base, [streamed(*chunks)]) as (engine, vllm):
        events = [event async for event in engine.generate(request(stream=True))]
        assert vllm.requests[0].document()["stream"] is True
    assert events[:3] == [Delta("", (3,)), Delta("ab", (4, 5)), Delta("c", (6,), finish_reason="stop")]
    assert isinstance(events[3], Finish)
    assert (events[3].reason, events[3].usage.completion_tokens) == ("stop", 4)


@pytest.mark.parametrize("stream", [False, True])
async def test_greedy_choices_are_one_answer_repeated(base: BaseModel, stream: bool) -> None:
    script = streamed(choice("a", [3], None), choice("b", [4], "stop")) if stream else answered(choice("ab", [3, 4]))
    async with served(base, [script]) as (engine, vllm):
        answers = await collect(engine.generate(request(n=3, stream=stream)), 3)
        assert vllm.requests[0].document()["n"] == 1
    assert {(one.text, one.token_ids) for one in answers.answers} == {("ab", (3, 4))}
    assert answers.usage.completion_tokens == 6


async def test_echo_is_answered_here_and_comes_first(base: BaseModel) -> None:
    async with served(base, [PLAIN]) as (engine, vllm):
        events = [event async for event in engine.generate(request("Hello", echo=True))]
        assert events[0] == Prompted(tuple(base.lay_out(RawText("Hello"))), "Hello")
        nothing = request("Hello", echo=True, sampling=Sampling(max_tokens=0), n=2)
        events = [event async for event in engine.generate(nothing)]
        assert len(vllm.requests) == 1
    assert [type(event) for event in events] == [Prompted, Delta, Delta, Finish]


async def test_logprobs_name_tokens_and_only_as_many_alternatives_as_asked(base: BaseModel) -> None:
    tops = {"token_id:70": -4.0, "token_id:71": -0.5, "token_id:300": -1.5}  # the chosen token first, though the last
    given = {"tokens": ["token_id:70"], "token_logprobs": [-4.0], "top_logprobs": [tops], "text_offset": [0]}
    async with served(base, [answered(choice("a", [70], logprobs=given))]) as (engine, vllm):
        answers = await collect(engine.generate(request(logprobs=2)))
        document = vllm.requests[0].document()
    assert (document["logprobs"], document["return_tokens_as_token_ids"]) == (2, True)
    (entry,) = answers.answers[0].logprobs
    assert (entry.token_id, entry.logprob, entry.text) == (70, -4.0, base.tokenizer.decode([70]))
    assert [(top.token_id, top.logprob) for top in entry.top] == [(71, -0.5), (300, -1.5)]
    assert all(top.data.decode() == top.text for top in entry.top)


@pytest.mark.parametrize(
    ("changes", "error", "said"),
    [
        ({"prompt_logprobs": 1}, UnsupportedFeature, "prompt_logprobs is not served"),
        ({"tools": ({"type": "function"},)}, UnsupportedFeature, "tools is not served"),
        ({"remote_model": "ft:gpt:a"}, UnsupportedFeature, "model is not served"),
        ({"n": 0}, InvalidRequest, "n is 0"),
        ({"sampling": Sampling(logit_bias={4096: 1.0})}, InvalidRequest, "token id 4096, which is outside"),
        ({"prompt": TokenIds((1,) * 1024)}, PromptTooLong, "has 1024 tokens but at most 1023 fit"),
        ({"prompt": TokenIds((4096,))}, InvalidRequest, "token id 4096 is outside"),
        ({"prompt": RawText("")}, InvalidRequest, "the prompt is empty"),
    ],
)
async def test_what_cannot_be_served_is_refused_before_anything_is_sent(
    base: BaseModel, changes: dict[str, Any], error: type[EngineError], said: str
) -> None:
    async with served(base, [PLAIN]) as (engine, vllm):
        with pytest.raises(error, match=said):
            await collect(engine.generate(replace(request(), **changes)))
        assert not vllm.requests


async def test_a_shorter_context_of_vllms_is_held_to(base: BaseModel) -> None:
    async with served(base, [PLAIN], context_length=64) as (engine, vllm):
        assert engine.capabilities().context_length == 64
        await collect(engine.generate(replace(request(), prompt=TokenIds((5,) * 60))))
        assert vllm.requests[0].document()["max_tokens"] == 4
        with pytest.raises(PromptTooLong):
            await collect(engine.generate(replace(request(soft_prompt=reference(base)), prompt=TokenIds((5,) * 60))))


async def test_soft_prompts_that_do_not_fit_are_refused(base: BaseModel) -> None:
    narrow = SoftPromptReference.to(random_prompt(1, 5, hidden_size=96), base.fingerprint)
    foreign = SoftPromptReference.to(random_prompt(1, 5), "f" * 64)
    prefix = Prefix("F32", (1, 2, 1, 1, 1), bytes(8))
    kv = SoftPromptReference.to(prefix, base.fingerprint)
    async with served(base, [PLAIN]) as (engine, vllm):
        for soft_prompt, error, said in (
            (narrow, GenerationFailed, "has H=96 but base model 'demo-base' has H=192"),
            (foreign, WrongBase, "tuned on base ffffffffffff"),
            (kv, UnsupportedFeature, "takes soft prompts and no prefixes"),
        ):
            with pytest.raises(error, match=said):
                await collect(engine.generate(request(soft_prompt=soft_prompt)))
            with pytest.raises(error, match=said):
                await engine.warm(soft_prompt)
        penalised = request(soft_prompt=reference(base), sampling=Sampling(repetition_penalty=1.1))
        with pytest.raises(UnsupportedFeature, match="repetition_penalty is not served beside a soft prompt"):
            await collect(engine.generate(penalised))
        assert not vllm.requests
        assert engine.stats().prompts == 0


async def test_a_warm_prompt_is_read_once_until_it_is_released(base: BaseModel) -> None:
    prompt, loads = random_prompt(3, 4), []

    def load() -> SoftPrompt:
        loads.append(1)
        return prompt

    soft_prompt = SoftPromptReference(prompt.digest, 4, base.fingerprint, load)
    async with served(base, [PLAIN]) as (engine, _):
        await engine.warm(soft_prompt)
        assert (engine.stats().prompts, engine.stats().prompt_bytes) == (1, 4 * 192 * 4)
        for _ in range(2):
            await collect(engine.generate(request(soft_prompt=soft_prompt)))
        assert len(loads) == 1
        await engine.release(prompt.digest)
        assert engine.stats().prompt_bytes == 0
        await collect(engine.generate(request(soft_prompt=soft_prompt)))
    assert len(loads) == 2


async def test_prompts_beyond_the_bound_go_oldest_first_and_pinned_ones_last(base: BaseModel) -> None:
    one, two, three = (reference(base, seed, 2) for seed in (1, 2, 3))
    async with served(base, [PLAIN], prompt_memory_bytes=2 * 2 * 192 * 4) as (engine, _):
        await engine.warm(one)
        for soft_prompt in (two, three):
            await collect(engine.generate(request(soft_prompt=soft_prompt)))
        assert set(engine._prompts._rows) == {one.digest, three.digest}
        await engine.warm(two)
        assert set(engine._prompts._rows) == {one.digest, two.digest}


async def test_who_asked_first_may_leave_while_others_wait_for_the_same_prompt(base: BaseModel) -> None:
    prompt, go, loads = random_prompt(4, 3), threading.Event(), []

    def load() -> SoftPrompt:
        loads.append(1)
        assert go.wait(20)
        return prompt

    soft_prompt = SoftPromptReference(prompt.digest, 3, base.fingerprint, load)
    async with served(base, [PLAIN]) as (engine, _):
        first, second = (
            asyncio.ensure_future(collect(engine.generate(request(soft_prompt=soft_prompt)))) for _ in range(2)
        )
        async with asyncio.timeout(20):
            while not loads:  # noqa: ASYNC110 (a thread begins)
                await asyncio.sleep(0)
            first.cancel()
            go.set()
            assert (await second).answers[0].text == "ab"
    assert loads == [1]


async def test_leaving_a_stream_hangs_up(base: BaseModel) -> None:
    head = [stream_head(), event({"choices": [choice("a", [3], None)]}), UNTIL_LEFT]
    async with served(base, [head]) as (engine, vllm):
        async with aclosing(engine.generate(request(stream=True))) as events:
            assert isinstance(await anext(events), Delta)
            assert engine.stats().running == 1
        async with asyncio.timeout(20):
            await vllm.requests[0].left.wait()
        assert engine.stats().running == 0


async def test_closing_waits_for_what_runs_and_takes_nothing_new(base: BaseModel) -> None:
    go = asyncio.Event()
    async with served(base, [[go, *PLAIN]]) as (engine, vllm):
        running = asyncio.ensure_future(collect(engine.generate(request())))
        await vllm.asked(1)
        closing = asyncio.ensure_future(engine.close(grace_s=20))
        await asyncio.sleep(0)
        with pytest.raises(EngineUnavailable, match="stopping"):
            await collect(engine.generate(request()))
        go.set()
        assert (await running).answers[0].text == "ab"
        await closing


@pytest.mark.parametrize(
    ("script", "error", "said"),
    [
        (error_answer(400, "no such parameter"), ProviderRefused, "no such parameter"),
        (answered(choice("a", [1], "abort")), ProviderUnavailable, r"gave the answer up \(abort\)"),
        (answered({"index": 0, "text": "a", "finish_reason": "stop"}), ProviderMisbehaved, "shows no token ids"),
        (answered(choice("a", [1], index=1)), ProviderMisbehaved, "goes on with choice 1"),
        (answered(choice("a", [1], None)), ProviderMisbehaved, "ended its answer before all choices did"),
        (answered(choice("a", [1]), choice("b", [2])), ProviderMisbehaved, "goes on with choice 0, which has ended"),
        (answered({"index": 0, "text": 5}), ProviderMisbehaved, "cannot be read"),
    ],
)
async def test_answers_that_are_none_are_told_as_what_they_are(
    base: BaseModel, script: Any, error: type[EngineError], said: str
) -> None:
    async with served(base, [script]) as (engine, _):
        with pytest.raises(error, match=said):
            await collect(engine.generate(request()))


async def test_tokens_as_text_where_ids_were_asked_for_are_refused(base: BaseModel) -> None:
    given = {"tokens": ["a"], "token_logprobs": [-1.0], "top_logprobs": [{"a": -1.0}]}
    async with served(base, [answered(choice("a", [1], logprobs=given))]) as (engine, _):
        with pytest.raises(ProviderMisbehaved, match="writes tokens as text"):
            await collect(engine.generate(request(logprobs=1)))


async def test_a_deadline_ends_the_wait(base: BaseModel) -> None:
    async with served(base, [[UNTIL_LEFT]]) as (engine, _):
        with pytest.raises(DeadlineExceeded):
            await collect(engine.generate(request(deadline_s=0.05)))


class Scored:
    """A vLLM that knows a log-probability for every token behind every path, and shows the `most` highest."""

    def __init__(self, base: BaseModel, text: str, most: int) -> None:
        self._before = len(base.lay_out(RawText(text)))
        self._most = most
        self.calls: list[tuple[int, int | None]] = []

    def logprob(self, path: tuple[int, ...], token: int) -> float:
        return -(1 + (7 * token + 13 * sum(path) + 3 * len(path)) % 4096) / 512

    def __call__(self, asked: Asked) -> Answer:
        document = asked.document()
        only = document.get("allowed_token_ids", [None])[0]
        self.calls.append((len(document["prompt"]), only))
        tables = []
        for prompt in document["prompt"]:
            path = tuple(prompt[self._before :])
            table = {token: self.logprob(path, token) for token in range(4096)}
            best = sorted(table, key=lambda token: -table[token])[: document["logprobs"]]
            tables.append({token: table[token] for token in ([only] if only is not None else best)})
        return json_answer(next_tokens(tables))


@pytest.mark.parametrize("most", [1, 20, 4096])
async def test_labels_are_scored_exactly_however_few_tokens_are_shown(base: BaseModel, most: int) -> None:
    labels = ("card lost", "card", "card stolen", "refund", "where is it")
    vllm = Scored(base, "Hello", most)
    async with served(base, vllm, max_logprobs=most) as (engine, _):
        scores = await engine.score(ScoreRequest("s", RawText("Hello"), labels))
    tokens = [tuple(base.continuation(label)) for label in labels]
    expected = [sum(vllm.logprob(one[:place], token) for place, token in enumerate(one)) for one in tokens]
    assert scores.log_probabilities == pytest.approx(expected)
    assert scores.lengths == tuple(map(len, tokens))
    assert scores.usage == Usage(len(base.lay_out(RawText("Hello"))), 0, 0)
    assert vllm.calls[0] == (1, None)  # the root alone
    inner = {one[:place] for one in tokens for place in range(len(one))}
    assert vllm.calls[1] == (len(inner) - 1, None)
    assert len(vllm.calls) == 2 if most == 4096 else len(vllm.calls) > 2


async def test_scoring_sends_the_soft_prompt_with_every_path(base: BaseModel, oracle: Oracle) -> None:
    tokens = base.continuation("yes")

    def script(asked: Asked) -> Answer:
        rows = asked.document()["prompt_embeds"]
        return json_answer(next_tokens([dict.fromkeys(tokens, -1.0)] * len(rows)))

    async with served(base, script) as (engine, vllm):
        scores = await engine.score(ScoreRequest("s", RawText("Hello"), ("yes",), soft_prompt=reference(base)))
    assert scores.log_probabilities == (-1.0 * len(tokens),)
    assert scores.usage.virtual_tokens == 5
    laid_out = [*base.lay_out(RawText("Hello")), *tokens[:-1]]
    sent = [tensor for asked in vllm.requests for tensor in embedded(asked.document())]
    longest = max(sent, key=len)
    assert torch.equal(longest[5:], oracle.model.get_input_embeddings()(torch.tensor(laid_out)))
    assert {len(tensor) for tensor in sent} == {5 + len(laid_out) - place for place in range(len(tokens))}


async def test_large_bodies_arrive_whole(base: BaseModel) -> None:
    tokens = base.continuation("where is it")

    def script(asked: Asked) -> Answer:
        return json_answer(next_tokens([dict.fromkeys(tokens, -1.0)] * len(embedded(asked.document()))))

    async with served(base, script) as (engine, vllm):
        asked = ScoreRequest("s", TokenIds((5,) * 900), ("where is it",), soft_prompt=reference(base))
        assert (await engine.score(asked)).log_probabilities == (-1.0 * len(tokens),)
    assert max(len(asked.body) for asked in vllm.requests) > 2 * 2**20


async def test_labels_that_do_not_fit_or_are_none_are_refused(base: BaseModel) -> None:
    async with served(base, [PLAIN]) as (engine, vllm):
        with pytest.raises(InvalidRequest, match="nothing to score"):
            await engine.score(ScoreRequest("s", RawText("Hello"), ()))
        with pytest.raises(PromptTooLong):
            await engine.score(ScoreRequest("s", TokenIds((5,) * 1022), ("where is it",)))
        assert not vllm.requests
    for broken, said in (
        (answered(), "was asked about 1 prompts"),
        (answered(choice("a", [1])), "left out the log-probabilities"),
        (answered(choice("a", [1], logprobs={**shown({5: -1.0}), "top_logprobs": []})), "left out"),
        (answered(*[choice("a", [1], logprobs=shown({5: -1.0}))] * 2), "was asked about 1 prompts"),
        (answered(choice("a", [1], logprobs=shown({5: -1.0}))), "left out the log-probability of a token"),
    ):
        async with served(base, [broken]) as (engine, _):
            with pytest.raises(ProviderMisbehaved, match=said):
                await engine.score(ScoreRequest("s", RawText("Hello"), ("yes",)))


async def test_requests_behind_one_soft_prompt_go_where_it_is_warm(base: BaseModel) -> None:
    async with ScriptedProvider([PLAIN]) as one, ScriptedProvider([PLAIN]) as two:
        engine = build_vllm(base, TransportOptions((one.url, two.url)), VllmOptions())
        await engine.start()
        for seed in range(8):
            before = len(one.requests), len(two.requests)
            for _ in range(3):
                await collect(engine.generate(request(soft_prompt=reference(base, seed))))
            more = len(one.requests) - before[0], len(two.requests) - before[1]
            assert more in {(3, 0), (0, 3)}
        assert one.requests
        assert two.requests
        engine.provider.drain(one.url)
        before = len(one.requests)
        for seed in range(8):
            await collect(engine.generate(request(soft_prompt=reference(base, seed))))
        assert len(one.requests) == before
        assert engine.stats().replicas_healthy == 1
        await engine.close()


async def test_a_certificate_file_that_is_not_there_is_said_when_the_engine_starts(base: BaseModel) -> None:
    engine = build_vllm(base, TransportOptions(("https://127.0.0.1:1/v1",), ca_file=Path("nowhere.pem")), VllmOptions())
    with pytest.raises(BackendError, match=r"nowhere\.pem"):
        await engine.start()


async def test_a_server_that_dies_within_a_stream_ends_it_in_an_error_and_others_answer_after_that(
    base: BaseModel,
) -> None:
    dying = ScriptedProvider([[stream_head(), event({"choices": [choice("a", [3], None)]}), UNTIL_LEFT]])
    async with ScriptedProvider([PLAIN]) as staying:
        async with dying:
            engine = build_vllm(base, TransportOptions((dying.url, staying.url)), VllmOptions())
            await engine.start()
            engine.provider.drain(staying.url)
            events = engine.generate(request(stream=True))
            assert await anext(events) == Delta("a", (3,))
        with pytest.raises(ProviderUnavailable, match="hung up before its answer was whole"):
            await anext(events)
        engine.provider.undrain(staying.url)
        for seed in range(64):  # until one of them belongs to the server that died, by a port that nobody chose
            answers = await collect(engine.generate(request(soft_prompt=reference(base, seed))))
            assert answers.answers[0].text == "ab"
            if engine.stats().replicas_healthy < 2:
                break
        assert (engine.stats().running, engine.stats().replicas_healthy) == (0, 1)
        await engine.close()


async def test_a_backends_servers_are_asked_for_their_health_and_one_that_is_not_well_gets_nothing(
    base: BaseModel,
) -> None:
    def play(asked: Asked, status: int) -> Answer:
        return PLAIN if asked.method == "POST" else [whole(b"", status)]

    well, ill = (ScriptedProvider(functools.partial(play, status=status)) for status in (200, 503))
    async with well, ill:
        table = {"kind": "vllm", "urls": [well.url, ill.url]}
        settings = TypeAdapter(BackendSettings).validate_python(table)
        (engine,) = build_backends({"cluster": settings}, {}, base=base).values()
        await engine.start()
        await engine.provider.check_health()
        assert [state.healthy for state in engine.provider.replicas()] == [True, False]
        for seed in range(8):
            await collect(engine.generate(request(soft_prompt=reference(base, seed))))
        await engine.close()
        assert [(asked.method, asked.path) for asked in ill.requests] == [("GET", "/health")]
        assert [asked.method for asked in well.requests] == ["GET"] + ["POST"] * 8

        watched = build_vllm(base, TransportOptions((well.url, ill.url), health_every_s=0.01), VllmOptions())
        await watched.start()
        async with asyncio.timeout(20):
            await asyncio.gather(well.asked(10), ill.asked(2))
        await watched.close()
    assert {(asked.method, asked.path) for asked in (well.requests[9], *ill.requests)} == {("GET", "/health")}


def test_a_vllm_backend_is_built_from_its_table(base: BaseModel) -> None:
    table = {"kind": "vllm", "urls": ["http://a:8000/v1", "http://b:8000/v1"], "context_length": 512}
    settings = TypeAdapter(BackendSettings).validate_python(table)
    (engine,) = build_backends({"cluster": settings}, {}, base=base).values()
    assert isinstance(engine, VllmEngine)
    assert engine.capabilities().context_length == 512
    assert engine.capabilities().payload_kinds == {"soft_prompt", "text"}
    assert engine.stats().replicas == 2
    with pytest.raises(BackendError, match="backend 'cluster' is vLLM and needs the base model"):
        build_backends({"cluster": settings}, {})
    with pytest.raises(ValueError, match="a vLLM backend has no address of its own"):
        TypeAdapter(BackendSettings).validate_python({"kind": "vllm"})
