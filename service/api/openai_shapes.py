"""The bodies of OpenAI's endpoints that we accept, as pydantic models.

Every parameter of theirs is known here. What we do not serve is still parsed, so that asking for it is answered with a
clear refusal and leaving it at its default is not.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal, cast

from pydantic import BaseModel, ConfigDict, Field

from prompt_store.prompts.task import Message
from service.api.response_formats import ResponseFormatBody, StructuredOutputsBody, response_format
from service.engines.base import MAX_CHOICES, Prompt, RawText, ResponseFormat, Sampling, TokenIds
from service.engines.errors import InvalidRequest, UnsupportedFeature

_NOT_SERVED_YET = "is not served here yet; leave it out"


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid")


class ContentPart(BaseModel):
    """A part of a message; only text is served."""

    model_config = ConfigDict(extra="allow")

    type: str
    text: str | None = None


class ChatMessage(_Body):
    role: Literal["system", "developer", "user", "assistant", "tool", "function"]
    content: str | list[ContentPart] | None = None
    name: str | None = None
    refusal: str | None = None
    tool_calls: list[dict[str, Any]] | None = None
    tool_call_id: str | None = None
    function_call: dict[str, Any] | None = None
    audio: dict[str, Any] | None = None

    def message(self, index: int) -> Message:
        """Our Message; raises UnsupportedFeature for tools, images and audio."""
        where = f"messages[{index}]"
        if self.role in ("tool", "function") or self.tool_calls or self.function_call or self.audio:
            raise UnsupportedFeature(f"{where} uses tools or audio, which {_NOT_SERVED_YET}", parameter="messages")
        if self.name is not None:
            raise UnsupportedFeature(f"{where} has a name, which {_NOT_SERVED_YET}", parameter="messages")
        if self.content is None:
            raise InvalidRequest(f"{where} has no content; give its text", parameter="messages")
        text = self.content if isinstance(self.content, str) else "".join(self._texts(where))
        role: Literal["system", "user", "assistant"] = "system"
        if self.role == "user" or self.role == "assistant":
            role = self.role
        return Message(role=role, content=text)

    def _texts(self, where: str) -> list[str]:
        assert isinstance(self.content, list)
        for part in self.content:
            if part.type != "text" or part.text is None:
                raise UnsupportedFeature(
                    f"{where} has a part of type '{part.type}'; only text is served here", parameter="messages"
                )
        return [part.text or "" for part in self.content]


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

    def sampling(self, defaults: Sampling) -> Sampling:
        """The defaults, with what the request says over them."""
        given: dict[str, Any] = {name: getattr(defaults, name) for name in Sampling.__dataclass_fields__}
        for name in given:
            value = getattr(self, name)
            if value is not None:
                given[name] = value
        if self.stop is not None:
            given["stop"] = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)
        given["stop_token_ids"] = tuple(given["stop_token_ids"])
        return Sampling(**given)


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
    # Accepted because they change nothing of the answer here.
    metadata: dict[str, Any] | None = None
    store: Literal[False] | None = None
    service_tier: str | None = None
    prompt_cache_key: str | None = None
    prompt_cache_retention: str | None = None

    @property
    def unit_key(self) -> str | None:
        """Whom the request is for, where the body says so."""
        return self.unit or self.safety_identifier or self.user

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
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    functions: list[dict[str, Any]] | None = None
    function_call: str | dict[str, Any] | None = None
    reasoning_effort: str | None = None
    verbosity: str | None = None
    modalities: list[str] | None = None
    audio: dict[str, Any] | None = None
    prediction: dict[str, Any] | None = None
    web_search_options: dict[str, Any] | None = None

    def sampling(self, defaults: Sampling) -> Sampling:
        if self.max_completion_tokens is not None:
            self.max_tokens = self.max_completion_tokens
        return super().sampling(defaults)

    def check(self) -> None:
        super().check()
        if self.top_logprobs is not None and not self.logprobs:
            raise InvalidRequest("top_logprobs needs logprobs; set logprobs to true", parameter="top_logprobs")
        if self.tool_choice not in (None, "none", "auto"):
            raise UnsupportedFeature(f"tool_choice {_NOT_SERVED_YET}", parameter="tool_choice")
        refuse(
            self,
            {
                "functions": None,
                "function_call": None,
                "reasoning_effort": None,
                "verbosity": None,
                "modalities": ["text"],
                "audio": None,
                "prediction": None,
                "web_search_options": None,
            },
        )

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
        refuse(self, {"suffix": None})
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


def refuse(body: BaseModel, served: Mapping[str, Any]) -> None:
    """Raise UnsupportedFeature for the first field that is set to anything but what is served."""
    for name, value in served.items():
        given = getattr(body, name)
        if given is not None and given != value:
            raise UnsupportedFeature(f"{name} {_NOT_SERVED_YET}", parameter=name)
