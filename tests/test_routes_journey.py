"""From a fine-tuned model at a provider to a soft prompt: the real command line, real servers, the official client.

The provider is a Softcue of its own, whose version of the task plays the model that was fine-tuned there.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.conftest import BASE_FOLDER
from tests.processes import Server, eventually, running, softcue

EXAMPLES = BASE_FOLDER.parent
TASK = "support_intents"
MESSAGE = "can i talk to a person about the heater"
KEY = "sk-never-to-be-seen"

SETTINGS = """
[store]
url = "store.db"

[backends.provider]
kind = "openai_compatible"
flavour = "softcue"
url = "{url}/v1"
key_env = "SOFTCUE_JOURNEY_KEY"
retries = {{ attempts = 2, first_backoff_s = 0.01 }}
breaker = {{ consecutive = 3, open_s = 1.0 }}

[backends.provider.prices]
default = {{ input = 2.5, output = 10.0 }}
"""

FALLBACK = """
[support_intents]
deadline_s = 8

[support_intents.route]
kind = "fallback"
routes = [{ version = "fine-tuned" }, { backend = "local" }]
"""

CASCADE = """
[support_intents.route]
kind = "cascade"
measure = "margin"
first = { backend = "local" }
second = { version = "fine-tuned" }
"""


@dataclass(frozen=True)
class Answered:
    """What a request came to: its text, its steps as `backend: outcome`, and its id."""

    text: str
    steps: tuple[str, ...]
    id: str

    @classmethod
    def of(cls, text: str, document: dict[str, Any], id: str) -> Answered:
        return cls(text, tuple(f"{step['backend']}: {step['outcome']}" for step in document["route"]), id)


BY_PROVIDER = ("provider: answered",)
BY_FALLBACK = ("provider: failed", "local: answered")


@dataclass
class Traffic:
    """Callers that ask without a pause, by the official client's streams and by classify, and keep every answer."""

    server: Server
    streamed: list[Answered] = field(default_factory=list)
    classified: list[Answered] = field(default_factory=list)
    _stopping: threading.Event = field(default_factory=threading.Event)
    _between_streams: list[threading.Lock] = field(default_factory=lambda: [threading.Lock() for _ in range(3)])

    @contextmanager
    def flowing(self) -> Iterator[Traffic]:
        """Raises what any of the requests failed with."""
        with ThreadPoolExecutor(len(self._between_streams) + 1) as callers:
            asking: list[Future[None]] = [callers.submit(self._stream, lock) for lock in self._between_streams]
            asking.append(callers.submit(self._classify))
            try:
                yield self
            finally:
                self._stopping.set()
        for each in asking:
            each.result()

    @contextmanager
    def between_streams(self) -> Iterator[None]:
        """No stream runs meanwhile: what has begun to be answered by a server stays with it."""
        with ExitStack() as held:
            for lock in self._between_streams:
                held.enter_context(lock)
            yield

    def next_streamed(self, steps: tuple[str, ...]) -> Answered:
        """The first answer of streams from now on that was come to by these steps."""
        since = len(self.streamed)
        found = eventually(lambda: [each for each in self.streamed[since:] if each.steps == steps], bool)
        return found[0]

    def _stream(self, between: threading.Lock) -> None:
        client = self.server.client
        while not self._stopping.is_set():
            with between:
                stream = client.chat.completions.create(
                    model=TASK, messages=[{"role": "user", "content": MESSAGE}], stream=True
                )
                chunks = list(stream)
            text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
            extra = chunks[-1].model_extra
            assert extra is not None
            self.streamed.append(Answered.of(text, extra["softcue"], chunks[-1].id))

    def _classify(self) -> None:
        with httpx.Client(timeout=30) as client:
            while not self._stopping.is_set():
                self.classified.append(classify(client, self.server, MESSAGE))


def classify(client: httpx.Client, server: Server, message: str) -> Answered:
    response = client.post(f"{server.url}/v1/tasks/{TASK}/classify", json={"inputs": {"message": message}})
    assert response.status_code == 200, response.text
    answer = response.json()
    return Answered.of(answer["label"], answer["softcue"], answer["id"])


def provider_arguments(folder: Path, port: int) -> list[str]:
    arguments = ["serve", "--port", str(port), "--store", str(folder / "provider.db"), "--base", str(BASE_FOLDER)]
    return [*arguments, "--seed", str(EXAMPLES)]


def test_a_provider_dies_and_comes_back_and_a_calibrated_cascade_takes_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SOFTCUE_JOURNEY_KEY", KEY)
    store = ("--store", tmp_path / "store.db")
    settings, fallback, cascade = (tmp_path / name for name in ("softcue.toml", "fallback.toml", "cascade.toml"))
    fallback.write_text(FALLBACK)
    cascade.write_text(CASCADE)

    with ExitStack() as servers:
        first = servers.enter_context(running(provider_arguments(tmp_path, 0), tmp_path / "provider-1.log"))
        settings.write_text(SETTINGS.format(url=first.url))
        arguments = ["serve", "--config", str(settings), "--port", "0", "--base", str(BASE_FOLDER), "--seed"]
        server = servers.enter_context(running([*arguments, str(EXAMPLES)], tmp_path / "server.log"))

        # The fine-tuned model is a version of the task, and a route puts it before the soft prompt on this machine.
        model = ("prompts", "remote", TASK, "provider", f"{TASK}@v1", "--alias", "fine-tuned")
        assert f"{TASK}@fine-tuned is v2" in softcue(*model, *store)
        assert "would change" in softcue("routes", "apply", fallback, "--dry-run", *store)
        assert "at revision 1" in softcue("routes", "apply", fallback, "--reason", "what we have", *store)

        traffic = Traffic(server)
        with traffic.flowing():
            expected = traffic.next_streamed(BY_PROVIDER).text

            # The provider is killed while requests are on their way to it.
            with traffic.between_streams():
                first.process.kill()
                first.process.wait()
            moved = traffic.next_streamed(BY_FALLBACK)
            eventually(lambda: server.metric('softcue_engine_breaker_open{backend="provider"}'), lambda open: open > 0)

            # It comes back, and takes over again once the breaker lets a request through.
            port = int(first.url.rpartition(":")[2])
            servers.enter_context(running(provider_arguments(tmp_path, port), tmp_path / "provider-2.log"))
            traffic.next_streamed(BY_PROVIDER)
            eventually(lambda: server.metric('softcue_engine_breaker_open{backend="provider"}'), lambda open: open == 0)

        answers = [*traffic.streamed, *traffic.classified]
        assert {answer.steps for answer in answers} == {BY_PROVIDER, BY_FALLBACK}
        assert {answer.text for answer in answers} == {expected}
        assert {answer.steps for answer in traffic.classified} == {BY_PROVIDER, BY_FALLBACK}

        # What became of a request can be asked for later.
        remembered = httpx.get(f"{server.url}/v1/generations/{moved.id.removeprefix('chatcmpl-')}").json()
        assert (remembered["version"], remembered["backend"], remembered["outcome"]) == ("v1", "local", "stop")
        assert [step["outcome"] for step in remembered["route"]] == ["failed", "answered"]

        # A cascade is refused until it is known how sure is sure enough.
        refused = softcue("routes", "apply", cascade, *store, code=1)
        assert f"{cascade}:5: {TASK}.route.first" in refused
        assert "no calibration for margin" in refused
        rows = EXAMPLES / TASK / "test.jsonl"
        calibrating = ("routes", "calibrate", TASK, "--version", "production", "--measure", "margin", "--data", rows)
        printed = softcue(*calibrating, "--target", "0.98", "--url", server.url, *store)
        assert f"{TASK}@v1 by margin: from 0." in printed
        assert "at revision 2" in softcue("routes", "apply", cascade, "--reason", "the soft prompt first", *store)

        messages = [json.loads(line)["inputs"]["message"] for line in rows.read_text().splitlines()[:60]]
        with httpx.Client(timeout=30) as client:
            eventually(lambda: classify(client, server, MESSAGE).steps, lambda steps: steps[0].startswith("local"))
            ways = [classify(client, server, message).steps for message in messages]
            assert set(ways) == {("local: answered",), ("local: passed_over", "provider: answered")}
            assert ways.count(("local: answered",)) > len(ways) / 2

            # And back.
            assert "at revision 3" in softcue("routes", "rollback", TASK, "--reason", "not yet", *store)
            eventually(lambda: classify(client, server, MESSAGE).steps, lambda steps: steps == BY_PROVIDER)
        history = softcue("routes", "history", TASK, *store)
        assert all(reason in history for reason in ("what we have", "the soft prompt first", "(back to 1) not yet"))

    log = (tmp_path / "server.log").read_text()
    assert "base model 'base', backends local, provider:" in log
    assert "is left alone for 1 s at a time" in log
    assert "answers again" in log
    lines = [json.loads(line) for line in log.splitlines() if line.startswith('{"id"')]
    assert {line["outcome"] for line in lines} == {"stop"}
    assert len(lines) >= len(answers) + len(ways)
    assert MESSAGE not in log.partition("Ctrl-C stops")[2]
    assert KEY not in log
    assert "Traceback" not in log
