"""The application over a filled store and a scripted engine."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from litestar.testing import AsyncTestClient
from referencing import Registry

from service.engines.base_model import BaseModel
from service.engines.scripted import ScriptedEngine
from tests import openai_contract
from tests.service.serving import Store, client_of, filled


@pytest.fixture
def store(tmp_path: Path, base: BaseModel) -> Store:
    return filled(tmp_path / "store.db", base)


@pytest.fixture
def engine() -> ScriptedEngine:
    return ScriptedEngine()


@pytest.fixture
async def client(store: Store, engine: ScriptedEngine) -> AsyncIterator[AsyncTestClient[Any]]:
    async with client_of(store, engine) as client:
        yield client


@pytest.fixture
def contract() -> Registry[Any]:
    return openai_contract.contract()
