"""A journal on a disk that is really full: requests are answered, nothing is torn, and it goes on afterwards."""

from __future__ import annotations

from pathlib import Path

import pytest
from litestar.testing import AsyncTestClient
from sqlalchemy import select

from prompt_store.tables import exposures, outcomes
from service.app import create_app
from service.engines.scripted import ScriptedEngine
from service.generation_ids import verify
from service.ledger.journal import Journal, JournalUnavailable
from service.ledger.records import read_records
from service.ledger.shipping import Shipper
from service.settings import load_settings
from tests.conftest import random_prompt
from tests.prompt_store.mounting import fill, small_disk
from tests.service.ledger.journalling import Store as Taking
from tests.service.ledger.journalling import exposure
from tests.service.routing.routed import counted
from tests.service.serving import COPY, Store
from tests.service.test_experiments import ask, ready, start


def test_a_full_disk_refuses_entries_tears_none_and_takes_them_again_once_there_is_space() -> None:
    with small_disk(1) as disk:
        journal, store = Journal.open(disk / "journal"), Taking()
        journal.append(exposure("0"))
        fill(disk / "filler")
        kept, refusals = ["0"], list[str]()
        for number in range(1, 200):  # some have room behind the first, in what the disk gave it
            try:
                journal.append(exposure(str(number)))
            except JournalUnavailable as refusal:
                refusals.append(str(refusal))
            else:
                kept.append(str(number))
        assert 1 < len(kept) < 200
        assert all("full; free space there" in each or "see that its disk has space" in each for each in refusals)
        assert journal.stats.entries == {"exposure": len(kept)}
        assert journal.stats.lost == {"exposure": 200 - len(kept)}
        (segment,) = (disk / "journal").rglob("*.segment")
        assert list(read_records(segment.read_bytes())) == [exposure(number) for number in kept]
        (disk / "filler").unlink()
        journal.append(exposure("after"))
        Shipper(journal, store.write, every_s=60.0, pause_s=0.0).ship()
        assert store.requests == [*kept, "after"]
        assert (journal.damaged, journal.stats.waiting_bytes) == (0, 0)
        journal.close()


def test_what_is_to_be_set_aside_waits_for_a_place_to_be_set_aside_to(tmp_path: Path) -> None:
    now, store = [0.0], Taking()
    store.refused = {"1"}
    journal = Journal.open(tmp_path / "journal")
    shipper = Shipper(journal, store.write, pause_s=0.0, clock=lambda: now[0])
    refused = tmp_path / "journal" / "refused.jsonl"
    refused.mkdir()
    for number in range(3):
        journal.append(exposure(str(number)))
    shipper.ship()
    assert journal.stats.waiting_bytes > 0
    refused.rmdir()
    now[0] += 60.0
    shipper.ship()
    assert refused.read_text().count("\n") == 1
    assert sorted(store.requests) == ["0", "2"]
    assert journal.stats.waiting_bytes == 0
    journal.close()


@pytest.fixture
def store(store: Store) -> Store:
    store.task({**COPY, "metrics": [{"name": "helpful", "direction": "maximise", "type": "boolean"}]})
    for seed, alias in ((1, "production"), (2, None)):
        store.publish("copy", random_prompt(seed, 4), alias)
    start(store)
    return store


async def test_while_the_journals_disk_is_full_requests_are_answered_and_outcomes_are_to_come_again(
    store: Store, caplog: pytest.LogCaptureFixture
) -> None:
    key = store.registry.database.signing_key()
    asked: list[str] = []
    with small_disk(1) as disk:
        journal = load_settings(None, {}, {"journal": {"folder": disk / "journal"}}).journal
        app = create_app(store.settings().model_copy(update={"journal": journal}), engine=ScriptedEngine())
        async with AsyncTestClient(app, raise_server_exceptions=False) as client:
            await ready(client)
            for number in range(4):
                if number == 1:
                    await counted(client, "softcue_journal_waiting_bytes 0.0")  # what is shipped leaves space behind
                    fill(disk / "filler")
                if number == 3:
                    (disk / "filler").unlink()
                answer = await ask(client, f"user {number}")
                assert answer.status_code == 200
                asked.append(verify(answer.json()["id"], key).request)
                outcome = {"metric": "helpful", "value": True}
                reported = await client.post(f"/v1/generations/{answer.json()['id']}/outcomes", json=outcome)
                if number in (0, 3):
                    assert reported.status_code == 202
                    continue
                assert (reported.status_code, reported.json()["error"]["code"]) == (503, "journal_unavailable")
                assert "see that its disk has space" in reported.json()["error"]["message"]
                assert reported.headers["retry-after"] == "2"
                for kind in ("exposure", "answered", "outcome"):
                    assert (
                        f'softcue_journal_lost_total{{kind="{kind}"}} {number}.0' in (await client.get("/metrics")).text
                    )
    assert caplog.text.count("what requests leave behind is lost until it can be written again") == 1
    with store.registry.database.read() as connection:
        for table in (exposures, outcomes):
            assert set(connection.execute(select(table.c.request)).scalars()) == {asked[0], asked[3]}
