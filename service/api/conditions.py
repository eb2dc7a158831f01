"""Conditional requests: what If-Match and If-None-Match expect, and the refusals that come of them.

An alias's ETag is the digest of the version that it points at, in quotes; a route's or an experiment's the number of
its revision, 0 where no route was applied.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Annotated

from litestar.params import HeaderParameter

from prompt_store.errors import Conflict, UnknownAlias
from prompt_store.prompts.registry import UNSET, Registry, Unset
from service.api.errors import InvalidCondition, PreconditionFailed, PreconditionRequired

IfMatch = Annotated[str | None, HeaderParameter(name="if-match")]
IfNoneMatch = Annotated[str | None, HeaderParameter(name="if-none-match")]

_TAG = re.compile(r'"([0-9a-f]{64})"')
_NUMBER = re.compile(r'"(0|[1-9][0-9]{0,8})"')

# A digest, None for an alias that must not exist yet, UNSET for whatever it is.
Expected = str | Unset | None


def etag(tag: str) -> str:
    return f'"{tag}"'


def expected_or_none(if_match: str | None, if_none_match: str | None) -> Expected:
    """Where the headers expect an alias to point that may be created. Raises as `expected_target`."""
    if if_none_match is None:
        return expected_target(if_match, otherwise=", or If-None-Match: * to create it")
    _require_none(if_match, if_none_match, "an alias that must not exist yet")
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


def expected_revision(if_match: str | None, if_none_match: str | None = None) -> int | None:
    """The revision of a route that the headers expect in force: 0 for none, None for whichever it is.

    Raises PreconditionRequired without any, InvalidCondition for what no route can have.
    """
    if if_none_match is not None:
        _require_none(if_match, if_none_match, "a task that no route was applied to yet")
        return 0
    if if_match is None:
        raise PreconditionRequired(
            "a route is changed only by somebody who knows what is in force; send If-Match with the ETag that GET gave "
            "for it, If-Match: * for whatever is, or If-None-Match: * where none was applied yet"
        )
    if if_match.strip() == "*":
        return None
    tag = _NUMBER.fullmatch(if_match.strip())
    if tag is None:
        raise InvalidCondition(
            "If-Match is not a route's ETag; send the one that GET gave for it, quotes included, or *"
        )
    return int(tag[1])


def expected_experiment(if_match: str | None) -> int | None:
    """The revision that If-Match expects an experiment at, None for whichever it is.

    Raises PreconditionRequired without it, InvalidCondition for what no experiment can have.
    """
    if if_match is None:
        raise PreconditionRequired(
            "an experiment is changed only by somebody who knows how it stands; send If-Match with the ETag that GET "
            "gave for it, or If-Match: * for however it does"
        )
    if if_match.strip() == "*":
        return None
    tag = _NUMBER.fullmatch(if_match.strip())
    if tag is None:
        raise InvalidCondition(
            "If-Match is not an experiment's ETag; send the one that GET gave for it, quotes included, or *"
        )
    return int(tag[1])


def _require_none(if_match: str | None, if_none_match: str, what: str) -> None:
    if if_match is not None:
        raise InvalidCondition("If-Match and If-None-Match contradict each other here; send one of them")
    if if_none_match.strip() != "*":
        raise InvalidCondition(f"If-None-Match can only be * here, for {what}")


def compared_with_revision(expected: int | None) -> AbstractContextManager[None]:
    """As `compared_with`, for a route or an experiment."""
    return compared_with(UNSET if expected is None else str(expected))


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
