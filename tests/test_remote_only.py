"""`softcue serve` without an engine of its own: vLLM servers and a provider behind it, no torch in it."""

from __future__ import annotations

from pathlib import Path

import httpx
import pytest

from tests.conftest import BASE_FOLDER
from tests.processes import running
from tests.providers import Answer, Asked, ScriptedProvider, json_answer

SETTINGS = """
[store]
url = "store.db"

[base]
path = "{base}"

[engine]
enabled = false

[backends.cluster]
kind = "vllm"
urls = ["http://127.0.0.1:1/v1", "http://127.0.0.1:2/v1"]

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


async def test_a_service_with_remote_backends_alone_loads_no_torch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SOME_KEY", "sk-of-this-test")
    settings = tmp_path / "softcue.toml"
    async with ScriptedProvider(answer) as provider:
        settings.write_text(SETTINGS.format(base=BASE_FOLDER, url=provider.url))
        with running(["serve", "--config", str(settings), "--port", "0"], tmp_path / "log") as server:
            async with httpx.AsyncClient(base_url=server.url, timeout=30) as client:
                body = {"model": "ft:small:me::1", "messages": [{"role": "user", "content": "hello"}]}
                for _ in range(50):
                    response = await client.post("/v1/chat/completions", json=body)
                    assert response.json()["choices"][0]["message"]["content"] == "ft:small:me::1 speaking"
                shown = (await client.get("/v1/backends")).text + (await client.get("/metrics")).text
            process = Path("/proc", str(server.process.pid))
            mapped = process.joinpath("maps").read_text()
            status = dict(line.split(":", 1) for line in process.joinpath("status").read_text().splitlines())
            log = server.log.read_text()
    assert provider.requests[0].headers["authorization"] == "Bearer sk-of-this-test"
    assert "libtorch" not in mapped
    assert int(status["RssAnon"].split()[0]) * 1024 < 400e6
    assert "sk-of-this-test" not in shown + log
    assert "hello" not in shown + log
