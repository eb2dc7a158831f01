"""One loaded model for all tests here: what differs between engines is memory and limits."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest

from service.engines.base_model import BaseModel
from service.engines.local.client import LocalEngine
from service.engines.local.engine import EngineCore
from service.engines.local.model_runner import ModelRunner
from service.engines.local.options import EngineOptions
from service.engines.local.scheduler import Batch
from service.engines.local.thread import ThreadHost
from tests.service.engines.local.driving import Watched, with_blocks
from tests.service.engines.local.oracle import Oracle

ENOUGH_BLOCKS = 512


@pytest.fixture(scope="session")
def runner(base: BaseModel) -> ModelRunner:
    return ModelRunner.load(base, EngineOptions())


@pytest.fixture(scope="session")
def oracle(base: BaseModel) -> Oracle:
    return Oracle.load(base)


@pytest.fixture
def make_core(runner: ModelRunner) -> Callable[..., EngineCore]:
    """An engine over KV memory of its own; `before` as in Watched, further options as in EngineOptions."""

    def make(
        *,
        blocks: int = ENOUGH_BLOCKS,
        before: Callable[[Batch], None] | None = None,
        clock: Callable[[], float] = time.monotonic,
        **options: Any,
    ) -> EngineCore:
        own: Any = with_blocks(runner, blocks)
        if before is not None:
            own = Watched(own, before)
        return EngineCore(own, EngineOptions(**options), clock=clock)

    return make


@pytest.fixture
def core(make_core: Callable[..., EngineCore]) -> EngineCore:
    return make_core()


@pytest.fixture(scope="module")
def loaded(runner: ModelRunner) -> EngineCore:
    """One engine for the hosts of a module."""
    return EngineCore(with_blocks(runner, ENOUGH_BLOCKS), EngineOptions(max_sequences=4))


@pytest.fixture
async def engine(base: BaseModel, loaded: EngineCore) -> AsyncIterator[LocalEngine]:
    engine = LocalEngine(base, ThreadHost(lambda: loaded), max_waiting=2)
    await engine.start()
    yield engine
    await engine.close()
