import sqlite3
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from datetime import UTC, datetime, timedelta, timezone
from pathlib import Path

import pytest
from sqlalchemy import insert, select, update
from sqlalchemy.exc import IntegrityError

from prompt_store.database import Database
from prompt_store.errors import NotYetSupported, StoreError, StoreUnavailable
from prompt_store.tables import bases, meta
from tests.prompt_store.building import ANNA


def test_opening_creates_the_folder_and_the_file(tmp_path: Path) -> None:
    path = tmp_path / "a" / "b" / "softcue.db"
    with Database.open(str(path)) as database:
        assert database.location == str(path)
    assert path.exists()


def test_a_url_and_a_path_name_the_same_store(tmp_path: Path) -> None:
    path = tmp_path / "with space#and?marks%20.db"
    with Database.open(path) as one:
        key = one.signing_key()
    with Database.open(f"sqlite:///{tmp_path / 'other.db'}") as other:
        assert other.location == str(tmp_path / "other.db")
        assert other.signing_key() != key
    assert sorted(tmp_path.glob("*.db")) == [tmp_path / "other.db", path]


def test_a_location_opens_the_same_store_again(database: Database) -> None:
    key = database.signing_key()
    with Database.open(database.location, create=False) as again:
        assert again.signing_key() == key


@pytest.mark.parametrize("url", ["mysql://anna:secret@db/softcue", "mysql+pymysql://anna:secret@db/softcue"])
def test_another_database_is_refused_without_showing_the_password(url: str) -> None:
    with pytest.raises(NotYetSupported, match=r"a store on mysql is not supported; use a file path") as caught:
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


def test_every_connection_to_a_sqlite_file_is_durable_and_patient(sqlite_database: Database) -> None:
    for transaction in (sqlite_database.read, sqlite_database.write):
        with transaction() as connection:
            values = {
                name: connection.exec_driver_sql(f"PRAGMA {name}").scalar_one()
                for name in ("journal_mode", "synchronous", "foreign_keys", "busy_timeout")
            }
        assert values == {"journal_mode": "wal", "synchronous": 2, "foreign_keys": 1, "busy_timeout": 30_000}


def test_a_row_that_refers_to_none_is_refused(database: Database) -> None:
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


def test_a_write_sees_what_was_committed_while_it_waited(database: Database) -> None:
    query = select(meta.c.value).where(meta.c.key == "count")
    with database.write() as connection:
        connection.execute(insert(meta).values(key="count", value=b"0"))

    def add_one(_: int) -> None:
        with database.write() as connection:
            count = int(connection.execute(query).scalar_one())
            connection.execute(update(meta).where(meta.c.key == "count").values(value=str(count + 1).encode()))

    with ThreadPoolExecutor(8) as threads:
        list(threads.map(add_one, range(40)))
    with database.read() as connection:
        assert connection.execute(query).scalar_one() == b"40"


def test_more_transactions_than_connections_are_refused_with_the_remedy(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(database.storage.engine.pool, "_timeout", 0.01)
    with ExitStack() as stack:

        def use_them_all() -> None:
            while True:
                stack.enter_context(database.read())

        with pytest.raises(StoreUnavailable, match=r"all its connections .* in use; try again"):
            use_them_all()
    with database.read():
        pass


def test_the_signing_key_is_made_once_and_kept(location: str, tmp_path: Path) -> None:
    with Database.open(location) as database:
        key = database.signing_key()
        assert len(key) == 32
        assert database.signing_key() == key
    with Database.open(location) as again, Database.open(tmp_path / "b.db") as other:
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


def test_a_file_damaged_while_open_is_reported_as_such(sqlite_database: Database) -> None:
    with sqlite_database.write() as connection:
        connection.execute(insert(meta).values(key="big", value=bytes(200_000)))
    sqlite_database.close()
    path = Path(sqlite_database.location)
    content = bytearray(path.read_bytes())
    content[4096:] = b"\xaa" * (len(content) - 4096)
    path.write_bytes(content)

    def open_and_read() -> None:
        with Database.open(path) as reopened, reopened.read() as connection:
            connection.execute(select(meta)).all()

    with pytest.raises(StoreUnavailable, match="restore a backup"):
        open_and_read()


def test_a_connection_in_use_at_the_close_is_closed_when_it_comes_back(location: str) -> None:
    database = Database.open(location)
    with database.read() as connection:
        driver = connection.connection.driver_connection
        assert driver is not None
        database.close()
        connection.execute(select(meta.c.key)).all()
    with pytest.raises(Exception, match="closed"):
        driver.execute("SELECT 1")
