"""`softcue routes calibrate` against a service of ours, and against one that answers what a test says."""

from __future__ import annotations

import asyncio
import math
import threading
from collections.abc import Callable, Iterator
from contextlib import aclosing
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from prompt_store.access import ANONYMOUS
from prompt_store.database import Database
from prompt_store.prompts.registry import NewVersion, Registry
from prompt_store.prompts.task import Message, load_task
from prompt_store.prompts.version import PromptVersion, TextPayload
from service.engines.base import ScoreRequest
from service.engines.base_model import BaseModel
from service.engines.scripted import ScriptedEngine, words
from tests.conftest import random_prompt
from tests.service.serving import COPY, INTENTS, listening, open_store
from tests.training.recipes import TASK, write_rows
from tests.training.scripted_service import Answer, scripted_service
from training.asking import Question, ask_each
from training.calibrating import Judged
from training.commands.tuning import calibrating
from training.dataset import Example
from training.errors import CalibrationError
from training.scorers import SCORERS

Service = Callable[[str, dict[str, Any]], Answer]


class Setting:
    """A store with one version of a task of two labels, and rows to calibrate it on."""

    def __init__(self, folder: Path) -> None:
        self.store = str(folder / "softcue.db")
        (folder / "task.toml").write_text(TASK)
        with Database.open(self.store) as database:
            registry = Registry(database)
            registry.apply_task(load_task(folder / "task.toml"), ANONYMOUS)
            new = NewVersion("colours", TextPayload(messages=(Message(role="user", content="{message}?"),)))
            self.version: PromptVersion = registry.publish(new, "candidate", "a test", ANONYMOUS).version
            self.task = registry.task("colours").task
        self.data = folder / "validation.jsonl"
        self.rows: list[dict[str, Any]] = [
            {"inputs": {"message": f"row {number}"}, "answer": "red"} for number in range(40)
        ]
        write_rows(self.data, self.rows)

    def calibrate(self, url: str, *more: str, target: str = "0.95", version: str = "v1") -> Result:
        # No other command stands beside it here, so it needs no name.
        arguments = ["colours", "--version", version, "--measure", "margin", "--data", str(self.data)]
        arguments += ["--target", target, "--url", url, "--store", self.store, *more]
        return CliRunner().invoke(calibrating, arguments)

    def stored(self) -> Any:
        with Database.open(self.store) as database:
            return Registry(database).calibrations("colours")


@pytest.fixture
def setting(tmp_path: Path) -> Setting:
    return Setting(tmp_path)


def classified(label: str, margin: float | None, **more: Any) -> Answer:
    return 200, {"label": label, "version": "colours@v1", "confidence": {"margin": margin}, **more}


def by_number(_: str, body: dict[str, Any]) -> Answer:
    """Rows 20 to 39 are right, and surer the higher the number; one has no confidence."""
    number = int(body["inputs"]["message"].split()[1])
    return classified("red" if number >= 20 else "blue", None if number == 39 else number / 100)


def test_a_threshold_is_found_by_asking_every_row_and_kept_with_the_version(setting: Setting) -> None:
    asked: list[tuple[str, dict[str, Any]]] = []

    def service(path: str, body: dict[str, Any]) -> Answer:
        asked.append((path, body))
        return by_number(path, body)

    with scripted_service(service) as url:
        result = setting.calibrate(f"{url}/v1", "--reason", "the first one", version="candidate", target="0.99")
    assert result.exit_code == 0, result.output
    assert {path for path, _ in asked} == {"/v1/tasks/colours/classify"}
    assert sorted(body["inputs"]["message"] for _, body in asked) == sorted(
        row["inputs"]["message"] for row in setting.rows
    )
    assert all(body["version"] == setting.version.digest and body["confidence"] == ["margin"] for _, body in asked)
    (calibration,) = setting.stored()
    assert calibration.version == setting.version.digest
    assert (calibration.measure, calibration.threshold, calibration.target) == ("margin", 0.2, 0.99)
    assert (calibration.accuracy, calibration.accepted_share, calibration.rows) == (1.0, 19 / 40, 40)
    assert len(calibration.dataset) == 64
    assert "from 0.2 on, 19 of 40 answers are accepted (47.5%), with accuracy 100.0% (95% interval" in result.stdout
    assert "at random, for the same cost: 50.0% (95% interval" in result.stdout
    assert "1 of 40 answers had no confidence" in result.stdout


@pytest.mark.parametrize(
    ("document", "measure", "value"), [(INTENTS, "margin", 0.4), (COPY, "quantile_logprob:0.5", -0.125)]
)
def test_a_service_of_ours_tells_what_is_asked_of_it(
    tmp_path: Path, base: BaseModel, document: dict[str, Any], measure: str, value: float
) -> None:
    store = open_store(tmp_path / "softcue.db", base)
    task = store.task(document)
    store.publish(task.name, random_prompt(1, 4))
    right = "get refund" if task.kind == "classify" else "red"
    rows = [
        {"inputs": dict.fromkeys(task.inputs, str(n)), "answer": right if n >= 10 else "greeting"} for n in range(30)
    ]
    write_rows(tmp_path / "rows.jsonl", rows)

    def scores(request: ScoreRequest) -> list[float]:
        """The surer of the first label, the higher the number that it is asked about."""
        best = 0.5 + int("".join(words(request.prompt))) / 100
        return [math.log(best), math.log((1 - best) / 2), math.log((1 - best) / 2)]

    engine = ScriptedEngine(lambda _: ["red"], scores)
    arguments = [task.name, "--version", "v1", "--measure", measure, "--data", str(tmp_path / "rows.jsonl")]
    with listening(store, engine) as url:
        arguments += ["--target", "1" if task.kind == "classify" else "0.5", "--url", url, "--store", store.location]
        result = CliRunner().invoke(calibrating, arguments)
    assert result.exit_code == 0, result.output
    (calibration,) = store.registry.calibrations(task.name)
    assert calibration.threshold == pytest.approx(value)
    assert calibration.accepted_share == (20 / 30 if task.kind == "classify" else 1.0)
    store.registry.database.close()


def refused(setting: Setting, service: Service, **more: str) -> str:
    with scripted_service(service) as url:
        result = setting.calibrate(url, **more)
    assert result.exit_code == 1, result.output
    assert setting.stored() == []
    return " ".join(result.stderr.split())


def test_a_target_out_of_reach_stores_nothing(setting: Setting) -> None:
    said = refused(setting, lambda *_: classified("blue", 0.5), target="0.9")
    assert "no threshold reaches 0.9: the best accepts 40 of 40 rows with 0; aim lower" in said


def test_too_few_rows_store_nothing(setting: Setting) -> None:
    write_rows(setting.data, setting.rows[:19])
    assert "19 rows are too few" in refused(setting, by_number)


def test_what_the_service_refuses_is_said_with_the_row(setting: Setting) -> None:
    said = refused(setting, lambda *_: (404, {"error": {"message": "nothing has that name; look again"}}))
    assert "validation.jsonl:" in said
    assert "the service answered 404: nothing has that name; look again" in said


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        ((200, {"label": "red", "version": "colours@v1"}), "has no confidence by margin; upgrade the service"),
        ((200, "red"), "has no confidence by margin"),
        ((200, [1]), "has no confidence by margin"),
        (classified("red", 0.5, version="colours@v9"), "colours@v9 answered instead of colours@v1"),
        ((500, "<html>"), "the service answered 500: Internal Server Error"),
    ],
)
def test_an_answer_that_is_none_is_refused(setting: Setting, answer: Answer, reason: str) -> None:
    assert reason in refused(setting, lambda *_: answer)


def test_a_service_that_is_not_there_is_named(setting: Setting) -> None:
    with scripted_service(by_number) as url:
        pass
    result = setting.calibrate(url)
    assert result.exit_code == 1
    assert f"{url} does not answer" in " ".join(result.stderr.split())


@pytest.mark.parametrize(
    ("more", "reason"),
    [(("--measure", "entropy"), "no measure of confidence"), (("--version", "v9"), "v9")],
)
def test_what_cannot_be_measured_is_refused_before_anything_is_asked(
    setting: Setting, more: tuple[str, str], reason: str
) -> None:
    result = setting.calibrate("http://127.0.0.1:9", *more)
    assert result.exit_code == 1
    assert reason in result.stderr


def question(setting: Setting) -> Question:
    label = f"colours@{setting.version.label}"
    return Question(setting.task, setting.version.digest, label, "margin", SCORERS["accuracy"])


def examples(count: int) -> list[Example]:
    return [Example({"message": f"row {number}"}, "red", f"rows:{number}") for number in range(count)]


async def ask(url: str, setting: Setting, count: int, *, concurrency: int = 4, **more: Any) -> list[Judged]:
    async with aclosing(ask_each(url, question(setting), examples(count), concurrency, **more)) as answers:
        return [answer async for answer in answers]


async def test_a_full_service_is_asked_again_when_it_says(setting: Setting) -> None:
    turned_away: Iterator[Answer] = iter([(429, {}), (503, {})])
    waited: list[float] = []

    async def sleep(seconds: float) -> None:
        waited.append(seconds)

    with scripted_service(lambda *_: next(turned_away, classified("red", 0.5))) as url:
        assert await ask(url, setting, 1, sleep=sleep) == [Judged(0.5, 1.0)]
    assert waited == [7.0, 2.0]


async def test_a_service_that_stays_full_is_given_up(setting: Setting) -> None:
    waited: list[float] = []

    async def sleep(seconds: float) -> None:
        waited.append(seconds)

    full = pytest.raises(CalibrationError, match="rows:0: the service answered 429: 9 requests wait")
    with scripted_service(lambda *_: (429, {"error": {"message": "9 requests wait"}})) as url, full:
        await ask(url, setting, 1, sleep=sleep)
    assert len(waited) == 5


async def test_no_more_rows_are_asked_at_once_than_were_allowed(setting: Setting) -> None:
    lock, together = threading.Lock(), threading.Barrier(3)
    running, most = 0, 0

    def service(_: str, __: dict[str, Any]) -> Answer:
        nonlocal running, most
        with lock:
            running += 1
            most = max(most, running)
        together.wait(10)  # so many do come at once
        with lock:
            running -= 1
        return classified("red", 0.5)

    with scripted_service(service) as url:
        assert len(await ask(url, setting, 9, concurrency=3)) == 9
    assert most == 3


async def test_whoever_stops_listening_stops_the_asking(setting: Setting) -> None:
    asked = threading.Semaphore(0)
    release = threading.Event()

    def service(_: str, body: dict[str, Any]) -> Answer:
        asked.release()
        if body["inputs"]["message"] != "row 0":
            assert release.wait(10)
        return classified("red", 0.5)

    with scripted_service(service) as url:
        answers = ask_each(url, question(setting), examples(50), 2)
        assert await anext(answers) == Judged(0.5, 1.0)
        await asyncio.wait_for(answers.aclose(), 10)
        release.set()
    count = 0
    while asked.acquire(blocking=False):
        count += 1
    assert count <= 3


@pytest.mark.parametrize("value", ["NaN", "Infinity", '"0.5"', "true", "null"])
async def test_what_is_no_number_is_no_confidence(setting: Setting, value: str) -> None:
    body = f'{{"label": "red", "version": "colours@v1", "confidence": {{"margin": {value}}}}}'
    with scripted_service(lambda *_: (200, body)) as url:
        assert await ask(url, setting, 1) == [Judged(None, 1.0)]
