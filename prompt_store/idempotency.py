"""Idempotency keys: a request that is sent again because its answer was lost is done once, and answered as it was.

A key belongs to the principal that chose it and lasts a day. Key and answer are written in the transaction that does
the work, so that of two requests at once one does it and the other finds the answer.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

from sqlalchemy import Connection, delete, insert, select

from prompt_store.access import Principal
from prompt_store.canonical import canonical_digest, canonical_json
from prompt_store.errors import InvalidArtifact, InvalidName, KeyReused
from prompt_store.tables import idempotency_keys

LONGEST_KEY = 255
LIFETIME = timedelta(hours=24)


@dataclass(frozen=True, slots=True)
class Asked:
    """A request under a key: `request` is the digest of all that was asked."""

    principal: str
    key: str
    request: str


def asked(key: str | None, principal: Principal, request: Mapping[str, Any]) -> Asked | None:
    """None where no key was given. Raises InvalidName for what is no key, InvalidArtifact for what JSON cannot say."""
    if key is None:
        return None
    if not (1 <= len(key) <= LONGEST_KEY and key.isprintable()):
        raise InvalidName(f"an idempotency key has 1 to {LONGEST_KEY} printable characters; use a random UUID")
    try:
        return Asked(principal.name, key, canonical_digest(request))
    except ValueError as error:
        raise InvalidArtifact(f"the request cannot be told from others as JSON: {error}; write NaN as null") from error


def answer_to(connection: Connection, asked: Asked | None, at: datetime) -> dict[str, Any] | None:
    """What the same request was answered within the last day, None for a new one.

    Raises KeyReused when the key came with another request.
    """
    if asked is None:
        return None
    row = connection.execute(
        select(idempotency_keys).where(
            idempotency_keys.c.principal == asked.principal,
            idempotency_keys.c.key == asked.key,
            idempotency_keys.c.created_at > at - LIFETIME,
        )
    ).one_or_none()
    if row is None:
        return None
    if row.request != asked.request:
        raise KeyReused(
            f"idempotency key {asked.key!r} was used at {row.created_at:%Y-%m-%d %H:%M:%S} UTC with another request; "
            "use a new key for a new request, and the same body and parameters to repeat one"
        )
    answer: dict[str, Any] = json.loads(row.answer)
    return answer


def keep_answer(connection: Connection, asked: Asked | None, answer: Mapping[str, Any], at: datetime) -> None:
    """Writes what a new request was answered, and forgets the keys whose day is over."""
    if asked is None:
        return
    connection.execute(delete(idempotency_keys).where(idempotency_keys.c.created_at <= at - LIFETIME))
    connection.execute(
        insert(idempotency_keys).values(
            principal=asked.principal,
            key=asked.key,
            request=asked.request,
            answer=canonical_json(dict(answer)).decode(),
            created_at=at,
        )
    )
