"""Units over HTTP: what one left goes, and no other's."""

from __future__ import annotations

from typing import Any
from urllib.parse import quote

import pytest
from litestar.testing import AsyncTestClient
from sqlalchemy import select

from prompt_store.ledger.entries import Entry
from prompt_store.tables import outcomes
from service.engines.scripted import ScriptedEngine
from service.generation_ids import unit_hash
from tests.prompt_store.ledger.entered import answered, captured, exposure, outcome
from tests.service.serving import Store, client_of

METRIC = {"name": "stars", "direction": "maximise"}


def lived(store: Store, *units: str) -> None:
    """Each unit left one entry of each kind."""
    key = store.registry.database.signing_key()
    entries: list[Entry] = []
    for place, unit in enumerate(units):
        whose = {"unit_hash": unit_hash(unit, key)}
        entries += [made(str(place), **whose) for made in (exposure, answered, outcome, captured)]
    store.registry.add_entries(entries)


@pytest.mark.parametrize("unit", ["user 7", "a/b", "a//b/", "x@y.example?z=1#2", "Zoë", "100%25"])
async def test_a_unit_is_erased_by_the_name_that_requests_gave_it(
    client: AsyncTestClient[Any], store: Store, unit: str
) -> None:
    lived(store, unit, "somebody else", f"{unit}x")
    erased = (await client.request("DELETE", f"/v1/units/{quote(unit, safe='')}")).json()
    assert erased == {
        "object": "unit.erased",
        "erased": {"exposures": 1, "answers": 1, "outcomes": 1, "captures": 1, "shadow_answers": 0},
    }


async def test_erasing_again_finds_nothing_and_refuses_nothing(client: AsyncTestClient[Any], store: Store) -> None:
    lived(store, "user 7")
    for left in (1, 0):
        answer = await client.delete("/v1/units/user%207")
        assert (answer.status_code, answer.json()["erased"]["outcomes"]) == (200, left)


async def test_a_mistyped_parameter_is_refused_before_anything_is_erased(
    client: AsyncTestClient[Any], store: Store
) -> None:
    lived(store, "user 7")
    assert (await client.delete("/v1/units/user%207?dry_run=true")).status_code == 400
    assert (await client.delete("/v1/units/user%207")).json()["erased"]["outcomes"] == 1


async def test_an_outcome_of_an_erased_unit_is_taken_and_not_kept(store: Store) -> None:
    """Its generation was before the erasure, and its entries may still lie in any replica's journal."""
    store.task({**store.registry.task("copy").task.document(), "metrics": [METRIC]})
    async with client_of(store, ScriptedEngine()) as client:
        asked = {"inputs": {"product": "mug", "colour": "red"}, "unit": "user 7"}
        generation = (await client.post("/v1/tasks/copy/generate", json=asked)).json()["id"]
        assert (await client.delete("/v1/units/user%207")).status_code == 200
        report = {"metric": "stars", "value": 5}
        assert (await client.post(f"/v1/generations/{generation}/outcomes", json=report)).status_code == 202
    with store.registry.database.read() as connection:
        assert connection.execute(select(outcomes)).all() == []
