"""What is written down of a request: that a unit is about to see an arm, how it ended, and its texts where a task's
operator has opted in. Nothing here keeps a request from being answered: what cannot be written is counted as lost.
"""

from __future__ import annotations

import json
import logging
import random
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from prompt_store.ledger.entries import Answered, Captured, Entry, Exposure
from prompt_store.prompts.revisions import TaskRevision
from prompt_store.prompts.task import Task
from prompt_store.prompts.unreadable import Unreadable
from service.engines.base import Messages, Prompt, RawText
from service.ledger.journal import JournalUnavailable
from service.metrics import Metrics
from service.routing.execute import Exposed
from service.routing.extracting import extract
from service.routing.leaf_classification import ClassifyWork, LabelQuestion
from service.routing.leaf_generation import GenerateWork
from service.routing.questions import Question, only_input
from service.routing.record import Record
from service.routing.run import Run

log = logging.getLogger(__name__)

_DAY_MS = 24 * 3600 * 1000
_UNFINISHED = ("error", "cancelled")


@dataclass(frozen=True, slots=True)
class Capturing:
    """How a task's requests are captured: which share, for how many days, and what is done to each text before."""

    sample: float
    retention_days: float
    redact: Callable[[str], str] = str

    def redacted(self, text: str) -> str:
        """What may be kept of a text. Raises TypeError where the hook gives something else, and whatever it raises."""
        kept: str = self.redact(text)
        if type(kept) is not str:  # nor can the journal write a kind of text of somebody's own
            raise TypeError(f"it gave {type(kept).__name__} instead of text")
        return kept


class Recorder:
    """Appends entries. `captures` are by task; `draw` gives numbers in [0, 1) for samples."""

    def __init__(
        self,
        append: Callable[[Entry], object],
        captures: Mapping[str, Capturing],
        metrics: Metrics,
        draw: Callable[[], float] = random.random,
    ) -> None:
        self._append = append
        self._captures = captures
        self._metrics = metrics
        self._draw = draw
        self._hooks_failing: set[str] = set()
        self._losing = False

    def begin(self, run: Run) -> None:
        """Decide whether the request is captured."""
        capturing = self._captures.get(run.plan.name)
        run.captured = capturing is not None and self._draw() < capturing.sample
        run.listened |= run.captured

    def expose(self, run: Run, exposed: Exposed) -> None:
        """A unit is about to be answered by an arm."""
        task = run.plan.task
        assert task is not None
        experiment = task.experiments[exposed.experiment]
        extracts = not isinstance(task.revision, Unreadable) and task.revision.task.kind == "extract"
        run.listened |= experiment.judge is not None or extracts
        self._write(
            Exposure(
                request=run.id,
                task=task.name,
                experiment=exposed.experiment,
                arm=exposed.assigned.arm,
                allocation=exposed.allocation,
                probability=exposed.assigned.probability,
                unit_hash=run.unit_hash,
                version=exposed.version,
                forced=exposed.forced,
                at_ms=_now_ms(),
                principal=run.caller.principal.name,
            )
        )

    def end(self, record: Record, work: GenerateWork | ClassifyWork, outcome: str) -> None:
        """How it ended, and what was said; only of what is to be analysed or captured."""
        run, target = record.run, record.target
        if not run.experiment and not run.captured:
            return
        task = target.task.task if target is not None and target.task is not None else None
        version = target.version.digest if target is not None and target.version is not None else ""
        text = "".join(run.said)
        finished = outcome not in _UNFINISHED
        usage = record.usage
        self._write(
            Answered(
                request=run.id,
                task=run.plan.name,
                experiment=run.experiment,
                arm=run.arm,
                unit_hash=run.unit_hash,
                version=version,
                backend=record.labels.backend,
                outcome=outcome,
                latency_ms=record.elapsed_s * 1000.0,
                first_token_ms=record.first_token_s * 1000.0 if record.first_token_s is not None else None,
                cost=run.cost,
                prompt_tokens=usage.prompt_tokens if usage is not None else None,
                completion_tokens=record.completion_tokens if usage is not None else None,
                refused=(run.refused or outcome == "content_filter") if finished else None,
                valid_json=extract(task, text).invalid is None
                if finished and task is not None and task.kind == "extract" and run.listened
                else None,
                at_ms=_now_ms(),
                principal=run.caller.principal.name,
            )
        )
        if run.captured and finished and target is not None and target.task is not None:
            self._capture(record, work, target.task, version, text)

    def _capture(
        self, record: Record, work: GenerateWork | ClassifyWork, task: TaskRevision, version: str, answer: str
    ) -> None:
        run = record.run
        capturing = self._captures[run.plan.name]
        given, prompt = _asked(task.task, work.question)
        try:
            inputs = None
            if given is not None:
                inputs = {name: capturing.redacted(text) for name, text in given.items()}
            prompt, answer = capturing.redacted(prompt), capturing.redacted(answer)
        except Exception:  # the hook is its operator's own code, and no text is kept that it did not pass
            self._metrics.captures_failed.labels(run.plan.name).inc()
            if run.plan.name not in self._hooks_failing:
                self._hooks_failing.add(run.plan.name)
                log.exception("the redaction of task '%s' failed, so such requests are not captured", run.plan.name)
            return
        at_ms = _now_ms()
        self._write(
            Captured(
                request=run.id,
                task=run.plan.name,
                revision=task.digest,
                version=version,
                unit_hash=run.unit_hash,
                inputs=inputs,
                prompt=prompt,
                answer=answer,
                at_ms=at_ms,
                expires_ms=at_ms + round(capturing.retention_days * _DAY_MS),
                principal=run.caller.principal.name,
            )
        )

    def _write(self, entry: Entry) -> None:
        try:
            self._append(entry)
        except JournalUnavailable as error:  # whoever asked is answered all the same
            if not self._losing:
                log.error("what requests leave behind is lost until it can be written again: %s", error)
            self._losing = True
        else:
            self._losing = False


def _asked(task: Task, question: Question | LabelQuestion) -> tuple[Mapping[str, str] | None, str]:
    """Inputs by the task's fields, or without them the text.

    A conversation of more than a single turn is kept whole, as its answer is due to all of it.
    """
    if question.inputs is not None:
        return question.inputs, ""
    prompt = question.request.prompt
    alone = isinstance(prompt, Messages) and len(prompt.messages) == 1
    inputs = only_input(task, prompt) if alone else None
    return (inputs, "") if inputs is not None else (None, _as_text(prompt))


def _as_text(prompt: Prompt) -> str:
    """A conversation as JSON, raw text as it is; token ids are no text."""
    if isinstance(prompt, Messages):
        turns = [{"role": turn.role, "content": turn.content} for turn in prompt.messages]
        return json.dumps(turns, ensure_ascii=False)
    return prompt.text if isinstance(prompt, RawText) else ""


def _now_ms() -> int:
    return int(time.time() * 1000)
