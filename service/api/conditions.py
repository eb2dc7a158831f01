"""Conditional requests on aliases: what If-Match and If-None-Match expect, and the refusals that come of them.

An alias's ETag is the digest of the version that it points at, in quotes.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager

from prompt_store.errors import Conflict, UnknownAlias
from prompt_store.prompts.registry import UNSET, Registry, Unset
from service.api.errors import InvalidCondition, PreconditionFailed, PreconditionRequired

_TAG = re.compile(r'"([0-9a-f]{64})"')

# A digest, None for an alias that must not exist yet, UNSET for whatever it is.
Expected = str | Unset | None


def etag(digest: str) -> str:
    return f'"{digest}"'


def expected_or_none(if_match: str | None, if_none_match: str | None) -> Expected:
    """Where the headers expect an alias to point that may be created. Raises as `expected_target`."""
    if if_none_match is None:
        return expected_target(if_match, otherwise=", or If-None-Match: * to create it")
    if if_match is not None:
        raise InvalidCondition("If-Match and If-None-Match contradict each other here; send one of them")
    if if_none_match.strip() != "*":
        raise InvalidCondition("If-None-Match can only be * here, for an alias that must not exist yet")
    return None


def expected_target(if_match: str | None, otherwise: str = "") -> str | Unset:
    """Where If-Match expects an alias to point; `otherwise` is what else its lack could be made up for with.

    Raises PreconditionRequired without it, InvalidCondition for what no alias can have.
    """
    if if_match is None:
        raise PreconditionRequired(
            "an alias moves only for somebody who knows where it points; send If-Match with the ETag that GET gave for "
            f"it, If-Match: * for wherever it points{otherwise}"
        )
    if if_match.strip() == "*":
        return UNSET
    tag = _TAG.fullmatch(if_match.strip())
    if tag is None:
        raise InvalidCondition(
            "If-Match is not an alias's ETag; send the one that GET gave for it, quotes included, or *"
        )
    return tag[1]


@contextmanager
def compared_with(expected: Expected) -> Iterator[None]:
    """A move that came too late for what was expected raises PreconditionFailed instead of Conflict."""
    try:
        yield
    except Conflict as error:
        if type(error) is not Conflict or isinstance(expected, Unset) or error.current == expected:
            raise
        raise PreconditionFailed(str(error)) from error


def require_existing(registry: Registry, task: str, alias: str) -> None:
    """What If-Match: * asks for. Raises PreconditionFailed for an alias that does not exist, UnknownTask."""
    try:
        registry.alias(task, alias)
    except UnknownAlias as error:
        raise PreconditionFailed(f"{error}; send If-None-Match: * instead to create it") from error
