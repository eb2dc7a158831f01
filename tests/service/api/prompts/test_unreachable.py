"""The store goes away under the API."""

from __future__ import annotations

import asyncio
import sqlite3
from contextlib import closing
from typing import Any

from litestar.testing import AsyncTestClient
from sqlalchemy import make_url

from tests.postgresql import Server
from tests.service.serving import Store


async def take_away(store: Store, request: Any) -> None:
    """SQLite's file is overwritten, PostgreSQL lets nobody in."""
    if store.registry.database.storage.kind == "sqlite":
        with closing(sqlite3.connect(store.location, timeout=1.0)) as connection:
            await empty_log(connection)  # what is in it would be read from there still
            overwrite(store.location)
            await empty_log(connection)  # whoever read between the two keeps its pages no longer
        return
    server: Server = request.getfixturevalue("postgresql")
    name = make_url(store.location).database
    server.execute(f"ALTER DATABASE {name} ALLOW_CONNECTIONS false")
    server.execute(f"SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = '{name}'")


async def empty_log(connection: sqlite3.Connection) -> None:
    async with asyncio.timeout(30):
        while connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()[0]:  # noqa: ASYNC110 (others read)
            await asyncio.sleep(0.001)  # the threads that are waited for need the interpreter


def overwrite(location: str) -> None:
    with open(location, "r+b") as file:
        file.write(b"\0" * 4096)


async def test_a_store_that_cannot_be_used_is_503_and_says_when_to_come_back(
    client: AsyncTestClient[Any], store: Store, request: Any
) -> None:
    await take_away(store, request)
    for response in (
        await client.get("/v1/prompts"),
        await client.put("/v1/prompts/copy/aliases/candidate", json={"version": "v1"}, headers={"if-none-match": "*"}),
    ):
        assert (response.status_code, response.json()["error"]["code"]) == (503, "store_unavailable")
        assert int(response.headers["retry-after"]) >= 1
    assert (await client.get("/v1/tasks/copy")).status_code == 200
