"""Our own `/v1` endpoints as the provider: a Softcue behind another, over a socket."""

from __future__ import annotations

import asyncio
import dataclasses
import math
import socket
import threading
from collections.abc import AsyncIterator, Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
import uvicorn

from prompt_store.prompts.task import Message
from service.app import create_app
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
    TokenIds,
)
from service.engines.base_model import BaseModel
from service.engines.build import build_backends
from service.engines.collecting import collect
from service.engines.errors import EngineError, GenerationFailed, ProviderError, ProviderRefused
from service.engines.remote.backend_settings import OpenAICompatibleSettings
from service.engines.scripted import ScriptedEngine, echo
from tests.service.serving import INTENTS, Store, filled

HELLO = Messages((Message(role="user", content="hello there you"),))
ASKED = GenerationRequest("id", HELLO, remote_model="intents@v1", sampling=Sampling(16), stream=False)


def script(request: GenerationRequest) -> Iterable[str | EngineError]:
    """The first of what may be answered, or what was said; `fail` in it fails after a word."""
    if request.response_format.choices:
        return [request.response_format.choices[0]]
    said = echo(request)
    return [said[0], GenerationFailed("it broke; ask again")] if said[-1] == " fail" else said


@pytest.fixture
def behind() -> ScriptedEngine:
    return ScriptedEngine(script)


@pytest.fixture
def store(tmp_path: Path, base: BaseModel) -> Iterator[Store]:
    store = filled(tmp_path / "store.db", base)
    yield store
    store.registry.database.close()


@pytest.fixture
async def engine(store: Store, behind: ScriptedEngine) -> AsyncIterator[Engine]:
    """An engine at a Softcue that runs in a thread of its own."""
    ready = threading.Event()
    app = create_app(store.settings(), engine=behind, on_ready=lambda _: ready.set())
    server = uvicorn.Server(uvicorn.Config(app, log_config=None, lifespan="on"))
    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=lambda: asyncio.run(server.serve([listener])))
        thread.start()
        try:
            assert await asyncio.to_thread(ready.wait, 30)
            url = f"http://127.0.0.1:{listener.getsockname()[1]}/v1"
            backend = OpenAICompatibleSettings(kind="openai_compatible", flavour="softcue", url=url)
            (engine,) = build_backends({"other": backend}, {}).values()
            await engine.start()
            try:
                yield engine
            finally:
                await engine.close()
        finally:
            server.should_exit = True
            await asyncio.to_thread(thread.join)


@pytest.mark.parametrize("streamed", [False, True])
async def test_an_answer_of_another_softcue_is_that_of_its_engine(
    engine: Engine, behind: ScriptedEngine, streamed: bool
) -> None:
    asked = dataclasses.replace(ASKED, n=2, logprobs=2, stream=streamed)
    theirs = await collect(behind.generate(dataclasses.replace(asked, remote_model=None)), 2)
    ours = await collect(engine.generate(asked), 2)
    assert [answer.text for answer in ours.answers] == ["hello there you"] * 2
    for answer, expected in zip(ours.answers, theirs.answers, strict=True):
        assert answer.finish_reason == expected.finish_reason
        assert [(entry.text, entry.logprob, entry.data) for entry in answer.logprobs] == [
            (entry.text, entry.logprob, entry.data) for entry in expected.logprobs
        ]
        assert [[other.text for other in entry.top] for entry in answer.logprobs] == [
            [other.text for other in entry.top] for entry in expected.logprobs
        ]
    assert (ours.usage.prompt_tokens, ours.usage.completion_tokens) == (3, 6)
    assert ours.usage.virtual_tokens == 4  # of the version that answered there
    assert ours.provider_request_id.startswith("chatcmpl-")


async def test_every_sampling_parameter_arrives_as_it_was_asked_for(engine: Engine, behind: ScriptedEngine) -> None:
    sampling = Sampling(
        9, 0.7, 0.9, 40, 11, ("\n",), 0.05, 1, True, (7,), 0.5, -0.5, 1.1, {3: -100.0, 5: 1.5}
    )  # fmt: skip
    await collect(engine.generate(dataclasses.replace(ASKED, sampling=sampling)))
    # Neutral values arrive as well: those of the task over there are others.
    neutral = Sampling(9, 1.0)
    await collect(engine.generate(dataclasses.replace(ASKED, remote_model="copy", sampling=neutral)))
    assert behind.requests[0].sampling == sampling
    assert behind.requests[1].sampling == dataclasses.replace(neutral, stop=("\n",))


async def test_a_stream_is_passed_on_word_by_word(engine: Engine) -> None:
    *deltas, finish = [event async for event in engine.generate(dataclasses.replace(ASKED, stream=True))]
    assert [delta.text for delta in deltas if isinstance(delta, Delta)] == ["hello", " there", " you", ""]
    assert isinstance(finish, Finish)


@pytest.mark.parametrize("prompt", [RawText("once upon"), TokenIds((5, 6))])
@pytest.mark.parametrize("streamed", [False, True])
async def test_completions_continue_text_and_token_ids(
    engine: Engine, behind: ScriptedEngine, prompt: Any, streamed: bool
) -> None:
    asked = dataclasses.replace(ASKED, prompt=prompt, logprobs=1, stream=streamed)
    answer = (await collect(engine.generate(asked))).answers[0]
    assert behind.requests[0].prompt == prompt
    assert answer.text == ("once upon" if isinstance(prompt, RawText) else "5 6")
    assert "".join(entry.text for entry in answer.logprobs) == answer.text


async def test_labels_are_chosen_among_those_asked_for(engine: Engine, behind: ScriptedEngine) -> None:
    labels = tuple(INTENTS["labels"])
    scores = await engine.score(ScoreRequest("id", HELLO, labels, remote_model="intents"))
    assert behind.requests[0].response_format == ResponseFormat("choice", choices=labels)
    assert scores.log_probabilities[0] == max(scores.log_probabilities)
    assert not scores.choice_only
    assert math.fsum(map(math.exp, scores.log_probabilities)) == pytest.approx(1.0)


async def test_what_it_refuses_is_refused_in_its_own_words(engine: Engine) -> None:
    with pytest.raises(ProviderRefused, match="'nothing'") as refused:
        await collect(engine.generate(dataclasses.replace(ASKED, remote_model="nothing")))
    assert refused.value.status == 404


async def test_a_failure_within_its_stream_ends_ours_in_an_error(engine: Engine) -> None:
    failing = Messages((Message(role="user", content="hello fail"),))
    events = engine.generate(dataclasses.replace(ASKED, prompt=failing, stream=True))
    assert await anext(events) == Delta("hello")
    with pytest.raises(ProviderError, match="it broke; ask again"):
        await anext(events)
