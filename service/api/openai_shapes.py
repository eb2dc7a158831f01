"""The bodies of OpenAI's endpoints that we accept, as pydantic models.

Every parameter of theirs is known here. What we do not serve is still parsed, so that asking for it is answered with a
clear refusal and leaving it at its default is not.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, cast

from pydantic import BaseModel, ConfigDict, Field

from service.api.chat_messages import ChatMessage
from service.api.response_formats import ResponseFormatBody, StructuredOutputsBody, response_format
from service.engines.base import MAX_CHOICES, Prompt, RawText, ResponseFormat, Sampling, TokenIds
from service.engines.errors import InvalidRequest, UnsupportedFeature
from service.engines.features import HARMLESS_OPTIONS

_PROVIDER_OPTIONS = (
    "reasoning_effort",
    "verbosity",
    "modalities",
    "audio",
    "prediction",
    "web_search_options",
    *sorted(HARMLESS_OPTIONS),
)


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid")


class StreamOptions(_Body):
    include_usage: bool = False
    include_obfuscation: bool | None = None


class SamplingBody(_Body):
    """What chat, completions and tasks share. `timeout_s` is how long the answer may take, ours alone."""

    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    seed: int | None = None
    stop: str | list[str] | None = None
    max_tokens: int | None = None
    min_p: float | None = None
    min_tokens: int | None = None
    ignore_eos: bool | None = None
    stop_token_ids: list[int] | None = None
    frequency_penalty: float | None = None
    presence_penalty: float | None = None
    repetition_penalty: float | None = None
    logit_bias: dict[int, float] | None = None
    n: int | None = None
    timeout_s: float | None = Field(None, gt=0, allow_inf_nan=False)

    @property
    def choices(self) -> int:
        """How many answers are asked for."""
        return 1 if self.n is None else self.n

    def sampling(self) -> dict[str, Any]:
        """What the request says of Sampling's fields; the rest is the task's."""
        given: dict[str, Any] = {name: getattr(self, name) for name in Sampling.__dataclass_fields__}
        if self.stop is not None:
            given["stop"] = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)
        if self.stop_token_ids is not None:
            given["stop_token_ids"] = tuple(self.stop_token_ids)
        return {name: value for name, value in given.items() if value is not None}


class OpenAIBody(SamplingBody):
    """What chat and completions share beside sampling."""

    model: str
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    prompt_logprobs: int | None = None
    response_format: ResponseFormatBody | None = None
    structured_outputs: StructuredOutputsBody | None = None
    user: str | None = None
    safety_identifier: str | None = None
    unit: str | None = None
    # Accepted because they change nothing of the answer here; what is a provider's is passed on to one.
    metadata: dict[str, Any] | None = None
    store: Literal[False] | None = None
    service_tier: str | None = None
    prompt_cache_key: str | None = None
    prompt_cache_retention: str | None = None

    @property
    def unit_key(self) -> str | None:
        """Whom the request is for, where the body says so."""
        return self.unit or self.attributes.get("unit") or self.safety_identifier or self.user

    @property
    def attributes(self) -> dict[str, str]:
        """What experiments may choose by: the request's metadata, as far as it is text."""
        return {name: value for name, value in (self.metadata or {}).items() if isinstance(value, str)}

    def format(self) -> ResponseFormat:
        """The form that the answer must take. Raises InvalidRequest."""
        return response_format(self.response_format, self.structured_outputs)

    def check(self) -> None:
        """Raise UnsupportedFeature or InvalidRequest for parameters that no backend here knows in the form given."""
        if self.stream and self.prompt_logprobs is not None:
            raise InvalidRequest(
                "prompt_logprobs come with a whole answer only; leave stream or prompt_logprobs out",
                parameter="prompt_logprobs",
            )


class ChatCompletionBody(OpenAIBody):
    messages: Annotated[list[ChatMessage], Field(min_length=1)]
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: Literal["none", "auto", "required"] | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    functions: list[dict[str, Any]] | None = None
    function_call: str | dict[str, Any] | None = None
    reasoning_effort: str | None = None
    verbosity: str | None = None
    modalities: list[str] | None = None
    audio: dict[str, Any] | None = None
    prediction: dict[str, Any] | None = None
    web_search_options: dict[str, Any] | None = None

    def sampling(self) -> dict[str, Any]:
        if self.max_completion_tokens is not None:
            self.max_tokens = self.max_completion_tokens
        return super().sampling()

    def check(self) -> None:
        super().check()
        if self.top_logprobs is not None and not self.logprobs:
            raise InvalidRequest("top_logprobs needs logprobs; set logprobs to true", parameter="top_logprobs")
        if self.tool_choice not in (None, "none", "auto") and not self.tools:
            raise InvalidRequest("tool_choice needs tools to choose from; give tools", parameter="tool_choice")
        for name in ("functions", "function_call"):
            if getattr(self, name) is not None:
                raise UnsupportedFeature(
                    f"{name} is not served here, OpenAI replaced it by tools; use tools and tool_choice", parameter=name
                )

    def provider_options(self) -> dict[str, Any]:
        """What only a provider can answer to, by its own names. Text alone is what everybody answers with."""
        options = {name: getattr(self, name) for name in _PROVIDER_OPTIONS}
        if options["modalities"] == ["text"]:
            options["modalities"] = None
        return {name: value for name, value in options.items() if value is not None}

    @property
    def alternatives(self) -> int | None:
        """How many alternatives come with each token's log-probability; None wants neither."""
        return self.top_logprobs or 0 if self.logprobs else None


class CompletionBody(OpenAIBody):
    prompt: str | list[int] | list[str] | list[list[int]]
    best_of: int | None = None
    echo: bool | None = None
    logprobs: int | None = None
    suffix: str | None = None

    def check(self) -> None:
        super().check()
        if self.suffix is not None:
            raise UnsupportedFeature("suffix is not served here; leave it out", parameter="suffix")
        if self.best_of is not None and self.best_of != self.choices:
            raise UnsupportedFeature(
                f"best_of is {self.best_of} and n is {self.choices}, but every answer that is made is returned here; "
                "leave best_of out",
                parameter="best_of",
            )

    @property
    def prompt_alternatives(self) -> int | None:
        """How many alternatives come with each of the prompt's tokens: an echoed prompt has what the answer has."""
        counts = [count for count in (self.prompt_logprobs, self.logprobs if self.echo else None) if count is not None]
        return max(counts, default=None)

    def prompts(self) -> list[Prompt]:
        """The prompts, each of which gets its own answers. Raises InvalidRequest for none, or for too many."""
        prompts: list[Prompt] = []
        if isinstance(self.prompt, str):
            prompts = [RawText(self.prompt)]
        elif self.prompt and isinstance(self.prompt[0], int):
            prompts = [TokenIds(tuple(self.prompt))]
        else:
            several = cast(list[str] | list[list[int]], self.prompt)
            prompts = [RawText(one) if isinstance(one, str) else TokenIds(tuple(one)) for one in several]
        if not 1 <= len(prompts) * self.choices <= MAX_CHOICES:
            raise InvalidRequest(
                f"{len(prompts)} prompts with {self.choices} answers each are asked for; ask for 1 to {MAX_CHOICES} "
                "answers at once",
                parameter="prompt" if len(prompts) != 1 else "n",
            )
        return prompts
