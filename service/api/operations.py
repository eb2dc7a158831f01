"""Health and metrics."""

from __future__ import annotations

from typing import Any

from litestar import MediaType, Response, get
from litestar.di import NamedDependency

from service.catalog import Catalog
from service.metrics import CONTENT_TYPE, Metrics
from service.routing.execute import Router


@get("/health/live", tags=["Operations"])
async def live() -> dict[str, str]:
    """The process answers."""
    return {"status": "live"}


@get("/health/ready", tags=["Operations"])
async def ready(catalog: NamedDependency[Catalog], router: NamedDependency[Router]) -> Response[dict[str, Any]]:
    """Requests will be answered: the store has been read and every engine is ready. 503 otherwise."""
    states = {name: engine.stats().ready for name, engine in router.engines.items()}
    is_ready = catalog.loaded and all(states.values())
    body = {"status": "ready" if is_ready else "not ready", "store": catalog.loaded, "backends": states}
    return Response(body, status_code=200 if is_ready else 503)


@get("/metrics", tags=["Operations"])
async def scrape(metrics: NamedDependency[Metrics]) -> Response[bytes]:
    """Prometheus metrics."""
    return Response(metrics.render(), media_type=MediaType.TEXT, headers={"content-type": CONTENT_TYPE})
