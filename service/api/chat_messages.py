"""Messages in OpenAI's chat form: what we take of them, and the conversation that engines are asked with."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from prompt_store.prompts.task import Message
from service.engines.base import Messages
from service.engines.errors import InvalidRequest, UnsupportedFeature
from service.engines.features import holds_only_text


class ContentPart(BaseModel):
    """A part of a message; what is not text is the provider's to understand."""

    model_config = ConfigDict(extra="allow")

    type: str
    text: str | None = None


class ChatMessage(BaseModel):
    model_config = ConfigDict(extra="forbid")

    role: Literal["system", "developer", "user", "assistant", "tool", "function"]
    content: str | list[ContentPart] | None = None
    name: str | None = None
    refusal: str | None = None
    tool_calls: list[dict[str, Any]] | None = None
    tool_call_id: str | None = None
    function_call: dict[str, Any] | None = None
    audio: dict[str, Any] | None = None

    @property
    def text(self) -> str:
        """Its text, without what else it holds."""
        if isinstance(self.content, list):
            return "".join(part.text or "" for part in self.content)
        return self.content or ""

    def check(self, where: str) -> None:
        """Raise InvalidRequest or UnsupportedFeature, naming the message by `where`."""
        if self.role == "function" or self.function_call is not None:
            raise UnsupportedFeature(
                f"{where} uses functions, which OpenAI replaced by tools; use tool_calls and role 'tool'",
                parameter=where,
            )
        if self.tool_calls and self.role != "assistant":
            raise InvalidRequest(f"{where} has tool_calls, but only an assistant calls tools", parameter=where)
        if self.role == "tool" and self.tool_call_id is None:
            raise InvalidRequest(
                f"{where} is a tool's result and does not say whose; give tool_call_id", parameter=where
            )
        speaks_otherwise = self.role == "assistant" and (self.tool_calls or self.refusal is not None or self.audio)
        if self.content is None and not speaks_otherwise:
            raise InvalidRequest(f"{where} has no content; give its text", parameter=where)
        if isinstance(self.content, list) and any(part.type == "text" and part.text is None for part in self.content):
            raise InvalidRequest(f"{where} has a part of type 'text' without text; give it", parameter=where)


_ROLES: dict[str, Literal["system", "user", "assistant"]] = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "assistant": "assistant",
    "tool": "user",
}


def conversation(messages: Sequence[ChatMessage]) -> Messages:
    """Roles and texts, and all of it in OpenAI's form where that says more. Raises as `ChatMessage.check`."""
    for index, message in enumerate(messages):
        message.check(f"messages[{index}]")
    texts = tuple(Message(role=_ROLES[message.role], content=message.text) for message in messages)
    wire = tuple(message.model_dump(exclude_none=True) for message in messages)
    return Messages(texts, () if all(map(holds_only_text, wire)) else wire)
