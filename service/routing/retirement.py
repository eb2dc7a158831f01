"""Remote models that go away: when, which routes lose a backend by it, and what the log says of that.

A date is that of the version in the store, or one of the settings' table of announced dates, whichever comes first.
It is the first day without the model, in UTC. How a provider is asked for its dates is `shutdown_dates`' subject.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, date, datetime, time
from functools import lru_cache
from typing import Literal

from prompt_store.errors import InvalidName, Place
from prompt_store.names import parse_selector
from prompt_store.prompts.snapshot import StoreSnapshot, TaskSnapshot
from prompt_store.prompts.unreadable import Unreadable
from prompt_store.prompts.version import SHUTDOWN_WARNING_DAYS, PromptVersion, RemoteModelPayload
from prompt_store.routing.backends import BackendDescription, choose_backend
from prompt_store.routing.routes import DirectRoute, endings, leaves
from service.routing.errors import ModelRetired
from service.routing.model_names import fine_tuned_base, stands_for

log = logging.getLogger(__name__)

_CACHED_MODELS = 4096

State = Literal["served", "ending", "retired"]


class Retirements:
    """When models go away. `announced` maps a model, or the family of its snapshots and tuned copies, to a date.

    `now` gives the time in UTC.
    """

    def __init__(self, announced: Mapping[str, date], now: Callable[[], datetime]) -> None:
        self._table = dict(announced)
        self._now = now
        self._announced = lru_cache(_CACHED_MODELS)(self._earliest)  # callers may name models that nobody knows

    def today(self) -> date:
        return self._now().astimezone(UTC).date()

    def shutdown_of(self, version: PromptVersion) -> date | None:
        """The first day without the model behind a version; None where none is known, or nobody can take it away.

        A fine-tuned model goes with its base: an entry for the base counts for it too.
        """
        if not isinstance(version.payload, RemoteModelPayload):
            return None
        known = (version.shutdown_date, self.announced(version.payload.model))
        return min((day for day in known if day is not None), default=None)

    def announced(self, model: str) -> date | None:
        """What the settings say of a model, by its name as its provider knows it."""
        return self._announced(model)

    def days_left(self, day: date) -> int:
        """Days until then; 0 and less where it is gone."""
        return (day - self.today()).days

    def state(self, day: date | None) -> State:
        if day is None or (left := self.days_left(day)) > SHUTDOWN_WARNING_DAYS:
            return "served"
        return "ending" if left > 0 else "retired"

    def check(self, version: PromptVersion) -> None:
        """Raises ModelRetired for a version whose model is gone."""
        if isinstance(version.payload, RemoteModelPayload):
            self._check(f"{version.task}@{version.label}", version.payload.model, self.shutdown_of(version))

    def check_model(self, model: str) -> None:
        """Raises ModelRetired for a provider's model that is gone."""
        self._check("the request", model, self.announced(model))

    def _check(self, what: str, model: str, day: date | None) -> None:
        if day is not None and self.state(day) == "retired":
            raise ModelRetired(what, model, day)

    def _earliest(self, model: str) -> date | None:
        names = [name for name in (model, fine_tuned_base(model)) if name is not None]
        days = (day for entry, day in self._table.items() if any(stands_for(entry, name) for name in names))
        return min(days, default=None)


@dataclass(frozen=True, slots=True)
class Loss:
    """A leaf of a task's route whose model goes away on `day`; `replaced` says whether the route answers without it."""

    task: str
    version: str
    backend: str
    model: str
    day: date
    replaced: bool


def losses(task: TaskSnapshot, backends: Sequence[BackendDescription], retirements: Retirements) -> list[Loss]:
    """What a task's route loses and when, each version on each backend once, in the order of the route.

    Whether it is replaced is as of its own day.
    """
    if isinstance(task.route, Unreadable):
        return []
    route = task.route.route
    days: dict[Place, date] = {}
    losing: dict[Place, tuple[DirectRoute, PromptVersion]] = {}
    for place, leaf in leaves(route):
        version = _version(task, leaf)
        day = retirements.shutdown_of(version) if version is not None else None
        if version is not None and day is not None:
            days[place], losing[place] = day, (leaf, version)
    found: dict[Loss, None] = {}
    for place, day, replaced in endings(route, days):
        leaf, version = losing[place]
        payload = version.payload
        assert isinstance(payload, RemoteModelPayload)
        chosen = choose_backend(backends, payload)
        backend = leaf.backend or (chosen.name if chosen is not None else payload.provider)
        found[Loss(task.name, version.label, backend, payload.model, day, replaced)] = None
    return list(found)


class RetirementWatch:
    """Looks at every snapshot, and says what routes lose: when that is new or changes, then once a day.

    `losses` are those that it saw last, however far away.
    """

    def __init__(self, retirements: Retirements, backends: Sequence[BackendDescription]) -> None:
        self._retirements = retirements
        self._backends = backends
        self._said: dict[Loss, date] = {}
        self._known: dict[str, tuple[TaskSnapshot, list[Loss]]] = {}
        self.losses: tuple[Loss, ...] = ()

    def look(self, snapshot: StoreSnapshot) -> None:
        """To be called with each new snapshot, and again every day."""
        before, self._known = self._known, {}
        for name, task in sorted(snapshot.tasks.items()):
            known = before.get(name)
            if known is None or known[0] is not task:  # a task that did not change is the same object
                known = (task, losses(task, self._backends, self._retirements))
            self._known[name] = known
        self.losses = tuple(loss for _, found in self._known.values() for loss in found)
        today = self._retirements.today()
        due = [loss for loss in self.losses if self._retirements.state(loss.day) != "served"]
        for loss in due:
            if self._said.get(loss) != today:
                log.warning(in_words(loss, self._retirements.days_left(loss.day)))
        self._said = dict.fromkeys(due, today)

    def timestamps(self) -> dict[tuple[str, str, str], float]:
        """By task, version and backend, when the model goes away: the start of its day, in seconds since 1970."""
        return {
            (loss.task, loss.version, loss.backend): datetime.combine(loss.day, time(), UTC).timestamp()
            for loss in self.losses
        }


def in_words(loss: Loss, days_left: int) -> str:
    """One line for the log: what is lost, when, and what there is to do."""
    what = f"{loss.version} ('{loss.model}' on backend '{loss.backend}')"
    remedy = f"publish a version that stays, or give the route a fallback: `softcue routes show {loss.task}`"
    if days_left > 0:
        left = f"in {days_left} {'day' if days_left == 1 else 'days'}"
        then = "what the route has beside it answers then" if loss.replaced else f"nothing answers then; {remedy}"
        return f"the route of task '{loss.task}' loses {what} on {loss.day}, {left}; {then}"
    now = "what the route has beside it answers" if loss.replaced else f"nothing answers in its place; {remedy}"
    return f"the route of task '{loss.task}' has lost {what}, shut down on {loss.day}; {now}"


def _version(task: TaskSnapshot, leaf: DirectRoute) -> PromptVersion | None:
    """The version that a leaf names; None where it names none that can be read, which whoever asks is told."""
    try:
        found = task.find(parse_selector(leaf.version))
    except InvalidName:
        return None
    return found if isinstance(found, PromptVersion) else None
