"""The only wiring: Settings in, a Litestar application out, with its engine, store and catalog started and stopped."""

from __future__ import annotations

import asyncio
import importlib.metadata
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

from litestar import Litestar
from litestar.datastructures import State
from litestar.di import Provide
from litestar.exceptions import HTTPException
from litestar.openapi import OpenAPIConfig
from litestar.openapi.plugins import JsonRenderPlugin, YamlRenderPlugin

from prompt_store.access import Principal
from prompt_store.bundle import load_bundle
from prompt_store.database import Database
from prompt_store.errors import StoreError
from prompt_store.prompts.registry import Registry
from prompt_store.routes import DEFAULT_ALIAS, DEFAULT_BACKEND
from service.api.answers import (
    ClientLeft,
    answer_client_left,
    answer_error,
    answer_http_error,
    answer_unreadable,
)
from service.api.bodies import require_content_type
from service.api.description import VariadicTuples
from service.api.openai import OpenAIController
from service.api.operations import live, ready, ready_for_writes, scrape
from service.api.prompt_aliases import AliasController
from service.api.prompts import BodyLimits, PromptController, list_bases
from service.api.tasks import TaskController
from service.catalog import Catalog
from service.engines.base import Engine
from service.engines.base_model import open_base_model
from service.engines.build import build_local
from service.engines.errors import EngineError
from service.metrics import Metrics
from service.routing.errors import RoutingError
from service.routing.execute import Router
from service.settings import Settings

_SERVICE = Principal("service", frozenset({"admin"}))


def create_app(
    settings: Settings,
    *,
    engine: Engine | None = None,
    on_ready: Callable[[Catalog], object] = lambda _: None,
    on_fatal: Callable[[Exception], object] = lambda _: None,
) -> Litestar:
    """The service. Opens base model and store at once; the engine starts with the application, in the background.

    `app.state.drain` begins the stop: await it before open connections are cut.
    `engine` stands in for the local engine that the settings describe, for tests and demonstrations.
    `on_ready` is called when requests are answered, `on_fatal` when they never will be.
    Raises EngineError and StoreError for a base model or a store that cannot be used.
    """
    base = open_base_model(settings.base.path, name=settings.base.name)
    database = Database.open(settings.store.url, backups=settings.store.backups)
    registry = Registry(database)
    registry.register_base(base.describe(), _SERVICE)
    if settings.store.seed is not None:
        load_bundle(registry, settings.store.seed, DEFAULT_ALIAS, _SERVICE)
    local = engine or build_local(
        base,
        settings.engine.options(),
        max_waiting=settings.engine.max_waiting,
        ready_timeout_s=settings.engine.ready_timeout_s,
    )
    engines = {DEFAULT_BACKEND: local}
    metrics = Metrics(engines)
    catalog = Catalog(
        database,
        registry,
        local,
        base_name=base.name,
        base_fingerprint=base.fingerprint,
        poll_s=settings.store.poll_s,
        fall_back_when_damaged=settings.store.fall_back_when_damaged,
        on_refresh=metrics.store_sequence.set,
        on_failure=metrics.catalog_failures.inc,
    )
    metrics.store_reachable.set_function(lambda: catalog.store_reachable)
    metrics.damaged_versions.set_function(lambda: catalog.damage.versions)
    metrics.aliases_fallen_back.set_function(lambda: catalog.damage.fallen_back)
    limits = BodyLimits(settings.server.max_body_bytes, settings.server.max_prompt_bytes)
    router = Router(catalog, engines, metrics, database.signing_key())

    async def run() -> None:
        try:
            await local.start()
            await catalog.load()
            on_ready(catalog)
            await catalog.follow()
        except Exception as error:
            on_fatal(error)
            raise

    @asynccontextmanager
    async def lifespan(_: Litestar) -> AsyncIterator[None]:
        running = asyncio.create_task(run(), name="softcue-catalog")
        try:
            yield
        finally:
            running.cancel()
            await asyncio.gather(running, return_exceptions=True)
            await drain()
            # Reads that are under way end first, and the store may be away.
            await asyncio.to_thread(catalog.close)
            await asyncio.to_thread(database.close)

    async def drain() -> None:
        """Let running requests end within the grace; those beyond it end in an error. The first step of stopping."""
        await local.close(settings.server.drain_s)

    return Litestar(
        state=State({"drain": drain}),
        route_handlers=[
            OpenAIController,
            TaskController,
            PromptController,
            AliasController,
            list_bases,
            live,
            ready,
            ready_for_writes,
            scrape,
        ],
        dependencies={
            "catalog": Provide(lambda: catalog, sync_to_thread=False),
            "router": Provide(lambda: router, sync_to_thread=False),
            "registry": Provide(lambda: registry, sync_to_thread=False),
            "limits": Provide(lambda: limits, sync_to_thread=False),
            "metrics": Provide(lambda: metrics, sync_to_thread=False),
        },
        lifespan=[lifespan],
        before_request=require_content_type,
        exception_handlers={
            StoreError: answer_error,
            EngineError: answer_error,
            RoutingError: answer_error,
            ClientLeft: answer_client_left,
            HTTPException: answer_http_error,
            UnicodeDecodeError: answer_unreadable,
            RecursionError: answer_unreadable,
            Exception: answer_error,
        },
        openapi_config=OpenAPIConfig(
            title="Softcue",
            version=importlib.metadata.version("softcue"),
            path="/schema",
            use_handler_docstrings=True,
            render_plugins=[JsonRenderPlugin(path=["/", "/openapi.json"]), YamlRenderPlugin()],
        ),
        plugins=[VariadicTuples()],
        logging_config=None,
        request_max_body_size=settings.server.max_body_bytes,
    )
