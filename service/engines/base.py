"""What every engine speaks: requests, their answers, and the `Engine` protocol.

Owns the shapes that travel between routing and engines. How text becomes token ids is `base_model`'s subject, how
tokens are made is each engine's own.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from prompt_store.access import ANONYMOUS, Principal
from prompt_store.prompts.prefix import Prefix
from prompt_store.prompts.soft_prompt import SoftPrompt
from prompt_store.prompts.task import Message
from service.engines.errors import InvalidRequest

FinishReason = Literal["stop", "length", "tool_calls", "content_filter"]
MAX_STOP_STRINGS = 16
MAX_STOP_TOKENS = 64
MAX_BIASED_TOKENS = 1024
MAX_CHOICES = 128
MAX_LOGPROBS = 20
_MANY = 2**31
UNBOUNDED = _MANY - 1
"""`max_tokens` of an answer as long as the backend lets it be: a remote engine leaves the parameter out."""


@dataclass(frozen=True, slots=True)
class Messages:
    """A conversation; the base model's chat template lays it out.

    `wire` is the same conversation in OpenAI's form, as it came, where it holds more than roles and texts (tool calls
    and their results, names, images); only engines with the feature `rich_messages` take it.
    """

    messages: tuple[Message, ...]
    wire: tuple[Mapping[str, Any], ...] = ()


@dataclass(frozen=True, slots=True)
class RawText:
    """Text to continue as it stands; no chat template."""

    text: str


@dataclass(frozen=True, slots=True)
class TokenIds:
    """Text that is tokenised already."""

    ids: tuple[int, ...]


Prompt = Messages | RawText | TokenIds


@dataclass(frozen=True, slots=True)
class SoftPromptReference:
    """A soft prompt or prefix by its tensor digest; `load` reads the tensor when an engine first meets it."""

    digest: str
    length: int
    base_fingerprint: str
    load: Callable[[], SoftPrompt | Prefix]

    @classmethod
    def to(cls, prompt: SoftPrompt | Prefix, base_fingerprint: str) -> SoftPromptReference:
        """Refer to a soft prompt that is in memory."""
        return cls(prompt.digest, prompt.length, base_fingerprint, lambda: prompt)


@dataclass(frozen=True, slots=True)
class Sampling:
    """How the next token is chosen. Temperature 0 takes the most probable token (greedy)."""

    max_tokens: int = 128
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    min_p: float = 0.0
    min_tokens: int = 0
    ignore_eos: bool = False
    stop_token_ids: tuple[int, ...] = ()
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)

    def check(self, *, fewest: int = 1) -> None:
        """Raise InvalidRequest for the first value that is out of its range.

        `fewest` is the least `max_tokens` that makes sense: 0 where only the prompt's log-probabilities are wanted.
        """
        checks = (
            (fewest <= self.max_tokens < _MANY, "max_tokens", f"at least {fewest} and below {_MANY}"),
            (0.0 <= self.temperature <= 2.0, "temperature", "between 0 and 2"),
            (0.0 < self.top_p <= 1.0, "top_p", "above 0 and at most 1"),
            (0 <= self.top_k < _MANY, "top_k", f"0 (off) or more, below {_MANY}"),
            (self.seed is None or -(2**63) <= self.seed < 2**63, "seed", "a 64-bit integer"),
            (len(self.stop) <= MAX_STOP_STRINGS, "stop", f"at most {MAX_STOP_STRINGS} strings"),
            (all(self.stop), "stop", "strings that are not empty"),
            (0.0 <= self.min_p <= 1.0, "min_p", "between 0 and 1"),
            (0 <= self.min_tokens <= self.max_tokens, "min_tokens", "0 or more, and at most max_tokens"),
            (len(self.stop_token_ids) <= MAX_STOP_TOKENS, "stop_token_ids", f"at most {MAX_STOP_TOKENS} token ids"),
            (-2.0 <= self.frequency_penalty <= 2.0, "frequency_penalty", "between -2 and 2"),
            (-2.0 <= self.presence_penalty <= 2.0, "presence_penalty", "between -2 and 2"),
            (0.0 < self.repetition_penalty <= 10.0, "repetition_penalty", "above 0 and at most 10"),
            (len(self.logit_bias) <= MAX_BIASED_TOKENS, "logit_bias", f"at most {MAX_BIASED_TOKENS} tokens"),
            (
                all(-100.0 <= bias <= 100.0 for bias in self.logit_bias.values()),
                "logit_bias",
                "each between -100 and 100",
            ),
        )
        for holds, name, expected in checks:
            if not holds:
                raise InvalidRequest(f"{name} is {getattr(self, name)!r}; it must be {expected}", parameter=name)


@dataclass(frozen=True, slots=True)
class ResponseFormat:
    """The form an answer must take: a JSON schema for `json_schema`, a pattern for `regex`, texts for `choice`.

    `lenient` leaves out of a schema what an engine cannot hold an answer to, instead of refusing it; whoever asks so
    checks the answer himself.
    """

    kind: Literal["text", "json_object", "json_schema", "regex", "choice"] = "text"
    json_schema: Mapping[str, Any] | None = None
    regex: str | None = None
    choices: tuple[str, ...] = ()
    lenient: bool = False

    def check(self) -> None:
        """Raise InvalidRequest for a form without what it is a form of."""
        given = {
            "json_schema": self.json_schema is not None,
            "regex": bool(self.regex),
            "choice": len(self.choices) > 0 and all(self.choices),
        }
        if not given.get(self.kind, True):
            raise InvalidRequest(
                f"response_format is {self.kind} and does not say which; give a JSON schema, a regular expression, or "
                "choices that are not empty",
                parameter="response_format",
            )


@dataclass(frozen=True, slots=True)
class GenerationRequest:
    """One question to an engine.

    `logprobs` and `prompt_logprobs` say how many alternatives come with each token's log-probability; None wants
    none. `stream` says whether text is wanted as it is made; otherwise an engine may bring all of it at the end.
    `task` is whom it counts for when tasks share an engine fairly. `deadline_s` is the time it may take, from now
    on, `begin_s` the time until its first event. `another_follows` says that another backend is asked where this
    one fails: then a provider that wants to be left alone for a while is not waited for. `remote_model` is the
    model as the provider knows it. `tools`, `tool_choice`, `parallel_tool_calls` and `provider_options` (other
    parameters, by the provider's own names) are passed on as they came.
    """

    id: str
    prompt: Prompt
    soft_prompt: SoftPromptReference | None = None
    remote_model: str | None = None
    sampling: Sampling = Sampling()
    principal: Principal = ANONYMOUS
    n: int = 1
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    echo: bool = False
    response_format: ResponseFormat = ResponseFormat()
    tools: tuple[Mapping[str, Any], ...] = ()
    tool_choice: str | Mapping[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    provider_options: Mapping[str, Any] = field(default_factory=dict)
    deadline_s: float | None = None
    begin_s: float | None = None
    another_follows: bool = False
    stream: bool = True
    task: str = ""

    def check(self) -> None:
        """Raise InvalidRequest for the first value that is out of its range, sampling and response format included."""
        checks = (
            (1 <= self.n <= MAX_CHOICES, "n", f"between 1 and {MAX_CHOICES}"),
            (_counts_alternatives(self.logprobs), "logprobs", f"between 0 and {MAX_LOGPROBS}"),
            (_counts_alternatives(self.prompt_logprobs), "prompt_logprobs", f"between 0 and {MAX_LOGPROBS}"),
            (self.deadline_s is None or self.deadline_s > 0.0, "deadline_s", "above 0"),
        )
        for holds, name, expected in checks:
            if not holds:
                raise InvalidRequest(f"{name} is {getattr(self, name)!r}; it must be {expected}", parameter=name)
        self.sampling.check(fewest=0 if self.echo or self.prompt_logprobs is not None else 1)
        self.response_format.check()


@dataclass(frozen=True, slots=True)
class ScoreRequest:
    """Ask for the log-probability of each continuation after the prompt, its end-of-sequence token included.

    `deadline_s` and `another_follows` as in GenerationRequest.
    """

    id: str
    prompt: Prompt
    continuations: tuple[str, ...]
    soft_prompt: SoftPromptReference | None = None
    remote_model: str | None = None
    principal: Principal = ANONYMOUS
    deadline_s: float | None = None
    another_follows: bool = False
    task: str = ""

    def check(self) -> None:
        """Raise InvalidRequest where there is no continuation."""
        if not self.continuations:
            raise InvalidRequest("there is nothing to score; name at least one continuation", parameter="continuations")


@dataclass(frozen=True, slots=True)
class Scores:
    """`log_probabilities[i]` is the natural logarithm of continuation i's probability, of `lengths[i]` tokens.

    With `choice_only` an engine knows which continuation was chosen and no probabilities: it has 0.0 for that one, and
    -inf for the others. `provider_request_id` as in Finish.
    """

    log_probabilities: tuple[float, ...]
    usage: Usage
    lengths: tuple[int, ...] = ()
    choice_only: bool = False
    provider_request_id: str = ""


@dataclass(frozen=True, slots=True)
class Usage:
    """Tokens of one generation; virtual tokens stand beside `prompt_tokens`, not in it.

    `cached_prompt_tokens` of the prompt's were read from a provider's cache, which it may bill at another price.
    """

    prompt_tokens: int
    completion_tokens: int
    virtual_tokens: int = 0
    cached_prompt_tokens: int = 0


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """A token's natural log-probability, and the most probable tokens in its place, the first one first.

    `data` are the token's own bytes, which may be half a character; `text` shows them, U+FFFD for what is incomplete.
    An engine gives both, because who asks knows no tokenizer and a remote engine no ids.
    """

    token_id: int
    logprob: float
    top: tuple[TokenLogprob, ...] = ()
    text: str = ""
    data: bytes = b""


@dataclass(frozen=True, slots=True)
class Prompted:
    """The prompt as it was laid out; comes first where `echo` or `prompt_logprobs` asked for it.

    `logprobs` and `pieces` (each token's own text and bytes, as in TokenLogprob) have an entry a token where
    `prompt_logprobs` asked for them. The first of `logprobs` is None: nothing says what it should have been.
    """

    token_ids: tuple[int, ...]
    text: str
    logprobs: tuple[TokenLogprob | None, ...] = ()
    pieces: tuple[tuple[str, bytes], ...] = ()


@dataclass(frozen=True, slots=True)
class ToolCallPiece:
    """More of the tool call at place `index` of an answer. `id` and `name` come with its first piece alone."""

    index: int
    arguments: str = ""
    id: str = ""
    name: str = ""


@dataclass(frozen=True, slots=True)
class Delta:
    """More of choice `index`. `text` may be empty while a character is incomplete.

    `finish_reason` is set on the last delta of each choice. So is `agreement` where an ensemble answers: the share of
    its members that gave this answer. A remote engine has no `token_ids`; it may bring `tool_calls`, and a `refusal`
    in place of text.
    """

    text: str
    token_ids: tuple[int, ...] = ()
    index: int = 0
    logprobs: tuple[TokenLogprob, ...] = ()
    finish_reason: FinishReason | None = None
    agreement: float | None = None
    tool_calls: tuple[ToolCallPiece, ...] = ()
    refusal: str = ""


@dataclass(frozen=True, slots=True)
class Finish:
    """The end of a generation, after the last delta of every choice; nothing follows it.

    `reason` is that of the first choice; usage counts all of them. `provider_request_id` is the name that a provider
    gave the request, for its support.
    """

    reason: FinishReason
    usage: Usage
    provider_request_id: str = ""


GenerationEvent = Prompted | Delta | Finish


@dataclass(frozen=True, slots=True)
class Capabilities:
    """What an engine serves: payload kinds of PromptVersion, and feature names.

    Features are those that `features.required_features` gives, and `scores` (it answers ScoreRequests) and `follow_up`
    (it takes a conversation with its own answer in it, so that a wrong answer can be corrected). `context_length` is 0
    where it is not known. `run_as` says how the base model's weights are run, such as "int8 on cpu".
    """

    payload_kinds: frozenset[str]
    features: frozenset[str]
    context_length: int
    run_as: str = ""


@dataclass(frozen=True, slots=True)
class EngineStats:
    """A moment of an engine's life. `kv_bytes` is all KV in use, `prompt_bytes` that of soft prompts among it.

    `breaker`, `retries` and `failures` (attempts that failed) are those of an engine behind a provider, `replicas` how
    many addresses it has and `replicas_healthy` how many of them take requests.
    """

    ready: bool = False
    waiting: int = 0
    running: int = 0
    max_running: int = 0
    kv_bytes: int = 0
    kv_budget_bytes: int = 0
    prompts: int = 0
    prompt_bytes: int = 0
    tokens_generated: int = 0
    preemptions: int = 0
    restarts: int = 0
    breaker: Literal["closed", "open", "half_open"] = "closed"
    retries: int = 0
    failures: int = 0
    replicas: int = 1
    replicas_healthy: int = 1


class Engine(Protocol):
    """Makes tokens.

    `generate` yields deltas (a Prompted before them where asked for) and then one Finish, or raises an EngineError;
    leaving the iterator early (`aclose`) cancels the generation and frees what it held. `warm` makes a soft prompt
    ready so that the next request does not pay for it, and keeps it until `release`.
    """

    async def start(self) -> None: ...

    async def close(self, grace_s: float = 0.0) -> None: ...

    def generate(self, request: GenerationRequest) -> AsyncIterator[GenerationEvent]: ...

    async def score(self, request: ScoreRequest) -> Scores: ...

    async def warm(self, soft_prompt: SoftPromptReference) -> None: ...

    async def release(self, digest: str) -> None: ...

    def stats(self) -> EngineStats: ...

    def capabilities(self) -> Capabilities: ...


def text_size(prompt: Prompt) -> int:
    """Characters of text in a prompt, or its token ids."""
    match prompt:
        case Messages(messages):
            return sum(len(message.content) for message in messages)
        case RawText(text):
            return len(text)
        case TokenIds(ids):
            return len(ids)


def _counts_alternatives(count: int | None) -> bool:
    return count is None or 0 <= count <= MAX_LOGPROBS
