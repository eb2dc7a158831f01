"""The whole of it, as its users meet it: the real command line, a real server on a real port, the official client."""

from __future__ import annotations

import os
import re
import shlex
import signal
import sqlite3
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path

import httpx
import openai
import pytest

from tests.conftest import BASE_FOLDER
from tests.processes import Server, eventually, running, softcue, start
from tests.training.recipes import write_recipe


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    """A server with an empty store."""
    arguments = ["serve", "--port", "0", "--store", str(tmp_path / "store.db"), "--base", str(BASE_FOLDER)]
    with running(arguments, tmp_path / "server.log") as server:
        yield server


def test_what_the_example_server_prints_works_as_printed(tmp_path: Path) -> None:
    config = BASE_FOLDER.parent / "softcue.toml"
    arguments = ["serve", "--config", str(config), "--port", "0", "--store", str(tmp_path / "store.db")]
    log = tmp_path / "server.log"
    with running(arguments, log) as server:
        printed = eventually(log.read_text, lambda text: "Ctrl-C stops" in text)
        for task in ("support_intents", "product_copy", "data_questions"):
            assert re.search(rf"{task} .*production = v1", printed)
        curl = re.search(r"^  curl -s (\S+) -H '(\S+): (\S+)' -d (.*)$", printed, re.MULTILINE)
        assert curl
        url, header, value, body = curl.groups()
        answer = httpx.post(url, headers={header: value}, content=shlex.split(body)[0]).json()
        snippet = re.search(r"openai client:\n((?:  .*\n)+)", printed)
        assert snippet
        result = subprocess.run(
            [sys.executable, "-c", textwrap.dedent(snippet[1])], capture_output=True, text=True, timeout=60
        )
        assert result.returncode == 0, result.stderr
        assert result.stdout.strip() == answer["label"]
        served = server.client.models.list().data
        assert {"demo-base", "support_intents", "product_copy@v1"} <= {model.id for model in served}


def test_tune_publish_serve_stream_roll_back_and_survive(server: Server, tmp_path: Path) -> None:
    store = ("--store", tmp_path / "store.db")
    tuning = ("tune", "soft-prompt", "--runs", tmp_path / "runs")
    client = server.client

    # Nothing is published yet: the task is unknown, the bare base answers.
    with pytest.raises(openai.NotFoundError):
        client.chat.completions.create(model="colours", messages=[{"role": "user", "content": "x"}])
    assert [model.id for model in client.models.list()] == ["base"]

    # Tune in another process, publish, and see it served without a restart.
    printed = softcue(*tuning, write_recipe(tmp_path / "first"), *store)
    assert "Published as colours@v1" in printed
    eventually(lambda: [model.id for model in client.models.list()], lambda ids: "colours@v1" in ids)
    softcue("prompts", "alias", "colours", "production", "v1", *store)
    eventually(lambda: [model.id for model in client.models.list()], lambda ids: "colours" in ids)

    def ask(model: str = "colours") -> tuple[str | None, str | None]:
        answer = client.chat.completions.create(
            model=model, messages=[{"role": "user", "content": "the car looks like fire"}], max_tokens=12
        )
        return answer.system_fingerprint, answer.choices[0].message.content

    fingerprint, first_answer = ask()
    assert fingerprint is not None
    assert fingerprint.startswith("colours@v1:")

    # Stream with the official client: the pieces are the whole answer.
    stream = client.chat.completions.create(
        model="colours",
        messages=[{"role": "user", "content": "the car looks like fire"}],
        max_tokens=12,
        stream=True,
        stream_options={"include_usage": True},
    )
    chunks = list(stream)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == first_answer
    assert chunks[-1].usage is not None

    # Labels with probabilities.
    labels = httpx.post(f"{server.url}/v1/tasks/colours/classify", json={"inputs": {"message": "the sea"}}).json()
    assert {label["label"] for label in labels["labels"]} == {"red", "blue"}
    assert sum(label["probability"] for label in labels["labels"]) == pytest.approx(1.0)

    # Disconnect mid-stream: the engine frees the sequence.
    body = {
        "model": "base",
        "prompt": "The house stood",
        "max_tokens": 900,
        "temperature": 0,
        "stream": True,
    }
    with httpx.stream("POST", f"{server.url}/v1/completions", json=body, timeout=30) as response:
        lines = response.iter_lines()  # held, because dropping it closes the response
        next(lines)
        assert server.metric("softcue_engine_running") == 1
    eventually(lambda: server.metric("softcue_engine_running"), lambda used: used == 0)
    with httpx.Client(timeout=30) as impatient, pytest.raises(httpx.ReadTimeout):
        impatient.post(f"{server.url}/v1/completions", json={**body, "stream": False}, timeout=0.2)
    eventually(lambda: server.metric("softcue_engine_running"), lambda used: used == 0)

    # A second version takes production over while requests run; moving the alias back brings the old answers back.
    second = write_recipe(tmp_path / "second", **{"seed = 1": "seed = 2", "max_steps = 8": "max_steps = 4"})
    softcue(*tuning, second, *store)
    softcue("prompts", "alias", "colours", "production", "candidate", *store)
    eventually(ask, lambda answer: str(answer[0]).startswith("colours@v2:"))
    assert ask("colours@v1")[1] == first_answer
    softcue("prompts", "alias", "colours", "production", "v1", "--reason", "worse", *store)
    assert eventually(ask, lambda answer: str(answer[0]).startswith("colours@v1:"))[1] == first_answer
    assert "worse" in softcue("prompts", "history", "colours", "production", *store)

    # The engine is killed: what was in flight ends in an error, and requests are answered again.
    cut = client.completions.create(model="base", prompt="The house stood", max_tokens=900, temperature=0, stream=True)
    next(cut)
    killed = server.engine_process()
    os.kill(killed, signal.SIGKILL)
    with pytest.raises(openai.APIError, match="engine was lost"):
        list(cut)
    assert ask() == (fingerprint, first_answer)
    assert server.metric("softcue_engine_restarts_total") == 1

    # Ctrl-C lets the running stream end, then everything stops and nothing is left.
    running = client.completions.create(
        model="base", prompt="The house stood", max_tokens=60, temperature=0, stream=True
    )
    next(running)
    engine = server.engine_process()
    assert engine != killed
    server.process.send_signal(signal.SIGINT)
    assert list(running)[-1].choices[0].finish_reason in ("stop", "length")
    assert server.process.wait(30) == 0
    assert "softcue: stopped" in server.log.read_text()
    assert not Path(f"/proc/{engine}").exists()


def test_a_stream_beyond_the_grace_ends_in_an_error_not_in_silence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SOFTCUE_SERVER_DRAIN_S", "0.2")
    arguments = ["serve", "--port", "0", "--store", str(tmp_path / "store.db"), "--base", str(BASE_FOLDER)]
    with running(arguments, tmp_path / "server.log") as server:
        stream = server.client.completions.create(
            model="base", prompt="The house stood", max_tokens=900, temperature=0, stream=True
        )
        next(stream)
        server.process.send_signal(signal.SIGTERM)
        with pytest.raises(openai.APIError, match="the service is stopping"):
            list(stream)
        assert server.process.wait(30) == 0
        assert "Traceback" not in server.log.read_text()


def test_requests_that_wait_for_the_store_keep_no_others_waiting(server: Server, tmp_path: Path) -> None:
    def write() -> int:
        url = f"{server.url}/v1/prompts/colours/aliases/production"
        return httpx.delete(url, headers={"if-match": "*"}, timeout=60).status_code

    def store_answers() -> bool:
        try:
            return httpx.get(f"{server.url}/v1/prompts", timeout=1).is_success
        except httpx.ReadTimeout:
            return False

    question = {
        "model": "base",
        "messages": [{"role": "user", "content": "x"}],
        "max_tokens": 4,
        "response_format": {"type": "json_object"},
    }
    database = sqlite3.connect(tmp_path / "store.db", isolation_level=None)
    with closing(database), ThreadPoolExecutor(40) as writers:
        database.execute("BEGIN IMMEDIATE")
        try:
            waiting = [writers.submit(write) for _ in range(40)]
            eventually(store_answers, lambda answers: not answers)
            # Its grammar is checked in a thread.
            answer = httpx.post(f"{server.url}/v1/chat/completions", json=question, timeout=20)
            assert (answer.status_code, any(write.done() for write in waiting)) == (200, False)
        finally:
            database.execute("ROLLBACK")
        assert {write.result() for write in waiting} == {404}


def test_a_port_in_use_and_a_missing_base_are_told_apart_with_remedies(server: Server, tmp_path: Path) -> None:
    port = server.url.rpartition(":")[2]
    taken = softcue("serve", "--port", port, "--store", tmp_path / "s.db", "--base", BASE_FOLDER, code=1)
    assert f"cannot listen on 127.0.0.1:{port}" in taken
    assert "see --port" in taken
    missing = softcue("serve", "--port", "0", "--store", tmp_path / "s.db", "--base", tmp_path / "nowhere", code=1)
    assert "no base model at" in missing
    assert "enabled = false" not in missing
    settings = tmp_path / "softcue.toml"
    settings.write_text('[backends.a]\nkind = "openai_compatible"\nurl = "http://127.0.0.1:1/v1"\n')
    remote = softcue("serve", "--config", settings, "--port", "0", "--base", tmp_path / "nowhere", code=1)
    assert "Without a base model, [engine] enabled = false serves the backends" in remote
    assert "Traceback" not in taken + missing


def test_ctrl_c_during_training_leaves_a_checkpoint_and_the_same_command_resumes(tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path / "r", **{"max_steps = 8": "max_steps = 3000\npatience = 1000"})
    arguments = [
        "tune", "soft-prompt", str(recipe), "--store", str(tmp_path / "s.db"), "--runs", str(tmp_path / "runs"),
    ]  # fmt: skip
    with (tmp_path / "log").open("w") as output:
        process = start(arguments, output)
        try:
            checkpoints = tmp_path / "runs"
            eventually(lambda: list(checkpoints.glob("*/checkpoint.safetensors")), bool, 60)
            process.send_signal(signal.SIGINT)
            assert process.wait(60) == 130
        finally:
            if process.poll() is None:
                process.kill()
            process.wait()
    printed = (tmp_path / "log").read_text()
    stopped = re.search(r"Stopped after step (\d+)", printed)
    assert stopped, printed
    with (tmp_path / "log2").open("w") as output:
        again = start(arguments, output)
        try:
            eventually(lambda: "Resumed from" in (tmp_path / "log2").read_text(), bool, 60)
            again.send_signal(signal.SIGINT)
            again.wait(60)
        finally:
            if again.poll() is None:
                again.kill()
            again.wait()
    assert f"Resumed from the checkpoint of step {stopped[1]}" in (tmp_path / "log2").read_text()
