"""The body of OpenAI's `/v1/responses`, and the conversation that is asked with it.

As in `openai_shapes`, every parameter of theirs is known; what is not served is refused with its remedy.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag

from service.api.chat_messages import ChatMessage, ContentPart, conversation
from service.api.response_formats import TextFormatBody, text_format
from service.engines.base import MAX_LOGPROBS, Messages, ResponseFormat
from service.engines.errors import InvalidRequest, UnsupportedFeature
from service.engines.features import HARMLESS_OPTIONS

Role = Literal["system", "developer", "user", "assistant"]
LOGPROBS = "message.output_text.logprobs"

# What concerns items that no answer here has may be asked for: there is nothing of it to include.
_INCLUDED = Literal[
    "message.output_text.logprobs",
    "reasoning.encrypted_content",
    "file_search_call.results",
    "web_search_call.results",
    "web_search_call.action.sources",
    "message.input_image.image_url",
    "computer_call_output.output.image_url",
    "code_interpreter_call.outputs",
]

# Parameters that are known and not served, with what to do instead.
_REFUSED = {
    "previous_response_id": "no responses are stored here; send the whole conversation as input",
    "conversation": "no conversations are stored here; send the whole conversation as input",
    "store": "no responses are stored here; set store to false or leave it out",
    "background": "a response is made while its request waits; leave background out, or stream",
    "prompt": "OpenAI's stored prompts are not known here; name a task as model, GET /v1/models lists them",
    "max_tool_calls": "it counts calls of built-in tools, and there are none here; leave it out",
    "context_management": "the conversation is sent as it is; shorten the input yourself and leave it out",
    "moderation": "nothing is moderated here; leave it out",
    "prompt_cache_options": "leave it out",
}


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid")


class InputPart(BaseModel):
    """A part of an item's content; what else it says (annotations, log-probabilities) is not sent on."""

    model_config = ConfigDict(extra="allow")

    type: str
    text: str | None = None
    refusal: str | None = None


class InputItem(BaseModel):
    """A message, a call of a function or its output. Items of an earlier answer may come with their ids and status."""

    model_config = ConfigDict(extra="allow")

    type: str = "message"
    role: Role | None = None
    content: str | list[InputPart] | None = None
    call_id: str | None = None
    name: str | None = None
    arguments: str | None = None
    output: str | list[InputPart] | None = None


class FunctionToolBody(BaseModel):
    """A tool; only functions of the caller's own are served."""

    model_config = ConfigDict(extra="allow")

    type: str
    name: str | None = None
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class TextBody(_Body):
    format: TextFormatBody | None = None
    verbosity: str | None = None


class ReasoningBody(_Body):
    effort: str | None = None
    summary: str | None = None
    generate_summary: str | None = None
    context: str | None = None
    mode: str | None = None


class ResponseStreamOptions(_Body):
    include_obfuscation: bool | None = None


def _input_kind(given: object) -> str:
    return "text" if isinstance(given, str) else "items"


# By its kind: otherwise what is wrong with an item is answered by saying that it is no text.
_Input = Annotated[Annotated[str, Tag("text")] | Annotated[list[InputItem], Tag("items")], Discriminator(_input_kind)]


class ResponseBody(_Body):
    """`unit` and `timeout_s` are ours, as in chat completions."""

    model: str
    input: _Input
    instructions: str | None = None
    stream: bool | None = None
    stream_options: ResponseStreamOptions | None = None
    temperature: float | None = None
    top_p: float | None = None
    max_output_tokens: int | None = Field(None, ge=1, lt=2**31)
    include: list[_INCLUDED] | None = None
    top_logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS)
    text: TextBody | None = None
    reasoning: ReasoningBody | None = None
    tools: list[FunctionToolBody] | None = None
    tool_choice: Literal["none", "auto", "required"] | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    truncation: Literal["auto", "disabled"] | None = None
    metadata: dict[str, str] | None = None
    user: str | None = None
    safety_identifier: str | None = None
    unit: str | None = None
    timeout_s: float | None = Field(None, gt=0, allow_inf_nan=False)
    service_tier: str | None = None
    prompt_cache_key: str | None = None
    prompt_cache_retention: str | None = None
    prompt_cache_options: dict[str, Any] | None = None
    previous_response_id: str | None = None
    conversation: str | dict[str, Any] | None = None
    store: bool | None = None
    background: bool | None = None
    prompt: dict[str, Any] | None = None
    max_tool_calls: int | None = None
    context_management: list[dict[str, Any]] | None = None
    moderation: dict[str, Any] | None = None

    @property
    def unit_key(self) -> str | None:
        """Whom the request is for, where the body says so."""
        return self.unit or self.attributes.get("unit") or self.safety_identifier or self.user

    @property
    def attributes(self) -> dict[str, str]:
        """What experiments may choose by: the request's metadata, as far as it is text."""
        return {name: value for name, value in (self.metadata or {}).items() if isinstance(value, str)}

    @property
    def alternatives(self) -> int | None:
        """How many alternatives come with each token's log-probability; None wants neither."""
        return self.top_logprobs or 0 if LOGPROBS in (self.include or ()) else None

    def check(self) -> None:
        """Raise UnsupportedFeature or InvalidRequest for what is not served whatever the backend."""
        for name, remedy in _REFUSED.items():
            if getattr(self, name) not in (None, False):
                raise UnsupportedFeature(f"{name} is not served: {remedy}", parameter=name)
        if self.truncation == "auto":
            raise UnsupportedFeature(
                "truncation is 'auto', but a conversation is never cut here; leave truncation out and send less",
                parameter="truncation",
            )
        if self.reasoning is not None:
            for name in ("summary", "generate_summary", "context", "mode"):
                if getattr(self.reasoning, name) is not None:
                    raise UnsupportedFeature(
                        f"reasoning.{name} is not served, only reasoning.effort is; leave it out",
                        parameter=f"reasoning.{name}",
                    )
        if self.top_logprobs and self.alternatives is None:
            raise InvalidRequest(
                f"top_logprobs needs log-probabilities; add '{LOGPROBS}' to include", parameter="top_logprobs"
            )
        if self.tool_choice not in (None, "none", "auto") and not self.tools:
            raise InvalidRequest("tool_choice needs tools to choose from; give tools", parameter="tool_choice")

    def sampling(self) -> dict[str, Any]:
        """What the request says of Sampling's fields; the rest is the task's."""
        given = {"temperature": self.temperature, "top_p": self.top_p, "max_tokens": self.max_output_tokens}
        return {name: value for name, value in given.items() if value is not None}

    def format(self) -> ResponseFormat:
        """The form that the answer must take. Raises InvalidRequest."""
        return text_format(self.text.format if self.text is not None else None)

    def provider_options(self) -> dict[str, Any]:
        """What only a provider can answer to, by the names that chat completions have for it."""
        options = {
            "reasoning_effort": self.reasoning.effort if self.reasoning is not None else None,
            "verbosity": self.text.verbosity if self.text is not None else None,
            **{name: getattr(self, name) for name in sorted(HARMLESS_OPTIONS)},
        }
        return {name: value for name, value in options.items() if value is not None}

    def nested_tools(self) -> tuple[dict[str, Any], ...]:
        """The tools in the form of chat completions. Raises UnsupportedFeature for built-in ones."""
        return tuple(_nested(tool, f"tools[{index}]") for index, tool in enumerate(self.tools or ()))

    def nested_tool_choice(self) -> str | dict[str, Any] | None:
        """The choice in the form of chat completions. Raises UnsupportedFeature for that of a built-in tool."""
        choice = self.tool_choice if self.tools else None
        if not isinstance(choice, dict):
            return choice
        if choice.get("type") != "function" or not isinstance(choice.get("name"), str):
            raise UnsupportedFeature(
                "tool_choice can name one function here, as {'type': 'function', 'name': ...}; otherwise use none, "
                "auto or required",
                parameter="tool_choice",
            )
        return {"type": "function", "function": {"name": choice["name"]}}

    def messages(self) -> Messages:
        """Instructions and input as a conversation. Raises UnsupportedFeature or InvalidRequest naming the item."""
        found = [ChatMessage(role="system", content=self.instructions)] if self.instructions is not None else []
        items = [InputItem(role="user", content=self.input)] if isinstance(self.input, str) else self.input
        for index, item in enumerate(items):
            _add(found, item, f"input[{index}]")
        if not found:
            raise InvalidRequest("input is empty; give a text or messages", parameter="input")
        return conversation(found)


def _nested(tool: FunctionToolBody, where: str) -> dict[str, Any]:
    if tool.type != "function":
        raise UnsupportedFeature(
            f"{where} is of type '{tool.type}'; no tools are built in here, only functions that you call yourself are "
            "passed on",
            parameter=where,
        )
    if tool.name is None:
        raise InvalidRequest(f"{where} has no name; give it", parameter=where)
    return {"type": "function", "function": tool.model_dump(exclude_none=True, exclude={"type"})}


def _add(messages: list[ChatMessage], item: InputItem, where: str) -> None:
    """Add an item to the conversation; calls that follow each other, or a text, are one message of the assistant."""
    match item:
        case InputItem(type="message", role=str(role), content=str() | list() as content):
            messages.append(_message(role, content, where))
        case InputItem(type="function_call", call_id=str(call_id), name=str(name), arguments=str(arguments)):
            call = {"id": call_id, "type": "function", "function": {"name": name, "arguments": arguments}}
            if not messages or messages[-1].role != "assistant":
                messages.append(ChatMessage(role="assistant"))
            messages[-1].tool_calls = [*(messages[-1].tool_calls or ()), call]
        case InputItem(type="function_call_output", call_id=str(call_id), output=str() | list() as output):
            texts = output if isinstance(output, str) else _texts(output, f"{where}.output")
            messages.append(ChatMessage(role="tool", tool_call_id=call_id, content=texts))
        case InputItem(type="message" | "function_call" | "function_call_output"):
            needed = {
                "message": "role and content",
                "function_call": "call_id, name and arguments",
                "function_call_output": "call_id and output",
            }
            raise InvalidRequest(f"{where} is a {item.type} and needs {needed[item.type]}", parameter=where)
        case _:
            raise UnsupportedFeature(
                f"{where} is of type '{item.type}'; only messages, function calls and their outputs are served here",
                parameter=where,
            )


def _message(role: Role, content: str | list[InputPart], where: str) -> ChatMessage:
    if isinstance(content, str):
        return ChatMessage(role=role, content=content)
    refusals: list[str] = []
    if role == "assistant":
        refusals = [part.refusal for part in content if part.type == "refusal" and part.refusal is not None]
        content = [part for part in content if part.type != "refusal" or part.refusal is None]
    texts = _texts(content, f"{where}.content")
    if not refusals:
        return ChatMessage(role=role, content=texts)
    return ChatMessage(role=role, content=texts or None, refusal="".join(refusals))


def _texts(parts: list[InputPart], where: str) -> list[ContentPart]:
    """Parts of text in the form of chat completions."""
    for part in parts:
        if part.type == "refusal":
            raise InvalidRequest(
                f"{where} has a part of type 'refusal', which only an assistant says, and says in its refusal; leave "
                "it out",
                parameter=where,
            )
        if part.type not in ("input_text", "output_text"):
            raise UnsupportedFeature(
                f"{where} has a part of type '{part.type}'; only text is served here, images and files can be sent to "
                "/v1/chat/completions where the task's backend takes them",
                parameter=where,
            )
        if part.text is None:
            raise InvalidRequest(f"{where} has a part of type '{part.type}' without text; give it", parameter=where)
    return [ContentPart(type="text", text=part.text) for part in parts]
