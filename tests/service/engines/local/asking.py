"""Asking an Engine: requests, their answers, and prompts that are read when a test says so."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable

from prompt_store.prompts.soft_prompt import SoftPrompt
from service.engines.base import Delta, GenerationEvent, GenerationRequest, RawText, Sampling, SoftPromptReference
from service.engines.local.client import LocalEngine
from tests.conftest import random_prompt

LONG = Sampling(max_tokens=900, temperature=1.0, seed=1, top_k=0)


def request(name: str, text: str = "The house stood", **options: object) -> GenerationRequest:
    return GenerationRequest(name, RawText(text), **options)


async def answer(engine: LocalEngine, asked: GenerationRequest) -> str:
    pieces = [event.text async for event in engine.generate(asked) if isinstance(event, Delta)]
    return "".join(pieces)


async def first(engine: LocalEngine, asked: GenerationRequest) -> AsyncIterator[GenerationEvent]:
    """A generation that has begun."""
    events = engine.generate(asked)
    await anext(events)
    return events


async def until(condition: Callable[[], bool]) -> None:
    """Wait for a condition that the engine brings about."""
    async with asyncio.timeout(20):
        while not condition():  # noqa: ASYNC110 (what is awaited happens elsewhere)
            await asyncio.sleep(0.001)  # a busy loop would keep the interpreter lock from the engine's thread


async def events_of(engine: LocalEngine, asked: GenerationRequest) -> list[GenerationEvent]:
    return [event async for event in engine.generate(asked)]


class Blocked:
    """A soft prompt whose tensor is read when `go` is set, from a thread."""

    def __init__(self, seed: int, engine: LocalEngine) -> None:
        self.go, self.asked = threading.Event(), threading.Event()
        self.prompt = random_prompt(seed, 5)
        self.reference = SoftPromptReference(self.prompt.digest, 5, engine.base.fingerprint, self._load)

    def _load(self) -> SoftPrompt:
        self.asked.set()
        assert self.go.wait(20)
        return self.prompt
