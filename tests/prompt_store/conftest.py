from collections.abc import Iterator

import pytest

from prompt_store.database import Database
from prompt_store.prompts.registry import Registry
from tests.prompt_store.building import ANNA, BASE, task


@pytest.fixture
def database(location: str) -> Iterator[Database]:
    """Each test that takes it runs twice: on SQLite and on PostgreSQL."""
    with Database.open(location) as opened:
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
