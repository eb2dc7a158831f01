"""Evaluation through the same engine that will serve: labels by scoring, everything else by greedy generation."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Self

from transformers import PreTrainedModel

from prompt_store.prompts.soft_prompt import SoftPrompt
from prompt_store.prompts.task import Message, Task, render_messages
from service.engines.base import (
    Engine,
    Finish,
    GenerationRequest,
    Messages,
    Sampling,
    ScoreRequest,
    SoftPromptReference,
)
from service.engines.base_model import BaseModel
from service.engines.local import attention
from service.engines.local.client import LocalEngine
from service.engines.local.engine import EngineCore
from service.engines.local.model_runner import ModelRunner
from service.engines.local.options import EngineOptions
from service.engines.local.thread import ThreadHost
from training.dataset import Example
from training.scorers import SCORERS, metric_names


@dataclass(frozen=True, slots=True)
class Answered:
    """One example with the answer that was given."""

    example: Example
    answer: str


@dataclass(frozen=True, slots=True)
class Evaluation:
    """The task's metrics over some rows, and every answer."""

    metrics: Mapping[str, float]
    answers: tuple[Answered, ...]

    def mistakes(self, count: int) -> list[Answered]:
        """The first answers that are not the expected ones."""
        wrong = (row for row in self.answers if not SCORERS["exact_match"](row.example, row.answer))
        return list(itertools.islice(wrong, count))


async def evaluate(
    engine: Engine,
    task: Task,
    examples: Sequence[Example],
    *,
    soft_prompt: SoftPromptReference | None = None,
    messages: tuple[Message, ...] | None = None,
) -> Evaluation:
    """Ask an engine every example and score its answers.

    With `messages`, those stand in for the task's own template: a text prompt.
    """
    answers = await asyncio.gather(
        *(_answer(engine, task, example, index, soft_prompt, messages) for index, example in enumerate(examples))
    )
    rows = tuple(Answered(example, answer) for example, answer in zip(examples, answers, strict=True))
    metrics = {
        name: sum(SCORERS[name](row.example, row.answer) for row in rows) / len(rows) for name in metric_names(task)
    }
    return Evaluation(metrics, rows)


async def _answer(
    engine: Engine,
    task: Task,
    example: Example,
    index: int,
    soft_prompt: SoftPromptReference | None,
    messages: tuple[Message, ...] | None,
) -> str:
    rendered = task.render(example.inputs) if messages is None else tuple(render_messages(messages, example.inputs))
    prompt = Messages(rendered)
    if task.kind == "classify":
        scores = await engine.score(ScoreRequest(f"score-{index}", prompt, task.labels, soft_prompt))
        return max(zip(scores.log_probabilities, task.labels, strict=True))[1]
    sampling = Sampling(max_tokens=task.sampling.max_tokens, stop=tuple(task.sampling.stop))
    pieces = []
    async for event in engine.generate(GenerationRequest(f"answer-{index}", prompt, soft_prompt, sampling=sampling)):
        if not isinstance(event, Finish):
            pieces.append(event.text)
    return "".join(pieces)


class Evaluator:
    """Evaluates with a model that training also uses: one copy of the weights, one engine in a thread.

    Between evaluations the engine is idle, so the optimiser may use the model; both switch its attention to their own.
    """

    def __init__(self, base: BaseModel, model: PreTrainedModel, task: Task) -> None:
        self._base = base
        self._model = model
        self._task = task
        self._runner = asyncio.Runner()
        self._engine = LocalEngine(base, ThreadHost(self._load), max_waiting=10_000_000)

    def __enter__(self) -> Self:
        self._runner.run(self._engine.start())
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._runner.run(self._engine.close())
        self._runner.close()

    def soft_prompt(self, prompt: SoftPrompt, examples: Sequence[Example]) -> Evaluation:
        """The task's metrics with a soft prompt."""
        reference = SoftPromptReference.to(prompt, self._base.fingerprint)
        return self._runner.run(self._with_prompt(reference, examples))

    def plain(self, examples: Sequence[Example], messages: tuple[Message, ...] | None = None) -> Evaluation:
        """The task's metrics without a soft prompt, by the task's own template or by a text prompt's."""
        self._model.set_attn_implementation(attention.NAME)
        return self._runner.run(evaluate(self._engine, self._task, examples, messages=messages))

    async def _with_prompt(self, reference: SoftPromptReference, examples: Sequence[Example]) -> Evaluation:
        self._model.set_attn_implementation(attention.NAME)
        try:
            return await evaluate(self._engine, self._task, examples, soft_prompt=reference)
        finally:
            await self._engine.release(reference.digest)

    def _load(self) -> EngineCore:
        options = EngineOptions(max_batch_tokens=2048)
        return EngineCore(ModelRunner.over(self._base, self._model, options), options)
