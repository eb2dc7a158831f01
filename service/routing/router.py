"""From a plan to an answer: puts a question to the plan's route, and keeps the account of what became of it."""

from __future__ import annotations

import itertools
import secrets
import time
from collections.abc import Sequence

from service.metrics import Metrics
from service.routing.backends import Backends
from service.routing.execute import Executor
from service.routing.generation import Batch, Classification, Generation
from service.routing.leaf_classification import ClassifyWork, LabelQuestion, Priors
from service.routing.leaf_generation import GenerateWork
from service.routing.leaves import Leaves
from service.routing.plan import Plan
from service.routing.questions import Question
from service.routing.recent import Recent
from service.routing.record import Caller, Record
from service.routing.run import Failure, Run, Step, within
from service.routing.shadowing import Said, Shadows

_SHADOW_DEADLINE_S = 120.0


class Router:
    """Takes plans and questions to backends."""

    def __init__(
        self,
        backends: Backends,
        leaves: Leaves,
        executor: Executor,
        shadows: Shadows,
        recent: Recent,
        metrics: Metrics,
        signing_key: bytes,
    ) -> None:
        self.backends = backends
        self.recent = recent
        self.signing_key = signing_key
        self._leaves = leaves
        self._executor = executor
        self._shadows = shadows
        self._metrics = metrics
        self._priors = Priors()
        # Engines know requests by names of their own: who answers, and so the signed id, is known later.
        self._replica = secrets.token_hex(4)
        self._count = itertools.count(1)

    async def generate(self, plan: Plan, caller: Caller, question: Question) -> Generation:
        """Begin to answer. Raises EngineError, StoreError or RoutingError before the first token."""
        generation = self._generation(plan, caller, question)
        await generation.begin()
        return generation

    async def generate_each(self, plan: Plan, caller: Caller, questions: Sequence[Question]) -> Batch:
        """Begin to answer several questions as one; what is raised for one of them ends all."""
        batch = Batch([self._generation(plan, caller, question) for question in questions])
        await batch.begin()
        return batch

    async def classify(
        self, plan: Plan, caller: Caller, question: LabelQuestion, *, deadline_s: float | None = None
    ) -> Classification:
        """Every label of the task with its probability. Raises as `generate`, and WrongTaskKind for other tasks."""
        run = self._run(plan, caller, deadline_s)
        work = ClassifyWork(self._leaves, self._priors, question, caller.principal)
        record = self._record(run, caller, work)
        outcome, answer = "cancelled", None
        try:
            answer = await self._executor.begin(run, work)
            outcome = "stop"
        except Exception:
            outcome = "error"
            raise
        finally:
            record.answered_by(answer.target if answer is not None else run.last_target)
            if answer is not None:
                run.said.append(answer.label)
            record.end(outcome, answer.usage if answer is not None else None)
        return Classification(record.id, run, answer)

    def _generation(self, plan: Plan, caller: Caller, question: Question) -> Generation:
        run = self._run(plan, caller, question.request.deadline_s)
        work = GenerateWork(self._leaves, question, caller.principal)
        record = self._record(run, caller, work)
        record.streamed_choices = question.request.n if question.request.stream else 0
        return Generation(record, lambda: self._executor.begin(run, work))

    def _run(self, plan: Plan, caller: Caller, deadline_s: float | None) -> Run:
        """The caller's deadline, or the task's where that is earlier."""
        limits = [limit for limit in (deadline_s, plan.deadline_s) if limit is not None]
        ends_at = time.monotonic() + min(limits) if limits else None
        return Run(f"{self._replica}-{next(self._count)}", plan, caller.unit, ends_at)

    def _record(self, run: Run, caller: Caller, work: GenerateWork | ClassifyWork) -> Record:
        def ended(record: Record, outcome: str) -> None:
            self._ended(record, work, outcome)

        return Record(caller, run, self._metrics, self.signing_key, ended)

    def _ended(self, record: Record, work: GenerateWork | ClassifyWork, outcome: str) -> None:
        """Once a request: what is counted by step, what may be asked for later, what is asked once more elsewhere."""
        run = record.run
        for step in run.steps:
            self._metrics.count_step(run.plan.name, step)
        self.recent.put(
            record.id,
            {
                "id": record.id,
                "object": "generation",
                "created": record.created_s,
                "task": record.labels.task,
                "version": record.labels.version,
                "backend": record.labels.backend,
                "outcome": outcome,
                **run.document(),
            },
        )
        answered = next((step for step in run.steps if step.outcome == "answered"), None)
        if not run.shadows or answered is None or outcome in ("error", "cancelled"):
            return
        assert answered.target is not None
        assert answered.target.task is not None
        primary = Said("".join(run.said), answered)
        for route, place in run.shadows:
            asked = Plan(task=run.plan.task, route=route, daily_cost_ceiling=run.plan.daily_cost_ceiling)
            asking = self._shadow(asked, record.caller, work)
            self._shadows.start(record.id, place, answered.target.task.task, primary, asking)

    async def _shadow(self, plan: Plan, caller: Caller, work: GenerateWork | ClassifyWork) -> Said:
        """What a shadow route answers. It spends of the task's money but has time of its own: nobody waits for it."""
        run = self._run(plan, caller, _SHADOW_DEADLINE_S)
        try:
            if isinstance(work, ClassifyWork):
                answer = await self._executor.begin(run, work)
                return Said(answer.label, answer.step)
            begun = await within(run.ends_at, work.hold(await self._executor.begin(run, work)))
            assert begun.whole is not None
            return Said(begun.whole.answers[0].text, begun.step)
        except Failure as error:
            nobody = Step("route", None, time.perf_counter())
            return Said(None, run.steps[-1] if run.steps else nobody, str(error))
        finally:
            for step in run.steps:
                self._metrics.count_step(plan.name, step)
