from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from prompt_store.errors import InvalidInputs, InvalidTask
from prompt_store.prompts.task import SamplingDefaults, Task, load_task, parse_task
from tests.prompt_store.building import TASK_TOML, task


def test_a_task_reads_from_toml(tmp_path: Path) -> None:
    path = tmp_path / "task.toml"
    path.write_text(TASK_TOML)
    loaded = load_task(path)
    assert loaded.labels == ("refund", "delivery")
    assert loaded.sampling == SamplingDefaults(max_tokens=8)
    assert loaded.render({"message": "hello"})[0].content == "hello"


def test_the_digest_is_of_the_content_alone() -> None:
    assert task().digest == task(description="").digest
    assert task().digest != task(description="x").digest
    assert task().digest != task(labels=["delivery", "refund"]).digest
    assert Task.model_validate_json(task().model_dump_json()).digest == task().digest


def test_the_digest_of_a_task_never_changes_between_releases() -> None:
    # Every stored revision and version rests on this value: do not edit it, keep the digest.
    assert task().digest == "98d67d9e188a081178d8956d8bb52d252c178d38578e8c1a40437ae8dbff3345"


def test_a_task_cannot_be_edited() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        task().name = "other"


EXTRACT: dict[str, Any] = {"kind": "extract", "labels": []}


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"name": "Not A Name"}, "name: 'Not A Name' is not a task name"),
        ({"kind": "summarise"}, "kind: Input should be 'generate'"),
        ({"labels": []}, "needs at least 2 labels but has 0"),
        ({"labels": ["one"]}, "needs at least 2 labels but has 1"),
        ({"labels": ["one", "one"]}, "a label is listed twice"),
        ({"labels": ["one", " "]}, "a label is empty or has spaces around it"),
        ({"kind": "generate"}, "a generate task has no labels"),
        ({"inputs": ["message", "message"]}, "an input is named twice"),
        ({"inputs": ["message", "a-b"]}, "'a-b' is not a field name"),
        ({"inputs": ["message", "unused"]}, "the input 'unused' appears in no message"),
        ({"inputs": []}, "the messages use {message}, which is not among the inputs"),
        ({"messages": []}, "messages: Tuple should have at least 1 item"),
        ({"messages": [{"role": "user", "content": "{message} }"}]}, "a lone '}' at character 10"),
        ({"messages": [{"role": "robot", "content": "{message}"}]}, "messages.1.role: Input should be 'system'"),
        ({"sampling": {"temperature": -1}}, "sampling.temperature"),
        ({"sampling": {"top_p": 0}}, "sampling.top_p"),
        ({"sampling": {"max_tokens": 0}}, "sampling.max_tokens"),
        ({"sampling": {"stop": [""]}}, "sampling.stop.1"),
        ({"metrics": [{"name": "a", "direction": "up"}]}, "metrics.1.direction"),
        ({"metrics": [{"name": "a", "direction": "maximise"}] * 2}, "two metrics have the same name"),
        ({"json_schema": {}}, "a classify task has no json_schema"),
        (EXTRACT, "an extract task needs a json_schema"),
        ({**EXTRACT, "json_schema": {"type": "objekt"}}, "json_schema is not a JSON schema at type"),
        ({**EXTRACT, "json_schema": {"$ref": "https://example.com/x"}}, "keep its definitions inside"),
        ({**EXTRACT, "json_schema": {"enum": [float("nan")]}}, "not JSON compliant"),
        ({"lables": []}, "unknown key 'lables'; did you mean 'labels'?"),
        ({"sampling": {"temprature": 1}}, "unknown key 'sampling.temprature'; did you mean 'temperature'?"),
        ({"zzz": 1}, "unknown key 'zzz'; the known keys are name, kind"),
    ],
)
def test_a_contradictory_task_is_refused_with_the_reason(changes: dict[str, Any], reason: str) -> None:
    with pytest.raises(InvalidTask) as caught:
        task(**changes)
    assert reason in str(caught.value)


def test_a_refusal_names_the_file(tmp_path: Path) -> None:
    path = tmp_path / "task.toml"
    for text, reason in [(TASK_TOML + "[samplin]\n", "did you mean 'sampling'?"), ("name = ", "is not TOML")]:
        path.write_text(text)
        with pytest.raises(InvalidTask) as caught:
            load_task(path)
        assert str(path) in str(caught.value)
        assert reason in str(caught.value)
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(InvalidTask, match="is not TOML"):
        load_task(path)
    with pytest.raises(InvalidTask, match="cannot be read"):
        load_task(tmp_path / "absent.toml")


def test_an_extract_task_keeps_its_json_schema() -> None:
    schema = {"type": "object", "properties": {"a": {"$ref": "#/$defs/a"}}, "$defs": {"a": {"type": "string"}}}
    assert task(**EXTRACT, json_schema=schema).json_schema == schema


def test_inputs_must_be_exactly_the_tasks_own() -> None:
    with pytest.raises(InvalidInputs, match="missing input 'message', unexpected input 'mesage'"):
        task().render({"mesage": "x"})


def test_a_task_without_inputs_renders_without_any() -> None:
    slogan = parse_task(
        {"name": "slogan", "kind": "generate", "inputs": [], "messages": [{"role": "user", "content": "A slogan!"}]}
    )
    assert slogan.render({})[0].content == "A slogan!"
