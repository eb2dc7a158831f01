"""From a task in production to a better prompt and to data of what users liked: the real command line, a real server,
the official client. The version in production is noise, and what the repository tuned is tried against it.
"""

from __future__ import annotations

import html
import json
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
from openai import OpenAI

from prompt_store.prompts.artifact import Artifact, write_artifact
from service.engines.base_model import BaseModel
from tests.conftest import BASE_FOLDER, random_prompt
from tests.processes import eventually, running, softcue

EXAMPLES = BASE_FOLDER.parent
TASK = "support_intents"
UNITS = 400

SETTINGS = """
[base]
path = "{base}"

[store]
url = "store.db"
seed = "{examples}"

[captures.support_intents]
sample = 1.0
"""

METRIC = """
[[metrics]]
name = "helpful"
direction = "maximise"
type = "boolean"
"""

EXPERIMENT = """
name = "tuned"
task = "support_intents"
control = "noise"
metric = "helpful"

[[arms]]
name = "noise"                  # the task's route as it is
weight = 0.5

[[arms]]
name = "tuned"
weight = 0.5
version = "v1"

[[guardrails]]
metric = "error"
margin = 0.2
"""

RECIPE = """
base = "{base}"
task = "task.toml"

[data]
train = "data/train.jsonl"
test = "data/test.jsonl"

[prompt]
length = 15
initialise = "labels"

[optimise]
max_steps = 4
evaluate_every = 4
warmup_steps = 1

[baseline]
text = "Name the intent."

[gate]
metric = "accuracy"
minimum_gain = -1.0
"""


@dataclass(frozen=True)
class Asked:
    """An answer that a unit got, and what it should have been."""

    unit: str
    message: str
    expected: str
    id: str
    answer: str
    arm: str | None

    @property
    def right(self) -> bool:
        return self.answer == self.expected


@dataclass(frozen=True)
class Callers:
    """Whoever asks the service and reports to it."""

    url: str
    client: OpenAI
    web: httpx.Client

    def ask(self, number: int, row: dict[str, Any], way: int) -> Asked:
        """The unit is told as `unit` at /v1/tasks, or as `user` or `metadata` of the official client, by `way`."""
        unit, message = f"user {number}", row["inputs"]["message"]
        if way % 3 == 0:
            body = {"inputs": {"message": message}, "unit": unit}
            answer = self.post(f"tasks/{TASK}/classify", body).raise_for_status().json()
            return Asked(unit, message, row["answer"], answer["id"], answer["label"], answer["softcue"].get("arm"))
        told: dict[str, Any] = {"user": unit} if way % 3 == 1 else {"metadata": {"unit": unit}}
        messages: Any = [{"role": "user", "content": message}]
        chat = self.client.chat.completions.create(model=TASK, messages=messages, **told)
        assert chat.model_extra is not None
        arm = chat.model_extra["softcue"].get("arm")
        return Asked(unit, message, row["answer"], chat.id, chat.choices[0].message.content or "", arm)

    def report(self, answers: list[Asked]) -> None:
        """Whether each was helpful, told singly and then all in one batch; and of some what should have been said."""
        for each in answers[:20]:
            told = self.post(f"generations/{each.id}/outcomes", {"metric": "helpful", "value": each.right})
            assert told.status_code == 202
        batch = [{"generation": each.id, "metric": "helpful", "value": each.right} for each in answers]
        batch += [{"generation": each.id, "metric": "demonstration", "value": each.expected} for each in shown(answers)]
        assert self.post("outcomes", {"outcomes": batch}).status_code == 202

    def post(self, path: str, body: dict[str, Any]) -> httpx.Response:
        return self.web.post(f"{self.url}/v1/{path}", json=body)

    def get(self, path: str) -> httpx.Response:
        return self.web.get(f"{self.url}/v1/{path}").raise_for_status()


def shown(answers: list[Asked]) -> list[Asked]:
    """Those of which somebody says what the answer should have been."""
    return answers[::10]


def exported(folder: Path) -> dict[str, str]:
    """The messages of an export with their answers."""
    lines = [line for side in ("train", "test") for line in (folder / f"{side}.jsonl").read_text().splitlines()]
    rows = [json.loads(line) for line in lines]
    return {row["inputs"]["message"]: row["answer"] for row in rows}


def test_a_better_version_is_found_promoted_and_its_traffic_tuned_on(tmp_path: Path, base: BaseModel) -> None:
    store, log, data = ("--store", tmp_path / "store.db"), tmp_path / "server.log", tmp_path / "data"
    settings = write(tmp_path / "softcue.toml", SETTINGS.format(base=BASE_FOLDER, examples=EXAMPLES))
    task = write(tmp_path / "task.toml", (EXAMPLES / TASK / "task.toml").read_text() + METRIC)
    tuned = write(tmp_path / "tuned.toml", EXPERIMENT)
    recipe = write(tmp_path / "recipe.toml", RECIPE.format(base=BASE_FOLDER))
    noise = tmp_path / "noise.safetensors"
    write_artifact(noise, Artifact(random_prompt(3, 8), TASK, base.fingerprint))
    rows = [json.loads(line) for line in (EXAMPLES / TASK / "train.jsonl").read_text().splitlines()][:UNITS]

    with ExitStack() as opened:
        server = opened.enter_context(running(["serve", "--config", str(settings), "--port", "0"], log))
        client, web = opened.enter_context(server.client), opened.enter_context(httpx.Client(timeout=30))
        callers = Callers(server.url, client, web)
        softcue("prompts", "apply-task", task, *store)
        softcue("prompts", "publish", TASK, noise, "--alias", "production", *store)
        started = softcue("experiments", "start", tuned, "--reason", "is it better than noise?", *store)
        assert "tuned runs on support_intents" in started
        other = write(tmp_path / "other.toml", EXPERIMENT.replace('name = "tuned"', 'name = "other"', 1))
        assert "`softcue experiments stop tuned`" in softcue("experiments", "start", other, *store, code=1)
        first = eventually(lambda: callers.ask(0, rows[0], 0), lambda asked: asked.arm is not None)

        # Every unit sees one arm, however it is told and asked again.
        with ThreadPoolExecutor(4) as asking:
            answers = list(asking.map(lambda number: callers.ask(number, rows[number], number), range(UNITS)))
            again = list(asking.map(lambda number: callers.ask(number, rows[number], number + 1), range(30)))
        arms = {each.unit: each.arm for each in answers}
        assert set(arms.values()) == {"noise", "tuned"}
        assert all(each.arm == arms[each.unit] for each in (first, *again))

        forged = answers[0].id[:-4] + answers[1].id[-4:]
        refused = callers.post(f"generations/{forged}/outcomes", {"metric": "helpful", "value": True})
        assert (refused.status_code, refused.json()["error"]["code"]) == (404, "generation_not_found")
        callers.report(answers)

        # What is known is the same over HTTP and at the command line, the sentence first.
        def all_counted(found: Any) -> bool:
            return found["units"] == sum(arm["valued"] for arm in found["metrics"][0]["arms"]) == UNITS

        found = eventually(lambda: callers.get("experiments/tuned").json(), all_counted)
        sentence = found["sentence"]
        assert sentence.startswith("Promote tuned: helpful is ")
        assert (found["verdict"], found["sample_ratio"]["mismatch"]) == ("promote", False)
        for arm in found["metrics"][0]["arms"]:
            right = [each.right for each in answers if each.arm == arm["arm"]]
            assert arm["mean"]["estimate"] == pytest.approx(sum(right) / len(right))
        assert {(each["arm"], each["label"]) for each in found["served"]} == {("noise", "v2"), ("tuned", "v1")}
        assert softcue("experiments", "show", "tuned", *store).splitlines()[0] == sentence
        assert json.loads(softcue("experiments", "show", "tuned", "--json", *store))["metrics"] == found["metrics"]
        page = callers.get("experiments/tuned/report")
        assert page.headers["content-type"].startswith("text/html")
        assert html.escape(sentence, quote=False) in page.text
        assert page.text.count("<svg") == 5

        # The alias moves to the arm that won, and the split is gone.
        softcue("experiments", "promote", "tuned", "tuned", "--reason", "far better", *store)
        assert "promoted: tuned" in softcue("experiments", "list", *store)
        eventually(lambda: callers.ask(0, rows[0], 0), lambda asked: asked.arm is None)
        assert json.loads(softcue("prompts", "show", f"{TASK}@production", "--json", *store))["number"] == 1
        history = softcue("experiments", "history", "tuned", *store)
        assert all(reason in history for reason in ("far better", "is it better than noise?"))

        # What helped and what should have been said is data, and what a unit left is erased from it.
        exporting = ("dataset", "export", "--task", TASK, "--where", "outcome.helpful = true", "--to", data)
        assert "demonstrated" in softcue(*exporting, *store)
        expected = {each.message: each.expected for each in answers if each.right or each in shown(answers)}
        messages = exported(data)
        assert messages == expected
        gone = next(each for each in answers if each.right)
        erased = web.delete(f"{server.url}/v1/units/{gone.unit}").raise_for_status().json()["erased"]
        assert min(erased[table] for table in ("exposures", "answers", "outcomes", "captures")) >= 1
        softcue(*exporting, *store)
        assert exported(data).keys() == messages.keys() - {gone.message}

        # It is tuned on, and served without a restart.
        printed = softcue("tune", "soft-prompt", recipe, "--runs", tmp_path / "runs", *store)
        assert "Not evaluated here, as only reported outcomes say it: helpful" in printed
        assert "Published as support_intents@v3" in printed
        eventually(lambda: [model.id for model in client.models.list()], lambda ids: f"{TASK}@v3" in ids)

    assert gone.message not in log.read_text().partition("Ctrl-C stops")[2]
    assert "Traceback" not in log.read_text()


def write(file: Path, text: str) -> Path:
    file.write_text(text)
    return file
