"""The engine over real vLLM servers, held against the local engine on the same weights."""

from __future__ import annotations

import asyncio
import json
import os
import re
import tomllib
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing, asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from benchmarks.engine.servers import Server, start_vllm
from benchmarks.engine.shapes import BUILD_FOLDER
from prompt_store.prompts.soft_prompt import SoftPrompt, decode
from prompt_store.prompts.task import Message
from service.engines.base import (
    Delta,
    GenerationRequest,
    Messages,
    RawText,
    ResponseFormat,
    Sampling,
    ScoreRequest,
    SoftPromptReference,
    TokenLogprob,
)
from service.engines.base_model import BaseModel
from service.engines.build import build_vllm
from service.engines.collecting import Answers, collect
from service.engines.errors import ProviderRefused
from service.engines.local.client import LocalEngine
from service.engines.local.engine import EngineCore
from service.engines.local.options import EngineOptions
from service.engines.local.thread import ThreadHost
from service.engines.remote.options import TransportOptions
from service.engines.remote.vllm import VllmEngine
from service.engines.remote.vllm_options import VllmOptions
from tests.conftest import BASE_FOLDER, ROOT
from tests.service.engines.local.oracle import TIE

PYTHON = os.environ.get("SOFTCUE_VLLM_PYTHON")
pytestmark = [
    pytest.mark.vllm,
    pytest.mark.skipif(PYTHON is None, reason="NOT RUN: needs vLLM, as `make slow-vllm` installs it"),
]
EXAMPLES = ROOT / "examples"
LABELS = tuple(tomllib.loads((EXAMPLES / "support_intents" / "task.toml").read_text("utf-8"))["labels"])
CLOSE = 1e-3
COMPACT = ("--structured-outputs-config", json.dumps({"backend": "guidance", "disable_any_whitespace": True}))
"""So small a model loses itself in blanks otherwise."""


@pytest.fixture(scope="module")
def servers() -> Iterator[list[Server]]:
    """Two servers of the demo base, each on a core of its own where there are two."""
    BUILD_FOLDER.mkdir(parents=True, exist_ok=True)
    cores = sorted(os.sched_getaffinity(0))
    started: list[Server] = []
    with ThreadPoolExecutor(2) as starting:
        coming = [
            starting.submit(start_vllm, f"vllm-test-{name}", Path(str(PYTHON)).absolute(), BASE_FOLDER, COMPACT, {core})
            for name, core in (("one", cores[0]), ("two", cores[-1]))
        ]
    started += [one.result() for one in coming if one.exception() is None]
    try:
        assert [one.exception() for one in coming] == [None, None]
        yield started
    finally:
        for server in started:
            server.end()


@pytest.fixture(scope="module")
def core(base: BaseModel) -> EngineCore:
    return EngineCore.load(base, EngineOptions(threads=1))


@pytest.fixture
async def local(base: BaseModel, core: EngineCore) -> AsyncIterator[LocalEngine]:
    engine = LocalEngine(base, ThreadHost(lambda: core))
    await engine.start()
    yield engine
    await engine.close()


@pytest.fixture
async def vllm(base: BaseModel, servers: list[Server]) -> AsyncIterator[VllmEngine]:
    async with over(base, servers[:1]) as engine:
        yield engine


@asynccontextmanager
async def over(base: BaseModel, servers: list[Server], **options: Any) -> AsyncIterator[VllmEngine]:
    transport = TransportOptions(tuple(map(address, servers)), health_every_s=0.5)
    engine = build_vllm(base, transport, VllmOptions(dtype="float32", **options))
    await engine.start()
    try:
        yield engine
    finally:
        await engine.close()


def address(server: Server) -> str:
    return f"http://127.0.0.1:{server.port}/v1"


def soft_prompt(base: BaseModel, task: str | None) -> SoftPromptReference | None:
    if task is None:
        return None
    prompt, _ = decode((EXAMPLES / task / "prompt.safetensors").read_bytes())
    assert isinstance(prompt, SoftPrompt)
    return SoftPromptReference.to(prompt, base.fingerprint)


def chat(text: str) -> Messages:
    return Messages((Message(role="user", content=text),))


TEN = [
    (None, RawText("The house stood at the edge of the village and"), False),
    (None, chat("Tell me about the sea, please."), True),
    (None, RawText("1, 2, 3, 4,"), True),
    ("support_intents", chat("I was charged twice for the same order, can you help?"), False),
    ("support_intents", RawText("Where is my parcel?"), True),
    ("product_copy", chat("Name: Alder kettle\nMaterial: enamelled steel\nColour: green"), False),
    ("product_copy", RawText("Grüße aus Köln — 12 € für eine Tasse ☕"), True),
    ("product_copy", chat("x"), True),
    ("data_questions", chat("How many customers ordered more than twice last month?"), True),
    ("data_questions", RawText("SELECT name FROM"), False),
]


@pytest.mark.parametrize(("task", "prompt", "stream"), TEN)
async def test_greedy_answers_are_the_local_engines(
    base: BaseModel, vllm: VllmEngine, local: LocalEngine, task: str | None, prompt: Messages | RawText, stream: bool
) -> None:
    asked = GenerationRequest(
        "a", prompt, soft_prompt(base, task), sampling=Sampling(max_tokens=48), logprobs=3, stream=stream
    )
    assert_same(await collect(vllm.generate(asked)), await collect(local.generate(asked)))


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(max_tokens=40, stop=("e", "\n\n"), min_tokens=5),
        Sampling(max_tokens=24, ignore_eos=True),
        Sampling(max_tokens=40, stop_token_ids=(5, 204)),
        Sampling(max_tokens=24, frequency_penalty=0.8, presence_penalty=0.4),
        Sampling(max_tokens=24, logit_bias={204: -100.0, 77: 3.0}),
    ],
)
async def test_parameters_mean_what_they_mean_locally(
    base: BaseModel, vllm: VllmEngine, local: LocalEngine, sampling: Sampling
) -> None:
    for task in ("support_intents", None):
        asked = GenerationRequest(
            "a", chat("Where is my order?"), soft_prompt(base, task), sampling=sampling, logprobs=2
        )
        assert_same(await collect(vllm.generate(asked)), await collect(local.generate(asked)))


def assert_same(theirs: Answers, ours: Answers) -> None:
    """Equal answers, as far as the first place where the local engine's two best tokens nearly tie."""
    (found,), (expected,) = theirs.answers, ours.answers
    places = zip(found.logprobs, expected.logprobs, strict=False)
    differing = next(((one, other) for one, other in places if one.token_id != other.token_id), None)
    if differing is not None:
        assert differing[1].top[0].logprob - differing[1].top[1].logprob < TIE
        return
    assert found.token_ids == expected.token_ids
    assert found.text == expected.text
    assert found.finish_reason == expected.finish_reason
    assert theirs.usage == ours.usage
    for one, other in zip(found.logprobs, expected.logprobs, strict=True):
        assert one.logprob == pytest.approx(other.logprob, abs=CLOSE)
        assert (one.text, one.data) == (other.text, other.data)
        assert values(one) == pytest.approx(values(other), abs=CLOSE)


def values(entry: TokenLogprob) -> list[float]:
    return [alternative.logprob for alternative in entry.top]


@pytest.mark.parametrize("max_logprobs", [1, 20])
@pytest.mark.parametrize("task", ["support_intents", None])
async def test_label_scores_are_the_local_engines(
    base: BaseModel, servers: list[Server], local: LocalEngine, task: str | None, max_logprobs: int
) -> None:
    rows = (EXAMPLES / "support_intents" / "test.jsonl").read_text("utf-8").splitlines()[:3]
    async with over(base, servers[:1], max_logprobs=max_logprobs) as vllm:
        for row in rows:
            asked = ScoreRequest("s", chat(row), LABELS, soft_prompt(base, task))
            found, expected = await vllm.score(asked), await local.score(asked)
            assert found.log_probabilities == pytest.approx(expected.log_probabilities, abs=CLOSE)
            assert (found.lengths, found.usage) == (expected.lengths, expected.usage)


async def test_sampled_choices_differ_and_a_seed_repeats_them(base: BaseModel, vllm: VllmEngine) -> None:
    sampling = Sampling(max_tokens=16, temperature=1.0, seed=7)
    asked = GenerationRequest("a", RawText("The"), soft_prompt(base, "product_copy"), sampling=sampling, n=3)
    first, second = [await collect(vllm.generate(asked), 3) for _ in range(2)]
    assert [answer.token_ids for answer in first.answers] == [answer.token_ids for answer in second.answers]
    assert len({answer.token_ids for answer in first.answers}) == 3
    assert first.usage.completion_tokens == sum(len(answer.token_ids) for answer in first.answers)


async def test_structured_answers_fit_their_form(base: BaseModel, vllm: VllmEngine) -> None:
    schema = {
        "type": "object",
        "properties": {"sold": {"enum": [True, False]}, "size": {"enum": ["small", "large"]}},
        "required": ["sold", "size"],
        "additionalProperties": False,
    }
    forms: dict[str, tuple[ResponseFormat, Callable[[str], bool]]] = {
        "choice": (ResponseFormat("choice", choices=LABELS), LABELS.__contains__),
        "regex": (ResponseFormat("regex", regex="[a-c]{4}"), lambda text: re.fullmatch("[a-c]{4}", text) is not None),
        "schema": (ResponseFormat("json_schema", schema), lambda text: set(json.loads(text)) == {"sold", "size"}),
    }
    for form, fits in forms.values():
        for task in ("support_intents", None):
            asked = GenerationRequest(
                "a", chat("Where is it?"), soft_prompt(base, task), sampling=Sampling(200), response_format=form
            )
            answers = await collect(vllm.generate(asked))
            assert fits(answers.answers[0].text), answers.answers[0].text


async def test_what_vllm_refuses_is_told_in_its_words(vllm: VllmEngine) -> None:
    asked = GenerationRequest("a", RawText("x"), response_format=ResponseFormat("regex", regex="("))
    with pytest.raises(ProviderRefused, match="unclosed group"):
        await collect(vllm.generate(asked))


def running(server: Server) -> int:
    """How many requests a server works on, by its own metrics."""
    _, text = server.get("/metrics")
    found = re.search(r"^vllm:num_requests_running\{[^}]*\} ([0-9.]+)$", text, re.MULTILINE)
    assert found is not None
    return int(float(found[1]))


async def until_running(server: Server, holds: Callable[[int], bool]) -> None:
    async with asyncio.timeout(60):
        while not holds(await asyncio.to_thread(running, server)):
            pass


LONG = Sampling(max_tokens=900, ignore_eos=True)
EXACTLY = Sampling(max_tokens=64, ignore_eos=True)


@pytest.mark.parametrize("task", ["support_intents", None])
async def test_leaving_frees_the_request_at_vllm(
    base: BaseModel, vllm: VllmEngine, servers: list[Server], task: str | None
) -> None:
    asked = GenerationRequest("a", RawText("The"), soft_prompt(base, task), sampling=LONG)
    async with aclosing(vllm.generate(asked)) as events:
        assert isinstance(await anext(events), Delta)
        await until_running(servers[0], lambda count: count == 1)
    await until_running(servers[0], lambda count: count == 0)
    whole = asyncio.ensure_future(
        collect(vllm.generate(GenerationRequest("b", RawText("The"), sampling=LONG, stream=False)))
    )
    await until_running(servers[0], lambda count: count == 1)
    whole.cancel()
    await until_running(servers[0], lambda count: count == 0)


def many(base: BaseModel) -> list[GenerationRequest]:
    return [
        GenerationRequest(
            str(place),
            RawText(f"Item {place}"),
            soft_prompt(base, task),
            sampling=Sampling(64, ignore_eos=True),
            stream=False,
        )
        for place in range(12)
        for task in (None, "support_intents", "product_copy", "data_questions")
    ]


async def test_a_drained_server_gets_nothing_new(base: BaseModel, servers: list[Server]) -> None:
    async with over(base, servers) as vllm:
        load = [asyncio.ensure_future(collect(vllm.generate(asked))) for asked in many(base)]
        await until_running(servers[0], bool)
        vllm.provider.drain(address(servers[0]))
        assert all(answers.usage.completion_tokens == 64 for answers in await asyncio.gather(*load))
        again = [asyncio.ensure_future(collect(vllm.generate(asked))) for asked in many(base)]
        await until_running(servers[1], bool)
        assert await asyncio.to_thread(running, servers[0]) == 0
        await asyncio.gather(*again)


async def test_a_server_that_dies_under_load_costs_no_answer(
    base: BaseModel, servers: list[Server], local: LocalEngine
) -> None:
    asked = many(base)
    async with over(base, servers) as vllm:
        load = [asyncio.ensure_future(collect(vllm.generate(one))) for one in asked]
        await until_running(servers[1], bool)
        for process in servers[1].processes():
            process.kill()
        found = await asyncio.gather(*load)
        assert vllm.stats().retries > 0
        assert vllm.stats().replicas_healthy == 1
    expected = [await collect(local.generate(one)) for one in asked]
    assert [one.usage for one in found] == [one.usage for one in expected]
    pairs = zip(found, expected, strict=True)
    assert sum(one.answers[0].text != other.answers[0].text for one, other in pairs) <= 2  # but for near ties
