"""Shadows: requests that are asked once more elsewhere, after they were answered, to see what another version says.

Bounded, and never in the way: a shadow begins when the answer has ended, and where too many are under way it is left
out and counted.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import logging
from collections import Counter
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any, Literal

from prompt_store.errors import StoreError
from prompt_store.prompts.task import Task
from prompt_store.routing.shadows import ShadowAnswer
from service.routing.background import Background
from service.routing.plan import Target
from service.routing.run import Step

log = logging.getLogger(__name__)

ShadowOutcome = Literal["answered", "failed", "left_out"]

_AT_ONCE = 16
_KEPT = 1000


@dataclass(frozen=True, slots=True)
class Said:
    """What a request was answered, and by which step; `text` is None where that failed, for the reason in `error`."""

    text: str | None
    step: Step
    error: str | None = None


class Shadows:
    """Those that are under way, and what they found until it is written.

    `write` puts answers into the store and blocks. `count(task, outcome, agreement)` is told each that came, failed or
    was left out.
    """

    def __init__(
        self,
        write: Callable[[list[ShadowAnswer]], object],
        count: Callable[[str, ShadowOutcome, float | None], object],
        at_once: int = _AT_ONCE,
    ) -> None:
        self._write = write
        self._count = count
        self._background = Background(at_once)
        self._found: list[ShadowAnswer] = []

    def start(
        self,
        generation_id: str,
        unit_hash: str,
        place: str,
        task: Task,
        primary: Said,
        ask: Coroutine[Any, Any, Said],
    ) -> None:
        """Ask in the background and hold the answer against the primary's. Returns at once."""
        if self._background.has_room():
            self._background.start(self._compare(generation_id, unit_hash, place, task, primary, ask))
        else:
            ask.close()
            self._count(task.name, "left_out", None)

    async def flush(self) -> None:
        """Write what was found. What cannot be written now is kept for the next time; of too many, the newest."""
        found, self._found = self._found, []
        try:
            if found:
                await asyncio.to_thread(self._write, found)
        except StoreError as error:
            self._found = (found + self._found)[-_KEPT:]
            log.warning("shadow answers cannot be written, they are kept until they can: %s", error)
        except BaseException:
            self._found = found + self._found
            raise

    async def forget(self, age: timedelta, delete: Callable[[datetime], object]) -> None:
        """Have the store delete what is older."""
        try:
            await asyncio.to_thread(delete, datetime.now(UTC) - age)
        except StoreError as error:
            log.warning("old shadow answers cannot be deleted now: %s", error)

    async def close(self) -> None:
        """End those that are under way, write what was found, and begin no others."""
        await self._background.close()
        await self.flush()

    async def _compare(
        self,
        generation_id: str,
        unit_hash: str,
        place: str,
        task: Task,
        primary: Said,
        ask: Coroutine[Any, Any, Said],
    ) -> None:
        try:
            shadow = await ask
        except asyncio.CancelledError:
            self._count(task.name, "left_out", None)
            raise
        except Exception:
            log.exception("a shadow of task '%s' failed by a fault of the service's own", task.name)
            self._count(task.name, "failed", None)
            return
        agreed = None if shadow.text is None else agreement(task, primary.text or "", shadow.text)
        self._count(task.name, "failed" if shadow.text is None else "answered", agreed)
        self._keep(generation_id, unit_hash, place, task, primary, shadow, agreed)

    def _keep(
        self,
        generation_id: str,
        unit_hash: str,
        place: str,
        task: Task,
        primary: Said,
        shadow: Said,
        agreed: float | None,
    ) -> None:
        answered, asked = primary.step, shadow.step
        if len(self._found) >= _KEPT:
            del self._found[0]
        self._found.append(
            ShadowAnswer(
                id=hashlib.sha256(f"{generation_id}:{place}".encode()).hexdigest(),
                generation_id=generation_id,
                task=task.name,
                at=datetime.now(UTC),
                primary_version=_digest(answered.target),
                primary_label=answered.label,
                primary_backend=answered.backend,
                primary_text=primary.text or "",
                primary_ms=answered.seconds * 1000,
                shadow_version=_digest(asked.target),
                shadow_label=asked.label,
                shadow_backend=asked.backend,
                shadow_text=shadow.text,
                shadow_error=shadow.error,
                shadow_ms=asked.seconds * 1000,
                agreement=agreed,
                unit_hash=unit_hash,
            )
        )


def _digest(target: Target | None) -> str:
    return target.version.digest if target is not None and target.version is not None else ""


def agreement(task: Task, one: str, other: str) -> float:
    """How far two answers to a task agree, from 0 to 1.

    Labels and JSON are equal or not. Texts are compared as bags of words: the harmonic mean of the shares of each one's
    words that the other has too (the F1 of SQuAD, Rajpurkar et al. 2016, arXiv 1606.05250).
    """
    if task.kind == "extract":
        try:
            return float(json.loads(one) == json.loads(other))
        except (ValueError, RecursionError):
            return float(one.strip() == other.strip())
    if task.kind == "classify":
        return float(one.strip() == other.strip())
    left, right = Counter(one.split()), Counter(other.split())
    if not left or not right:
        return float(left == right)
    shared = sum((left & right).values())
    return 2.0 * shared / (left.total() + right.total())
