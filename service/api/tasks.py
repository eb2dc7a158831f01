"""Softcue's own endpoints: a task's inputs in, its answer out."""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

from jsonschema import Draft202012Validator
from litestar import Controller, Request, Response, get, post
from litestar.di import NamedDependency
from litestar.params import FromPath, JSONBody
from pydantic import BaseModel, ConfigDict, Field

from prompt_store.prompts.registry import TaskSnapshot
from prompt_store.prompts.task import Task
from prompt_store.prompts.unreadable import Unreadable, readable
from service.api.answers import DONE, ERRORS, EventStream, errors, event, unless_disconnected
from service.api.callers import caller_of
from service.api.openai_answers import usage_body
from service.api.openai_shapes import SamplingBody
from service.catalog import Catalog, Target
from service.engines.base import Delta, GenerationEvent, GenerationRequest, ResponseFormat
from service.engines.collecting import Answer, Answers, assemble
from service.engines.scoring import Normalise
from service.routing.execute import Router
from service.routing.generation import Generation


class GenerateBody(SamplingBody):
    """Inputs by field name; `version` is an alias, `v7` or a digest, the task's route decides when it is left out.

    An extract task's answer is held to the task's schema while it is made, as far as a grammar can say it, unless
    `constrained` is false; it is checked against all of it in any case.
    """

    inputs: dict[str, str]
    version: str | None = None
    unit: str | None = None
    stream: bool = False
    constrained: bool = True


class ClassifyBody(BaseModel):
    """`normalise` and `calibrate` say how probabilities come of log-probabilities; see `engines/scoring.py`.

    Neither is on by default: on the held-out rows of examples/support_intents, each lost accuracy or calibration with
    a tuned prompt, a text prompt and none (`python -m benchmarks.label_scoring`).
    """

    model_config = ConfigDict(extra="forbid")

    inputs: dict[str, str]
    version: str | None = None
    unit: str | None = None
    normalise: Normalise = "none"
    calibrate: bool = False
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
        target = _target(catalog, task, data.version)
        asked = GenerationRequest(
            id="",
            prompt=router.task_prompt(target, data.inputs),
            sampling=data.sampling(router.sampling_defaults(target)),
            n=data.choices,
            response_format=_answer_form(target, router) if data.constrained else ResponseFormat(),
            deadline_s=data.timeout_s,
            stream=data.stream,
        )
        generation = await unless_disconnected(request, router.generate(target, caller_of(request, data.unit), asked))
        headers = {"x-softcue-version": target.label, "x-softcue-backend": target.backend}
        if data.stream:
            return EventStream(_stream(generation, target, data), headers, generation.aclose)
        try:
            answers = await unless_disconnected(request, generation.whole(data.choices))
        finally:
            await generation.aclose()
        return Response({**_head(generation, target), **_tail(target, data, answers)}, headers=headers)

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
        target = _target(catalog, task, data.version)
        asking = router.classify(
            target,
            caller_of(request, data.unit),
            data.inputs,
            normalise=data.normalise,
            calibrate=data.calibrate,
            deadline_s=data.timeout_s,
        )
        answer = await unless_disconnected(request, asking)
        body: dict[str, Any] = {
            "id": answer.id,
            "task": task.partition("@")[0],
            "version": target.label,
            "label": answer.labels[0].label,
            "labels": [{"label": label.label, "probability": label.probability} for label in answer.labels],
            "usage": usage_body(answer.usage),
        }
        if answer.agreement is not None:
            body["agreement"] = answer.agreement
        return Response(body, headers={"x-softcue-version": target.label, "x-softcue-backend": target.backend})


def _target(catalog: Catalog, task: str, version: str | None) -> Target:
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


def _head(generation: Generation, target: Target) -> dict[str, Any]:
    assert target.task is not None
    return {"id": generation.id, "task": target.task.task.name, "version": target.label}


def _tail(target: Target, asked: GenerateBody, given: Answers) -> dict[str, Any]:
    """The first answer, and with `n` all of them under `answers`."""
    assert target.task is not None
    task = target.task.task
    answers = [_answer_body(task, answer) for answer in given.answers]
    body = {**answers[0], "usage": usage_body(given.usage)}
    return body if asked.n is None else {**body, "answers": answers}


def _answer_body(task: Task, answer: Answer) -> dict[str, Any]:
    body: dict[str, Any] = {"text": answer.text, "finish_reason": answer.finish_reason}
    if task.kind == "extract":
        body |= _extracted(task, answer.text)
    return body if answer.agreement is None else {**body, "agreement": answer.agreement}


def _answer_form(target: Target, router: Router) -> ResponseFormat:
    """The JSON schema of an extract task, where its backend can hold an answer to one."""
    assert target.task is not None
    if target.task.task.kind != "extract" or not router.serves(target, "structured_output"):
        return ResponseFormat()
    return ResponseFormat("json_schema", target.task.task.json_schema, lenient=True)


def _extracted(task: Task, text: str) -> dict[str, Any]:
    """`parsed` is the answer as JSON where it is valid for the task's schema; else null, and `invalid` says why."""
    try:
        parsed = json.loads(text)
        problem = next(Draft202012Validator(task.json_schema or {}).iter_errors(parsed), None)
    except ValueError as error:
        return {"parsed": None, "invalid": f"the answer is not JSON: {error}"}
    except RecursionError:
        return {"parsed": None, "invalid": "the answer is nested too deeply to be read"}
    if problem is not None:
        return {"parsed": None, "invalid": f"the answer does not fit the task's schema: {problem.message}"}
    return {"parsed": parsed, "invalid": None}


async def _stream(generation: Generation, target: Target, asked: GenerateBody) -> AsyncGenerator[bytes]:
    """A delta as it comes, with its answer's index where there are several; at last what is answered unstreamed."""
    head = _head(generation, target)
    seen: list[GenerationEvent] = []
    async with aclosing(generation.events()) as events:
        async for item in events:
            seen.append(item)
            if isinstance(item, Delta) and item.text:
                place = {} if asked.n is None else {"index": item.index}
                yield event({**head, **place, "delta": item.text})
    yield event({**head, "delta": "", **_tail(target, asked, assemble(seen, asked.choices))})
    yield DONE
