"""A PostgreSQL server for tests: the one that SOFTCUE_TEST_POSTGRES_URL names, or a throw-away cluster of its own.

Without either a test is skipped; CI turns that into a failure.
"""

from __future__ import annotations

import os
import secrets
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psycopg
import pytest
from sqlalchemy import URL, make_url

GIVEN = "SOFTCUE_TEST_POSTGRES_URL"
_START_TIMEOUT_S = 60


class Server:
    """A server whose databases tests make and drop; `cluster` where it is one of our own, which may be broken."""

    def __init__(self, url: URL, cluster: Cluster | None = None) -> None:
        self.url = url
        self.cluster = cluster

    def execute(self, statement: str) -> list[tuple[Any, ...]]:
        """Runs one statement as the server's administrator, outside of any transaction."""
        address = self.url.set(drivername="postgresql").render_as_string(hide_password=False)
        with psycopg.connect(address, autocommit=True) as connection:
            cursor = connection.execute(statement.encode())
            return cursor.fetchall() if cursor.description is not None else []

    def create(self, *, template: str | None = None, tablespace: str | None = None) -> str:
        """A new database; returns its URL."""
        name = f"softcue_test_{secrets.token_hex(6)}"
        clauses = f" TEMPLATE {template}" if template else ""
        clauses += f" TABLESPACE {tablespace}" if tablespace else ""
        self.execute(f"CREATE DATABASE {name}{clauses}")
        return self.url.set(database=name).render_as_string(hide_password=False)

    def drop(self, url: str) -> None:
        """Drops a database that `create` made, whoever is still connected."""
        self.execute(f"DROP DATABASE {make_url(url).database} WITH (FORCE)")


class Cluster:
    """A cluster in a folder of its own, reached by a socket in that folder alone.

    The server refuses to run as root, so there it runs as another user, to whom the folder belongs.
    """

    def __init__(self, binaries: Path, *, durable: bool = False) -> None:
        self._binaries = binaries
        self.folder = Path(tempfile.mkdtemp(prefix="softcue-postgresql-"))
        self._user: dict[str, Any] = {}
        if os.getuid() == 0:
            self._user = {"user": "postgres", "group": "postgres", "extra_groups": []}
            shutil.chown(self.folder, "postgres", "postgres")
        self.url = URL.create(
            "postgresql+psycopg", username="softcue", database="postgres", query={"host": str(self.folder)}
        )
        try:
            self._run("initdb", "-D", self._data, "-U", "softcue", "-A", "trust", "-E", "UTF8", "--no-locale", "-N")
            settings = ["listen_addresses = ''", f"unix_socket_directories = '{self.folder}'", "max_connections = 200"]
            if not durable:
                settings += ["fsync = off", "full_page_writes = off"]
            with open(self.folder / "data" / "postgresql.conf", "a") as configuration:
                configuration.write("\n".join(settings) + "\n")
            self.start()
        except BaseException:
            shutil.rmtree(self.folder)
            raise

    @property
    def _data(self) -> str:
        return str(self.folder / "data")

    def start(self) -> None:
        log = str(self.folder / "log")
        self._run("pg_ctl", "start", "-D", self._data, "-w", "-t", str(_START_TIMEOUT_S), "-l", log)

    def stop(self, *, mode: str = "fast") -> None:
        """`immediate` ends it as a crash would."""
        self._run("pg_ctl", "stop", "-D", self._data, "-w", "-m", mode)

    def remove(self) -> None:
        try:
            if (self.folder / "data" / "postmaster.pid").exists():
                self.stop(mode="immediate")
        finally:
            shutil.rmtree(self.folder)

    def _run(self, program: str, *arguments: str) -> None:
        with open(self.folder / "output", "ab") as output:
            # No pipe: the server would keep it open.
            done = subprocess.run(
                [self._binaries / program, *arguments],
                **self._user,
                cwd=self.folder,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
            )
        if done.returncode:
            raise RuntimeError(f"{program} failed: {(self.folder / 'output').read_text()[-2000:]}")


def binaries() -> Path | None:
    """The folder of the installed server's programs, None where there is none."""
    tool = shutil.which("pg_config")
    found = [Path(subprocess.run([tool, "--bindir"], capture_output=True, text=True).stdout.strip())] if tool else []
    # Debian installs servers beside each other, without pg_config.
    found += sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True)
    return next((folder for folder in found if (folder / "initdb").exists()), None)


@contextmanager
def running_server(*, own: bool = False, durable: bool = False) -> Iterator[Server]:
    """The server for a run of tests; `own` asks for a cluster that may be stopped and broken.

    A `durable` cluster is one of its own that brings every commit to the disk.
    """
    given = os.environ.get(GIVEN)
    if given and not own and not durable:
        yield Server(make_url(given))
        return
    folder = binaries()
    if folder is None:
        message = f"PostgreSQL's server is not installed and {GIVEN} is not set: this test needs either"
        if os.environ.get("SOFTCUE_NO_SKIPS"):
            pytest.fail(message)
        pytest.skip(message)
    cluster = Cluster(folder, durable=durable)
    try:
        yield Server(cluster.url, cluster)
    finally:
        cluster.remove()
