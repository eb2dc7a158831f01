"""Softcue's own endpoints: a task's inputs in, its answer out."""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any, cast

from jsonschema import Draft202012Validator
from litestar import Controller, Request, Response, get, post
from litestar.di import NamedDependency
from litestar.params import FromPath, JSONBody
from pydantic import BaseModel, ConfigDict

from prompt_store.prompts.task import Task
from service.api.answers import DONE, ERRORS, EventStream, event, unless_disconnected
from service.api.callers import caller_of
from service.api.openai import usage_body
from service.api.openai_shapes import SamplingBody
from service.catalog import Catalog, Target
from service.engines.base import Finish, GenerationEvent, GenerationRequest
from service.routing.execute import Router
from service.routing.generation import Generation


class GenerateBody(SamplingBody):
    """Inputs by field name; `version` is an alias, `v7` or a digest, the task's route decides when it is left out."""

    inputs: dict[str, str]
    version: str | None = None
    unit: str | None = None
    stream: bool = False


class ClassifyBody(BaseModel):
    model_config = ConfigDict(extra="forbid")

    inputs: dict[str, str]
    version: str | None = None
    unit: str | None = None


class TaskController(Controller):
    """`/v1/tasks`."""

    path = "/v1/tasks"
    tags = ("Tasks",)

    @get()
    async def list_tasks(self, catalog: NamedDependency[Catalog]) -> dict[str, Any]:
        """Every task: kind, inputs, labels or schema, aliases."""
        tasks = sorted(catalog.snapshot.tasks)
        return {"object": "list", "data": [_task_body(catalog, name) for name in tasks]}

    @get("/{task:str}", responses={404: ERRORS[404]})
    async def show_task(self, task: FromPath[str], catalog: NamedDependency[Catalog]) -> dict[str, Any]:
        """One task."""
        catalog.task(task)
        return _task_body(catalog, task)

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
        )
        generation = await unless_disconnected(request, router.generate(target, caller_of(request, data.unit), asked))
        headers = {"x-softcue-version": target.label, "x-softcue-backend": target.backend}
        if data.stream:
            return EventStream(_stream(generation, target), headers, generation.aclose)
        try:
            text, finish = await unless_disconnected(request, generation.text())
        finally:
            await generation.aclose()
        return Response({**_head(generation, target), **_tail(target, text, finish)}, headers=headers)

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
        prompt = router.task_prompt(target, data.inputs)
        answer = await unless_disconnected(request, router.classify(target, caller_of(request, data.unit), prompt))
        body = {
            "id": answer.id,
            "task": task.partition("@")[0],
            "version": target.label,
            "label": answer.labels[0].label,
            "labels": [{"label": label.label, "probability": label.probability} for label in answer.labels],
            "usage": usage_body(answer.usage),
        }
        return Response(body, headers={"x-softcue-version": target.label, "x-softcue-backend": target.backend})


def _target(catalog: Catalog, task: str, version: str | None) -> Target:
    """`task` and the body's `version`, or both at once as `task@alias` in the path."""
    name, _, selector = task.partition("@")
    return catalog.resolve_task(name, version or selector or None)


def _task_body(catalog: Catalog, name: str) -> dict[str, Any]:
    revision = catalog.task(name)
    aliases = catalog.snapshot.aliases.get(name, {})
    return {
        **revision.task.model_dump(mode="json"),
        "object": "task",
        "revision": revision.number,
        "aliases": {alias: catalog.snapshot.versions[digest].label for alias, digest in aliases.items()},
        "versions": [version.label for version in catalog.versions(name)],
    }


def _head(generation: Generation, target: Target) -> dict[str, Any]:
    assert target.task is not None
    return {"id": generation.id, "task": target.task.task.name, "version": target.label}


def _tail(target: Target, text: str, finish: Finish) -> dict[str, Any]:
    assert target.task is not None
    body: dict[str, Any] = {"text": text, "finish_reason": finish.reason, "usage": usage_body(finish.usage)}
    if target.task.task.kind == "extract":
        body |= _extracted(target.task.task, text)
    return body


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


async def _stream(generation: Generation, target: Target) -> AsyncGenerator[bytes]:
    head = _head(generation, target)
    pieces: list[str] = []
    events = cast(AsyncGenerator[GenerationEvent], generation.events())
    async with aclosing(events):
        async for item in events:
            if isinstance(item, Finish):
                yield event({**head, "delta": "", **_tail(target, "".join(pieces), item)})
            elif item.text:
                pieces.append(item.text)
                yield event({**head, "delta": item.text})
    yield DONE
