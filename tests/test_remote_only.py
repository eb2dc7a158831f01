"""`softcue serve` without an engine of its own: vLLM servers and a provider behind it, no torch in it."""

from __future__ import annotations

from pathlib import Path

import httpx
import pytest
import torch

from service.engines.base_model import BaseModel
from tests.conftest import BASE_FOLDER, random_prompt
from tests.processes import running
from tests.providers import Answer, Asked, ScriptedProvider, json_answer, whole
from tests.service.engines.remote.vllm_answers import answered, choice, embedded
from tests.service.serving import COPY, open_store

SETTINGS = """
[store]
url = "store.db"

[base]
path = "{base}"

[engine]
enabled = false

[backends.cluster]
kind = "vllm"
urls = ["{cluster}", "http://127.0.0.1:1/v1"]

[backends.openai]
kind = "openai_compatible"
url = "{url}"
models = ["ft:*"]
key_env = "SOME_KEY"
"""


def answer(asked: Asked) -> Answer:
    message = {"role": "assistant", "content": f"{asked.document()['model']} speaking", "refusal": None}
    choice = {"index": 0, "message": message, "finish_reason": "stop", "logprobs": None}
    usage = {"prompt_tokens": 3, "completion_tokens": 2, "total_tokens": 5}
    return json_answer(
        {"id": "c", "object": "chat.completion", "created": 1, "model": "m", "choices": [choice], "usage": usage}
    )


def complete(asked: Asked) -> Answer:
    """What a vLLM says, well and asked for a completion."""
    return [whole(b"")] if asked.method == "GET" else answered(choice(" a red mug", [70, 71, 72]))


async def test_a_service_with_remote_backends_alone_loads_no_torch(
    tmp_path: Path, base: BaseModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SOME_KEY", "sk-of-this-test")
    settings = tmp_path / "softcue.toml"
    prompt = random_prompt(1, 5)
    store = open_store(tmp_path / "store.db", base)
    store.publish(store.task(COPY).name, prompt)
    store.registry.database.close()
    async with ScriptedProvider(answer) as provider, ScriptedProvider(complete) as vllm:
        settings.write_text(SETTINGS.format(base=BASE_FOLDER, url=provider.url, cluster=vllm.url))
        with running(["serve", "--config", str(settings), "--port", "0"], tmp_path / "log") as server:
            async with httpx.AsyncClient(base_url=server.url, timeout=30) as client:
                body = {"model": "ft:small:me::1", "messages": [{"role": "user", "content": "hello"}]}
                for _ in range(50):
                    response = await client.post("/v1/chat/completions", json=body)
                    assert response.json()["choices"][0]["message"]["content"] == "ft:small:me::1 speaking"
                for _ in range(20):
                    response = await client.post("/v1/chat/completions", json={**body, "model": "copy"})
                    assert response.json()["choices"][0]["message"]["content"] == " a red mug"
                shown = (await client.get("/v1/backends")).text + (await client.get("/metrics")).text
            process = Path("/proc", str(server.process.pid))
            mapped = process.joinpath("maps").read_text()
            status = dict(line.split(":", 1) for line in process.joinpath("status").read_text().splitlines())
            log = server.log.read_text()
            files = [file for file in Path(store.location).parent.glob("store.db*") if file.is_file()]
            stored = b"".join(file.read_bytes() for file in files)
    assert provider.requests[0].headers["authorization"] == "Bearer sk-of-this-test"
    completions = [asked.document() for asked in vllm.requests if asked.method == "POST"]
    assert len(completions) == 20
    for document in completions:
        (sent,) = embedded(document)
        assert torch.equal(sent[:5], torch.from_numpy(prompt.to_float32()))
    assert "libtorch" not in mapped
    assert int(status["RssAnon"].split()[0]) * 1024 < 400e6
    assert "sk-of-this-test" not in shown + log
    assert b"openai_compatible" in stored
    assert b"sk-of-this-test" not in stored
    assert "hello" not in shown + log
