"""The engine behind vLLM: the base model runs there, and soft prompts come with each request as embeddings.

A prompt is laid out here as for the local engine, token by token, and sent whole: as rows of the embedding matrix
behind the soft prompt's, or as token ids where there is none. vLLM applies no chat template.
"""

from __future__ import annotations

import asyncio
import dataclasses
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import aclosing
from dataclasses import dataclass
from functools import partial
from typing import Any

import msgspec

from service.engines.base import (
    Capabilities,
    Delta,
    EngineStats,
    Finish,
    GenerationEvent,
    GenerationRequest,
    Prompted,
    ScoreRequest,
    Scores,
    SoftPromptReference,
    Usage,
)
from service.engines.base_model import BaseModel
from service.engines.deadlines import left_s, sooner
from service.engines.errors import PromptTooLong, UnsupportedFeature
from service.engines.features import check_supported
from service.engines.layout import check_base, lay_out
from service.engines.remote.connection import Reply
from service.engines.remote.embeddings import EmbeddingMatrix
from service.engines.remote.encoded_prompts import EncodedPrompts
from service.engines.remote.in_flight import InFlight
from service.engines.remote.provider import Provider
from service.engines.remote.vllm_options import VllmOptions
from service.engines.remote.vllm_scoring import LabelScorer
from service.engines.remote.vllm_wire import GREEDY_BELOW, Completion, Input, copied, generation_fields
from service.engines.token_text import token_texts

_PATH = "/completions"
_LARGE_BYTES = 256 * 1024  # to make more than this holds the event loop up for milliseconds

_BEFORE = "vLLM was asked"
_FEATURES = frozenset(
    {
        "n", "logprobs", "echo", "structured_output", "deadline", "min_p", "min_tokens", "ignore_eos", "stop_token_ids",
        "frequency_penalty", "presence_penalty", "repetition_penalty", "logit_bias", "scores",
    }
)  # fmt: skip


class VllmEngine:
    """An Engine over one or several vLLM servers of the same base model, started with `--enable-prompt-embeds`."""

    def __init__(self, base: BaseModel, provider: Provider, matrix: EmbeddingMatrix, options: VllmOptions) -> None:
        self.base = base
        self.provider = provider
        self._matrix = matrix
        self._options = options
        self._context_length = min(options.context_length or base.context_length, base.context_length)
        self._prompts = EncodedPrompts(base, matrix.wire_type, options.prompt_memory_bytes)
        self._token_text = token_texts(base.tokenizer)
        self._in_flight = InFlight()
        self._tokens_generated = 0

    async def start(self) -> None:
        """vLLM is asked nothing yet. Raises BackendError for options that prove wrong."""
        await self.provider.start()
        self._in_flight.open()

    async def close(self, grace_s: float = 0.0) -> None:
        """Take no more requests, let running ones finish for `grace_s` seconds, hang up on the rest."""
        await self._in_flight.close(grace_s)
        await self.provider.close()

    async def generate(self, request: GenerationRequest) -> AsyncIterator[GenerationEvent]:
        """Deltas, then one Finish. See `Engine`; raises any of the EngineError tree."""
        check_supported(request, self.capabilities())
        request.check()
        self.base.check_tokens(request.sampling)
        if request.soft_prompt is not None and request.sampling.repetition_penalty != 1.0:
            raise UnsupportedFeature(
                "repetition_penalty is not served beside a soft prompt by this task's backend: vLLM does not see the "
                "prompt's tokens then. Use frequency_penalty or presence_penalty",
                parameter="repetition_penalty",
            )
        # vLLM makes one greedy answer at a time; the others are its copies.
        copies = request.n if request.sampling.temperature < GREEDY_BELOW else 1
        with self._in_flight.request():
            asked = await self._ask(request, begin_s=request.begin_s)
            completion = Completion(request.n // copies, request.logprobs, self._token_text)
            # Held until vLLM has taken the request, so that it can still be refused with a status of its own.
            prompted = Prompted(tuple(asked.token_ids), self.base.text_of(asked.token_ids)) if request.echo else None
            async with aclosing(self._deltas(request, asked, completion)) as deltas:
                async for delta in deltas:
                    if prompted is not None:
                        yield prompted
                        prompted = None
                    for copy in copied(delta, copies):
                        yield copy
            completion_tokens = completion.completion_tokens * copies
            self._tokens_generated += completion_tokens
            usage = Usage(len(asked.token_ids), completion_tokens, asked.virtual_tokens)
            yield Finish(completion.reasons[0], usage, completion.request_id)

    async def score(self, request: ScoreRequest) -> Scores:
        """Log-probabilities of the continuations, equal to the local engine's; see `ScoreRequest`.

        Takes two or three calls in turn, see `vllm_scoring`.
        """
        request.check()
        with self._in_flight.request():
            continuations = [self.base.continuation(text) for text in request.continuations]
            lengths = tuple(map(len, continuations))
            asked = await self._ask(request, further_tokens=max(lengths) - 1)
            scorer = LabelScorer(partial(self._post, asked), asked.input, asked.token_ids, self._options.max_logprobs)
            log_probabilities = await scorer.score(continuations)
        return Scores(log_probabilities, Usage(len(asked.token_ids), 0, asked.virtual_tokens), lengths)

    async def warm(self, soft_prompt: SoftPromptReference) -> None:
        """Read a soft prompt now and keep it in memory until `release`, as far as there is room."""
        check_base(self.base, soft_prompt)
        await self._prompts.pin(soft_prompt)

    async def release(self, digest: str) -> None:
        """Let a soft prompt go; requests that use it have their own copy."""
        self._prompts.release(digest)

    def stats(self) -> EngineStats:
        return dataclasses.replace(
            self.provider.stats(),
            prompts=len(self._prompts),
            prompt_bytes=self._prompts.size_bytes,
            tokens_generated=self._tokens_generated,
        )

    def capabilities(self) -> Capabilities:
        return Capabilities(frozenset({"soft_prompt", "text"}), _FEATURES, self._context_length, "vLLM")

    async def _ask(
        self, request: GenerationRequest | ScoreRequest, further_tokens: int = 0, begin_s: float | None = None
    ) -> _Asked:
        """The request laid out; `further_tokens` beside the prompt's must have room too."""
        now_s = time.monotonic()
        ends_at = None if request.deadline_s is None else now_s + request.deadline_s
        begins_at = sooner(ends_at, None if begin_s is None else now_s + begin_s)
        soft_prompt = request.soft_prompt
        token_ids = await lay_out(self.base, request.prompt, soft_prompt)
        virtual_tokens = soft_prompt.length if soft_prompt else 0
        room = self._context_length - len(token_ids) - virtual_tokens
        if room < 1 + further_tokens:
            raise PromptTooLong(len(token_ids) + further_tokens, virtual_tokens, self._context_length)
        rows = await self._prompts.rows(soft_prompt) if soft_prompt else None
        affinity = soft_prompt.digest if soft_prompt else ""
        laid_out = Input(self._matrix, rows)
        return _Asked(token_ids, virtual_tokens, room, laid_out, affinity, ends_at, begins_at, request.another_follows)

    async def _deltas(self, request: GenerationRequest, asked: _Asked, completion: Completion) -> AsyncGenerator[Delta]:
        """What vLLM makes of the prompt, as it comes or all at its end."""
        if request.sampling.max_tokens == 0:  # only the prompt was wanted, which is known here
            for delta in completion.without_tokens():
                yield delta
            return
        fields = generation_fields(request, self.base, most_tokens=asked.room, n=completion.n)
        size_bytes = asked.input.size_bytes(len(asked.token_ids))

        def body() -> dict[str, Any]:
            return asked.input.fields([asked.token_ids]) | fields

        if request.stream:
            content = partial(self._encoded, body, size_bytes)
            async with self.provider.events(
                _PATH,
                content,
                affinity=asked.affinity,
                deadline_s=left_s(asked.ends_at, before=_BEFORE),
                begin_s=left_s(asked.begins_at, before=_BEFORE),
                another_follows=asked.another_follows,
            ) as events:
                completion.request_id = events.request_id
                async for document in events:
                    for delta in completion.read(document):
                        yield delta
        else:
            reply = await self._post(asked, body, size_bytes)
            completion.request_id = reply.request_id
            for delta in completion.read(reply.document):
                yield delta
        completion.check_ended()

    async def _post(self, asked: _Asked, body: Callable[[], dict[str, Any]], size_bytes: int) -> Reply:
        """vLLM's whole answer to what `body` makes, which takes about `size_bytes`."""
        content = partial(self._encoded, body, size_bytes)
        return await self.provider.post(
            _PATH,
            content,
            affinity=asked.affinity,
            deadline_s=left_s(asked.begins_at, before=_BEFORE),
            another_follows=asked.another_follows,
        )

    async def _encoded(self, body: Callable[[], dict[str, Any]], size_bytes: int) -> bytes:
        """A body as it is sent; a large one is made in a thread."""
        model = {} if self._options.model is None else {"model": self._options.model}
        if size_bytes > _LARGE_BYTES:
            return await asyncio.to_thread(lambda: msgspec.json.encode(model | body()))
        return msgspec.json.encode(model | body())


@dataclass(frozen=True, slots=True)
class _Asked:
    """A request laid out. `room` are the tokens that the context still takes.

    `ends_at` and, for its first event, `begins_at` are by `time.monotonic`.
    """

    token_ids: list[int]
    virtual_tokens: int
    room: int
    input: Input
    affinity: str
    ends_at: float | None
    begins_at: float | None
    another_follows: bool
