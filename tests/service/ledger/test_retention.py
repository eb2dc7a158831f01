"""What is older than it may be goes, and a store that is away is asked again later."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from prompt_store.database import Database
from prompt_store.errors import StoreUnavailable
from prompt_store.prompts.registry import Registry
from service.ledger.retention import forget_older
from tests.prompt_store.building import ANNA
from tests.prompt_store.ledger.entered import START_MS, exposure, outcome

NOW = datetime.fromtimestamp(START_MS / 1000, UTC)
DAY_MS = 24 * 3600 * 1000


async def test_what_is_older_goes_and_the_rest_stays(tmp_path: Path) -> None:
    with Database.open(tmp_path / "softcue.db") as database:
        registry = Registry(database)
        registry.add_entries(
            [
                exposure("old", at_ms=START_MS - 31 * DAY_MS, unit_hash="u"),
                outcome("old", generated_ms=START_MS - 31 * DAY_MS, unit_hash="u"),
                exposure("new", at_ms=START_MS - 29 * DAY_MS, unit_hash="u"),
            ]
        )
        await forget_older(timedelta(days=30), registry.forget, lambda: NOW)
        left = registry.erase_unit("u", ANNA)
    assert (left.exposures, left.outcomes) == (1, 0)


async def test_a_store_that_is_away_is_told_in_the_log(caplog: pytest.LogCaptureFixture) -> None:
    def away(_: int) -> None:
        raise StoreUnavailable("the store is away; wait")

    await forget_older(timedelta(days=30), away, lambda: NOW)
    assert "cannot be deleted now: the store is away; wait" in caplog.text
