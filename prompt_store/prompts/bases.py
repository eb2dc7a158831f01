"""The base models that the store has seen, by fingerprint."""

from collections import defaultdict
from dataclasses import asdict, dataclass
from datetime import datetime

from sqlalchemy import Connection, insert, select, update

from prompt_store.access import Principal
from prompt_store.changes import record
from prompt_store.errors import Conflict, InvalidArtifact, InvalidName, UnknownBase
from prompt_store.names import SHORTEST_DIGEST_PREFIX, check_texts
from prompt_store.prompts.version import BaseDescription
from prompt_store.tables import bases, versions

# Added to the schema later: a base that an earlier release registered has none.
_FILLED_IN = ("kv_heads", "head_size")

# What the columns hold; SQLite alone would take more.
_LONGEST_FINGERPRINT = 128
_LARGEST_SIZE = 2**31 - 1


def register_base(connection: Connection, base: BaseDescription, principal: Principal, at: datetime) -> None:
    """Adds a base once. The first name stays: a fingerprint is one model, wherever its folder is.

    KV sizes that were not known are filled in. Raises Conflict when the same fingerprint was registered with other
    sizes, InvalidArtifact for sizes and texts that the store cannot hold.
    """
    check_texts("description of the base", asdict(base))
    sizes = [value for value in asdict(base).values() if isinstance(value, int)]
    if not base.fingerprint or not base.name or not all(1 <= size <= _LARGEST_SIZE for size in sizes):
        raise InvalidArtifact(
            f"base {base.name!r} has an empty name or fingerprint, or a size that is none; describe the loaded model"
        )
    if len(base.fingerprint) > _LONGEST_FINGERPRINT:
        raise InvalidArtifact(
            f"base {base.name!r} has a fingerprint of {len(base.fingerprint)} characters; give at most "
            f"{_LONGEST_FINGERPRINT}, as a SHA-256 in hexadecimal"
        )
    known = {entry.fingerprint: entry for entry in read_bases(connection)}.get(base.fingerprint)
    if known is not None:
        differing = [
            f"{key}={value!r} (was {asdict(known)[key]!r})"
            for key, value in asdict(base).items()
            if key != "name" and asdict(known)[key] != value and not (key in _FILLED_IN and asdict(known)[key] is None)
        ]
        if differing:
            raise Conflict(
                f"base {known.name!r} is already registered under fingerprint {base.fingerprint} with other facts: "
                f"{', '.join(differing)}; a changed model needs a new fingerprint",
                current=base.fingerprint,
            )
        missing = {key: getattr(base, key) for key in _FILLED_IN if getattr(known, key) is None}
        if all(size is None for size in missing.values()):
            return
        connection.execute(update(bases).where(bases.c.fingerprint == base.fingerprint).values(**missing))
        record(
            connection,
            "base",
            action="base.complete",
            task=None,
            subject=base.fingerprint,
            principal=principal,
            at=at,
            details=missing,
        )
        return
    connection.execute(insert(bases).values(**asdict(base), created_at=at, principal=principal.name))
    record(
        connection,
        "base",
        action="base.register",
        task=None,
        subject=base.fingerprint,
        principal=principal,
        at=at,
        details={"name": base.name},
    )


def read_bases(connection: Connection) -> list[BaseDescription]:
    """Every base, in the order in which they were registered."""
    rows = connection.execute(select(bases).order_by(bases.c.created_at, bases.c.fingerprint))
    return [
        BaseDescription(
            fingerprint=row.fingerprint,
            name=row.name,
            hidden_size=row.hidden_size,
            layers=row.layers,
            context_length=row.context_length,
            vocabulary_size=row.vocabulary_size,
            architecture=row.architecture,
            kv_heads=row.kv_heads,
            head_size=row.head_size,
        )
        for row in rows
    ]


@dataclass(frozen=True, slots=True)
class CarriedBase:
    """A base and the labels of the versions that are bound to it, by task.

    `missing` are the tasks with versions for other bases and none for this one: what a move to it still needs. Texts
    and remote models run anywhere, so they need nothing.
    """

    base: BaseDescription
    versions: dict[str, tuple[str, ...]]
    missing: tuple[str, ...]

    @property
    def count(self) -> int:
        return sum(map(len, self.versions.values()))


def carried_by_bases(connection: Connection) -> list[CarriedBase]:
    """Every base with what it carries, in the order in which they were registered."""
    bound: defaultdict[str, defaultdict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
    query = select(versions.c.base_fingerprint, versions.c.task, versions.c.number)
    for row in connection.execute(
        query.where(versions.c.base_fingerprint.is_not(None)).order_by(versions.c.task, versions.c.number)
    ):
        bound[row.base_fingerprint][row.task].append(f"v{row.number}")
    tasks = sorted({task for carried in bound.values() for task in carried})
    return [
        CarriedBase(
            base,
            {task: tuple(labels) for task, labels in bound[base.fingerprint].items()},
            tuple(task for task in tasks if task not in bound[base.fingerprint]),
        )
        for base in read_bases(connection)
    ]


def find_base(known: list[BaseDescription], name_or_fingerprint: str) -> BaseDescription:
    """The base of that fingerprint, unique fingerprint prefix (8 or more characters) or unique name.

    Raises UnknownBase naming the nearest, or InvalidName when it fits several.
    """
    exact = [base for base in known if base.fingerprint == name_or_fingerprint]
    named = [base for base in known if base.name == name_or_fingerprint]
    prefixed = (
        [base for base in known if base.fingerprint.startswith(name_or_fingerprint)]
        if len(name_or_fingerprint) >= SHORTEST_DIGEST_PREFIX
        else []
    )
    found = exact or named or prefixed
    if not found:
        raise UnknownBase(name_or_fingerprint, [name for base in known for name in (base.name, base.fingerprint)])
    if len(found) > 1:
        listed = ", ".join(base.fingerprint[:12] for base in found)
        raise InvalidName(f"{name_or_fingerprint!r} fits {len(found)} bases ({listed}); give more of the fingerprint")
    return found[0]
