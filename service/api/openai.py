"""OpenAI's endpoints: chat completions, completions, models. The official client works with only `base_url` changed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from litestar import Controller, Request, Response, get, post
from litestar.di import NamedDependency
from litestar.params import FromPath, JSONBody

from prompt_store.errors import StoreError
from prompt_store.prompts.registry import TaskSnapshot
from prompt_store.prompts.unreadable import Unreadable, UnreadableVersion
from prompt_store.prompts.version import PromptVersion
from service.api.answers import ERRORS, EventStream, errors, unless_disconnected
from service.api.callers import caller_of
from service.api.openai_answers import ChatShape, CompletionShape, Shape
from service.api.openai_shapes import ChatCompletionBody, CompletionBody, OpenAIBody
from service.catalog import Catalog, Target
from service.engines.base import GenerationRequest
from service.routing.execute import Router


class OpenAIController(Controller):
    """`/v1/chat/completions`, `/v1/completions`, `/v1/models`."""

    path = "/v1"
    tags = ("OpenAI",)

    @post("/chat/completions", status_code=200, responses=ERRORS)
    async def chat_completions(
        self,
        request: Request[Any, Any, Any],
        data: JSONBody[ChatCompletionBody],
        catalog: NamedDependency[Catalog],
        router: NamedDependency[Router],
    ) -> Response[Any]:
        """Answer a conversation with the soft prompt that `model` names (`task`, `task@alias`, `task@v7`)."""
        data.check()
        target = catalog.resolve(data.model)
        messages = tuple(message.message(index) for index, message in enumerate(data.messages))
        asked = GenerationRequest(
            id="",
            prompt=router.chat_prompt(target, messages),
            sampling=data.sampling(router.sampling_defaults(target)),
            n=data.choices,
            logprobs=data.alternatives,
            prompt_logprobs=data.prompt_logprobs,
            response_format=data.format(),
            tools=tuple(data.tools or ()),
            deadline_s=data.timeout_s,
            stream=bool(data.stream),
        )
        return await _answer(request, data, router, target, [asked], ChatShape)

    @post("/completions", status_code=200, responses=ERRORS)
    async def completions(
        self,
        request: Request[Any, Any, Any],
        data: JSONBody[CompletionBody],
        catalog: NamedDependency[Catalog],
        router: NamedDependency[Router],
    ) -> Response[Any]:
        """Continue raw text, or each of several; no chat template is applied."""
        data.check()
        target = catalog.resolve(data.model)
        sampling, form = data.sampling(router.sampling_defaults(target)), data.format()
        asked = [
            GenerationRequest(
                id="",
                prompt=router.raw_prompt(target, prompt),
                sampling=sampling,
                n=data.choices,
                logprobs=data.logprobs,
                prompt_logprobs=data.prompt_alternatives,
                echo=bool(data.echo),
                response_format=form,
                deadline_s=data.timeout_s,
                stream=bool(data.stream),
            )
            for prompt in data.prompts()
        ]
        return await _answer(request, data, router, target, asked, CompletionShape)

    @get("/models")
    async def models(self, catalog: NamedDependency[Catalog]) -> dict[str, Any]:
        """The base model, every task, and every version, the way vLLM lists adapters."""
        return {"object": "list", "data": _models(catalog)}

    @get("/models/{model:path}", responses=errors(400, 404))
    async def model(self, model: FromPath[str], catalog: NamedDependency[Catalog]) -> dict[str, Any]:
        """One of them; `task@alias` too."""
        name = model.lstrip("/")
        target = catalog.resolve(name)
        if target.version is None:
            return _base_entry(catalog)
        if name == target.version.task:
            return _task_entry(catalog, catalog.task(name), target.version)
        return {**_version_entry(catalog, target.version), "id": name}


async def _answer(
    request: Request[Any, Any, Any],
    body: OpenAIBody,
    router: Router,
    target: Target,
    asked: Sequence[GenerationRequest],
    shape_of: type[Shape],
) -> Response[Any]:
    caller = caller_of(request, body.unit_key)
    batch = await unless_disconnected(request, router.generate_each(target, caller, asked))
    shape = shape_of(batch, target, body, asked[0])
    if body.stream:
        include_usage = body.stream_options is not None and body.stream_options.include_usage
        return EventStream(shape.stream(include_usage=include_usage), shape.headers, batch.aclose)
    try:
        answers = await unless_disconnected(request, batch.whole(asked[0].n))
    finally:
        await batch.aclose()
    return Response(shape.whole(answers), headers=shape.headers)


def _models(catalog: Catalog) -> list[dict[str, Any]]:
    entries = [_base_entry(catalog)]
    for name, task in sorted(catalog.snapshot.tasks.items()):
        try:
            serving = catalog.resolve_task(name, None).version
        except StoreError:
            serving = None  # no version has the default alias yet, or what has it cannot be served
        if serving is not None:
            entries.append(_task_entry(catalog, task, serving))
        entries += [_version_entry(catalog, version) for version in task.versions.values()]
    return entries


def _base_entry(catalog: Catalog) -> dict[str, Any]:
    return _entry(catalog.base_name, 0, root=catalog.base_name, parent=None)


def _task_entry(catalog: Catalog, task: TaskSnapshot, serving: PromptVersion) -> dict[str, Any]:
    made = serving.created_at if isinstance(task.revision, Unreadable) else task.revision.created_at
    root = f"{task.name}@{serving.label}"
    return _entry(task.name, int(made.timestamp()), root=root, parent=catalog.base_name)


def _version_entry(catalog: Catalog, version: PromptVersion | UnreadableVersion) -> dict[str, Any]:
    label = f"{version.task}@{version.label}"
    entry = _entry(label, int(version.created_at.timestamp()), root=label, parent=catalog.base_name)
    return {**entry, "unreadable": version.reason} if isinstance(version, UnreadableVersion) else entry


def _entry(name: str, created_s: int, **more: str | None) -> dict[str, Any]:
    return {"id": name, "object": "model", "created": created_s, "owned_by": "softcue", **more}
