"""What the store refuses, and why.

StoreError                  every message gives the fact and the remedy
├── NotFound                .what, .name, .nearest (the closest known name, or None)
│   ├── UnknownTask
│   ├── UnknownVersion
│   ├── UnknownAlias
│   ├── UnknownBase
│   └── UnknownExperiment
├── InvalidName             a task, alias, selector, model name, key or cursor outside the grammar
├── InvalidTask             a task document that contradicts itself
├── InvalidInputs           fields missing from, or unknown to, a task's template
├── InvalidArtifact         unacceptable content: bytes, shape, dtype, NaN, report
│   └── DamagedArtifact     stored bytes that are missing, or no longer what was published
├── BaseMismatch            a soft prompt that does not fit the base it names
├── InvalidExperiment       an experiment that contradicts itself, its task or its route; .problems as of InvalidRoute
├── InvalidOutcome          a metric that the task does not have, or a value that is not of its type
├── InvalidRoute            a route that contradicts itself or what the store holds; .problems, each with its place
├── Conflict                what the store holds now does not allow it, as a lost compare-and-set; .current is that
│   ├── InUse               a version that something needs; .users says what
│   └── KeyReused           an idempotency key that came with another request before
├── NotYetSupported         a reserved shape that nothing serves yet
├── SchemaMismatch          a database or document that this code cannot read
└── StoreUnavailable        busy, full, read-only, missing or damaged database file
"""

import difflib
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, ClassVar, Self


class StoreError(Exception):
    """Base of everything the store raises on purpose. `str(error)` is fit to show to a user."""


class NotFound(StoreError):
    """A name that the store does not hold.

    `known` are the names to look for a near miss in; `where` is put behind the name in the message.
    """

    what: ClassVar[str] = "entry"
    remedy: ClassVar[str] = "check the name"

    def __init__(self, name: str, known: Iterable[str] = (), *, where: str = "", remedy: str | None = None) -> None:
        self.name = name
        self.nearest = nearest_name(name, known)
        fact = f"no {self.what} {name!r}{where}"
        instead = remedy or self.remedy
        hint = f"did you mean {self.nearest!r}? Otherwise {instead}" if self.nearest is not None else instead
        super().__init__(f"{fact}; {hint}")

    def __reduce__(self) -> tuple[Any, ...]:
        # Unpickling would otherwise take the message for the name.
        return _revived, (type(self), str(self), vars(self))


class UnknownTask(NotFound):
    what = "task"
    remedy = "list the tasks with `softcue prompts tasks`, or add this one with `softcue prompts apply-task FILE`"


class UnknownVersion(NotFound):
    what = "version"
    remedy = "list the versions with `softcue prompts list TASK`"


class UnknownAlias(NotFound):
    what = "alias"
    remedy = "list the aliases with `softcue prompts list TASK`, or set it with `softcue prompts alias`"


class UnknownBase(NotFound):
    what = "base model"
    remedy = "make it known to this store with `softcue register-base FOLDER`"


class UnknownExperiment(NotFound):
    what = "experiment"
    remedy = "list them with `softcue experiments list`, or start one with `softcue experiments start FILE`"


class InvalidName(StoreError):
    pass


class InvalidTask(StoreError):
    pass


class InvalidInputs(StoreError):
    """Inputs that do not fit a template: `missing` and `unexpected` name the fields."""

    def __init__(self, message: str, *, missing: tuple[str, ...] = (), unexpected: tuple[str, ...] = ()) -> None:
        super().__init__(message)
        self.missing = missing
        self.unexpected = unexpected


class InvalidArtifact(StoreError):
    pass


class DamagedArtifact(InvalidArtifact):
    pass


class BaseMismatch(StoreError):
    pass


Place = tuple[str | int, ...]
"""The way to something in a document: fields, and indices of lists."""


@dataclass(frozen=True, slots=True)
class RouteProblem:
    """One thing that is wrong with a route or an experiment, at its place in the document."""

    place: Place
    message: str

    def __str__(self) -> str:
        return f"{dotted(self.place)}: {self.message}" if self.place else self.message


def dotted(place: Place) -> str:
    """A place in a document as answers and messages show it: route.routes[0].version."""
    return "".join(f"[{step}]" if isinstance(step, int) else f".{step}" for step in place).removeprefix(".")


class InvalidRoute(StoreError):
    """`problems` are all that is wrong with the route; the message has each of them."""

    def __init__(self, message: str, problems: tuple[RouteProblem, ...] = ()) -> None:
        super().__init__(message)
        self.problems = problems

    @classmethod
    def of(cls, problems: Iterable[RouteProblem]) -> Self:
        listed = tuple(problems)
        return cls("; ".join(map(str, listed)), listed)


class InvalidExperiment(StoreError):
    """`problems` are all that is wrong with the experiment; the message has each of them."""

    def __init__(self, message: str, problems: tuple[RouteProblem, ...] = ()) -> None:
        super().__init__(message)
        self.problems = problems

    @classmethod
    def of(cls, problems: Iterable[RouteProblem]) -> Self:
        listed = tuple(problems)
        return cls("; ".join(map(str, listed)), listed)


class InvalidOutcome(StoreError):
    pass


class Conflict(StoreError):
    """Somebody else was first, or this would break something. `current` is what the store holds, None for nothing."""

    def __init__(self, message: str, *, current: str | None = None) -> None:
        super().__init__(message)
        self.current = current


class InUse(Conflict):
    """`users` say in words who needs the version whose digest is `current`."""

    def __init__(self, message: str, *, users: tuple[str, ...] = (), current: str | None = None) -> None:
        super().__init__(message, current=current)
        self.users = users


class KeyReused(Conflict):
    pass


class NotYetSupported(StoreError):
    pass


class SchemaMismatch(StoreError):
    pass


class StoreUnavailable(StoreError):
    retry_after_s: ClassVar[float] = 2.0


def _revived(kind: type[StoreError], message: str, state: dict[str, Any]) -> StoreError:
    error = kind.__new__(kind, message)
    vars(error).update(state)
    return error


_NUMBERED = re.compile(r"v(\d{1,9})")


def nearest_name(name: str, known: Iterable[str]) -> str | None:
    """The known name closest to `name`, or None when none is close.

    Version labels are compared as numbers: of v1, v2 and v3, the nearest to v9 is v3.
    """
    candidates = list(dict.fromkeys(known))
    asked = _NUMBERED.fullmatch(name)
    if asked is not None:
        labels = [(label, match) for label in candidates if (match := _NUMBERED.fullmatch(label))]
        if labels:
            return min(labels, key=lambda pair: abs(int(pair[1][1]) - int(asked[1])))[0]
    close = difflib.get_close_matches(name, candidates, n=1, cutoff=0.5)
    return close[0] if close else None
