"""Softcue's own endpoints: a task's inputs in, its answer out."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from typing import Annotated, Any

from litestar import Controller, Request, Response, get, post
from litestar.di import NamedDependency
from litestar.params import FromPath, JSONBody
from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from prompt_store.prompts.registry import TaskSnapshot
from prompt_store.prompts.task import Task
from prompt_store.prompts.unreadable import Unreadable, readable
from prompt_store.routing.routes import check_measure
from service.api.answers import DONE, ERRORS, EventStream, errors, event, while_connected
from service.api.callers import caller_of
from service.api.openai_answers import answer_headers, path_body, usage_body
from service.api.openai_shapes import SamplingBody
from service.catalog import Catalog
from service.engines.base import Delta, GenerationEvent, GenerationRequest, Messages
from service.engines.collecting import Answer, Answers, assemble
from service.engines.scoring import Normalise
from service.routing.confidence import confidence, needs_logprobs
from service.routing.extracting import extract
from service.routing.generation import Generation
from service.routing.leaf_classification import LabelQuestion
from service.routing.plan import Plan
from service.routing.questions import Question
from service.routing.router import Router

Measure = Annotated[str, AfterValidator(check_measure)]


class GenerateBody(SamplingBody):
    """Inputs by field name; `version` is an alias, `v7` or a digest, the task's route decides when it is left out.

    `unit` is whom the request is for (a user, session, ticket): it sees one arm of each experiment. `attributes` are
    what experiments choose requests by.
    An extract task's answer is held to the task's schema while it is made, as far as a grammar can say it, unless
    `constrained` is false; it is checked against all of it in any case. `confidence` names measures that are wanted
    beside the answer, as a cascade's route names them.
    """

    inputs: dict[str, str]
    version: str | None = None
    unit: str | None = None
    attributes: dict[str, str] = Field(default_factory=dict)
    stream: bool = False
    constrained: bool = True
    confidence: tuple[Measure, ...] = ()


class ClassifyBody(BaseModel):
    """`normalise` and `calibrate` say how probabilities come of log-probabilities; see `engines/scoring.py`.

    Neither is on by default: on the held-out rows of examples/support_intents, each lost accuracy or calibration with
    a tuned prompt, a text prompt and none (`python -m benchmarks.label_scoring`).
    """

    model_config = ConfigDict(extra="forbid")

    inputs: dict[str, str]
    version: str | None = None
    unit: str | None = None
    attributes: dict[str, str] = Field(default_factory=dict)
    normalise: Normalise = "none"
    calibrate: bool = False
    confidence: tuple[Measure, ...] = ()
    timeout_s: float | None = Field(None, gt=0, allow_inf_nan=False)


class TaskController(Controller):
    """`/v1/tasks`."""

    path = "/v1/tasks"
    tags = ("Tasks",)

    @get()
    async def list_tasks(self, catalog: NamedDependency[Catalog]) -> dict[str, Any]:
        """Every task: kind, inputs, labels or schema, aliases."""
        tasks = [task for _, task in sorted(catalog.snapshot.tasks.items())]
        return {"object": "list", "data": [_task_body(task) for task in tasks]}

    @get("/{task:str}", responses=errors(404))
    async def show_task(self, task: FromPath[str], catalog: NamedDependency[Catalog]) -> dict[str, Any]:
        """One task."""
        found = catalog.task(task)
        readable(found.revision)
        return _task_body(found)

    @post("/{task:str}/generate", status_code=200, responses=ERRORS)
    async def generate(
        self,
        request: Request[Any, Any, Any],
        task: FromPath[str],
        data: JSONBody[GenerateBody],
        catalog: NamedDependency[Catalog],
        router: NamedDependency[Router],
    ) -> Response[Any]:
        """Answer the task for these inputs. An extract task's answer is parsed and checked against its schema."""
        asked = GenerationRequest(
            id="",
            prompt=Messages(()),
            n=data.choices,
            logprobs=0 if any(map(needs_logprobs, data.confidence)) else None,
            deadline_s=data.timeout_s,
            stream=data.stream,
        )
        question = Question(asked, data.sampling(), data.inputs, data.constrained)
        plan, caller = _plan(catalog, task, data.version), caller_of(request, data.unit, data.attributes)
        async with while_connected(request):
            generation = await router.generate(plan, caller, question)
            answers = None if data.stream else await generation.whole(data.choices)
        headers = answer_headers(generation.target, [generation.run])
        if answers is None:
            return EventStream(_stream(generation, data), headers, generation.aclose)
        return Response({**_head(generation), **_tail(generation, data, answers)}, headers=headers)

    @post("/{task:str}/classify", status_code=200, responses=ERRORS)
    async def classify(
        self,
        request: Request[Any, Any, Any],
        task: FromPath[str],
        data: JSONBody[ClassifyBody],
        catalog: NamedDependency[Catalog],
        router: NamedDependency[Router],
    ) -> Response[dict[str, Any]]:
        """Every label of the task with its probability, the most probable first."""
        plan, caller = _plan(catalog, task, data.version), caller_of(request, data.unit, data.attributes)
        question = LabelQuestion(data.inputs, data.normalise, data.calibrate)
        async with while_connected(request):
            given = await router.classify(plan, caller, question, deadline_s=data.timeout_s)
        answer = given.answer
        body: dict[str, Any] = {
            "id": given.id,
            "task": task.partition("@")[0],
            "version": answer.target.label,
            "label": answer.label,
            "labels": [{"label": label.label, "probability": label.probability} for label in answer.labels],
            "usage": usage_body(answer.usage),
        }
        if answer.agreement is not None:
            body["agreement"] = answer.agreement
        if data.confidence:
            body["confidence"] = {measure: answer.confidence(measure) for measure in data.confidence}
        return Response(body | path_body([given.run]), headers=answer_headers(answer.target, [given.run]))


def _plan(catalog: Catalog, task: str, version: str | None) -> Plan:
    """`task` and the body's `version`, or both at once as `task@alias` in the path."""
    name, _, selector = task.partition("@")
    return catalog.resolve_task(name, version or selector or None)


def _task_body(task: TaskSnapshot) -> dict[str, Any]:
    revision = task.revision
    known: dict[str, Any] = (
        {"name": task.name, "unreadable": revision.reason}
        if isinstance(revision, Unreadable)
        else {**revision.task.model_dump(mode="json"), "revision": revision.number}
    )
    return {
        **known,
        "object": "task",
        "aliases": {alias: task.versions[digest].label for alias, digest in task.aliases.items()},
        "versions": [version.label for version in task.versions.values()],
    }


def _head(generation: Generation) -> dict[str, Any]:
    return {"id": generation.id, "task": generation.run.plan.name, "version": generation.target.label}


def _tail(generation: Generation, asked: GenerateBody, given: Answers) -> dict[str, Any]:
    """The first answer, and with `n` all of them under `answers`."""
    assert generation.target.task is not None
    task = generation.target.task.task
    answers = [_answer_body(task, answer, asked.confidence) for answer in given.answers]
    body = {**answers[0], "usage": usage_body(given.usage)}
    if asked.n is not None:
        body["answers"] = answers
    return body | path_body([generation.run])


def _answer_body(task: Task, answer: Answer, measures: Sequence[str]) -> dict[str, Any]:
    body: dict[str, Any] = {"text": answer.text, "finish_reason": answer.finish_reason}
    if task.kind == "extract":
        found = extract(task, answer.text)
        body |= {"parsed": found.parsed, "invalid": found.invalid}
    if answer.agreement is not None:
        body["agreement"] = answer.agreement
    if measures:
        body["confidence"] = {measure: confidence(measure, answer) for measure in measures}
    return body


async def _stream(generation: Generation, asked: GenerateBody) -> AsyncGenerator[bytes]:
    """A delta as it comes, with its answer's index where there are several; at last what is answered unstreamed."""
    head = _head(generation)
    seen: list[GenerationEvent] = []
    async with aclosing(generation.events()) as events:
        async for item in events:
            seen.append(item)
            if isinstance(item, Delta) and item.text:
                place = {} if asked.n is None else {"index": item.index}
                yield event({**head, **place, "delta": item.text})
    yield event({**head, "delta": "", **_tail(generation, asked, assemble(seen, asked.choices))})
    yield DONE
