"""vLLM's completions: bodies out, answers in. Pure.

Written from vLLM 0.32's own description (`CompletionRequest`, `SamplingParams`). What its server would take from the
base model's generation_config is always said, so that an answer depends on the request alone.
"""

from __future__ import annotations

import base64
import dataclasses
from collections.abc import Sequence
from typing import Any

import msgspec

from service.engines.base import Delta, FinishReason, GenerationRequest, ResponseFormat, Sampling, TokenLogprob
from service.engines.base_model import BaseModel
from service.engines.errors import ProviderMisbehaved, ProviderUnavailable
from service.engines.remote.embeddings import EmbeddingMatrix
from service.engines.remote.request_body import leniently
from service.engines.remote.torch_file import ITEM_BYTES, torch_file
from service.engines.token_text import TokenText

GREEDY_BELOW = 1e-5
"""Temperatures under this are greedy, for vLLM as for the local engine."""

_REASONS: dict[str, FinishReason] = {"stop": "stop", "length": "length", "repetition": "stop"}
_TOKEN = "token_id:"


class Input:
    """What vLLM reads before it answers: token ids, or embeddings where a soft prompt stands before them."""

    def __init__(self, matrix: EmbeddingMatrix, soft_rows: bytes | None) -> None:
        self._matrix = matrix
        self._soft_rows = soft_rows

    def fields(self, prompts: Sequence[Sequence[int]]) -> dict[str, Any]:
        """The fields of a body that ask about each of these prompts; takes a while for many or long ones."""
        if self._soft_rows is None:
            return {"prompt": [list(prompt) for prompt in prompts]}
        return {"prompt_embeds": [self._embedded(prompt, self._soft_rows) for prompt in prompts]}

    def size_bytes(self, prompt_tokens: int) -> int:
        """About how large a prompt of so many tokens is on the wire."""
        if self._soft_rows is None:
            return 8 * prompt_tokens
        row_bytes = self._matrix.hidden_size * ITEM_BYTES[self._matrix.wire_type]
        return (len(self._soft_rows) + prompt_tokens * row_bytes) * 4 // 3

    def _embedded(self, prompt: Sequence[int], soft_rows: bytes) -> str:
        rows = self._matrix.encode(prompt)
        wire_type, hidden_size = self._matrix.wire_type, self._matrix.hidden_size
        length = (len(soft_rows) + len(rows)) // (hidden_size * ITEM_BYTES[wire_type])
        return base64.b64encode(torch_file(wire_type, (length, hidden_size), (soft_rows, rows))).decode("ascii")


def generation_fields(request: GenerationRequest, base: BaseModel, *, most_tokens: int, n: int) -> dict[str, Any]:
    """All of a body but the prompt. `most_tokens` is what the context has room for, `n` how many answers are made."""
    sampling = request.sampling
    fields: dict[str, Any] = {
        "max_tokens": min(sampling.max_tokens, most_tokens),
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "top_k": sampling.top_k,
        "min_p": sampling.min_p,
        "frequency_penalty": sampling.frequency_penalty,
        "presence_penalty": sampling.presence_penalty,
        "repetition_penalty": sampling.repetition_penalty,
        "min_tokens": min(sampling.min_tokens, most_tokens),
        "ignore_eos": sampling.ignore_eos,
        "stop": sampling.stop,
        "stop_token_ids": _ending(sampling, base),
        "seed": sampling.seed,
        "logit_bias": {str(token): bias for token, bias in sampling.logit_bias.items()} or None,
        "n": n,
        "stream": request.stream,
        "return_token_ids": True,
        "structured_outputs": _structured(request.response_format),
    }
    if request.logprobs is not None:
        fields |= {"logprobs": request.logprobs, "return_tokens_as_token_ids": True}
    return {name: value for name, value in fields.items() if value is not None}


def scoring_fields(logprobs: int, only: int | None = None) -> dict[str, Any]:
    """All of a body that asks what may come next, but the prompts: the most probable tokens, or `only` this one.

    vLLM reports log-probabilities as they are before anything is masked.
    """
    shown = {"logprobs": logprobs} if only is None else {"logprobs": 0, "allowed_token_ids": [only]}
    return {"max_tokens": 1, "temperature": 0.0, "return_tokens_as_token_ids": True, **shown}


def _ending(sampling: Sampling, base: BaseModel) -> list[int]:
    """Every token that ends an answer: vLLM alone would know of one end-of-sequence token, or of all."""
    eos = () if sampling.ignore_eos else base.eos_token_ids
    return sorted({*sampling.stop_token_ids, *eos})


def _structured(form: ResponseFormat) -> dict[str, Any] | None:
    match form.kind:
        case "text":
            return None
        case "json_object":
            return {"json": {"type": "object"}}
        case "json_schema" if form.lenient and form.json_schema is not None:
            return {"json": leniently(form.json_schema)}
        case "json_schema":
            return {"json": form.json_schema}
        case "regex":
            return {"regex": form.regex}
        case "choice":
            return {"choice": form.choices}


class _Logprobs(msgspec.Struct):
    tokens: list[str]
    token_logprobs: list[float]
    top_logprobs: list[dict[str, float]]


class _Choice(msgspec.Struct):
    text: str
    index: int = 0
    token_ids: list[int] | None = None
    logprobs: _Logprobs | None = None
    finish_reason: str | None = None


class _Document(msgspec.Struct):
    choices: list[_Choice]


class Completion:
    """The documents that answer one generation of `n` choices, the chunks of a stream or the one whole answer.

    `alternatives` as the request's `logprobs`. `request_id` is vLLM's own, for messages.
    """

    def __init__(self, n: int, alternatives: int | None, token_text: TokenText) -> None:
        self.n = n
        self.request_id = ""
        self._alternatives = alternatives
        self._token_text = token_text
        self.reasons: dict[int, FinishReason] = {}
        self.completion_tokens = 0

    def read(self, document: Any) -> list[Delta]:
        """What a document brings. Raises ProviderMisbehaved, and ProviderUnavailable for an answer given up."""
        return [self._delta(choice) for choice in _converted(document, self.request_id).choices]

    def without_tokens(self) -> list[Delta]:
        """The choices of a request for none, which nobody need be asked for."""
        self.reasons = dict.fromkeys(range(self.n), "length")
        return [Delta("", (), index, finish_reason="length") for index in range(self.n)]

    def check_ended(self) -> None:
        """Raise ProviderMisbehaved unless every choice has ended."""
        if len(self.reasons) < self.n:
            raise self._misbehaved("ended its answer before all choices did")

    def _delta(self, choice: _Choice) -> Delta:
        if choice.token_ids is None:
            raise self._misbehaved("shows no token ids; it must be vLLM 0.32 or newer")
        if not 0 <= choice.index < self.n or choice.index in self.reasons:
            raise self._misbehaved(f"goes on with choice {choice.index}, which has ended or was not asked for")
        reason = None
        if choice.finish_reason is not None:
            reason = self._reason(choice.finish_reason)
            self.reasons[choice.index] = reason
        self.completion_tokens += len(choice.token_ids)
        return Delta(choice.text, tuple(choice.token_ids), choice.index, self._logprobs(choice), reason)

    def _reason(self, said: str) -> FinishReason:
        reason = _REASONS.get(said)
        if reason is None:
            raise ProviderUnavailable(
                f"vLLM gave the answer up ({said[:40]}); send the request again", request_id=self.request_id
            )
        return reason

    def _logprobs(self, choice: _Choice) -> tuple[TokenLogprob, ...]:
        if self._alternatives is None or choice.logprobs is None:
            return ()
        given = choice.logprobs
        if not len(given.tokens) == len(given.token_logprobs) == len(given.top_logprobs):
            raise self._misbehaved("has log-probabilities that do not fit its tokens")
        return tuple(
            self._logprob(token, logprob, top)
            for token, logprob, top in zip(given.tokens, given.token_logprobs, given.top_logprobs, strict=True)
        )

    def _logprob(self, token: str, logprob: float, top: dict[str, float]) -> TokenLogprob:
        """vLLM shows the chosen token among its alternatives, even where it is none of them."""
        assert self._alternatives is not None
        best = sorted(_by_token_id(top, self.request_id).items(), key=lambda entry: -entry[1])[: self._alternatives]
        (token_id,) = _by_token_id({token: logprob}, self.request_id)
        alternatives = tuple(TokenLogprob(other, value, (), *self._token_text(other)) for other, value in best)
        return TokenLogprob(token_id, logprob, alternatives, *self._token_text(token_id))

    def _misbehaved(self, what: str) -> ProviderMisbehaved:
        return ProviderMisbehaved(f"vLLM {what}", request_id=self.request_id)


def next_logprobs(document: Any, count: int, request_id: str = "") -> list[dict[int, float]]:
    """For each of `count` prompts, the log-probabilities of the tokens that may come next, as far as they are shown.

    Raises ProviderMisbehaved.
    """
    choices = sorted(_converted(document, request_id).choices, key=lambda choice: choice.index)
    if [choice.index for choice in choices] != list(range(count)):
        raise ProviderMisbehaved(f"vLLM was asked about {count} prompts and answered otherwise", request_id=request_id)
    shown = [choice.logprobs for choice in choices]
    if any(logprobs is None or not logprobs.top_logprobs for logprobs in shown):
        raise ProviderMisbehaved("vLLM left out the log-probabilities it was asked for", request_id=request_id)
    return [_by_token_id(logprobs.top_logprobs[0], request_id) for logprobs in shown if logprobs is not None]


def _by_token_id(named: dict[str, float], request_id: str) -> dict[int, float]:
    """Log-probabilities by token id, of tokens that are written `token_id:17`. Raises ProviderMisbehaved."""
    try:
        return {int(token.removeprefix(_TOKEN)): logprob for token, logprob in named.items()}
    except ValueError as error:
        raise ProviderMisbehaved(
            f"vLLM writes tokens as text where ids were asked for: {error}", request_id=request_id
        ) from error


def copied(delta: Delta, copies: int) -> list[Delta]:
    """A choice's delta for that many equal choices."""
    return [delta] if copies == 1 else [dataclasses.replace(delta, index=index) for index in range(copies)]


def _converted(document: Any, request_id: str) -> _Document:
    try:
        return msgspec.convert(document, _Document)
    except msgspec.ValidationError as error:
        raise ProviderMisbehaved(f"vLLM's answer cannot be read: {error}", request_id=request_id) from error
