"""Examples from captured traffic: which answers are taken, as what, and which of them are held out.

A demonstration, the answer that somebody said should have been given, is the row's answer; other answers are rows where
the caller wants them. Nothing is dropped in silence: what is left out is counted and named in `Chosen`.

A unit (a user, say) is never on both sides, and neither are equal inputs. A unit's side depends on its hash alone, so
it is the same in every later export. Inputs that units of both sides sent are trained on, by the answers that the
training side's units got: so rows may leave the test side as traffic grows, and none that was trained on enters it.
"""

from __future__ import annotations

import hashlib
import json
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field

from prompt_store.ledger.automatic import AUTOMATIC
from prompt_store.ledger.captured import CapturedRow
from prompt_store.ledger.entries import DEMONSTRATION
from prompt_store.ledger.metrics import find_metric
from prompt_store.prompts.task import Task
from training.conditions import OUTCOME, Kind, Value
from training.dataset import Example, schema_validator, why_unusable
from training.errors import DatasetError

VERSION = "version"
_NO_INPUTS = "it was a conversation or raw text, without the task's inputs"


@dataclass(frozen=True, slots=True)
class TrafficRow:
    """An example of one unit; its `place` is the generation. `demonstrated` where the answer is a demonstration."""

    example: Example
    unit: str
    demonstrated: bool
    at_ms: int


@dataclass
class Chosen:
    """What an export is made of, demonstrations first and then the newest, and the generations that are no part of it.

    `unusable` are by the reason why the task cannot take them; `shared` are a held-out unit's whose inputs a unit that
    is trained on sent too.
    """

    train: list[TrafficRow] = field(default_factory=list)
    test: list[TrafficRow] = field(default_factory=list)
    captured: int = 0
    unwanted: list[str] = field(default_factory=list)
    unusable: dict[str, list[str]] = field(default_factory=dict)
    repeated: list[str] = field(default_factory=list)
    corrected: list[str] = field(default_factory=list)
    conflicting: list[str] = field(default_factory=list)
    shared: list[str] = field(default_factory=list)
    over_limit: list[str] = field(default_factory=list)

    def left_out(self) -> dict[str, Sequence[str]]:
        """Generations that are no row, by why."""
        reasons: dict[str, Sequence[str]] = {
            "are not asked for": self.unwanted,
            **{f"cannot be used: {reason}": requests for reason, requests in self.unusable.items()},
            "repeat the inputs and answer of a row": self.repeated,
            "have a demonstration with the same inputs, which says otherwise": self.corrected,
            "answer otherwise than a row with the same inputs, which is no worse and newer": self.conflicting,
            "are held out but have the inputs of a row that is trained on": self.shared,
            "are more than the limit": self.over_limit,
        }
        return {reason: requests for reason, requests in reasons.items() if requests}


def known_names(task: Task) -> dict[str, Kind]:
    """What a condition may speak of."""
    own = [metric.name for metric in task.metrics if metric.name not in AUTOMATIC]
    return {
        **{f"{OUTCOME}{name}": find_metric(task, name).type for name in (*own, DEMONSTRATION)},
        **{name: metric.type for name, metric in AUTOMATIC.items()},
        "experiment": "text",
        "arm": "text",
        VERSION: "text",
    }


def facts_of(row: CapturedRow) -> dict[str, Value | None]:
    """What is known of one generation, by the names of `known_names`; its version by digest."""
    return {
        **row.facts,
        **{f"{OUTCOME}{name}": value for name, value in row.outcomes.items()},
        "experiment": row.experiment or None,
        "arm": row.arm or None,
        VERSION: row.entry.version,
    }


def choose(
    rows: Iterable[CapturedRow],
    task: Task,
    wanted: Callable[[CapturedRow], bool],
    *,
    test_fraction: float,
    limit: int | None = None,
) -> Chosen:
    """Rows for the task as it is now. `wanted` is asked of what was not demonstrated; about `test_fraction` of the
    units are held out, none where it is 0."""
    chosen = Chosen()
    alike: dict[str, list[TrafficRow]] = defaultdict(list)
    for row in _usable(rows, task, wanted, chosen):
        alike[row.example.inputs_digest].append(row)
    found = [_best(same, test_fraction, chosen) for same in alike.values()]
    found.sort(key=lambda row: (row.demonstrated, row.at_ms, row.example.place), reverse=True)
    chosen.over_limit = [row.example.place for row in found[limit:]] if limit is not None else []
    for row in found[:limit]:
        (chosen.test if held_out(row.unit, test_fraction) else chosen.train).append(row)
    return chosen


def held_out(unit: str, test_fraction: float) -> bool:
    """Whether a unit is on the test side: a larger fraction only adds units to it."""
    digest = hashlib.sha256(f"test unit:{unit}".encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64 < test_fraction


def refuse_empty(chosen: Chosen, task: str, test_fraction: float) -> None:
    """Raises DatasetError where a side has no row that should have."""
    if not chosen.captured:
        raise DatasetError(
            f"nothing of task {task!r} is captured; have the service capture it, by its settings, and wait for requests"
        )
    reasons = "; ".join(f"{len(requests)} {reason}" for reason, requests in chosen.left_out().items())
    if not chosen.train and not chosen.test:
        raise DatasetError(f"none of {chosen.captured} captured generations of {task!r} is a row: {reasons}")
    for name, side in (("train", chosen.train), ("test", chosen.test)):
        if not side and (name == "train" or test_fraction):
            raise DatasetError(
                f"all rows are of units on one side, so {name}.jsonl would be empty; choose another --test-fraction, "
                "wait for more units, or give a file that ends in .jsonl to hold none out"
            )


def jsonl(rows: Sequence[TrafficRow]) -> bytes:
    """As `softcue tune` reads them."""
    lines = ({"inputs": row.example.inputs, "answer": row.example.answer} for row in rows)
    return "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines).encode()


def _usable(
    rows: Iterable[CapturedRow], task: Task, wanted: Callable[[CapturedRow], bool], chosen: Chosen
) -> Iterator[TrafficRow]:
    """Those that are wanted and that the task can take; the others are noted in `chosen`."""
    validator = schema_validator(task)
    for row in rows:
        chosen.captured += 1
        entry, shown = row.entry, row.outcomes.get(DEMONSTRATION)
        if shown is None and not wanted(row):
            chosen.unwanted.append(entry.request)
            continue
        answer = entry.answer if shown is None else str(shown)
        inputs = entry.inputs
        reason = _NO_INPUTS if inputs is None else why_unusable(inputs, answer, task, validator)
        if reason is not None:
            chosen.unusable.setdefault(reason, []).append(entry.request)
            continue
        assert inputs is not None
        # A request without a unit is one of its own.
        unit = entry.unit_hash or entry.request
        yield TrafficRow(Example(inputs, answer, entry.request), unit, shown is not None, entry.at_ms)


def _best(same: Sequence[TrafficRow], test_fraction: float, chosen: Chosen) -> TrafficRow:
    """The one of rows with the same inputs that is used: demonstrated before others, then the newest."""
    trained = [row for row in same if not held_out(row.unit, test_fraction)]
    if trained:
        chosen.shared += [row.example.place for row in same if held_out(row.unit, test_fraction)]
    best, *others = sorted(
        trained or same, key=lambda row: (row.demonstrated, row.at_ms, row.example.place), reverse=True
    )
    for row in others:
        if row.example.answer == best.example.answer:
            chosen.repeated.append(row.example.place)
        elif best.demonstrated and not row.demonstrated:
            chosen.corrected.append(row.example.place)
        else:
            chosen.conflicting.append(row.example.place)
    return best
