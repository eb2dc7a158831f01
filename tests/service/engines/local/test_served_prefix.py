"""A task that a prefix in the store answers, over HTTP, by the real engine."""

from __future__ import annotations

from pathlib import Path

from prompt_store.prompts.task import Message
from service.engines.base import GenerationRequest, Messages, Sampling, SoftPromptReference
from service.engines.base_model import BaseModel
from service.engines.local.client import LocalEngine
from service.engines.local.engine import EngineCore
from service.engines.local.thread import ThreadHost
from tests.service.engines.local.asking import answer
from tests.service.serving import COPY, client_of, open_store, random_prefix


async def test_a_published_prefix_answers_as_the_engine_does_when_it_is_asked_itself(
    tmp_path: Path, base: BaseModel, loaded: EngineCore
) -> None:
    store = open_store(tmp_path / "store.db", base)
    store.task(COPY)
    prefix = random_prefix(4, length=9)
    store.publish("copy", prefix)
    body = {"inputs": {"product": "kettle", "colour": "blue"}, "temperature": 0, "max_tokens": 12}
    chat = {
        "model": "copy",
        "messages": [{"role": "user", "content": "blue kettle"}],
        "temperature": 0,
        "max_tokens": 12,
    }
    async with client_of(store, LocalEngine(base, ThreadHost(lambda: loaded), max_waiting=2)) as client:
        served = await client.post("/v1/tasks/copy/generate", json=body)
        chatted = await client.post("/v1/chat/completions", json=chat)
    store.registry.database.close()
    engine = LocalEngine(base, ThreadHost(lambda: loaded), max_waiting=2)
    await engine.start()
    messages, sampling = Messages((Message(role="user", content="blue kettle"),)), Sampling(12, stop=("\n",), top_p=0.9)
    reference = SoftPromptReference.to(prefix, base.fingerprint)
    expected = await answer(engine, GenerationRequest("a", messages, soft_prompt=reference, sampling=sampling))
    plain = await answer(engine, GenerationRequest("b", messages, sampling=sampling))
    await engine.close()
    assert (served.status_code, served.headers["x-softcue-version"]) == (200, "copy@v1")
    assert served.json()["text"] == expected != plain
    assert served.json()["usage"]["virtual_tokens"] == 9
    assert chatted.json()["choices"][0]["message"]["content"] == expected
