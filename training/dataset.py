"""Examples: reading, checking, splitting by content hash, and turning them into token ids.

A row is `{"inputs": {field: text}, "answer": text}`. Nothing is dropped in silence: what cannot be used stops the run,
what does not fit the context or stands there twice is counted and named in `Findings`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from jsonschema import Draft202012Validator

from prompt_store.canonical import canonical_digest
from prompt_store.errors import InvalidInputs
from prompt_store.prompts.task import Task
from prompt_store.prompts.version import DatasetUse
from service.engines.base import Messages
from service.engines.base_model import BaseModel
from training.errors import DatasetError
from training.recipe import Recipe

_NAMED_PROBLEMS = 20


@dataclass(frozen=True)
class Example:
    """One row, and where it stands."""

    inputs: dict[str, str]
    answer: str
    place: str

    @cached_property
    def inputs_digest(self) -> str:
        """What decides the row's split: its inputs, not its answer."""
        return canonical_digest(self.inputs)


@dataclass(frozen=True)
class Tokens:
    """An example as the model sees it: prompt ids, then answer ids with the end-of-sequence token."""

    prompt: list[int]
    answer: list[int]

    @property
    def length(self) -> int:
        return len(self.prompt) + len(self.answer)


@dataclass
class Findings:
    """Rows that are not trained on, each named."""

    duplicates: list[str] = field(default_factory=list)
    too_long: list[str] = field(default_factory=list)

    def lines(self, named: int | None = None) -> list[str]:
        """What a person should know, a line each, with all rows named or the first `named`."""
        found = []
        for name, rows in (
            ("stand there twice and are used once", self.duplicates),
            ("do not fit the context and are left out", self.too_long),
        ):
            if rows:
                more = "; …" if named is not None and len(rows) > named else ""
                found.append(f"{len(rows)} rows {name}: {'; '.join(rows[:named])}{more}")
        return found


@dataclass(frozen=True)
class Dataset:
    """The rows of a run. `test` is read once, at the end."""

    train: tuple[Example, ...]
    validation: tuple[Example, ...]
    test: tuple[Example, ...]
    findings: Findings
    files: tuple[DatasetUse, ...]


def load_dataset(recipe: Recipe, task: Task, base: BaseModel) -> Dataset:
    """Read, check and split the recipe's files. Raises DatasetError naming every bad line (the first twenty)."""
    findings = Findings()
    train_file = recipe.path(recipe.data.train)
    rows = _fitting(read_examples(train_file, task, findings), task, base, recipe.prompt.length, findings)
    files = [dataset_use(train_file, len(rows))]
    if recipe.data.test is not None:
        test_file = recipe.path(recipe.data.test)
        test = _fitting(read_examples(test_file, task, findings), task, base, recipe.prompt.length, findings)
        files.append(dataset_use(test_file, len(test)))
        _refuse_shared(rows, test)
    else:
        test = [row for row in rows if _share(row, "test") < recipe.data.test_fraction]
        rows = [row for row in rows if _share(row, "test") >= recipe.data.test_fraction]
    validation = [row for row in rows if _share(row, "validation") < recipe.data.validation_fraction]
    train = [row for row in rows if _share(row, "validation") >= recipe.data.validation_fraction]
    for name, part in (("train", train), ("validation", validation), ("test", test)):
        if not part:
            raise DatasetError(f"the {name} split has no rows; add rows to {train_file} or change its fraction")
    if task.kind == "classify" and len({row.answer for row in train}) < 2:
        raise DatasetError(f"{train_file} has rows of one label only; a classifier needs at least two")
    return Dataset(tuple(train), tuple(validation), tuple(test), findings, tuple(files))


def read_examples(file: Path, task: Task, findings: Findings) -> list[Example]:
    """Every usable row of a JSONL file. Raises DatasetError that names each bad line by file, line and reason."""
    try:
        lines = file.read_text("utf-8").split("\n")  # splitlines would also split at U+2028 within a text
    except OSError as error:
        raise DatasetError(f"{file} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise DatasetError(f"{file} is not UTF-8: {error}; save it as UTF-8") from error
    validator = schema_validator(task)
    seen: dict[tuple[str, str], str] = {}
    answers: dict[str, tuple[str, str]] = {}
    rows: list[Example] = []
    problems: list[str] = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        place = f"{file}:{number}"
        example = _parse(line, place, task, validator)
        if isinstance(example, str):
            problems.append(f"{place}: {example}")
            continue
        key = (example.inputs_digest, example.answer)
        if key in seen:
            findings.duplicates.append(f"{place} repeats {seen[key]}")
            continue
        other = answers.setdefault(example.inputs_digest, (example.answer, place))
        if task.kind != "generate" and other[0] != example.answer:
            problems.append(
                f"{place}: answers {example.answer!r} but {other[1]} answers {other[0]!r} to the same inputs"
            )
            continue
        seen[key] = place
        rows.append(example)
    if problems:
        more = f"\n… and {len(problems) - _NAMED_PROBLEMS} more" if len(problems) > _NAMED_PROBLEMS else ""
        raise DatasetError(
            f"{len(problems)} rows cannot be used; correct or remove them:\n"
            + "\n".join(problems[:_NAMED_PROBLEMS])
            + more
        )
    if not rows:
        raise DatasetError(f'{file} has no rows; write one JSON object a line: {{"inputs": {{...}}, "answer": "..."}}')
    return rows


def tokenise(example: Example, task: Task, base: BaseModel) -> Tokens:
    """The token ids of an example, laid out as serving does it."""
    return Tokens(base.lay_out(Messages(task.render(example.inputs))), base.continuation(example.answer))


def _parse(line: str, place: str, task: Task, validator: Draft202012Validator | None) -> Example | str:
    """The example of a line, or the reason why there is none."""
    try:
        row: Any = json.loads(line)
    except (ValueError, RecursionError) as error:
        return f"not JSON: {error}"
    if not isinstance(row, dict) or set(row) != {"inputs", "answer"}:
        return 'not of the form {"inputs": {...}, "answer": "..."}'
    reason = why_unusable(row["inputs"], row["answer"], task, validator)
    return Example(row["inputs"], row["answer"], place) if reason is None else reason


def schema_validator(task: Task) -> Draft202012Validator | None:
    """What answers of an extract task are held against."""
    return Draft202012Validator(task.json_schema) if task.json_schema is not None else None


def why_unusable(inputs: Any, answer: Any, task: Task, validator: Draft202012Validator | None) -> str | None:
    """Why the task cannot take a row, None where it can; `validator` is its `schema_validator`."""
    if not isinstance(answer, str) or not answer.strip():
        return "answer is not a text, or empty"
    if not isinstance(inputs, dict) or not all(isinstance(value, str) for value in inputs.values()):
        return "inputs is not an object of texts"
    try:
        task.render(inputs)
    except InvalidInputs as error:
        return str(error)
    if task.kind == "classify" and answer not in task.labels:
        return f"answer {answer!r} is not among the task's labels"
    if validator is not None:
        try:
            problem = next(validator.iter_errors(json.loads(answer)), None)
        except (ValueError, RecursionError) as error:
            return f"answer is not JSON: {error}"
        if problem is not None:
            return f"answer does not fit the task's schema: {problem.message}"
    return None


def _fitting(
    rows: Sequence[Example], task: Task, base: BaseModel, prompt_length: int, findings: Findings
) -> list[Example]:
    kept = []
    for row in rows:
        length = tokenise(row, task, base).length + prompt_length
        if length > base.context_length:
            findings.too_long.append(f"{row.place} has {length} tokens of {base.context_length}")
        else:
            kept.append(row)
    return kept


def _refuse_shared(train: Sequence[Example], test: Sequence[Example]) -> None:
    known = {row.inputs_digest: row.place for row in train}
    shared = [f"{known[row.inputs_digest]} and {row.place}" for row in test if row.inputs_digest in known]
    if shared:
        named = "; ".join(shared[:_NAMED_PROBLEMS])
        raise DatasetError(f"{len(shared)} rows stand in both train and test; remove them from one: {named}")


def _share(example: Example, purpose: str) -> float:
    """A number in [0, 1) that depends on the row's inputs and the purpose alone."""
    digest = hashlib.sha256(f"{purpose}:{example.inputs_digest}".encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64


def dataset_use(file: Path, rows: int) -> DatasetUse:
    """A file and how many of its rows are used, by the content of all of it."""
    return DatasetUse(name=file.name, digest=hashlib.sha256(file.read_bytes()).hexdigest(), rows=rows)


def batches(rows: int, batch_size: int, seed: int, start: int) -> Iterator[list[int]]:
    """Row indices of step `start`, `start + 1`, …: each epoch every row once, in an order that seed and epoch give."""
    per_epoch = -(-rows // batch_size)
    step = start
    order: list[int] = []
    while True:
        epoch, within = divmod(step, per_epoch)
        if within == 0 or not order:
            order = _order(rows, seed, epoch)
        yield order[within * batch_size : (within + 1) * batch_size]
        step += 1


def _order(rows: int, seed: int, epoch: int) -> list[int]:
    """A permutation that any platform and Python version repeats: rows sorted by a hash."""
    keys = [hashlib.sha256(f"{seed}:{epoch}:{row}".encode()).digest() for row in range(rows)]
    return sorted(range(rows), key=keys.__getitem__)
