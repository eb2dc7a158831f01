"""The store that the catalog follows."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from service.engines.base_model import BaseModel
from tests.conftest import random_prompt
from tests.service.serving import INTENTS, Store, open_store


@pytest.fixture
def store(location: str, base: BaseModel) -> Iterator[Store]:
    """On SQLite and on PostgreSQL."""
    store = open_store(location, base)
    store.task(INTENTS)
    store.publish("intents", random_prompt(1, 4))
    yield store
    store.registry.database.close()
