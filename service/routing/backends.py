"""The backends that a service has: each an engine under a name, with what it serves and what it costs."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import NoReturn

from prompt_store.prompts.version import Payload, RemoteModelPayload
from prompt_store.routing.backends import BackendDescription, choose_backend
from service.engines.base import Engine
from service.engines.remote.provider import Provider
from service.routing.errors import NotServed
from service.routing.prices import Price
from service.routing.shutdown_dates import Ask


@dataclass(frozen=True)
class Backend:
    """A named engine. `provider` is what remote models name, `models` the patterns of ids that may be asked for bare.

    `ask` gets the JSON object at a path under the provider's address, where it has one, and `transport` reaches it.
    """

    name: str
    engine: Engine
    kind: str = "local"
    provider: str | None = None
    models: tuple[str, ...] = ()
    default_model: str | None = None
    prices: Mapping[str, Price] = field(default_factory=dict)
    ask: Ask | None = None
    transport: Provider | None = None

    def describe(self) -> BackendDescription:
        """What the store keeps of it, so that routes can be checked without this service."""
        serves = self.engine.capabilities()
        return BackendDescription(
            self.name, self.kind, self.provider, serves.payload_kinds, serves.features, self.default_model
        )


class Backends(Mapping[str, Backend]):
    """By name, in the order of the settings; the first that fits is taken where none is named."""

    def __init__(self, backends: Iterable[Backend]) -> None:
        self._backends = {backend.name: backend for backend in backends}
        self.descriptions = {name: backend.describe() for name, backend in self._backends.items()}
        self.described = list(self.descriptions.values())

    def __getitem__(self, name: str) -> Backend:
        return self._backends[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._backends)

    def __len__(self) -> int:
        return len(self._backends)

    @property
    def engines(self) -> dict[str, Engine]:
        return {name: backend.engine for name, backend in self._backends.items()}

    def named(self, name: str) -> Backend:
        """Raises NotServed naming those that there are."""
        backend = self._backends.get(name)
        if backend is None:
            raise NotServed(
                f"the route of this task names backend '{name}', which this service does not have; "
                f"it has: {', '.join(self) or 'none'}"
            )
        return backend

    def serving(self, payload: Payload, preferred: str | None = None) -> str:
        """The backend of a version whose route names none: the preferred one where it serves such versions, else the
        first that does; empty where none does."""
        if preferred is not None and preferred in self and self.descriptions[preferred].serves(payload):
            return preferred
        chosen = choose_backend(self.described, payload)
        return chosen.name if chosen is not None else ""

    def refuse(self, payload: Payload) -> NoReturn:
        """Raises NotServed for a version that no backend serves."""
        if isinstance(payload, RemoteModelPayload):
            known = sorted({backend.provider for backend in self._backends.values() if backend.provider})
            raise NotServed(
                f"model '{payload.model}' is at provider '{payload.provider}', and no backend here is; add one to "
                f"[backends] (known providers: {', '.join(known) or 'none'})"
            )
        raise NotServed(
            f"no backend of this service answers versions of kind '{payload.kind}'; it has: {', '.join(self) or 'none'}"
        )

    def of_base(self) -> str:
        """The backend that runs the bare base model. Raises NotServed where none does."""
        for name, description in self.descriptions.items():
            if "soft_prompt" in description.payload_kinds:
                return name
        raise NotServed("no backend of this service runs a base model; GET /v1/models lists what is served")

    def of_model(self, model: str) -> str:
        """The backend of a provider's model that is asked for by its bare id. Raises NotServed."""
        for name, backend in self._backends.items():
            if any(fnmatchcase(model, pattern) for pattern in backend.models):
                return name
        raise NotServed(
            f"no backend here serves '{model}'; add it to `models` of one in [backends], or name a task: "
            "GET /v1/models lists them"
        )
