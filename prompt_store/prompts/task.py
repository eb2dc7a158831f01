"""A Task: what is asked. The document, its rules, its digest, and reading it from TOML.

Storing revisions is the registry's business; filling in templates is `template`'s.
"""

import tomllib
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from jsonschema import Draft202012Validator
from jsonschema.exceptions import SchemaError
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator

from prompt_store.canonical import canonical_digest, canonical_json
from prompt_store.errors import InvalidName, InvalidTask, nearest_name
from prompt_store.ledger.automatic import AUTOMATIC
from prompt_store.ledger.entries import DEMONSTRATION
from prompt_store.names import check_task_name, check_texts
from prompt_store.prompts.template import FIELD_NAME, Message, fill_in, render_messages, template_fields

__all__ = ["Message", "Metric", "SamplingDefaults", "Task", "load_task", "parse_task", "render_messages"]

TASK_SCHEMA = "softcue.task/1"

_FROZEN = ConfigDict(frozen=True, extra="forbid", hide_input_in_errors=True)


def _task_name(name: str) -> str:
    try:
        return check_task_name(name)
    except InvalidName as error:
        raise ValueError(str(error)) from error


class SamplingDefaults(BaseModel):
    """How answers are drawn when the request does not say; `top_k` 0 means every token."""

    model_config = _FROZEN

    max_tokens: int = Field(default=128, ge=1)
    temperature: float = Field(default=0.0, ge=0.0, le=2.0, allow_inf_nan=False)
    top_p: float = Field(default=1.0, gt=0.0, le=1.0, allow_inf_nan=False)
    top_k: int = Field(default=0, ge=0)
    stop: tuple[Annotated[str, Field(min_length=1)], ...] = Field(default=(), max_length=16)


class Metric(BaseModel):
    """What answers are judged by, which way is better, and of which type an outcome's value is."""

    model_config = _FROZEN

    name: str = Field(min_length=1, max_length=64)
    direction: Literal["maximise", "minimise"]
    type: Literal["number", "boolean", "text"] = "number"


class Task(BaseModel):
    """What is asked. Immutable: an edit is a new Task with another digest, kept as a new revision.

    The constructor raises pydantic's ValidationError; `parse_task` and `load_task` raise InvalidTask.
    """

    model_config = _FROZEN

    name: Annotated[str, AfterValidator(_task_name)]
    kind: Literal["generate", "classify", "extract"]
    description: str = ""
    inputs: tuple[str, ...]
    messages: tuple[Message, ...] = Field(min_length=1)
    labels: tuple[str, ...] = ()
    json_schema: dict[str, Any] | None = None
    sampling: SamplingDefaults = SamplingDefaults()
    metrics: tuple[Metric, ...] = ()

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        self._check_inputs()
        self._check_labels()
        self._check_json_schema()
        metric_names = [metric.name for metric in self.metrics]
        if len(set(metric_names)) < len(metric_names):
            raise ValueError("two metrics have the same name; name each metric once")
        return self

    def _check_inputs(self) -> None:
        for field in self.inputs:
            if not FIELD_NAME.fullmatch(field):
                raise ValueError(
                    f"{field!r} is not a field name; use letters, digits and '_', not starting with a digit"
                )
        if len(set(self.inputs)) < len(self.inputs):
            raise ValueError("an input is named twice; name each input once")
        used = template_fields(self.messages)
        unknown = [field for field in used if field not in self.inputs]
        if unknown:
            raise ValueError(f"the messages use {{{unknown[0]}}}, which is not among the inputs; add it to `inputs`")
        unused = [field for field in self.inputs if field not in used]
        if unused:
            raise ValueError(f"the input {unused[0]!r} appears in no message; use {{{unused[0]}}} or remove the input")

    def _check_labels(self) -> None:
        if self.kind != "classify":
            if self.labels:
                raise ValueError(f"a {self.kind} task has no labels; remove them or make its kind 'classify'")
            return
        if any(not label or label != label.strip() for label in self.labels):
            raise ValueError("a label is empty or has spaces around it; write each label trimmed")
        if len(set(self.labels)) < len(self.labels):
            raise ValueError("a label is listed twice; list each label once")
        if len(self.labels) < 2:
            raise ValueError(
                f"a classify task needs at least 2 labels but has {len(self.labels)}; list them in `labels`"
            )

    def _check_json_schema(self) -> None:
        if self.kind != "extract":
            if self.json_schema is not None:
                raise ValueError(f"a {self.kind} task has no json_schema; remove it or make its kind 'extract'")
            return
        if self.json_schema is None:
            raise ValueError("an extract task needs a json_schema; describe the JSON it should answer with")
        try:
            Draft202012Validator.check_schema(self.json_schema)
            canonical_json(self.json_schema)
        except SchemaError as error:
            place = "/".join(str(step) for step in error.absolute_path) or "its top"
            raise ValueError(
                f"json_schema is not a JSON schema at {place}: {error.message}; correct it there"
            ) from error
        except RecursionError as error:
            raise ValueError("json_schema is nested too deeply; flatten it") from error
        _refuse_remote_references(self.json_schema)

    def document(self) -> dict[str, Any]:
        """The whole task as JSON values, defaults included, except metrics' types: digests are older than those."""
        document = self.model_dump(mode="json")
        for metric in document["metrics"]:
            if metric["type"] == "number":
                del metric["type"]
        return document

    @cached_property
    def digest(self) -> str:
        """SHA-256 over the canonical JSON of the whole document, defaults included.

        A field added to this class later must be left out here while it holds its default, or every stored digest
        would change under its users.
        """
        return canonical_digest({"schema": TASK_SCHEMA, **self.document()})

    def render(self, inputs: Mapping[str, str]) -> tuple[Message, ...]:
        """The task's messages for these inputs. Raises InvalidInputs naming missing and unexpected fields."""
        return fill_in(self.messages, inputs, self.inputs)


def parse_task(document: Mapping[str, Any], *, source: str = "task") -> Task:
    """Raises InvalidTask giving `source`, the place and the reason; an unknown key names the nearest known one."""
    # Not the model's own rules: it also reads what the store took in before there were these.
    check_texts(f"text of {source}", document, InvalidTask)
    try:
        task = Task.model_validate(dict(document))
    except ValidationError as error:
        raise InvalidTask(f"{source}: {_explain(error)}") from error
    taken = next((metric.name for metric in task.metrics if metric.name in (*AUTOMATIC, DEMONSTRATION)), None)
    if taken is not None:
        raise InvalidTask(f"{source}: every task has the metric {taken!r} already; leave it out, or rename your own")
    return task


def load_task(path: Path | str) -> Task:
    """Reads a task from TOML. Raises InvalidTask naming the file and the reason."""
    try:
        with open(path, "rb") as file:
            document = tomllib.load(file)
    except OSError as error:
        raise InvalidTask(f"{path}: cannot be read ({error.strerror}); give the path of a task's TOML file") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise InvalidTask(f"{path}: is not TOML: {error}; correct it there") from error
    return parse_task(document, source=str(path))


_TABLES: dict[str, type[BaseModel]] = {"messages": Message, "sampling": SamplingDefaults, "metrics": Metric}


def _explain(error: ValidationError) -> str:
    problem = error.errors(include_url=False, include_input=False)[0]
    place = tuple(problem["loc"])
    where = ".".join(str(step + 1) if isinstance(step, int) else step for step in place)
    if problem["type"] == "extra_forbidden":
        table = _TABLES.get(str(place[0]), Task) if len(place) > 1 else Task
        known = list(table.model_fields)
        near = nearest_name(str(place[-1]), known)
        hint = f"did you mean {near!r}?" if near else f"the known keys are {', '.join(known)}"
        return f"unknown key {where!r}; {hint}"
    reason = problem["msg"].removeprefix("Value error, ")
    return f"{where}: {reason}" if where else reason


def _refuse_remote_references(value: Any) -> None:
    # A schema that names an address would have its validator fetch it.
    if isinstance(value, dict):
        for keyword in ("$ref", "$dynamicRef"):
            target = value.get(keyword)
            if isinstance(target, str) and not target.startswith("#"):
                raise ValueError(f"json_schema refers to {target!r}; keep its definitions inside, under $defs")
        for inner in value.values():
            _refuse_remote_references(inner)
    elif isinstance(value, list):
        for inner in value:
            _refuse_remote_references(inner)
