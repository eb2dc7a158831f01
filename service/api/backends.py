"""Backends over HTTP: what each serves and how it fares, and addresses that are taken out for a while."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal, Self

from litestar import Controller, get, post
from litestar.di import NamedDependency
from litestar.params import FromPath, JSONBody
from pydantic import BaseModel, ConfigDict

from prompt_store.errors import nearest_name
from service.api.answers import errors
from service.api.errors import UnknownBackend, UnknownReplica
from service.api.queries import require_known_query
from service.routing.backends import Backend
from service.routing.router import Router


class DrainBody(BaseModel):
    """`drained` addresses get nothing new; what runs there ends by itself."""

    model_config = ConfigDict(extra="forbid", hide_input_in_errors=True)

    url: str
    drained: bool


class ReplicaBody(BaseModel):
    """One address of a backend, and how many requests are in flight there. A drained one is not healthy either."""

    url: str
    healthy: bool
    drained: bool
    running: int


class BackendBody(BaseModel):
    """What a backend serves, and how it fares at this service. One on this machine has no replicas.

    `retries` and `failures` count attempts since the start.
    """

    object: Literal["backend"] = "backend"
    name: str
    kind: str
    provider: str | None
    default_model: str | None
    payload_kinds: list[str]
    features: list[str]
    ready: bool
    breaker: Literal["closed", "open", "half_open"]
    waiting: int
    running: int
    retries: int
    failures: int
    replicas: list[ReplicaBody]

    @classmethod
    def of(cls, backend: Backend) -> Self:
        described, stats = backend.describe(), backend.engine.stats()
        replicas = backend.transport.replicas() if backend.transport is not None else ()
        return cls(
            name=backend.name,
            kind=backend.kind,
            provider=backend.provider,
            default_model=backend.default_model,
            payload_kinds=sorted(described.payload_kinds),
            features=sorted(described.features),
            ready=stats.ready,
            breaker=stats.breaker,
            waiting=stats.waiting,
            running=stats.running,
            retries=stats.retries,
            failures=stats.failures,
            replicas=[
                ReplicaBody(url=each.url, healthy=each.healthy, drained=each.drained, running=each.running)
                for each in replicas
            ],
        )


class BackendListBody(BaseModel):
    """Every backend, in the order of the settings."""

    object: Literal["list"] = "list"
    data: list[BackendBody]


class BackendController(Controller):
    """`/v1/backends`: those of this service, as it sees them; other replicas of the service have their own view."""

    path = "/v1/backends"
    tags = ("Routes",)
    before_request = staticmethod(require_known_query)

    @get(responses=errors(400))
    async def list_backends(self, router: NamedDependency[Router]) -> BackendListBody:
        """What each backend serves and how it fares."""
        return BackendListBody(data=[BackendBody.of(backend) for backend in router.backends.values()])

    @post("/{name:str}/replicas", status_code=200, responses=errors(400, 404, 413, 415))
    async def drain(
        self, name: FromPath[str], data: JSONBody[DrainBody], router: NamedDependency[Router]
    ) -> BackendBody:
        """Take an address out of a backend, or put it back, at this service until it is started again."""
        backend = router.backends.get(name)
        if backend is None:
            raise UnknownBackend(f"there is no backend {name!r} here{_hint(name, router.backends)}")
        transport = backend.transport
        known = [each.url for each in transport.replicas()] if transport is not None else []
        if transport is None or data.url not in known:
            has = f"it has {', '.join(known)}" if known else "it runs on this machine"
            raise UnknownReplica(f"backend {name!r} has no address {data.url!r}; {has}")
        if data.drained:
            transport.drain(data.url)
        else:
            transport.undrain(data.url)
        return BackendBody.of(backend)


def _hint(name: str, known: Iterable[str]) -> str:
    nearest = nearest_name(name, known)
    return f"; did you mean {nearest!r}?" if nearest is not None else f"; there are {', '.join(known) or 'none'}"
