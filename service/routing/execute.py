"""Runs a request on the route of its task. Today every route is `direct`: one backend, one version.

A version that is an ensemble is asked as its members.
"""

from __future__ import annotations

import asyncio
import dataclasses
from collections import OrderedDict
from collections.abc import Mapping, Sequence

from prompt_store.prompts.task import Message, render_messages
from prompt_store.prompts.template import fill_in, template_fields
from prompt_store.prompts.version import EnsemblePayload, TextPayload, Vote
from service.catalog import Catalog, Target
from service.engines import ensemble
from service.engines.base import (
    Engine,
    GenerationRequest,
    Messages,
    Prompt,
    Sampling,
    ScoreRequest,
    Scores,
    SoftPromptReference,
    Usage,
)
from service.engines.collecting import total
from service.engines.errors import UnsupportedFeature
from service.engines.scoring import CONTENT_FREE, Normalise, label_log_probabilities
from service.metrics import Labels, Metrics
from service.routing.errors import NotServed, WrongTaskKind
from service.routing.generation import Batch, Caller, Generation, Record

_KEPT_PRIORS = 4096


@dataclasses.dataclass(frozen=True, slots=True)
class LabelProbability:
    """How probable a label is among the task's labels."""

    label: str
    probability: float


@dataclasses.dataclass(frozen=True, slots=True)
class Classification:
    """Labels, the chosen one first. `agreement` is the share of an ensemble's members that chose it, else None."""

    id: str
    labels: tuple[LabelProbability, ...]
    usage: Usage
    agreement: float | None = None


class Router:
    """Takes a resolved target and a prompt to a backend, and keeps the record."""

    def __init__(self, catalog: Catalog, engines: Mapping[str, Engine], metrics: Metrics, signing_key: bytes) -> None:
        self._catalog = catalog
        self.engines = engines
        self._metrics = metrics
        self._signing_key = signing_key
        self._prior_scores: OrderedDict[tuple[str, str, str], tuple[Scores, ...]] = OrderedDict()
        self._asking_priors = asyncio.Lock()

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
        task = target.task.task
        payload = target.version.payload if target.version is not None else None
        messages = payload.messages if isinstance(payload, TextPayload) else task.messages
        # A text prompt may leave inputs out; a request brings all of them whichever version answers.
        return Messages(fill_in(messages, inputs, task.inputs))

    def serves(self, target: Target, feature: str) -> bool:
        """Whether the target's backend has a feature, by its name in `required_features`. Raises NotServed."""
        return feature in self._engine(target).capabilities().features

    async def generate(self, target: Target, caller: Caller, request: GenerationRequest) -> Generation:
        """Begin to answer. Raises EngineError, StoreError or NotServed before the first token; the prompt is the
        request's, soft prompt and id come from the target."""
        generation = self._generation(target, caller, request)
        await generation.begin()
        return generation

    async def generate_each(self, target: Target, caller: Caller, requests: Sequence[GenerationRequest]) -> Batch:
        """Begin to answer several requests as one; what is raised for one of them ends all."""
        batch = Batch([self._generation(target, caller, request) for request in requests])
        await batch.begin()
        return batch

    def _generation(self, target: Target, caller: Caller, request: GenerationRequest) -> Generation:
        record = self._record(target, caller)
        try:
            engine = self._engine(target)
            request = dataclasses.replace(request, id=record.id, principal=caller.principal, task=record.labels.task)
            soft_prompts = self._soft_prompts(target)
            if (vote := _vote(target)) is not None:
                events = ensemble.generate(engine, request, soft_prompts, vote)
            else:
                record.streamed_choices = request.n if request.stream else 0
                events = engine.generate(dataclasses.replace(request, soft_prompt=soft_prompts[0]))
        except Exception:
            record.end("error", None)
            raise
        return Generation(record, events)

    async def classify(
        self,
        target: Target,
        caller: Caller,
        inputs: Mapping[str, str],
        *,
        normalise: Normalise = "none",
        calibrate: bool = False,
        deadline_s: float | None = None,
    ) -> Classification:
        """Every label of the task with its probability. Raises WrongTaskKind for tasks without labels."""
        assert target.task is not None
        task = target.task.task
        prompt = self.task_prompt(target, inputs)
        record = self._record(target, caller)
        outcome, usage = "cancelled", None
        try:
            if task.kind != "classify":
                raise WrongTaskKind(
                    f"task '{task.name}' is of kind '{task.kind}'; POST /v1/tasks/{task.name}/generate answers it"
                )
            request = ScoreRequest(
                record.id, prompt, task.labels, principal=caller.principal, deadline_s=deadline_s, task=task.name
            )
            members = await ensemble.score(self._engine(target), request, self._soft_prompts(target))
            priors = await self._priors(target, request) if calibrate else [None] * len(members)
            outcome, usage = "stop", total(member.usage for member in members)
        except Exception:
            outcome = "error"
            raise
        finally:
            record.end(outcome, usage)
        values = [
            label_log_probabilities(member, normalise, prior) for member, prior in zip(members, priors, strict=True)
        ]
        vote = _vote(target)
        elected = ensemble.elect_label(values, vote or "mean_logprob")
        labels = (LabelProbability(task.labels[place], elected.probabilities[place]) for place in elected.order)
        return Classification(record.id, tuple(labels), usage, elected.agreement if vote is not None else None)

    async def _priors(self, target: Target, request: ScoreRequest) -> tuple[Scores, ...]:
        """The scores of the labels after an input that says nothing, of each member; asked once a version."""
        assert target.task is not None
        assert target.version is not None
        key = (target.version.digest, target.task.digest, target.backend)
        if key not in self._prior_scores:
            async with self._asking_priors:
                if key not in self._prior_scores:
                    nothing = dict.fromkeys(target.task.task.inputs, CONTENT_FREE)
                    asked = dataclasses.replace(
                        request, id=f"{request.id}/prior", prompt=self.task_prompt(target, nothing)
                    )
                    scores = await ensemble.score(self._engine(target), asked, self._soft_prompts(target))
                    self._prior_scores[key] = scores
                    while len(self._prior_scores) > _KEPT_PRIORS:
                        self._prior_scores.popitem(last=False)
        self._prior_scores.move_to_end(key)
        return self._prior_scores[key]

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

    def _soft_prompts(self, target: Target) -> tuple[SoftPromptReference | None, ...]:
        """The soft prompt that a target answers with, or those of its ensemble; a single None where it has none."""
        if target.version is None or isinstance(target.version.payload, TextPayload):
            return (None,)
        kind = target.version.payload.kind
        needed = "soft_prompt" if kind == "ensemble" else kind
        if needed not in self._engine(target).capabilities().payload_kinds:
            raise UnsupportedFeature(
                f"{target.label} is of kind '{kind}'; backend '{target.backend}' does not serve it", parameter="model"
            )
        return self._catalog.references(target.version)


def _vote(target: Target) -> Vote | None:
    """How the members of the target's ensemble vote; None where it is none."""
    payload = target.version.payload if target.version is not None else None
    return payload.vote if isinstance(payload, EnsemblePayload) else None
