"""OpenAI's endpoints: chat completions, completions, models. The official client works with only `base_url` changed."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, date, datetime
from typing import Any

from litestar import Controller, Request, Response, get, post
from litestar.di import NamedDependency
from litestar.params import FromPath, JSONBody

from prompt_store.errors import StoreError
from prompt_store.prompts.registry import TaskSnapshot
from prompt_store.prompts.unreadable import Unreadable, UnreadableVersion
from prompt_store.prompts.version import PromptVersion, RemoteModelPayload
from service.api.answers import ERRORS, EventStream, errors, while_connected
from service.api.callers import caller_of
from service.api.chat_messages import conversation
from service.api.openai_answers import ChatShape, CompletionShape, Shape
from service.api.openai_shapes import ChatCompletionBody, CompletionBody, OpenAIBody
from service.catalog import Catalog
from service.engines.base import GenerationRequest
from service.routing.plan import Plan, Target
from service.routing.questions import Question
from service.routing.retirement import Retirements
from service.routing.router import Router


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
        plan = catalog.resolve(data.model)
        asked = GenerationRequest(
            id="",
            prompt=conversation(data.messages),
            n=data.choices,
            logprobs=data.alternatives,
            prompt_logprobs=data.prompt_logprobs,
            response_format=data.format(),
            tools=tuple(data.tools or ()),
            tool_choice=data.tool_choice if data.tools else None,
            parallel_tool_calls=data.parallel_tool_calls if data.tools else None,
            provider_options=data.provider_options(),
            deadline_s=data.timeout_s,
            stream=bool(data.stream),
        )
        return await _answer(request, data, router, plan, [asked], ChatShape)

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
        plan, form = catalog.resolve(data.model), data.format()
        asked = [
            GenerationRequest(
                id="",
                prompt=prompt,
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
        return await _answer(request, data, router, plan, asked, CompletionShape)

    @get("/models")
    async def models(
        self, catalog: NamedDependency[Catalog], retirements: NamedDependency[Retirements]
    ) -> dict[str, Any]:
        """The base model, every task, and every version, the way vLLM lists adapters.

        What a provider's model answers has a `shutdown_date` where one is known: the first day without it.
        """
        return {"object": "list", "data": _Listing(catalog, retirements).all()}

    @get("/models/{model:path}", responses=errors(400, 404))
    async def model(
        self, model: FromPath[str], catalog: NamedDependency[Catalog], retirements: NamedDependency[Retirements]
    ) -> dict[str, Any]:
        """One of them; `task@alias` too."""
        return _Listing(catalog, retirements).one(model.lstrip("/"))


async def _answer(
    request: Request[Any, Any, Any],
    body: OpenAIBody,
    router: Router,
    plan: Plan,
    asked: Sequence[GenerationRequest],
    shape_of: type[Shape],
) -> Response[Any]:
    caller = caller_of(request, body.unit_key, body.attributes)
    sampling = body.sampling()
    questions = [Question(each, sampling) for each in asked]
    async with while_connected(request):
        batch = await router.generate_each(plan, caller, questions)
        answers = None if body.stream else await batch.whole(asked[0].n)
    shape = shape_of(batch, body, asked[0])
    if answers is None:
        include_usage = body.stream_options is not None and body.stream_options.include_usage
        return EventStream(shape.stream(include_usage=include_usage), shape.headers, batch.aclose)
    return Response(shape.whole(answers), headers=shape.headers)


@dataclass(frozen=True, slots=True)
class _Listing:
    """What can be asked for, as OpenAI lists models."""

    catalog: Catalog
    retirements: Retirements

    def all(self) -> list[dict[str, Any]]:
        entries = [self._base()] if self.catalog.base_name else []
        for name, task in sorted(self.catalog.snapshot.tasks.items()):
            # A task is listed where it is answered: not while no version has the default alias, or none can be served.
            with contextlib.suppress(StoreError):
                target = self.catalog.resolve_task(name, None).target
                if target is None or target.backend:
                    entries.append(self._task(task, target))
            entries += map(self._version, task.versions.values())
        return entries

    def one(self, name: str) -> dict[str, Any]:
        """Raises as `Catalog.resolve`."""
        plan = self.catalog.resolve(name)
        if plan.task is None:
            return self._base() if name == self.catalog.base_name else self._remote(name)
        if plan.target is None or name == plan.task.name:
            return self._task(plan.task, plan.target)
        assert plan.target.version is not None
        return {**self._version(plan.target.version), "id": name}

    def _base(self) -> dict[str, Any]:
        return _entry(self.catalog.base_name, 0, root=self.catalog.base_name)

    def _remote(self, model: str) -> dict[str, Any]:
        return {**_entry(model, 0, root=model), **_shutdown(self.retirements.announced(model))}

    def _task(self, task: TaskSnapshot, serving: Target | None) -> dict[str, Any]:
        """A task; its root is the version that answers, or itself where its route decides."""
        version = serving.version if serving is not None else None
        if not isinstance(task.revision, Unreadable):
            made = task.revision.created_at
        else:
            made = version.created_at if version is not None else datetime.fromtimestamp(0, UTC)
        root = serving.label if serving is not None else task.name
        return {**_entry(task.name, int(made.timestamp()), root=root), **self._beside(version)}

    def _version(self, version: PromptVersion | UnreadableVersion) -> dict[str, Any]:
        label = f"{version.task}@{version.label}"
        entry = _entry(label, int(version.created_at.timestamp()), root=label)
        if isinstance(version, UnreadableVersion):
            return {**entry, "unreadable": version.reason}
        return {**entry, **self._beside(version)}

    def _beside(self, version: PromptVersion | None) -> dict[str, Any]:
        """What a version runs on, as its parent; of a provider's model also when that goes away."""
        if version is not None and isinstance(version.payload, RemoteModelPayload):
            return {"parent": version.payload.model, **_shutdown(self.retirements.shutdown_of(version))}
        return {"parent": self.catalog.base_name or None}


def _shutdown(day: date | None) -> dict[str, Any]:
    return {} if day is None else {"shutdown_date": day.isoformat()}


def _entry(name: str, created_s: int, *, root: str) -> dict[str, Any]:
    return {"id": name, "object": "model", "created": created_s, "owned_by": "softcue", "root": root, "parent": None}
