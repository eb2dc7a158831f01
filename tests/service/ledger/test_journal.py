"""The journal: what was acknowledged reaches the store, whatever happens to process, disk and store."""

from __future__ import annotations

import os
import random
import shutil
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from zlib import crc32

import msgspec
import pytest

from prompt_store.ledger.entries import Entry
from service.ledger.journal import Journal, JournalUnavailable
from service.ledger.records import Damage, Unknown, read_records, record_of
from service.ledger.shipping import Shipper
from tests.conftest import BASE_FOLDER
from tests.service.ledger.journalling import Store, exposure

KILLS = int(os.environ.get("SOFTCUE_KILLS", "8"))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "journal"


@pytest.fixture
def journal(folder: Path) -> Iterator[Journal]:
    journal = Journal.open(folder)
    yield journal
    journal.close()


def shipped(folder: Path, store: Store) -> None:
    """All that lies in a journal's folder, by a process that opens it now."""
    shipper = Shipper(Journal.open(folder), store.write, every_s=0.0, pause_s=0.0)
    shipper.ship()
    while shipper.ship():
        pass
    shipper.close(10.0)


def test_what_was_acknowledged_before_kill_9_reaches_the_store_and_nothing_else_does(folder: Path) -> None:
    draw, acknowledged, begun = random.Random(5), set[str](), set[str]()
    store = Store()
    for kill in range(KILLS):
        process = subprocess.Popen(
            [sys.executable, "-m", "tests.service.ledger.journalling", str(folder), f"p{kill}"],
            stdout=subprocess.PIPE, text=True, cwd=BASE_FOLDER.parent.parent,
        )  # fmt: skip
        assert process.stdout is not None
        for _ in range(draw.randrange(1, 400)):
            acknowledged.add(process.stdout.readline().strip())
        process.kill()
        rest = process.stdout.read().splitlines(keepends=True)
        acknowledged |= {line.strip() for line in rest if line.endswith("\n")}
        process.stdout.close()
        process.wait()
        mine = [int(name.partition("-")[2]) for name in acknowledged if name.startswith(f"p{kill}-")]
        begun.add(f"p{kill}-{max(mine) + 1}")
        if kill % 3 == 2:
            shipped(folder, store)
    shipped(folder, store)
    assert len(store.requests) == len(set(store.requests))
    assert acknowledged <= set(store.requests) <= acknowledged | begun
    assert not list(folder.rglob("*.segment"))


def test_while_the_store_is_away_all_is_kept_and_shipped_when_it_is_back(journal: Journal) -> None:
    now, store = [0.0], Store()
    shipper = Shipper(journal, store.write, pause_s=0.0, clock=lambda: now[0])
    store.away = True
    for number in range(300):
        journal.append(exposure(str(number)))
        now[0] += 0.2
        shipper.ship()
    assert store.requests == []
    assert journal.stats.waiting_bytes > 0
    store.away = False
    now[0] += 60.0
    while shipper.ship() or journal.stats.waiting_bytes:
        now[0] += 1.0
    assert sorted(store.requests, key=int) == [str(number) for number in range(300)]
    assert journal.stats.lost == {}


def test_what_the_store_refuses_for_itself_is_set_aside_alone(journal: Journal, folder: Path) -> None:
    store = Store()
    store.refused = {"3", "7"}
    for number in range(10):
        journal.append(exposure(str(number)))
    shipper = Shipper(journal, store.write, every_s=60.0, pause_s=0.0)
    shipper.ship()
    assert sorted(store.requests) == ["0", "1", "2", "4", "5", "6", "8", "9"]
    kept = (folder / "refused.jsonl").read_text()
    assert kept.count("\n") == journal.stats.refused == 2
    assert '"3"' in kept
    assert '"7"' in kept
    assert journal.stats.waiting_bytes == 0


def test_a_torn_record_costs_itself_alone_at_every_byte() -> None:
    first, last = record_of([exposure("1")]), record_of([exposure("2"), exposure("3")])
    for length in range(len(last)):
        parts = list(read_records(first + last[:length]))
        assert parts[0] == exposure("1")
        assert [part for part in parts[1:] if not isinstance(part, Damage)] == []
    assert list(read_records(first + last)) == [exposure("1"), exposure("2"), exposure("3")]


def test_a_flipped_byte_costs_its_record_alone() -> None:
    records = [record_of([exposure(str(number))]) for number in range(3)]
    for place in range(len(records[1])):
        damaged = bytearray(records[1])
        damaged[place] ^= 0x55
        parts = list(read_records(records[0] + bytes(damaged) + records[2]))
        whole = [part for part in parts if not isinstance(part, Damage)]
        assert whole == [exposure("0"), exposure("2")]
        assert any(isinstance(part, Damage) for part in parts)


def test_an_entry_of_a_kind_that_this_release_does_not_know_is_set_aside(journal: Journal, folder: Path) -> None:
    known = msgspec.msgpack.decode(record_of([exposure("1")])[12:])
    known.append(["of tomorrow", "x"])
    payload = msgspec.msgpack.encode(known)
    record = record_of([exposure("1")])[:4] + struct.pack("<II", len(payload), crc32(payload)) + payload
    parts = list(read_records(record))
    assert parts[0] == exposure("1")
    assert isinstance(parts[1], Unknown)
    left = folder / "1-0000dead" / "00000001.segment"
    left.parent.mkdir(parents=True)
    left.write_bytes(record)
    store = Store()
    Shipper(journal, store.write, every_s=60.0, pause_s=0.0).ship()
    assert store.requests == ["1"]
    assert "of tomorrow" in (folder / "refused.jsonl").read_text()


def test_two_processes_share_a_folder_and_one_alone_adopts_what_a_third_left(folder: Path) -> None:
    left = Journal.open(folder)
    left.append(exposure("left"))
    left.close()
    stores = [Store(), Store()]
    journals = [Journal.open(folder) for _ in stores]
    for number, each in enumerate(journals):
        each.append(exposure(f"own-{number}"))
    for each, store in zip(journals, stores, strict=True):
        Shipper(each, store.write, every_s=60.0, pause_s=0.0).ship()
    assert sorted(stores[0].requests) == ["left", "own-0"]
    assert stores[1].requests == ["own-1"]
    for each in journals:
        each.close()


def test_what_is_no_journal_stays_and_what_cannot_be_taken_over_keeps_nobody_from_the_rest(folder: Path) -> None:
    (folder / "lost+found").mkdir(parents=True)
    (folder / "1-00000000" / "lock").mkdir(parents=True)  # no lock that could be opened, as is that of another user
    left = Journal.open(folder)
    left.append(exposure("left"))
    left.close()
    store = Store()
    shipped(folder, store)
    assert store.requests == ["left"]
    assert list((folder / "lost+found").iterdir()) == []
    assert sorted(path.name for path in folder.iterdir() if path.is_dir()) == ["1-00000000", "lost+found"]


def test_what_hundreds_of_processes_left_is_shipped_by_and_by(folder: Path) -> None:
    record = {number: record_of([exposure(str(number))]) for number in range(250)}
    for number, data in record.items():
        segment = folder / f"1-{number:08x}" / "00000001.segment"
        segment.parent.mkdir(parents=True)
        segment.write_bytes(data)
    now, store = [0.0], Store()
    journal = Journal.open(folder)
    store.away = True
    shipper = Shipper(journal, store.write, pause_s=0.0, clock=lambda: now[0])
    opened = len(os.listdir("/proc/self/fd"))
    for _ in range(5):
        shipper.ship()
        now[0] += 60.0
    assert len(os.listdir("/proc/self/fd")) - opened <= 100
    store.away = False
    while shipper.ship() or journal.stats.waiting_bytes or len(store.requests) < len(record):
        now[0] += 60.0
    assert sorted(store.requests, key=int) == [str(number) for number in record]
    journal.close()
    assert not list(folder.glob("*/"))


def test_beyond_its_bound_the_journal_refuses_and_says_so_until_there_is_room(folder: Path) -> None:
    journal, store = Journal.open(folder, max_bytes=1000), Store()
    size_bytes = len(record_of([exposure("0")]))
    taken = 1000 // size_bytes
    for number in range(taken):
        journal.append(exposure(str(number)))
    with pytest.raises(JournalUnavailable, match=r"raise journal\.max_bytes"):
        journal.append(exposure("n"))
    assert journal.stats.lost == {"exposure": 1}
    Shipper(journal, store.write, every_s=60.0, pause_s=0.0).ship()
    journal.append(exposure("more"))
    assert len(store.requests) == taken
    journal.close()


def test_a_batch_is_kept_whole_or_not_at_all(folder: Path) -> None:
    journal = Journal.open(folder, max_bytes=1000)
    entries: list[Entry] = [exposure(str(number)) for number in range(100)]
    with pytest.raises(JournalUnavailable):
        journal.append_all(entries)
    assert journal.stats.waiting_bytes == 0
    assert journal.stats.lost == {"exposure": 100}
    journal.close()


def test_a_deleted_folder_is_made_anew(journal: Journal, folder: Path) -> None:
    store = Store()
    shipper = Shipper(journal, store.write, every_s=60.0, pause_s=0.0)
    journal.append(exposure("gone"))
    shutil.rmtree(folder)
    with pytest.raises(JournalUnavailable):
        journal.append(exposure("refused"))
    shipper.ship()
    journal.append(exposure("kept"))
    shipper.ship()
    assert "kept" in store.requests
