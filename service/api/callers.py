"""Who asks, and for whom: the Principal and the unit of a request."""

from __future__ import annotations

import secrets
from typing import Any

from litestar import Request

from prompt_store.access import ANONYMOUS, Principal
from service.routing.record import Caller

UNIT_HEADER = "x-softcue-unit"


def principal_of(_: Request[Any, Any, Any]) -> Principal:
    """There are no API keys yet, so everybody is anonymous."""
    return ANONYMOUS


def caller_of(request: Request[Any, Any, Any], unit: str | None) -> Caller:
    """The caller of a request. Without a unit in body or header, the request is its own unit."""
    return Caller(principal_of(request), unit or request.headers.get(UNIT_HEADER) or secrets.token_hex(8))
