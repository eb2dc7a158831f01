"""The grammar of names: tasks, aliases, version selectors and the `model` field of a request.

    task      [a-z][a-z0-9_-]{0,63}
    alias     the same, but neither v<digits> nor six or more hexadecimal digits
    selector  v7 | a SHA-256 in hexadecimal or at least its first 8 digits | an alias
    model     task | task@selector | ft:<id at a remote provider>

Aliases exclude what looks like a number or digest so that a selector always reads one way. Notes, tags and reasons are
free text, as far as a database can hold it.
"""

import re
from dataclasses import dataclass
from typing import Any

from prompt_store.errors import InvalidArtifact, InvalidName, StoreError

SHORTEST_DIGEST_PREFIX = 8

_NAME = re.compile(r"[a-z][a-z0-9_-]{0,63}")
_NUMBER = re.compile(r"v([1-9][0-9]{0,8})")
_LOOKS_NUMBERED = re.compile(r"v[0-9]+")
_DIGEST = re.compile(rf"[0-9a-f]{{{SHORTEST_DIGEST_PREFIX},64}}")
_LOOKS_HEX = re.compile(r"[0-9a-f]{6,}")
_REMOTE = re.compile(r"ft:[A-Za-z0-9][A-Za-z0-9._:/+-]{0,250}")
_NO_TEXT = re.compile("[\0\ud800-\udfff]")
_LONGEST_SHOWN = 80


@dataclass(frozen=True, slots=True)
class NumberSelector:
    """`v7`: the seventh version of a task."""

    number: int


@dataclass(frozen=True, slots=True)
class DigestSelector:
    """A full digest, or a prefix of at least 8 digits that must be unique within the task."""

    prefix: str


@dataclass(frozen=True, slots=True)
class AliasSelector:
    name: str


Selector = NumberSelector | DigestSelector | AliasSelector


@dataclass(frozen=True, slots=True)
class TaskModel:
    """A task of this store; `selector` is well-formed text for `Registry.version`, None when none was given."""

    task: str
    selector: str | None = None


@dataclass(frozen=True, slots=True)
class RemoteModel:
    """A fine-tuned model at a provider, such as `ft:gpt-4o-mini-2024-07-18:acme::Ab12`."""

    id: str


ModelName = TaskModel | RemoteModel


def check_task_name(name: str) -> str:
    """Returns `name`. Raises InvalidName when it is not a task name."""
    if not _NAME.fullmatch(name):
        raise InvalidName(
            f"{_shown(name)} is not a task name; use 1 to 64 of a-z, 0-9, '_' and '-', starting with a letter"
        )
    return name


def check_alias(name: str) -> str:
    """Returns `name`. Raises InvalidName when it is not an alias."""
    if _LOOKS_NUMBERED.fullmatch(name):
        raise InvalidName(f"{_shown(name)} is not an alias, it reads as a version number; use a word like 'production'")
    if _LOOKS_HEX.fullmatch(name):
        raise InvalidName(f"{_shown(name)} is not an alias, it reads as a digest; use a word like 'production'")
    if not _NAME.fullmatch(name):
        raise InvalidName(
            f"{_shown(name)} is not an alias; use 1 to 64 of a-z, 0-9, '_' and '-', starting with a letter"
        )
    return name


def parse_selector(text: str) -> Selector:
    """Raises InvalidName when `text` is neither a version number, a digest (prefix) nor an alias."""
    number = _NUMBER.fullmatch(text)
    if number:
        return NumberSelector(int(number[1]))
    if _DIGEST.fullmatch(text):
        return DigestSelector(text)
    if _LOOKS_NUMBERED.fullmatch(text):
        raise InvalidName(f"{_shown(text)} is not a version number; versions count v1, v2, v3 and so on")
    if _LOOKS_HEX.fullmatch(text):
        raise InvalidName(
            f"{_shown(text)} is not a digest; give {SHORTEST_DIGEST_PREFIX} to 64 hexadecimal digits of it"
        )
    if not _NAME.fullmatch(text):
        raise InvalidName(
            f"{_shown(text)} selects no version; use a number like v7, a digest of 8 or more digits, or an alias"
        )
    return AliasSelector(text)


def parse_model_name(text: str) -> ModelName:
    """What the `model` field of a request names. Raises InvalidName with the accepted forms."""
    if text.startswith("ft:"):
        if not _REMOTE.fullmatch(text):
            raise InvalidName(
                f"{_shown(text)} is not a fine-tuned model id; use ft: and then letters, digits and ._:/+-"
            )
        return RemoteModel(text)
    task, at, selector = text.partition("@")
    if not _NAME.fullmatch(task):
        raise InvalidName(
            f"{_shown(text)} is not a model name; use a task, task@alias, task@v7, task@<digest> or ft:<id>"
        )
    if not at:
        return TaskModel(task)
    parse_selector(selector)
    return TaskModel(task, selector)


def is_digest(text: str) -> bool:
    """Whether `text` is a whole SHA-256 in hexadecimal."""
    return len(text) == 64 and _DIGEST.fullmatch(text) is not None


def check_text(what: str, text: str) -> str:
    """Returns `text`. Raises InvalidArtifact for what a database cannot hold: NUL, and half of a surrogate pair."""
    check_texts(what, text)
    return text


def check_texts(what: str, value: Any, refusal: type[StoreError] = InvalidArtifact) -> None:
    """Checks every text in a JSON value, its keys too, as `check_text`. Raises `refusal`."""
    pending = [value]
    while pending:
        match pending.pop():
            case str() as text if _NO_TEXT.search(text):
                raise refusal(f"the {what} {_shown(text)} holds NUL or half a character; remove it")
            case dict() as inner:
                pending += [*inner.keys(), *inner.values()]
            case list() | tuple() as inner:
                pending += inner


def storable_text(text: str) -> str:
    """`text` with what a database cannot hold replaced by U+FFFD: for what is recorded and not anybody's to correct."""
    return _NO_TEXT.sub("\ufffd", text)


def _shown(text: str) -> str:
    return repr(text if len(text) <= _LONGEST_SHOWN else text[:_LONGEST_SHOWN] + "…")
