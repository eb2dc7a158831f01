"""Messages with `{field}` placeholders: parsing, and filling them in.

Not `str.format`: a placeholder is a bare field name, so a template can reach no attribute and no format code, and what
is filled in is never read as a template again. Literal braces are doubled.
"""

import re
from collections.abc import Mapping
from functools import lru_cache
from typing import Literal

from pydantic import BaseModel, ConfigDict

from prompt_store.errors import InvalidInputs

FIELD_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,63}")

_TOKEN = re.compile(r"\{\{|\}\}|\{([^{}]*)\}|[{}]")


class Message(BaseModel):
    """One turn of a conversation; in a task or text prompt, `content` is a template."""

    model_config = ConfigDict(frozen=True, extra="forbid", hide_input_in_errors=True)

    role: Literal["system", "user", "assistant"]
    content: str


@lru_cache(maxsize=4096)
def parse_template(content: str) -> tuple[str, ...]:
    """Splits a template into literal text and field names, in turn: even places are text, odd places are fields.

    Raises ValueError naming the first brace or placeholder that is not understood.
    """
    parts: list[str] = []
    literal: list[str] = []
    position = 0
    for match in _TOKEN.finditer(content):
        literal.append(content[position : match.start()])
        position = match.end()
        token = match[0]
        if token in ("{{", "}}"):
            literal.append(token[0])
        elif match[1] is None:
            raise ValueError(f"a lone {token!r} at character {match.start()}; write a literal brace twice")
        elif not FIELD_NAME.fullmatch(match[1]):
            raise ValueError(
                f"the placeholder {token!r} holds no field name; use {{field}}, or write literal braces twice"
            )
        else:
            parts += ["".join(literal), match[1]]
            literal = []
    parts.append("".join(literal) + content[position:])
    return tuple(parts)


def template_fields(messages: tuple[Message, ...]) -> tuple[str, ...]:
    """The fields that the messages use, each once, in order of first use. Raises ValueError as `parse_template`."""
    return tuple(dict.fromkeys(field for message in messages for field in parse_template(message.content)[1::2]))


def render_messages(messages: tuple[Message, ...], inputs: Mapping[str, str]) -> tuple[Message, ...]:
    """The messages with every placeholder filled in, literal braces single.

    Raises InvalidInputs naming fields that are missing, not used by the messages, or not text.
    """
    return fill_in(messages, inputs, template_fields(messages))


def fill_in(messages: tuple[Message, ...], inputs: Mapping[str, str], fields: tuple[str, ...]) -> tuple[Message, ...]:
    """As `render_messages`, where the inputs must be exactly `fields`, used by these messages or not."""
    missing = tuple(field for field in fields if field not in inputs)
    unexpected = tuple(str(field) for field in inputs if field not in fields)
    if missing or unexpected:
        complaints = [f"missing input {field!r}" for field in missing]
        complaints += [f"unexpected input {field!r}" for field in unexpected]
        expected = ", ".join(repr(field) for field in fields) or "no inputs"
        raise InvalidInputs(f"{', '.join(complaints)}; give exactly {expected}", missing=missing, unexpected=unexpected)
    for field in fields:
        if not isinstance(inputs[field], str):
            raise InvalidInputs(f"input {field!r} is {type(inputs[field]).__name__}, not text; give a string")
    return tuple(message.model_copy(update={"content": _filled(message.content, inputs)}) for message in messages)


def _filled(content: str, inputs: Mapping[str, str]) -> str:
    parts = parse_template(content)
    return "".join(inputs[part] if place % 2 else part for place, part in enumerate(parts))
