"""A database that is away while an experiment runs: requests are answered, and no arm loses a unit."""

from __future__ import annotations

import asyncio
from collections import Counter

from prompt_store.database import Database
from prompt_store.prompts.registry import Registry
from service.engines.base_model import BaseModel
from service.engines.scripted import ScriptedEngine
from service.generation_ids import verify
from tests.conftest import random_prompt
from tests.postgresql import Server
from tests.service.serving import COPY, client_of, open_store
from tests.service.test_experiments import ask, start


async def test_an_outage_of_the_database_changes_no_arms_count(own_postgresql: Server, base: BaseModel) -> None:
    """Requests, outcomes and a restart of the service fall into it; time does not matter to the journal."""
    url = own_postgresql.create()
    cluster = own_postgresql.cluster
    assert cluster is not None
    store = open_store(url, base)
    store.task({**COPY, "metrics": [{"name": "helpful", "direction": "maximise", "type": "boolean"}]})
    for seed, alias in ((1, "production"), (2, None)):
        store.publish("copy", random_prompt(seed, 4), alias)
    start(store)
    key = store.registry.database.signing_key()
    arms: Counter[str] = Counter()
    told: Counter[str] = Counter()
    async with client_of(store, ScriptedEngine()) as client:
        for number in range(60):
            if number == 20:
                await asyncio.to_thread(cluster.stop, mode="immediate")
            answer = (await ask(client, f"user {number}")).json()
            arms[answer["softcue"]["arm"]] += 1
            outcome = {"metric": "helpful", "value": number % 3 == 0}
            reported = await client.post(f"/v1/generations/{answer['id']}/outcomes", json=outcome)
            assert reported.status_code == 202, reported.text
            told[verify(answer["id"], key).arm] += 1
            if number == 40:
                await asyncio.to_thread(cluster.start)
    store.registry.database.close()
    # What could not be shipped before the service ended is shipped by the next one.
    again = open_store(url, base)
    async with client_of(again, ScriptedEngine()):
        pass
    again.registry.database.close()
    with Database.open(url) as database:
        sums = Registry(database).experiment_sums("tone", "copy", ["helpful"], missing="ignore", started_ms=0)
    units: Counter[str] = Counter()
    valued: Counter[str] = Counter()
    for each in sums.metrics["helpful"]:
        units[each.arm] += each.units
        valued[each.arm] += each.valued
    assert units == valued == arms == told
    assert sums.exposures == 60
    own_postgresql.drop(url)
