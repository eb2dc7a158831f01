import sqlite3
import threading
from datetime import UTC, datetime, timedelta, timezone
from pathlib import Path

import pytest
from sqlalchemy import insert, select
from sqlalchemy.exc import IntegrityError

from prompt_store.database import Database
from prompt_store.errors import NotYetSupported, StoreError, StoreUnavailable
from prompt_store.tables import bases, meta
from tests.prompt_store.building import ANNA


def test_opening_creates_the_folder_and_the_file(tmp_path: Path) -> None:
    path = tmp_path / "a" / "b" / "softcue.db"
    with Database.open(str(path)) as database:
        assert database.path == path
    assert path.exists()


def test_a_url_and_a_path_name_the_same_store(tmp_path: Path) -> None:
    path = tmp_path / "with space#and?marks%20.db"
    with Database.open(path) as one:
        key = one.signing_key()
    with Database.open(f"sqlite:///{tmp_path / 'other.db'}") as other:
        assert other.path == tmp_path / "other.db"
        assert other.signing_key() != key
    assert sorted(tmp_path.glob("*.db")) == [tmp_path / "other.db", path]


@pytest.mark.parametrize("url", ["postgresql+psycopg://anna:secret@db/softcue", "mysql://db/softcue"])
def test_another_database_is_refused_without_showing_the_password(url: str) -> None:
    with pytest.raises(NotYetSupported, match=r"softcue\[postgres\]") as caught:
        Database.open(url)
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize("url", ["", ":memory:", "sqlite://", "sqlite:///:memory:", "://", "sqlite:///"])
def test_a_store_without_a_file_is_refused(url: str) -> None:
    with pytest.raises(StoreError, match=r"use a file path|give a path"):
        Database.open(url)


def test_an_absent_store_is_not_created_for_reading(tmp_path: Path) -> None:
    with pytest.raises(StoreUnavailable, match="there is no store at"):
        Database.open(tmp_path / "absent.db", create=False)
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_is_no_database_is_refused_and_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "notes.txt"
    path.write_text("dear diary " * 1000)
    with pytest.raises(StoreUnavailable, match="not a database"):
        Database.open(path)
    assert path.read_text() == "dear diary " * 1000


def test_somebody_elses_database_is_refused_and_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "other.db"
    with sqlite3.connect(path) as other:
        other.execute("CREATE TABLE recipes (name TEXT)")
    other.close()
    before = path.read_bytes()
    with pytest.raises(StoreError, match="a table 'recipes'"):
        Database.open(path)
    assert path.read_bytes() == before


def test_a_folder_that_cannot_be_made_is_said(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreUnavailable, match="cannot create"):
        Database.open(tmp_path / "file" / "softcue.db")


def test_every_connection_is_durable_and_checks_foreign_keys(database: Database) -> None:
    for transaction in (database.read, database.write):
        with transaction() as connection:
            values = {
                name: connection.exec_driver_sql(f"PRAGMA {name}").scalar_one()
                for name in ("journal_mode", "synchronous", "foreign_keys", "busy_timeout")
            }
        assert values == {"journal_mode": "wal", "synchronous": 2, "foreign_keys": 1, "busy_timeout": 30_000}
    with pytest.raises(IntegrityError), database.write() as connection:
        connection.exec_driver_sql("INSERT INTO version_tensors VALUES ('absent', 'soft_prompt', 'absent')")


def test_a_failed_write_leaves_no_trace(database: Database) -> None:
    def write_and_fail() -> None:
        with database.write() as connection:
            connection.execute(insert(meta).values(key="a", value=b"1"))
            raise RuntimeError("halfway")

    with pytest.raises(RuntimeError, match="halfway"):
        write_and_fail()
    with database.read() as connection:
        assert connection.execute(select(meta.c.key).where(meta.c.key == "a")).all() == []


def test_a_read_sees_one_state_while_others_write(database: Database) -> None:
    query = select(meta.c.key).where(meta.c.key == "a")
    with database.read() as reader:
        assert reader.execute(query).all() == []
        with database.write() as writer:
            writer.execute(insert(meta).values(key="a", value=b"1"))
        assert reader.execute(query).all() == []
    with database.read() as reader:
        assert len(reader.execute(query).all()) == 1


def test_a_write_that_waits_too_long_says_so(database: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("prompt_store.database.BUSY_TIMEOUT_S", 0.0)
    with (
        Database.open(database.path) as impatient,
        database.write(),
        pytest.raises(StoreUnavailable, match="another process holds it"),
        impatient.write(),
    ):
        pass


def test_data_version_changes_when_another_connection_commits(database: Database) -> None:
    before = database.data_version()
    assert database.data_version() == before
    with database.read() as connection:
        connection.execute(select(meta)).all()
    assert database.data_version() == before
    with database.write() as connection:
        connection.execute(insert(meta).values(key="a", value=b"1"))
    assert database.data_version() != before


def test_data_version_may_be_asked_from_any_thread(database: Database) -> None:
    answers: list[int] = [database.data_version()]
    threads = [threading.Thread(target=lambda: answers.append(database.data_version())) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(answers) == 5
    assert len(set(answers)) == 1


def test_the_signing_key_is_made_once_and_kept(tmp_path: Path) -> None:
    with Database.open(tmp_path / "a.db") as database:
        key = database.signing_key()
        assert len(key) == 32
        assert database.signing_key() == key
    with Database.open(tmp_path / "a.db") as again, Database.open(tmp_path / "b.db") as other:
        assert again.signing_key() == key
        assert other.signing_key() != key


def test_times_come_back_in_utc_and_naive_ones_are_refused(database: Database) -> None:
    row = {
        "fingerprint": "f", "name": "n", "hidden_size": 1, "layers": 1, "context_length": 1, "vocabulary_size": 1,
        "architecture": "x", "principal": ANNA.name,
    }  # fmt: skip
    moment = datetime(2026, 5, 1, 12, 0, 0, 123456, tzinfo=timezone(timedelta(hours=2)))
    with database.write() as connection:
        connection.execute(insert(bases).values(**row, created_at=moment))
    with database.read() as connection:
        stored = connection.execute(select(bases.c.created_at)).scalar_one()
    assert (stored, stored.tzinfo) == (moment, UTC)
    with pytest.raises(Exception, match="without time zone"), database.write() as connection:
        connection.execute(insert(bases).values(**row, created_at=datetime(2026, 5, 1)))


def test_a_database_damaged_while_open_is_reported_as_such(database: Database, tmp_path: Path) -> None:
    with database.write() as connection:
        connection.execute(insert(meta).values(key="big", value=bytes(200_000)))
    database.close()
    content = bytearray(database.path.read_bytes())
    content[4096:] = b"\xaa" * (len(content) - 4096)
    database.path.write_bytes(content)

    def open_and_read() -> None:
        with Database.open(database.path) as reopened, reopened.read() as connection:
            connection.execute(select(meta)).all()

    with pytest.raises(StoreUnavailable, match="restore a backup"):
        open_and_read()
