"""`softcue dataset export`, from what a store has captured to what training reads."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from prompt_store.access import ANONYMOUS
from prompt_store.database import Database
from prompt_store.ledger.entries import DEMONSTRATION
from prompt_store.prompts.registry import NewVersion, Registry
from prompt_store.prompts.task import Message, parse_task
from prompt_store.prompts.version import TextPayload
from service.engines.base_model import BaseModel
from tests.training.recipes import THINGS, write_recipe
from tests.training.traffic import Asked
from training.commands.dataset import app
from training.dataset import load_dataset
from training.recipe import load_recipe

SEEN = {"red": "looks like fire", "blue": "looks like the sea"}


class Traffic:
    """A store with the task `colours`, and what was captured of it."""

    def __init__(self, folder: Path, store: str) -> None:
        self.folder, self.store = folder, store
        metrics = [{"name": "helpful", "direction": "maximise", "type": "boolean"}]
        messages = [{"role": "user", "content": "{message}"}]
        task = {"name": "colours", "kind": "classify", "inputs": ["message"], "labels": ["red", "blue"]}
        with Database.open(self.store) as database:
            registry = Registry(database)
            self.task = parse_task({**task, "messages": messages, "metrics": metrics})
            registry.apply_task(self.task, ANONYMOUS)
            new = NewVersion("colours", TextPayload(messages=(Message(role="user", content="{message}?"),)))
            self.version = registry.publish(new, "production", "a test", ANONYMOUS).version

    def happens(self, *asked: Asked) -> None:
        with Database.open(self.store) as database:
            Registry(database).add_entries([entry for one in asked for entry in one.entries()])

    def invoke(self, *arguments: str, to: str = "data") -> Result:
        return CliRunner().invoke(
            app, ["export", "--task", "colours", "--to", str(self.folder / to), *arguments, "--store", self.store]
        )

    def export(self, *arguments: str, to: str = "data") -> Any:
        result = self.invoke(*arguments, "--json", to=to)
        assert result.exit_code == 0, result.output
        return json.loads(result.stdout)

    def refusal(self, *arguments: str) -> str:
        result = self.invoke(*arguments)
        assert result.exit_code == 1, result.output
        assert not (self.folder / "data").exists()
        return str(result.stderr)

    def rows(self, name: str) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (self.folder / name).read_text("utf-8").splitlines()]

    def messages(self, name: str) -> set[str]:
        return {row["inputs"]["message"] for row in self.rows(name)}


@pytest.fixture
def traffic(tmp_path: Path, location: str) -> Traffic:
    """On SQLite, and in another run of the same test on PostgreSQL."""
    return Traffic(tmp_path, location)


def everyday(first: int = 0, units: int = 40) -> list[Asked]:
    """Each unit asks about three things; half of the answers are right and said to be helpful."""
    found = []
    for number in range(first, first + 3 * units):
        unit, thing = f"unit-{number % units}", THINGS[number % len(THINGS)]
        right, wrong = ("red", "blue") if number % 4 < 2 else ("blue", "red")
        good = number % 2 == 0
        found.append(
            Asked(
                f"r{number}", f"the {thing} of {unit} {SEEN[right]} {number}", right if good else wrong, unit,
                outcomes={"helpful": good}, latency_ms=100.0 + number, at_ms=number,
            )
        )  # fmt: skip
    return found


def test_answers_that_were_helpful_are_what_training_reads(traffic: Traffic, base: BaseModel) -> None:
    traffic.happens(*everyday(), Asked("d1", "a coat like fire", "blue", "unit-1", outcomes={DEMONSTRATION: "red"}))
    recipe = write_recipe(
        traffic.folder / "run", **{'"train.jsonl"': '"../data/train.jsonl"', '"test.jsonl"': '"../data/test.jsonl"'}
    )
    said = traffic.export("--where", "outcome.helpful = true and latency_ms < 200", "--test-fraction", "0.3")
    dataset = load_dataset(load_recipe(recipe), traffic.task, base)
    assert len(dataset.train) + len(dataset.validation) == said["files"]["train"]["rows"]
    assert len(dataset.test) == said["files"]["test"]["rows"]
    rows = [*dataset.train, *dataset.validation, *dataset.test]
    assert len(rows) == 50 + 1
    assert all(SEEN[row.answer].split()[-1] in row.inputs["message"] for row in rows)
    assert said["captured"] == 121
    assert {reason: len(requests) for reason, requests in said["left_out"].items()} == {"are not asked for": 70}


def test_demonstrations_stand_first_in_their_file(traffic: Traffic) -> None:
    traffic.happens(
        Asked("r1", "the sea", "blue", "u1", at_ms=9),
        Asked("r2", "a fire", "blue", "u2", outcomes={DEMONSTRATION: "red"}, at_ms=1),
    )
    traffic.export("--all", to="rows.jsonl")
    assert [(row["inputs"]["message"], row["answer"]) for row in traffic.rows("rows.jsonl")] == [
        ("a fire", "red"),
        ("the sea", "blue"),
    ]
    traffic.export("--demonstrations-only", to="rows.jsonl")
    assert traffic.messages("rows.jsonl") == {"a fire"}


def test_a_second_export_after_more_traffic_keeps_every_unit_on_its_side(traffic: Traffic) -> None:
    traffic.happens(*everyday())
    traffic.export("--all", to="first")
    traffic.happens(*everyday(120))
    traffic.export("--all", to="second")
    for side in ("train", "test"):
        first, second = traffic.messages(f"first/{side}.jsonl"), traffic.messages(f"second/{side}.jsonl")
        assert first < second
        units = {message.split()[3] for message in first}
        assert units == {message.split()[3] for message in second}


def test_an_export_replaces_the_files_of_the_one_before(traffic: Traffic) -> None:
    traffic.happens(*everyday())
    traffic.export("--all")
    before = traffic.rows("data/train.jsonl")
    traffic.export("--where", "outcome.helpful = true")
    assert 0 < len(traffic.rows("data/train.jsonl")) < len(before)
    assert sorted(file.name for file in (traffic.folder / "data").iterdir()) == ["test.jsonl", "train.jsonl"]


def test_the_summary_names_what_is_left_out_and_the_lines_for_a_recipe(traffic: Traffic) -> None:
    traffic.happens(*everyday(), Asked("chat", None, "red"))
    result = traffic.invoke("--all")
    assert result.exit_code == 0, result.output
    lines = result.stdout.splitlines()
    assert lines[0] == "colours: 121 captured generations"
    assert f"{traffic.folder / 'data' / 'train.jsonl'}: " in lines[1]
    assert "left out: 1 cannot be used: it was a conversation or raw text, without the task's inputs: chat" in lines
    data = traffic.folder / "data"
    assert lines[-3:] == ["[data]", f'train = "{data / "train.jsonl"}"', f'test = "{data / "test.jsonl"}"']


def test_a_version_is_named_by_number_or_alias(traffic: Traffic) -> None:
    traffic.happens(Asked("r1", "old", "red"), Asked("r2", "new", "red", version=traffic.version.digest))
    for name in ("v1", "production", traffic.version.digest[:12]):
        traffic.export("--where", f"version = '{name}'", to="rows.jsonl")
        assert traffic.messages("rows.jsonl") == {"new"}
    assert "no version 'v7'" in traffic.refusal("--where", "version = 'v7'")


@pytest.mark.parametrize(
    ("where", "said"),
    [
        ("outcome.helpfull = true", "character 1: nothing is called outcome.helpfull; did you mean outcome.helpful?"),
        ("outcome.helpful = 'yes'", "outcome.helpful is not compared with 'yes'; give true or false"),
        ("outcome.helpful = true and", "character 27: it ends there; a name"),
        ("latency_ms > 1e6", "none of 120 captured generations of 'colours' is a row: 120 are not asked for"),
    ],
)
def test_a_condition_that_cannot_be_used_is_refused_and_nothing_is_written(
    traffic: Traffic, where: str, said: str
) -> None:
    traffic.happens(*everyday())
    assert said in traffic.refusal("--where", where)


def test_what_is_not_known_is_refused(traffic: Traffic) -> None:
    assert "nothing of task 'colours' is captured" in traffic.refusal("--all")
    result = CliRunner().invoke(app, ["export", "--task", "colour", "--all", "--to", "x", "--store", traffic.store])
    assert result.exit_code == 1
    assert "did you mean 'colours'?" in result.stderr


@pytest.mark.parametrize(
    ("arguments", "to", "said"),
    [
        ([], "data", "nothing is known to be right; give one of --where"),
        (["--all", "--demonstrations-only"], "data", "give one of --where"),
        (["--all", "--test-fraction", "0.2"], "rows.jsonl", "is one file, which holds nothing out"),
        (["--all", "--test-fraction", "0.9"], "data", "less than or equal to 0.5"),
    ],
)
def test_arguments_that_leave_open_what_is_meant_are_refused(
    traffic: Traffic, arguments: list[str], to: str, said: str
) -> None:
    result = traffic.invoke(*arguments, to=to)
    assert result.exit_code == 2
    assert said in " ".join(result.stderr.replace("│", " ").split())
