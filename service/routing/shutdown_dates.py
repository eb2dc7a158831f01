"""Asking providers when their models go away, and writing that down.

OpenAI's description of a model, `GET /models/{model}`, has a `shutdown_date`: a day, or null where none is announced.
Other providers leave it out, and nothing is learnt from them.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
from collections import defaultdict
from collections.abc import Awaitable, Callable, Mapping, Sequence
from datetime import date
from typing import Any
from urllib.parse import quote

from prompt_store.errors import StoreError
from prompt_store.prompts.snapshot import StoreSnapshot
from prompt_store.prompts.version import PromptVersion, RemoteModelPayload
from prompt_store.routing.backends import BackendDescription, choose_backend
from service.engines.errors import EngineError, ProviderRefused

log = logging.getLogger(__name__)

EVERY_S = 24 * 3600.0
LOOK_EVERY_S = 60.0

Ask = Callable[[str], Awaitable[Mapping[str, Any]]]
"""The JSON object at a path under a provider's base address. Raises EngineError."""


class ShutdownDates:
    """Asks for every remote version of the store, of the backend that serves it, when its model goes away.

    `ask` has a way to each backend that can be asked. `note` writes a date down and may block and raise StoreError.
    `announced` is what is known of a model without asking; it is written down where it is the earlier date.
    Whatever fails is logged and tried again with the next day's poll; no request depends on it.
    """

    def __init__(
        self,
        ask: Mapping[str, Ask],
        backends: Sequence[BackendDescription],
        note: Callable[[PromptVersion, date], object],
        announced: Callable[[str], date | None] = lambda _: None,
    ) -> None:
        self._ask = ask
        self._backends = backends
        self._note = note
        self._announced = announced
        self._asked: set[str] = set()  # by the digests of versions

    async def follow(
        self, snapshot: Callable[[], StoreSnapshot], sleep: Callable[[float], Awaitable[object]] = asyncio.sleep
    ) -> None:
        """Poll now and once a day, and every minute for what was published since, until cancelled."""
        for look in itertools.count():
            if look % round(EVERY_S / LOOK_EVERY_S) == 0:
                self._asked.clear()
            try:
                await self.poll(snapshot())
            except Exception:  # requests are answered all the same
                log.exception("what providers say of when their models go away could not be looked at")
            await sleep(LOOK_EVERY_S)

    async def poll(self, snapshot: StoreSnapshot) -> None:
        """Ask for the models of versions that were not asked for today, and note the dates that changed.

        Once for every model, one after the other at each backend.
        """
        new = self._new(snapshot)
        self._asked.update(each.digest for models in new.values() for versions in models.values() for each in versions)
        await asyncio.gather(*(self._poll_backend(name, models) for name, models in new.items()))

    def _new(self, snapshot: StoreSnapshot) -> dict[str, dict[str, list[PromptVersion]]]:
        """Remote versions not asked for yet, by backend and model; those that no backend serves under an empty name."""
        found: defaultdict[str, defaultdict[str, list[PromptVersion]]] = defaultdict(lambda: defaultdict(list))
        for task in snapshot.tasks.values():
            for version in task.versions.values():
                if version.digest in self._asked or not isinstance(version, PromptVersion):
                    continue
                if isinstance(version.payload, RemoteModelPayload):
                    backend = choose_backend(self._backends, version.payload)
                    found[backend.name if backend is not None else ""][version.payload.model].append(version)
        return {name: dict(models) for name, models in found.items()}

    async def _poll_backend(self, name: str, models: Mapping[str, Sequence[PromptVersion]]) -> None:
        ask = self._ask.get(name)
        for model, versions in models.items():
            told: date | None = None
            if ask is not None:
                try:
                    told = shutdown_date(await ask(f"/models/{quote(model, safe=':')}"))
                except ProviderRefused as error:
                    log.warning("backend '%s' does not tell when '%s' goes away: %s", name, model, error)
                except ValueError as error:
                    log.warning("what backend '%s' says of when '%s' goes away is no date: %s", name, model, error)
                except EngineError as error:
                    log.warning("backend '%s' cannot be asked when its models go away: %s", name, error)
                    ask = None
            day = min((known for known in (told, self._announced(model)) if known is not None), default=None)
            for version in versions:
                # A date that somebody noted is taken back by its provider alone.
                noted = version.shutdown_date
                stays = noted is not None and told is None and (day is None or noted <= day)
                if day is not None and day != noted and not stays:
                    await self._write(day, version)

    async def _write(self, day: date, version: PromptVersion) -> None:
        try:
            await asyncio.to_thread(self._note, version, day)
        except StoreError as error:
            log.warning("%s@%s goes away on %s, which is not noted: %s", version.task, version.label, day, error)


def shutdown_date(document: Mapping[str, Any]) -> date | None:
    """The date in a provider's description of a model; None where it has none.

    A null takes nothing back: it also stands where a provider announces its dates elsewhere and somebody noted one.
    Raises ValueError for what is no date.
    """
    said = document.get("shutdown_date")
    if said is None:
        return None
    if not isinstance(said, str):
        raise ValueError(f"{said!r}")
    return date.fromisoformat(said)
