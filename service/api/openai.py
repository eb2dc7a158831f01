"""OpenAI's endpoints: chat completions, completions, models. The official client works with only `base_url` changed."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any, Literal, cast

from litestar import Controller, Request, Response, get, post
from litestar.di import NamedDependency
from litestar.params import FromPath, JSONBody

from prompt_store.errors import NotFound
from prompt_store.prompts.version import PromptVersion
from service.api.answers import DONE, ERRORS, EventStream, event, unless_disconnected
from service.api.callers import caller_of
from service.api.openai_shapes import ChatCompletionBody, CompletionBody, OpenAIBody
from service.catalog import Catalog, Target
from service.engines.base import Finish, GenerationEvent, GenerationRequest, Prompt, RawText, TokenIds, Usage
from service.engines.errors import UnsupportedFeature
from service.routing.execute import Router
from service.routing.generation import Generation

Kind = Literal["chat.completion", "text_completion"]


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
            n=1 if data.n is None else data.n,
            logprobs=(data.top_logprobs or 0) if data.logprobs or data.top_logprobs is not None else None,
            response_format=data.format(),
            tools=tuple(data.tools or ()),
        )
        return await _answer(request, data, router, target, asked, "chat.completion")

    @post("/completions", status_code=200, responses=ERRORS)
    async def completions(
        self,
        request: Request[Any, Any, Any],
        data: JSONBody[CompletionBody],
        catalog: NamedDependency[Catalog],
        router: NamedDependency[Router],
    ) -> Response[Any]:
        """Continue raw text; no chat template is applied."""
        data.check()
        target = catalog.resolve(data.model)
        asked = GenerationRequest(
            id="",
            prompt=router.raw_prompt(target, _raw_prompt(data.prompt)),
            sampling=data.sampling(router.sampling_defaults(target)),
            n=1 if data.n is None else data.n,
            logprobs=data.logprobs,
            echo=bool(data.echo),
        )
        return await _answer(request, data, router, target, asked, "text_completion")

    @get("/models")
    async def models(self, catalog: NamedDependency[Catalog]) -> dict[str, Any]:
        """The base model, every task, and every version, the way vLLM lists adapters."""
        return {"object": "list", "data": _models(catalog)}

    @get("/models/{model:path}", responses={404: ERRORS[404]})
    async def model(self, model: FromPath[str], catalog: NamedDependency[Catalog]) -> dict[str, Any]:
        """One of them; `task@alias` too."""
        name = model.lstrip("/")
        known = {entry["id"]: entry for entry in _models(catalog)}
        if name in known:
            return known[name]
        target = catalog.resolve(name)
        return {**known[target.label], "id": name}


async def _answer(
    request: Request[Any, Any, Any],
    body: OpenAIBody,
    router: Router,
    target: Target,
    asked: GenerationRequest,
    kind: Kind,
) -> Response[Any]:
    generation = await unless_disconnected(request, router.generate(target, caller_of(request, body.unit_key), asked))
    shape = _Shape(kind, generation, target, body.model)
    if body.stream:
        include_usage = body.stream_options is not None and body.stream_options.include_usage
        return EventStream(shape.stream(include_usage=include_usage), shape.headers, generation.aclose)
    try:
        text, finish = await unless_disconnected(request, generation.text())
    finally:
        await generation.aclose()
    return Response(shape.whole(text, finish), headers=shape.headers)


class _Shape:
    """The bodies of one answer."""

    def __init__(self, kind: Kind, generation: Generation, target: Target, model: str) -> None:
        self._kind = kind
        self._generation = generation
        label = target.label
        self.headers = {"x-softcue-version": label or "base", "x-softcue-backend": target.backend}
        prefix = "chatcmpl-" if kind == "chat.completion" else "cmpl-"
        self._common: dict[str, Any] = {
            "id": prefix + generation.id,
            "created": generation.record.created_s,
            "model": model,
            "system_fingerprint": f"{label}:{target.version.digest[:12]}" if target.version is not None else "base",
        }

    def whole(self, text: str, finish: Finish) -> dict[str, Any]:
        """The body of an answer that is not streamed."""
        choice: dict[str, Any] = {"index": 0, "logprobs": None, "finish_reason": finish.reason}
        if self._kind == "chat.completion":
            choice["message"] = {"role": "assistant", "content": text, "refusal": None}
        else:
            choice["text"] = text
        return {**self._common, "object": self._kind, "choices": [choice], "usage": usage_body(finish.usage)}

    async def stream(self, *, include_usage: bool) -> AsyncGenerator[bytes]:
        """The same as server-sent events, OpenAI's chunks and `[DONE]` at the end."""
        usage: dict[str, Any] = {"usage": None} if include_usage else {}
        events = cast(AsyncGenerator[GenerationEvent], self._generation.events())
        async with aclosing(events):
            if self._kind == "chat.completion":
                yield self._chunk({"role": "assistant", "content": "", "refusal": None}, None, usage)
            async for item in events:
                if isinstance(item, Finish):
                    yield self._chunk({}, item.reason, usage)
                    if include_usage:
                        last = {"choices": [], "usage": usage_body(item.usage)}
                        yield event({**self._common, "object": self._chunk_object, **last})
                elif item.text:
                    yield self._chunk({"content": item.text}, None, usage)
        yield DONE

    @property
    def _chunk_object(self) -> str:
        return "chat.completion.chunk" if self._kind == "chat.completion" else "text_completion"

    def _chunk(self, delta: dict[str, Any], reason: str | None, usage: dict[str, Any]) -> bytes:
        choice: dict[str, Any] = {"index": 0, "logprobs": None, "finish_reason": reason}
        if self._kind == "chat.completion":
            choice["delta"] = delta
        else:
            choice["text"] = delta.get("content", "")
        return event({**self._common, "object": self._chunk_object, "choices": [choice], **usage})


def usage_body(usage: Usage) -> dict[str, int]:
    """OpenAI's usage, and the soft prompt's virtual tokens beside it."""
    return {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
        "virtual_tokens": usage.virtual_tokens,
    }


def _raw_prompt(prompt: str | list[int] | list[str] | list[list[int]]) -> Prompt:
    if isinstance(prompt, str):
        return RawText(prompt)
    if all(isinstance(item, int) for item in prompt):
        return TokenIds(tuple(cast(list[int], prompt)))
    if len(prompt) != 1:
        raise UnsupportedFeature(f"prompt holds {len(prompt)} prompts; send one a request", parameter="prompt")
    return _raw_prompt(cast(str | list[int], prompt[0]))


def _models(catalog: Catalog) -> list[dict[str, Any]]:
    entries = [_entry(catalog.base_name, 0, root=catalog.base_name, parent=None)]
    for task, revision in sorted(catalog.snapshot.tasks.items()):
        created = int(revision.created_at.timestamp())
        try:
            serving: PromptVersion | None = catalog.resolve_task(task, None).version
        except NotFound:
            serving = None  # no version has the default alias yet
        if serving is not None:
            root = f"{task}@{serving.label}"
            entries.append(_entry(task, created, root=root, parent=catalog.base_name))
        for version in catalog.versions(task):
            label = f"{task}@{version.label}"
            made = int(version.created_at.timestamp())
            entries.append(_entry(label, made, root=label, parent=catalog.base_name))
    return entries


def _entry(name: str, created_s: int, **more: str | None) -> dict[str, Any]:
    return {"id": name, "object": "model", "created": created_s, "owned_by": "softcue", **more}
