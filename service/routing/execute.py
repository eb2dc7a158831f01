"""Runs a request on the route of its task. Today every route is `direct`: one backend, one version."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping

from prompt_store.prompts.task import Message, render_messages
from prompt_store.prompts.template import template_fields
from prompt_store.prompts.version import SoftPromptPayload, TextPayload
from service.catalog import Catalog, Target
from service.engines.base import (
    Engine,
    GenerationRequest,
    Messages,
    Prompt,
    Sampling,
    ScoreRequest,
    SoftPromptReference,
    Usage,
)
from service.engines.errors import UnsupportedFeature
from service.metrics import Labels, Metrics
from service.routing.errors import NotServed, WrongTaskKind
from service.routing.generation import Caller, Generation, Record


@dataclasses.dataclass(frozen=True, slots=True)
class LabelProbability:
    """How probable a label is among the task's labels."""

    label: str
    probability: float


@dataclasses.dataclass(frozen=True, slots=True)
class Classification:
    """Labels from the most to the least probable."""

    id: str
    labels: tuple[LabelProbability, ...]
    usage: Usage


class Router:
    """Takes a resolved target and a prompt to a backend, and keeps the record."""

    def __init__(self, catalog: Catalog, engines: Mapping[str, Engine], metrics: Metrics, signing_key: bytes) -> None:
        self._catalog = catalog
        self.engines = engines
        self._metrics = metrics
        self._signing_key = signing_key

    def sampling_defaults(self, target: Target) -> Sampling:
        """The task's default sampling; greedy and 128 tokens for the bare base."""
        if target.task is None:
            return Sampling()
        defaults = target.task.task.sampling
        return Sampling(
            max_tokens=defaults.max_tokens,
            temperature=defaults.temperature,
            top_p=defaults.top_p,
            top_k=defaults.top_k,
            stop=tuple(defaults.stop),
        )

    def chat_prompt(self, target: Target, messages: tuple[Message, ...]) -> Messages:
        """A conversation as it is; a version that is a text prompt stands before it, its last turn left to the caller.

        Raises UnsupportedFeature for a text prompt whose other turns have placeholders: only inputs can fill them.
        """
        payload = target.version.payload if target.version is not None else None
        if not isinstance(payload, TextPayload):
            return Messages(messages)
        before = payload.messages
        if before[-1].role == "user":
            before = before[:-1]
        if template_fields(before):
            raise UnsupportedFeature(
                f"{target.label} is a text prompt with placeholders; ask it with inputs at /v1/tasks", parameter="model"
            )
        return Messages((*render_messages(before, {}), *messages))

    def raw_prompt(self, target: Target, prompt: Prompt) -> Prompt:
        """Raw text as it is. Raises UnsupportedFeature for a text prompt, which has no place in it."""
        if target.version is not None and isinstance(target.version.payload, TextPayload):
            raise UnsupportedFeature(
                f"{target.label} is a text prompt; ask it at /v1/chat/completions or /v1/tasks", parameter="model"
            )
        return prompt

    def task_prompt(self, target: Target, inputs: Mapping[str, str]) -> Messages:
        """Inputs through the task's template, or through the version's own where it is a text prompt."""
        assert target.task is not None
        messages = target.task.task.render(inputs)
        payload = target.version.payload if target.version is not None else None
        if isinstance(payload, TextPayload):
            messages = tuple(render_messages(payload.messages, inputs))
        return Messages(messages)

    async def generate(self, target: Target, caller: Caller, request: GenerationRequest) -> Generation:
        """Begin to answer. Raises EngineError, StoreError or NotServed before the first token; the prompt is the
        request's, soft prompt and id come from the target."""
        record = self._record(target, caller)
        try:
            engine = self._engine(target)
            request = dataclasses.replace(
                request, id=record.id, soft_prompt=self._soft_prompt(target), principal=caller.principal
            )
        except Exception:
            record.end("error", None)
            raise
        generation = Generation(record, engine.generate(request))
        await generation.begin()
        return generation

    async def classify(self, target: Target, caller: Caller, prompt: Prompt) -> Classification:
        """Every label of the task with its probability. Raises WrongTaskKind for tasks without labels."""
        assert target.task is not None
        task = target.task.task
        record = self._record(target, caller)
        outcome, usage = "cancelled", None
        try:
            if task.kind != "classify":
                raise WrongTaskKind(
                    f"task '{task.name}' is of kind '{task.kind}'; POST /v1/tasks/{task.name}/generate answers it"
                )
            scores = await self._engine(target).score(
                ScoreRequest(record.id, prompt, task.labels, self._soft_prompt(target), caller.principal)
            )
            outcome, usage = "stop", scores.usage
        except Exception:
            outcome = "error"
            raise
        finally:
            record.end(outcome, usage)
        probabilities = normalise(scores.log_probabilities)
        ranked = sorted(zip(task.labels, probabilities, strict=True), key=lambda pair: -pair[1])
        return Classification(record.id, tuple(LabelProbability(*pair) for pair in ranked), scores.usage)

    def _record(self, target: Target, caller: Caller) -> Record:
        labels = Labels(
            task=target.task.task.name if target.task is not None else "",
            version=target.version.label if target.version is not None else "",
            arm="",
            backend=target.backend,
        )
        digest = target.version.digest if target.version is not None else ""
        return Record(caller, labels, digest, self._metrics, self._signing_key)

    def _engine(self, target: Target) -> Engine:
        engine = self.engines.get(target.backend)
        if engine is None:
            raise NotServed(
                f"the route of this task names backend '{target.backend}', which this service does not have; "
                f"it has: {', '.join(self.engines)}"
            )
        return engine

    def _soft_prompt(self, target: Target) -> SoftPromptReference | None:
        if target.version is None:
            return None
        payload = target.version.payload
        if payload.kind not in self._engine(target).capabilities().payload_kinds:
            raise UnsupportedFeature(
                f"{target.label} is of kind '{payload.kind}'; backend '{target.backend}' does not serve it",
                parameter="model",
            )
        return self._catalog.reference(target.version) if isinstance(payload, SoftPromptPayload) else None


def normalise(log_probabilities: tuple[float, ...]) -> list[float]:
    """Probabilities that sum to 1, from log-probabilities of alternatives."""
    highest = max(log_probabilities)
    weights = [math.exp(value - highest) for value in log_probabilities]
    total = sum(weights)
    return [weight / total for weight in weights]
