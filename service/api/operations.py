"""Health and metrics."""

from __future__ import annotations

from typing import Any

from litestar import Response, get
from litestar.di import NamedDependency
from litestar.openapi.datastructures import ResponseSpec

from service.catalog import Catalog
from service.metrics import CONTENT_TYPE, Metrics
from service.routing.router import Router

# The body is that of a 200, and says what is missing.
_NOT_READY = {503: ResponseSpec(dict[str, Any], description="Not ready", generate_examples=False)}


@get("/health/live", tags=["Operations"])
async def live() -> dict[str, str]:
    """The process answers."""
    return {"status": "live"}


@get("/health/ready", tags=["Operations"], responses=_NOT_READY)
async def ready(catalog: NamedDependency[Catalog], router: NamedDependency[Router]) -> Response[dict[str, Any]]:
    """Requests will be answered: the store has been read and every engine is ready. 503 otherwise.

    `store` says whether the store can be reached now; what was read of it is served without. `warm` says whether the
    prompts that aliases point at are all computed; until they are, first answers take a moment longer.
    """
    states = {name: engine.stats().ready for name, engine in router.backends.engines.items()}
    is_ready = catalog.loaded and all(states.values())
    body = {
        "status": _in_words(is_ready),
        "store": catalog.store_reachable,
        "writes": _in_words(catalog.store_reachable),
        "warm": catalog.settled,
        "backends": states,
    }
    return Response(body, status_code=200 if is_ready else 503)


@get("/health/ready/writes", tags=["Operations"], responses=_NOT_READY)
async def ready_for_writes(catalog: NamedDependency[Catalog]) -> Response[dict[str, Any]]:
    """What is published, moved or applied will be stored: the store can be reached. 503 otherwise."""
    reachable = catalog.store_reachable
    return Response({"status": _in_words(reachable)}, status_code=200 if reachable else 503)


@get("/metrics", tags=["Operations"], media_type=CONTENT_TYPE)
async def scrape(metrics: NamedDependency[Metrics]) -> Response[bytes]:
    """Prometheus metrics."""
    return Response(metrics.render(), media_type=CONTENT_TYPE)


def _in_words(is_ready: bool) -> str:
    return "ready" if is_ready else "not ready"
