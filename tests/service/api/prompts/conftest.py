"""The same application as beside this folder, over a store on each database."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from service.engines.base_model import BaseModel
from tests.service.serving import Store, filled


@pytest.fixture
def store(location: str, base: BaseModel) -> Iterator[Store]:
    store = filled(location, base)
    with store.registry.database:
        yield store
