import multiprocessing
from collections.abc import Iterator
from multiprocessing.context import ForkServerContext
from pathlib import Path

import pytest

from prompt_store.database import Database
from prompt_store.prompts.registry import Registry
from tests.prompt_store.building import ANNA, BASE, task


@pytest.fixture(scope="session")
def children() -> ForkServerContext:
    """Starts processes in milliseconds, from one that has imported the store and opened nothing."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.prompt_store.processes"])
    return context


@pytest.fixture
def database(location: str) -> Iterator[Database]:
    """Each test that takes it runs twice: on SQLite and on PostgreSQL."""
    with Database.open(location) as opened:
        yield opened


@pytest.fixture
def sqlite_database(tmp_path: Path) -> Iterator[Database]:
    """For what SQLite alone has."""
    with Database.open(tmp_path / "store" / "softcue.db") as opened:
        yield opened


@pytest.fixture
def postgresql_database(postgresql_location: str) -> Iterator[Database]:
    """For what PostgreSQL alone has."""
    with Database.open(postgresql_location) as opened:
        yield opened


@pytest.fixture
def empty_registry(database: Database) -> Registry:
    return Registry(database)


@pytest.fixture
def registry(empty_registry: Registry) -> Registry:
    """Knows one base and one task, and has no version yet."""
    empty_registry.register_base(BASE, ANNA)
    empty_registry.apply_task(task(), ANNA)
    return empty_registry
