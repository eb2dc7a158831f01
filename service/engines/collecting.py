"""Whole answers from an engine's events."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Coroutine, Iterable
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any, TypeVar, cast

from service.engines.base import (
    Delta,
    Finish,
    FinishReason,
    GenerationEvent,
    Prompted,
    TokenLogprob,
    ToolCallPiece,
    Usage,
)

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Answer:
    """One choice, whole, each of its tool calls in one piece. `agreement` and `refusal` as in Delta."""

    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprob, ...]
    finish_reason: FinishReason
    agreement: float | None = None
    tool_calls: tuple[ToolCallPiece, ...] = ()
    refusal: str = ""


@dataclass(frozen=True, slots=True)
class Answers:
    """Every choice of one request in order, its prompt where that was asked for, and what all of it took."""

    answers: tuple[Answer, ...]
    usage: Usage
    prompted: Prompted | None = None
    provider_request_id: str = ""


@dataclass(slots=True)
class _Pieces:
    texts: list[str] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    agreement: float | None = None
    tool_calls: dict[int, ToolCallPiece] = field(default_factory=dict)
    refusals: list[str] = field(default_factory=list)

    def add(self, delta: Delta) -> None:
        self.texts.append(delta.text)
        self.token_ids += delta.token_ids
        self.logprobs += delta.logprobs
        self.finish_reason = delta.finish_reason or self.finish_reason
        self.agreement = delta.agreement if delta.agreement is not None else self.agreement
        if delta.refusal:
            self.refusals.append(delta.refusal)
        for piece in delta.tool_calls:
            before = self.tool_calls.get(piece.index)
            self.tool_calls[piece.index] = piece if before is None else _joined(before, piece)

    def whole(self, reason: FinishReason) -> Answer:
        return Answer(
            "".join(self.texts),
            tuple(self.token_ids),
            tuple(self.logprobs),
            self.finish_reason or reason,
            self.agreement,
            tuple(self.tool_calls[place] for place in sorted(self.tool_calls)),
            "".join(self.refusals),
        )


def _joined(before: ToolCallPiece, more: ToolCallPiece) -> ToolCallPiece:
    return ToolCallPiece(
        before.index, before.arguments + more.arguments, before.id or more.id, before.name or more.name
    )


def assemble(events: Iterable[GenerationEvent], n: int = 1) -> Answers:
    """The answers of a generation of `n` choices, from all of its events."""
    choices = [_Pieces() for _ in range(n)]
    prompted: Prompted | None = None
    for event in events:
        match event:
            case Prompted():
                prompted = event
            case Delta():
                choices[event.index].add(event)
            case Finish(reason, usage, request_id):
                return Answers(tuple(choice.whole(reason) for choice in choices), usage, prompted, request_id)
    raise AssertionError("an engine ended a generation without a Finish")


async def collect(events: AsyncIterator[GenerationEvent], n: int = 1) -> Answers:
    """As `assemble`, once all events have come; closes the iterator however it ends."""
    async with aclosing(cast(AsyncGenerator[GenerationEvent], events)) as closing:
        return assemble([event async for event in closing], n)


async def all_or_none(work: Iterable[Coroutine[Any, Any, T]]) -> list[T]:
    """Every result in order. The first error is raised as it is, once the others have been cancelled and have ended."""
    coroutines = list(work)
    if len(coroutines) == 1:
        return [await coroutines[0]]
    tasks = [asyncio.ensure_future(coroutine) for coroutine in coroutines]
    try:
        return await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def total(usages: Iterable[Usage]) -> Usage:
    """What several requests took together."""
    prompt_tokens, completion_tokens, virtual_tokens, cached_prompt_tokens = 0, 0, 0, 0
    for usage in usages:
        prompt_tokens += usage.prompt_tokens
        completion_tokens += usage.completion_tokens
        virtual_tokens += usage.virtual_tokens
        cached_prompt_tokens += usage.cached_prompt_tokens
    return Usage(prompt_tokens, completion_tokens, virtual_tokens, cached_prompt_tokens)
