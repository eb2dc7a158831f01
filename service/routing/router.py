"""From a plan to an answer: puts a question to the plan's route, and keeps the account of what became of it."""

from __future__ import annotations

import dataclasses
import itertools
import secrets
import time
from collections.abc import Sequence

from prompt_store.access import Principal
from service.generation_ids import unit_hash, verify
from service.ledger.recording import Recorder
from service.metrics import Metrics
from service.routing.backends import Backends
from service.routing.execute import Executor
from service.routing.generation import Batch, Classification, Generation
from service.routing.judging import Judged, Judges, judged_inputs
from service.routing.leaf_classification import ClassifyWork, LabelQuestion, Priors
from service.routing.leaf_generation import GenerateWork
from service.routing.leaves import Leaves
from service.routing.plan import Plan, require_arm
from service.routing.questions import Question
from service.routing.recent import Recent
from service.routing.record import Record
from service.routing.run import Caller, Failure, Run, Step, within
from service.routing.shadowing import Said, Shadows

_ASIDE_DEADLINE_S = 120.0


class Router:
    """Takes plans and questions to backends."""

    def __init__(
        self,
        backends: Backends,
        leaves: Leaves,
        executor: Executor,
        shadows: Shadows,
        judges: Judges,
        recent: Recent,
        recorder: Recorder,
        metrics: Metrics,
        signing_key: bytes,
    ) -> None:
        self.backends = backends
        self.recent = recent
        self.signing_key = signing_key
        self._leaves = leaves
        self._executor = executor
        self._shadows = shadows
        self._judges = judges
        self._recorder = recorder
        self._metrics = metrics
        self._priors = Priors()
        # A request's own name is unique among all replicas; its signed id has it, once it is known who answers.
        self._replica = secrets.token_hex(8)
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
        record = self._record(run, work)
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
                run.said.append(answer.label)  # whether somebody listens or not
            record.end(outcome, answer.usage if answer is not None else None)
        return Classification(record.id, run, answer)

    def _generation(self, plan: Plan, caller: Caller, question: Question) -> Generation:
        run = self._run(plan, caller, question.request.deadline_s)
        work = GenerateWork(self._leaves, question, caller.principal)
        record = self._record(run, work)
        record.streamed_choices = question.request.n if question.request.stream else 0
        return Generation(record, lambda: self._executor.begin(run, work))

    def _run(self, plan: Plan, caller: Caller, deadline_s: float | None) -> Run:
        """The caller's deadline, or the task's where that is earlier. Raises InvalidRequest for an arm there is not."""
        if caller.arm:
            require_arm(plan, caller.arm)
        limits = [limit for limit in (deadline_s, plan.deadline_s) if limit is not None]
        ends_at = time.monotonic() + min(limits) if limits else None
        identity = f"{self._replica}-{next(self._count)}"
        unit = caller.unit or identity
        hashed = unit_hash(unit, self.signing_key)
        run = Run(identity, plan, caller, unit, hashed, ends_at)
        self._recorder.begin(run)
        return run

    def _record(self, run: Run, work: GenerateWork | ClassifyWork) -> Record:
        def ended(record: Record, outcome: str) -> None:
            self._ended(record, work, outcome)

        return Record(run, self._metrics, self.signing_key, ended)

    def _ended(self, record: Record, work: GenerateWork | ClassifyWork, outcome: str) -> None:
        """Once a request: what is counted by step, what may be asked for later, what is asked once more elsewhere."""
        run = record.run
        for step in run.steps:
            self._metrics.count_step(run.plan.name, step)
        self._recorder.end(record, work, outcome)
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
        if answered is None or outcome in ("error", "cancelled"):
            return
        judge = self._judges.drawn(run)
        if not run.shadows and judge is None:
            return
        assert answered.target is not None
        assert answered.target.task is not None
        task, primary = answered.target.task.task, Said("".join(run.said), answered)
        for route, place in run.shadows:
            asked = Plan(task=run.plan.task, route=route, daily_cost_ceiling=run.plan.daily_cost_ceiling)
            self._shadows.start(record.id, run.unit_hash, place, task, primary, self._ask_aside(run, asked, work))
        if judge is not None and outcome != "tool_calls":
            tag, principal = verify(record.id, self.signing_key), run.caller.principal

            async def ask(plan: Plan, question: Question | LabelQuestion) -> Said:
                return await self._ask_aside(run, plan, self._work(question, principal))

            assert run.plan.task is not None
            inputs = judged_inputs(task, work.question)
            self._judges.start(judge, Judged(tag, run.plan.task, principal.name, inputs, primary.text or ""), ask)

    def _work(self, question: Question | LabelQuestion, principal: Principal) -> GenerateWork | ClassifyWork:
        if isinstance(question, LabelQuestion):
            return ClassifyWork(self._leaves, self._priors, question, principal)
        return GenerateWork(self._leaves, question, principal)

    async def _ask_aside(self, asked: Run, plan: Plan, work: GenerateWork | ClassifyWork) -> Said:
        """What a plan answers to a shadow or a judge of what was asked: nobody waits for it, and it counts for nothing.

        It spends of the money of the plan's task, and has time of its own.
        """
        caller = dataclasses.replace(asked.caller, unit=asked.unit, arm="")
        run = self._run(plan, caller, _ASIDE_DEADLINE_S)
        run.counted = False
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
