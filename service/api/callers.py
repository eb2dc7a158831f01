"""Who asks, and for whom: the Principal and the unit of a request, and what experiments choose it by."""

from __future__ import annotations

import hmac
from collections.abc import Mapping
from typing import Any

from litestar import Request

from prompt_store.access import ANONYMOUS, FORCE_ARM_SCOPE, Principal
from service.api.errors import Forbidden
from service.routing.plan import ARM_HEADER
from service.routing.run import Caller

UNIT_HEADER = "x-softcue-unit"
FORCE_KEY = "force_key"
"""Where the application's state holds the key whose owner may ask for arms, as bytes; None for no such key."""

_TESTER = Principal("tester", frozenset({FORCE_ARM_SCOPE}))
_NO_ATTRIBUTES: Mapping[str, str] = {}


def principal_of(request: Request[Any, Any, Any]) -> Principal:
    """There is one API key so far, that of testers; everybody else is anonymous."""
    key: bytes | None = request.app.state.get(FORCE_KEY)
    if key is None:
        return ANONYMOUS
    given = request.headers.get("authorization", "").removeprefix("Bearer ")
    return _TESTER if hmac.compare_digest(given.encode(), key) else ANONYMOUS


def caller_of(
    request: Request[Any, Any, Any], unit: str | None, attributes: Mapping[str, str] = _NO_ATTRIBUTES
) -> Caller:
    """The caller of a request. Without a unit in body or header, the request is its own unit.

    Raises Forbidden for whoever asks for an arm and may not.
    """
    principal, arm = principal_of(request), request.headers.get(ARM_HEADER, "")
    if arm and FORCE_ARM_SCOPE not in principal.scopes:
        raise Forbidden(
            f"{ARM_HEADER} asks for an arm, which only the key of testers may; send that key as a bearer token (the "
            "service's setting experiments.force_key_env names it), or leave the header out"
        )
    return Caller(principal, unit or _in_utf8(request.headers.get(UNIT_HEADER, "")), attributes, arm)


def _in_utf8(header: str) -> str:
    """A header as it was sent, in UTF-8 where it is that: a unit is the same there as in a body."""
    try:
        return header.encode("latin-1").decode("utf-8")
    except UnicodeError:
        return header
