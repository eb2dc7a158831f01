"""Judges: a sample of an experiment's answers is put before another task, and its verdict is an outcome of theirs.

Bounded, and never in the way: a judge is asked when the answer has ended, and where too many are asked already it is
left out and counted. Being asked exposes nobody to an experiment and is not judged itself.
"""

from __future__ import annotations

import logging
import math
import random
import re
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Literal

from prompt_store.errors import InvalidOutcome, StoreError
from prompt_store.experiments.experiment import Judge
from prompt_store.ledger.entries import HOLDOUT, Outcome
from prompt_store.ledger.metrics import checked_value, find_metric
from prompt_store.prompts.registry import TaskSnapshot
from prompt_store.prompts.task import Task
from prompt_store.prompts.unreadable import readable
from service.engines.base import GenerationRequest, Messages
from service.generation_ids import GenerationTag
from service.ledger.journal import JournalUnavailable
from service.routing.background import Background
from service.routing.errors import RoutingError
from service.routing.extracting import extract
from service.routing.leaf_classification import LabelQuestion
from service.routing.outcome_rules import outcome_of, revision_with
from service.routing.plan import Plan
from service.routing.questions import Question, only_input
from service.routing.run import Run
from service.routing.shadowing import Said

log = logging.getLogger(__name__)

# `unclear` is a verdict without a number that the metric could have.
JudgementOutcome = Literal["recorded", "unclear", "failed", "left_out"]

ANSWER = "answer"
"""The input by which a judge's task is given what it is to judge."""

SCORE = "score"
"""The field of an extract task's answer that is its verdict."""

_AT_ONCE = 16
_NUMBER = re.compile(r"(?<![\w.])[-+]?\d+(?:\.\d+)?(?:[eE][-+]?\d+)?(?!\w|\.\d)")
_AROUND = " \t\r\n.!\"'`*"


@dataclass(frozen=True, slots=True)
class Judged:
    """An answer that is to be judged: its generation, its task, who asked for it, with what inputs, and its text.

    Where its inputs are not known, it is left out.
    """

    tag: GenerationTag
    task: TaskSnapshot
    principal: str
    inputs: Mapping[str, str] | None
    answer: str


# Asks a plan something aside; see `Router`.
Ask = Callable[[Plan, Question | LabelQuestion], Awaitable[Said]]


class Judges:
    """Those that are asked now.

    `resolve` says who answers for a task and a version of it, `append` journals a verdict, `count(task, outcome)` is
    told how each judgement ended, and `draw` gives numbers in [0, 1) for samples.
    """

    def __init__(
        self,
        resolve: Callable[[str, str | None], Plan],
        append: Callable[[Outcome], object],
        count: Callable[[str, JudgementOutcome], object],
        draw: Callable[[], float] = random.random,
        at_once: int = _AT_ONCE,
    ) -> None:
        self._resolve = resolve
        self._append = append
        self._count = count
        self._draw = draw
        self._background = Background(at_once)
        self._told: dict[str, str] = {}  # by task why its answers are not judged, as it was logged last

    def drawn(self, run: Run) -> Judge | None:
        """The judge of the experiment that a run counts for, where its answer is among the sample."""
        experiment = run.plan.task.experiments.get(run.experiment) if run.plan.task is not None else None
        judge = experiment.judge if experiment is not None and run.arm != HOLDOUT else None
        return judge if judge is not None and self._draw() < judge.sample else None

    def start(self, judge: Judge, judged: Judged, ask: Ask) -> None:
        """Have it judged in the background. Returns at once."""
        if judged.inputs is not None and self._background.has_room():
            self._background.start(self._judge(judge, judged, judged.inputs, ask))
        else:
            self._count(judged.tag.task, "left_out")

    async def close(self) -> None:
        """End those that are under way, and begin no others."""
        await self._background.close()

    async def _judge(self, judge: Judge, judged: Judged, inputs: Mapping[str, str], ask: Ask) -> None:
        outcome: JudgementOutcome = "left_out"
        try:
            outcome = await self._judgement(judge, judged, inputs, ask)
        except (StoreError, RoutingError, JournalUnavailable) as error:
            outcome = "failed"
            if self._told.get(judged.tag.task) != str(error):
                self._told[judged.tag.task] = str(error)
                log.warning("answers of task '%s' are not judged: %s", judged.tag.task, error)
        except Exception:
            outcome = "failed"
            log.exception("a judgement of task '%s' failed by a fault of the service's own", judged.tag.task)
        finally:
            self._count(judged.tag.task, outcome)

    async def _judgement(self, judge: Judge, judged: Judged, inputs: Mapping[str, str], ask: Ask) -> JudgementOutcome:
        plan = self._resolve(judge.task, judge.version)
        assert plan.task is not None
        said = await ask(plan, _question(readable(plan.task.revision).task, {**inputs, ANSWER: judged.answer}))
        if said.text is None:
            return "failed"
        assert said.step.target is not None
        assert said.step.target.task is not None
        number = verdict(said.step.target.task.task, said.text, judge.scores)
        if number is None:
            return "unclear"
        tag = judged.tag
        rules = revision_with(judge.metric, judged.task, tag.version)
        if find_metric(rules, judge.metric).type == "boolean" and number in (0.0, 1.0):
            number = bool(number)
        try:
            value = checked_value(rules, judge.metric, number)
        except InvalidOutcome:
            return "unclear"
        at_ms = round(time.time() * 1000)
        self._append(outcome_of(tag, judge.metric, value, at_ms, source="judge", principal=judged.principal))
        return "recorded"


def judged_inputs(task: Task, question: Question | LabelQuestion) -> Mapping[str, str] | None:
    """The inputs that a question came with, by the task's fields; None where it has none.

    Of a longer conversation the judge would not know what the answer was to, and raw text is a prompt already.
    """
    return question.inputs if question.inputs is not None else only_input(task, question.request.prompt)


def verdict(task: Task, text: str, scores: Mapping[str, float]) -> float | None:
    """The number that a judge's answer stands for; None where it stands for none, or for several.

    `scores` are by label or text, whose case and closing marks do not count.
    """
    if task.kind != "extract":
        return _number(text, scores)
    parsed = extract(task, text).parsed
    match parsed.get(SCORE) if isinstance(parsed, dict) else None:
        case bool() | int() | float() as number:
            return _finite(number)
        case str() as said:
            return _number(said, scores)
    return None


def _question(task: Task, inputs: Mapping[str, str]) -> Question | LabelQuestion:
    if task.kind == "classify":
        return LabelQuestion(inputs)
    return Question(GenerationRequest(id="", prompt=Messages(())), inputs=inputs, constrained=True)


def _number(text: str, scores: Mapping[str, float]) -> float | None:
    said = _plain(text)
    for name, score in scores.items():
        if _plain(name) == said:
            return _finite(score)
    found = _NUMBER.findall(text)
    return _finite(float(found[0])) if len(found) == 1 else None


def _plain(text: str) -> str:
    return text.strip(_AROUND).casefold()


def _finite(number: float) -> float | None:
    try:
        found = float(number)
    except OverflowError:
        return None
    return found if math.isfinite(found) else None
