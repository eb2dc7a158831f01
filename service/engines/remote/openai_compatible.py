"""The engine behind a provider of OpenAI's API: what `request_body` sends and `answer_body` reads, over a Provider.

Labels are scored by one constrained answer and the alternatives beside its tokens, see `labels`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import time
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from urllib.parse import quote

from prompt_store.prompts.task import Message
from service.engines.base import (
    Capabilities,
    Delta,
    EngineStats,
    Finish,
    GenerationEvent,
    GenerationRequest,
    Messages,
    Prompt,
    ResponseFormat,
    Sampling,
    ScoreRequest,
    Scores,
    SoftPromptReference,
)
from service.engines.collecting import total
from service.engines.deadlines import left_s, sooner
from service.engines.errors import ProviderMisbehaved, UnsupportedFeature
from service.engines.features import check_supported
from service.engines.remote.answer_body import StreamedAnswer, before_choice, read_answer, unwrapped_text
from service.engines.remote.flavours import Flavour
from service.engines.remote.in_flight import InFlight
from service.engines.remote.labels import label_scores
from service.engines.remote.provider import Provider
from service.engines.remote.request_body import Endpoint, Outgoing, encode

_TOKENS_BESIDE_A_LABEL = 8


@dataclasses.dataclass(frozen=True, slots=True)
class AzureDeployment:
    """Azure's classic addresses: the deployment (the model where None) is in the path, the version in the query.

    Source: https://learn.microsoft.com/azure/ai-foundry/openai/api-version-lifecycle
    """

    api_version: str
    deployment: str | None = None


class OpenAICompatibleEngine:
    """An Engine at a provider.

    `default_model` answers requests that name no remote model. Whatever is wrong with an answer that is not streamed is
    raised before its first event, and of a stream what is wrong until its first chunk.
    """

    def __init__(
        self,
        provider: Provider,
        flavour: Flavour,
        *,
        default_model: str | None = None,
        azure: AzureDeployment | None = None,
    ) -> None:
        self.provider = provider
        self._flavour = flavour
        self._default_model = default_model
        self._azure = azure
        kinds = {"remote_model"} if default_model is None else {"remote_model", "text"}
        self._capabilities = Capabilities(frozenset(kinds), flavour.features, context_length=0)
        self._in_flight = InFlight()
        self._tokens_generated = 0

    async def start(self) -> None:
        """Nothing is asked of the provider yet. Raises BackendError for options that prove wrong."""
        await self.provider.start()
        self._in_flight.open()

    async def close(self, grace_s: float = 0.0) -> None:
        """Take no more requests, let running ones finish for `grace_s` seconds, hang up on the rest."""
        await self._in_flight.close(grace_s)
        await self.provider.close()

    async def generate(self, request: GenerationRequest) -> AsyncIterator[GenerationEvent]:
        """Deltas, then one Finish. See `Engine`; raises any of the EngineError tree."""
        check_supported(request, self._capabilities)
        request.check()
        _refuse(request.soft_prompt)
        outgoing = self._encode(request)
        with self._in_flight.request():
            if outgoing.stream:
                async with contextlib.aclosing(self._stream(request, outgoing)) as events:
                    async for event in events:
                        yield event
                return
            deltas, finish = await self._whole(request, outgoing, wrapped=outgoing.wrapped)
            for delta in deltas:
                yield delta
            yield finish

    async def score(self, request: ScoreRequest) -> Scores:
        """The labels' log-probabilities among themselves, from one constrained answer; see `labels`.

        Where the provider shows no log-probabilities, or they do not spell the answer, only the choice is known. An
        answer that is none of the labels is asked for once more; a second one raises ProviderMisbehaved.
        """
        request.check()
        if "scores" not in self._capabilities.features:
            raise UnsupportedFeature("labels are not scored by this task's backend; route the task to another")
        _refuse(request.soft_prompt)
        ends_at = None if request.deadline_s is None else time.monotonic() + request.deadline_s
        asked = self._label_request(request)
        with self._in_flight.request():
            delta, finish = await self._one(asked)
            usages = [finish.usage]
            chosen = _chosen(delta.text, request.continuations)
            if chosen is None:
                corrected = _corrected(request.prompt, delta.text, request.continuations)
                deadline_s = left_s(ends_at, before="a label was answered")
                delta, finish = await self._one(dataclasses.replace(asked, prompt=corrected, deadline_s=deadline_s))
                usages.append(finish.usage)
                chosen = _chosen(delta.text, request.continuations)
        if chosen is None:
            raise ProviderMisbehaved(
                "the provider was asked twice for one of the task's labels and answered with none of them; see that "
                "the model was tuned for these labels, or give the route a fallback",
                request_id=finish.provider_request_id,
            )
        spelled = [_spelled(delta.text, label) for label in request.continuations]
        values = label_scores(delta.logprobs, spelled, chosen) if delta.logprobs else None
        if values is None:
            only = tuple(0.0 if place == chosen else -float("inf") for place in range(len(request.continuations)))
            return Scores(only, total(usages), choice_only=True, provider_request_id=finish.provider_request_id)
        return Scores(values, total(usages), provider_request_id=finish.provider_request_id)

    async def warm(self, soft_prompt: SoftPromptReference) -> None:
        """Nothing: there are no soft prompts here."""

    async def release(self, digest: str) -> None:
        """Nothing, as `warm`."""

    def stats(self) -> EngineStats:
        return dataclasses.replace(self.provider.stats(), tokens_generated=self._tokens_generated)

    def capabilities(self) -> Capabilities:
        return self._capabilities

    def _encode(self, request: GenerationRequest) -> Outgoing:
        return encode(request, self._model(request.remote_model), self._flavour)

    def _model(self, asked: str | None) -> str:
        model = asked or self._default_model
        if model is None:
            raise UnsupportedFeature(
                "this task's backend has no model of its own; publish a version with the remote model's id, or set the "
                "backend's default_model",
                parameter="model",
            )
        return model

    def _path(self, endpoint: Endpoint, model: str) -> str:
        if self._azure is None:
            return f"/{endpoint}"
        deployment = quote(self._azure.deployment or model, safe="")
        return f"/deployments/{deployment}/{endpoint}?api-version={self._azure.api_version}"

    async def _stream(self, request: GenerationRequest, outgoing: Outgoing) -> AsyncGenerator[GenerationEvent]:
        path = self._path(outgoing.endpoint, self._model(request.remote_model))
        async with self.provider.events(
            path,
            outgoing.body,
            deadline_s=request.deadline_s,
            begin_s=request.begin_s,
            another_follows=request.another_follows,
        ) as events:
            answer = StreamedAnswer(request.n, events.request_id)
            async for document in events:
                for delta in answer.read(document):
                    yield delta
            finish = answer.finish()
        self._tokens_generated += finish.usage.completion_tokens
        yield finish

    async def _whole(
        self, request: GenerationRequest, outgoing: Outgoing, *, wrapped: bool
    ) -> tuple[list[Delta], Finish]:
        path = self._path(outgoing.endpoint, self._model(request.remote_model))
        reply = await self.provider.post(
            path,
            outgoing.body,
            deadline_s=sooner(request.deadline_s, request.begin_s),
            another_follows=request.another_follows,
        )
        deltas, finish = read_answer(
            reply.document, outgoing.endpoint, n=request.n, wrapped=wrapped, request_id=reply.request_id
        )
        self._tokens_generated += finish.usage.completion_tokens
        return deltas, finish

    async def _one(self, request: GenerationRequest) -> tuple[Delta, Finish]:
        """The one choice, as it came: what stands around it is needed to find its labels' tokens."""
        (delta,), finish = await self._whole(request, self._encode(request), wrapped=False)
        return delta, finish

    def _label_request(self, request: ScoreRequest) -> GenerationRequest:
        """One label asked for: constrained to them where the provider constrains, with all that it shows beside."""
        features = self._capabilities.features
        constrained = "structured_output" in features and (
            isinstance(request.prompt, Messages) or self._flavour.completion_formats
        )
        form = ResponseFormat("choice", choices=request.continuations) if constrained else ResponseFormat()
        longest = max(len(json.dumps(label)) for label in request.continuations)  # no token is shorter than a character
        return GenerationRequest(
            id=request.id,
            prompt=request.prompt,
            remote_model=request.remote_model,
            sampling=Sampling(max_tokens=longest + _TOKENS_BESIDE_A_LABEL),
            principal=request.principal,
            logprobs=self._flavour.most_logprobs if "logprobs" in features else None,
            response_format=form,
            deadline_s=request.deadline_s,
            another_follows=request.another_follows,
            stream=False,
            task=request.task,
        )


def _refuse(soft_prompt: SoftPromptReference | None) -> None:
    if soft_prompt is not None:
        raise UnsupportedFeature(
            "this task's backend is at a provider and takes no soft prompts; route the version to one that does",
            parameter="model",
        )


def _chosen(text: str, labels: Sequence[str]) -> int | None:
    """The label that an answer is, spaces and case aside; None where it is none, or may be several."""
    said = unwrapped_text(text)
    said = (text if said is None else said).strip()
    if said in labels:
        return labels.index(said)
    alike = [place for place, label in enumerate(labels) if label.strip().casefold() == said.casefold()]
    return alike[0] if len(alike) == 1 else None


def _spelled(text: str, label: str) -> str:
    """The whole answer had it been `label`: in the JSON object that this one is, or after its leading spaces."""
    before = before_choice(text)
    if before is not None:
        return f'{before}{json.dumps(label, ensure_ascii=False)[1:-1]}"'
    return text[: len(text) - len(text.lstrip())] + label


def _corrected(prompt: Prompt, answer: str, labels: Sequence[str]) -> Prompt:
    """The conversation with its wrong answer, and what is wrong with it; raw text is asked again as it is."""
    if not isinstance(prompt, Messages):
        return prompt
    asked = "That is none of the possible answers. Answer with one of these alone:\n" + "\n".join(labels)
    said = (Message(role="assistant", content=answer), Message(role="user", content=asked))
    wire = tuple({"role": message.role, "content": message.content} for message in said)
    return Messages((*prompt.messages, *said), (*prompt.wire, *wire) if prompt.wire else ())
