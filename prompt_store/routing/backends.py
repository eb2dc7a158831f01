"""What a store knows of the backends that answer: services say it at their start, and routes are checked against it.

How a backend is reached, and with which key, is in the settings of whoever runs it and never in the store.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import datetime
from typing import Any

from pydantic import TypeAdapter, ValidationError
from sqlalchemy import Connection, delete, insert, select

from prompt_store.access import Principal
from prompt_store.canonical import canonical_json
from prompt_store.changes import record
from prompt_store.errors import InvalidArtifact, InvalidName, SchemaMismatch
from prompt_store.names import check_task_name, check_texts
from prompt_store.prompts.version import EnsemblePayload, Payload, RemoteModelPayload
from prompt_store.tables import backends


@dataclass(frozen=True, slots=True)
class BackendDescription:
    """What a backend serves: `payload_kinds` of versions, and `features` as an engine's Capabilities name them.

    `provider` is what remote-model versions call it, None for one that serves no remote models; `default_model` is the
    remote model that answers where a version names none.
    """

    name: str
    kind: str
    provider: str | None = None
    payload_kinds: frozenset[str] = frozenset()
    features: frozenset[str] = frozenset()
    default_model: str | None = None

    def serves(self, payload: Payload) -> bool:
        """Whether it can answer with such a version. An ensemble's members are soft prompts."""
        if isinstance(payload, RemoteModelPayload) and payload.provider != self.provider:
            return False
        kind = "soft_prompt" if isinstance(payload, EnsemblePayload) else payload.kind
        return kind in self.payload_kinds

    def document(self) -> dict[str, Any]:
        """As JSON values."""
        kinds, features = sorted(self.payload_kinds), sorted(self.features)
        return {**asdict(self), "payload_kinds": kinds, "features": features}


_DESCRIPTION: TypeAdapter[BackendDescription] = TypeAdapter(BackendDescription)


def choose_backend(known: Sequence[BackendDescription], payload: Payload) -> BackendDescription | None:
    """The backend of a route's leaf that names none: the first that serves the version; None where none does."""
    return next((backend for backend in known if backend.serves(payload)), None)


def register_backends(
    connection: Connection, descriptions: Sequence[BackendDescription], principal: Principal, at: datetime
) -> None:
    """Keeps what is said of these backends, in their order; what is kept already is not written again.

    Backends that are not among them stay: another service may run them. Raises InvalidName or InvalidArtifact.
    """
    for description in descriptions:
        check_backend_name(description.name)
        check_texts("description of the backend", description.document())
        if not description.kind or len(description.kind) > 64:
            raise InvalidArtifact(f"backend {description.name!r} has no kind of 1 to 64 characters; give it one")
    kept = _read_kept(connection)
    for place, description in enumerate(descriptions):
        if kept.get(description.name) == (place, description):
            continue
        connection.execute(delete(backends).where(backends.c.name == description.name))
        connection.execute(
            insert(backends).values(
                name=description.name,
                kind=description.kind,
                place=place,
                document=canonical_json(description.document()).decode(),
                updated_at=at,
                principal=principal.name,
            )
        )
        record(
            connection,
            "backend",
            action="backend.register",
            task=None,
            subject=description.name,
            principal=principal,
            at=at,
            details=description.document(),
        )


def are_known(connection: Connection, descriptions: Sequence[BackendDescription]) -> bool:
    """Whether `register_backends` would write nothing."""
    kept = _read_kept(connection)
    return all(kept.get(entry.name) == (place, entry) for place, entry in enumerate(descriptions))


def read_backends(connection: Connection) -> list[BackendDescription]:
    """Every backend that a service has made known, in the order of the services' settings.

    Raises SchemaMismatch for a description that this code cannot read.
    """
    return [
        to_backend(row.name, row.document)
        for row in connection.execute(select(backends).order_by(backends.c.place, backends.c.name))
    ]


def to_backend(name: str, document: str) -> BackendDescription:
    """A row's description. Raises SchemaMismatch."""
    try:
        return _DESCRIPTION.validate_json(document)
    except ValidationError as error:
        raise SchemaMismatch(
            f"the description of backend {name!r} was written by another release of Softcue, or is damaged, and cannot "
            "be read; upgrade Softcue, or start the service that runs it again"
        ) from error


def _read_kept(connection: Connection) -> dict[str, tuple[int, BackendDescription | None]]:
    """Each backend's place and description, by name; None for one that this code cannot read, which is written anew."""
    kept: dict[str, tuple[int, BackendDescription | None]] = {}
    for row in connection.execute(select(backends)):
        try:
            kept[row.name] = (row.place, to_backend(row.name, row.document))
        except SchemaMismatch:
            kept[row.name] = (row.place, None)
    return kept


def check_backend_name(name: str) -> str:
    """Returns `name`. Raises InvalidName when it is not a backend name."""
    try:
        return check_task_name(name)
    except InvalidName as error:
        raise InvalidName(
            f"{name!r} is not a backend name; use a-z, 0-9, '_' and '-', starting with a letter"
        ) from error
