"""Real damage to a store: bytes of the file on disk, and statements that go round the registry."""

import sqlite3
from contextlib import closing
from typing import Any

from sqlalchemy import select, text

from prompt_store.database import Database
from prompt_store.sqlite import SqliteStorage
from prompt_store.tables import tensors


def flip_tensor_byte(database: Database, digest: str) -> None:
    """Changes one byte in the middle of a stored tensor: in the file itself, or where there is none by UPDATE."""
    with database.read() as connection:
        data = connection.execute(select(tensors.c.data).where(tensors.c.digest == digest)).scalar_one()
    if isinstance(database.storage, SqliteStorage):
        flip_file_byte(database, data, len(data) // 2)
        return
    with database.write() as connection:
        damaged = bytearray(data)
        damaged[len(data) // 2] ^= 1
        connection.execute(tensors.update().where(tensors.c.digest == digest).values(data=bytes(damaged)))


def flip_file_byte(database: Database, known: bytes, offset: int, mask: int = 1) -> None:
    """Finds bytes that lie in the SQLite file exactly once, and changes the one at `offset` in them."""
    assert isinstance(database.storage, SqliteStorage)
    database.storage.engine.dispose()
    with closing(sqlite3.connect(database.storage.path)) as connection:
        connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    path = database.storage.path
    content = bytearray(path.read_bytes())
    assert content.count(known) == 1
    content[content.index(known) + offset] ^= mask
    path.write_bytes(bytes(content))


def change(database: Database, statement: str, **values: Any) -> None:
    """Runs one statement with foreign keys off, as a foreign hand or a bug would."""
    with database.storage.engine.connect() as connection:
        off, on = (
            ("PRAGMA foreign_keys=OFF", "PRAGMA foreign_keys=ON")
            if isinstance(database.storage, SqliteStorage)
            else ("SET session_replication_role = replica", "SET session_replication_role = DEFAULT")
        )
        # Through the driver, because SQLite ignores this inside a transaction.
        connection.connection.cursor().execute(off)
        connection.execute(text(statement), values)
        connection.commit()
        connection.connection.cursor().execute(on)
        connection.connection.commit()
