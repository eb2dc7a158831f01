"""The only wiring: Settings in, a Litestar application out, with its engine, store and catalog started and stopped."""

from __future__ import annotations

import asyncio
import importlib.metadata
import itertools
import logging
import os
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from datetime import timedelta
from typing import Any

from litestar import Litestar
from litestar.datastructures import State
from litestar.di import NamedDependency, Provide
from litestar.exceptions import HTTPException
from litestar.openapi import OpenAPIConfig
from litestar.openapi.plugins import JsonRenderPlugin, YamlRenderPlugin

from prompt_store.access import Principal
from prompt_store.bundle import load_bundle
from prompt_store.database import Database
from prompt_store.errors import StoreError
from prompt_store.leadership import Leadership
from prompt_store.prompts.registry import Registry
from prompt_store.routing.backends import BackendDescription
from prompt_store.routing.registry import utc_now
from prompt_store.routing.routes import DEFAULT_ALIAS, DEFAULT_BACKEND
from service.api.answers import (
    ClientLeft,
    answer_client_left,
    answer_error,
    answer_http_error,
    answer_unreadable,
)
from service.api.backends import BackendController
from service.api.bodies import require_content_type
from service.api.callers import FORCE_KEY
from service.api.description import VariadicTuples
from service.api.experiments import ExperimentController
from service.api.generations import GenerationController
from service.api.openai import OpenAIController
from service.api.operations import live, ready, ready_for_writes, scrape
from service.api.outcomes import OutcomeController
from service.api.prompt_aliases import AliasController
from service.api.prompts import BodyLimits, PromptController, list_bases
from service.api.responses import create_response
from service.api.routes import RouteController, list_routes
from service.api.tasks import TaskController
from service.api.units import UnitController
from service.catalog import Catalog
from service.deciding import Decider
from service.engines.base import Engine
from service.engines.base_model import BaseModel, open_base_model
from service.engines.build import build_backends, build_local
from service.engines.errors import BaseModelError, EngineError
from service.engines.remote.backend_settings import OpenAICompatibleSettings
from service.engines.remote.provider import Provider
from service.ledger.journal import Journal
from service.ledger.recording import Capturing, Recorder
from service.ledger.retention import forget_older
from service.ledger.shipping import Shipper
from service.metrics import Metrics
from service.routing.backends import Backend, Backends
from service.routing.errors import RoutingError
from service.routing.execute import Executor
from service.routing.judging import Judges
from service.routing.leaves import Leaves
from service.routing.recent import Recent
from service.routing.retirement import Retirements, RetirementWatch
from service.routing.router import Router
from service.routing.shadowing import Shadows
from service.routing.shutdown_dates import Ask, ShutdownDates
from service.routing.spending import Spending
from service.settings import Settings, SettingsError

log = logging.getLogger(__name__)

_SERVICE = Principal("service", frozenset({"admin"}))
_ACCOUNTS_EVERY_S = 5.0
_HOUR_S = 3600.0
_SHIP_WITHIN_S = 5.0


def create_app(
    settings: Settings,
    *,
    engine: Engine | None = None,
    backends: Sequence[Backend] = (),
    on_ready: Callable[[Catalog], object] = lambda _: None,
    on_fatal: Callable[[Exception], object] = lambda _: None,
) -> Litestar:
    """The service. Opens base model and store at once; the engines start with the application, in the background.

    `app.state.drain` begins the stop: await it before open connections are cut.
    `engine` stands in for the local engine that the settings describe, and `backends` beside those that they do, for
    tests and demonstrations.
    `on_ready` is called when requests are answered, `on_fatal` when they never will be.
    Raises EngineError, StoreError, JournalUnavailable and SettingsError for a base model, a backend, a store, a journal
    or a key or redaction that cannot be used.
    """
    captures, force_key = _captures(settings), _force_key(settings)
    base = _open_base(settings)
    served = Backends([*_local(settings, base, engine), *_remote(settings, base), *backends])
    database = Database.open(settings.store.url, backups=settings.store.backups)
    registry = Registry(database)
    if base is not None:
        registry.register_base(base.describe(), _SERVICE)
    registry.register_backends(served.described, _SERVICE)
    if settings.store.seed is not None:
        load_bundle(registry, settings.store.seed, DEFAULT_ALIAS, _SERVICE)
    metrics = Metrics(served.engines)
    retirements = Retirements(settings.retirements, utc_now)
    watch = RetirementWatch(retirements, served.described)
    metrics.watch_retirements(watch.timestamps)

    def refreshed(sequence: int) -> None:
        metrics.store_sequence.set(sequence)
        watch.look(catalog.snapshot)

    catalog = Catalog(
        database,
        registry,
        served,
        base_name=base.name if base is not None else "",
        base_fingerprint=base.fingerprint if base is not None else "",
        poll_s=settings.store.poll_s,
        fall_back_when_damaged=settings.store.fall_back_when_damaged,
        on_refresh=refreshed,
        on_failure=metrics.catalog_failures.inc,
    )
    metrics.store_reachable.set_function(lambda: catalog.store_reachable)
    metrics.damaged_versions.set_function(lambda: catalog.damage.versions)
    metrics.aliases_fallen_back.set_function(lambda: catalog.damage.fallen_back)
    limits = BodyLimits(settings.server.max_body_bytes, settings.server.max_prompt_bytes)
    spending = Spending(utc_now, registry.spending, registry.add_spending)
    shadows = Shadows(registry.add_shadow_answers, metrics.count_shadow)
    leaves = Leaves(catalog, served, retirements, spending)
    journal = Journal.open(
        settings.journal.folder or database.storage.journal,
        segment_bytes=settings.journal.segment_bytes,
        max_bytes=settings.journal.max_bytes,
    )
    metrics.watch_journal(lambda: journal.stats)
    shipper = Shipper(journal, registry.add_entries)
    recorder = Recorder(journal.append, captures, metrics)
    judges = Judges(catalog.resolve_task, journal.append, metrics.count_judgement)
    executor = Executor(catalog, recorder.expose)
    router = Router(served, leaves, executor, shadows, judges, Recent(), recorder, metrics, database.signing_key())
    decider = Decider(registry, Leadership(database, "experiments"), utc_now, metrics.count_decision, _SERVICE)
    metrics.leader.set_function(lambda: decider.leads)
    dates = ShutdownDates(
        {name: backend.ask for name, backend in served.items() if backend.ask is not None},
        served.described,
        lambda version, day: registry.note_shutdown(version.task, version.digest, day, _SERVICE),
        retirements.announced,
    )

    async def run() -> None:
        try:
            await asyncio.gather(*(each.start() for each in served.engines.values()))
            await catalog.load()
            await asyncio.to_thread(spending.flush)
            on_ready(catalog)
            async with asyncio.TaskGroup() as group:
                group.create_task(catalog.follow())
                group.create_task(keep_accounts())
                group.create_task(shipper.follow())
                group.create_task(decider.follow())
                group.create_task(dates.follow(lambda: catalog.snapshot))
        except Exception as error:
            on_fatal(error)
            raise

    async def keep_accounts() -> None:
        """What requests leave behind them, written behind their backs."""
        for count in itertools.count(1):
            await asyncio.sleep(_ACCOUNTS_EVERY_S)
            try:
                await asyncio.to_thread(spending.flush)
                await shadows.flush()
                if count % round(_HOUR_S / _ACCOUNTS_EVERY_S) == 1:  # also of a service that is never up for an hour
                    watch.look(catalog.snapshot)
                    await shadows.forget(timedelta(days=settings.store.shadow_days), registry.delete_shadow_answers)
                    await forget_older(timedelta(days=settings.ledger.retention_days), registry.forget, utc_now)
            except Exception:  # requests are answered all the same
                log.exception("what requests left behind could not be written")

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
            await asyncio.to_thread(decider.close)
            await asyncio.to_thread(shipper.close, _SHIP_WITHIN_S)
            await asyncio.to_thread(spending.close)
            await asyncio.to_thread(database.close)

    async def drain() -> None:
        """Let running requests end within the grace; those beyond it end in an error. The first step of stopping."""
        closing = [each.close(settings.server.drain_s) for each in served.engines.values()]
        # What shadows and judges found is written while requests end.
        await asyncio.gather(shadows.close(), judges.close(), *closing)

    def provide_router(catalog: NamedDependency[Catalog]) -> Router:
        """Provided after the catalog: what is provided at once, Litestar provides in a task each (50 us a request)."""
        return router

    def provide_journal(router: NamedDependency[Router]) -> Journal:
        """After the router, for the same reason."""
        return journal

    return Litestar(
        state=State({"drain": drain, FORCE_KEY: force_key}),
        route_handlers=[
            OpenAIController,
            create_response,
            TaskController,
            RouteController,
            list_routes,
            ExperimentController,
            BackendController,
            GenerationController,
            OutcomeController,
            UnitController,
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
            "router": Provide(provide_router, sync_to_thread=False),
            "retirements": Provide(lambda: retirements, sync_to_thread=False),
            "registry": Provide(lambda: registry, sync_to_thread=False),
            "limits": Provide(lambda: limits, sync_to_thread=False),
            "metrics": Provide(lambda: metrics, sync_to_thread=False),
            "journal": Provide(provide_journal, sync_to_thread=False),
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


def _force_key(settings: Settings, environment: Mapping[str, str] = os.environ) -> bytes | None:
    """The key of testers. Raises SettingsError where its variable is named and not set."""
    name = settings.experiments.force_key_env
    if name is None:
        return None
    if not environment.get(name):
        raise SettingsError(f"experiments.force_key_env names {name}, which is not set; set it to the testers' key")
    return environment[name].encode()


def _captures(settings: Settings) -> dict[str, Capturing]:
    return {
        task: Capturing(each.sample, each.retention_days, each.redaction()) for task, each in settings.captures.items()
    }


def describe_backends(settings: Settings) -> list[BackendDescription]:
    """The backends that a service with these settings has, without their keys and without starting any.

    Raises EngineError as `create_app`.
    """
    base = _open_base(settings)
    backends = [*_local(settings, base, None), *_remote(settings, base, _AnyKey())]
    return [backend.describe() for backend in backends]


class _AnyKey(dict[str, str]):
    """An environment in which every key is set."""

    def get(self, name: str, default: Any = None) -> str:
        return "none"


def _open_base(settings: Settings) -> BaseModel | None:
    """The base model, None where no backend needs one."""
    wanted = any(backend.kind == "vllm" for backend in settings.backends.values())
    if not settings.engine.enabled and not wanted:
        return None
    try:
        return open_base_model(settings.base.path, name=settings.base.name)
    except BaseModelError as error:
        if wanted or not settings.backends:
            raise
        raise BaseModelError(f"{error}. Without a base model, [engine] enabled = false serves the backends") from error


def _local(settings: Settings, base: BaseModel | None, engine: Engine | None) -> list[Backend]:
    if engine is not None:
        return [Backend(DEFAULT_BACKEND, engine)]
    if base is None or not settings.engine.enabled:
        return []
    local = build_local(
        base,
        settings.engine.options(),
        max_waiting=settings.engine.max_waiting,
        ready_timeout_s=settings.engine.ready_timeout_s,
    )
    return [Backend(DEFAULT_BACKEND, local)]


def _remote(settings: Settings, base: BaseModel | None, environment: Mapping[str, str] = os.environ) -> list[Backend]:
    engines = build_backends(settings.backends, environment, base=base)
    found: list[Backend] = []
    for name, backend in settings.backends.items():
        if isinstance(backend, OpenAICompatibleSettings):
            described = Backend(
                name,
                engines[name],
                backend.kind,
                provider=backend.provider or name,
                models=backend.answers(),
                default_model=backend.default_model,
                prices=backend.prices,
                ask=_asking(engines[name].provider),
                transport=engines[name].provider,
            )
        else:
            described = Backend(
                name, engines[name], backend.kind, prices=backend.prices, transport=engines[name].provider
            )
        found.append(described)
    return found


def _asking(provider: Provider) -> Ask:
    async def ask(path: str) -> Mapping[str, Any]:
        return (await provider.get(path)).document

    return ask
