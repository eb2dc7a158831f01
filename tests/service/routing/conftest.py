from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from service.engines.base_model import BaseModel
from tests.service.routing.routed import publish_remote
from tests.service.serving import Store, filled


@pytest.fixture
def store(tmp_path: Path, base: BaseModel) -> Iterator[Store]:
    """Tasks with a soft prompt in production, and v2, a model at a provider."""
    store = filled(tmp_path / "softcue.db", base)
    for task in ("intents", "copy", "query"):
        publish_remote(store, task)
    yield store
    store.registry.database.close()
