import multiprocessing
import shutil
from collections.abc import Callable, Iterator
from multiprocessing.context import ForkServerContext
from pathlib import Path

import pytest

from prompt_store.database import Database
from prompt_store.migrating import MIGRATIONS, newest_revision
from prompt_store.prompts.registry import Registry
from tests.prompt_store.building import ANNA, BASE, task

STEP = """
import os
import signal

import sqlalchemy as sa
from alembic import op

revision = "9999"
down_revision = "{newest}"


def upgrade() -> None:
    op.create_table("extra", sa.Column("name", sa.Text(), nullable=False))
    op.execute("UPDATE tasks SET last_version = last_version + 1000")
    with op.batch_alter_table("tasks") as tasks:
        tasks.add_column(sa.Column("colour", sa.Text(), nullable=True))
    {ending}
"""


@pytest.fixture(scope="session")
def children() -> ForkServerContext:
    """Starts processes in milliseconds, from one that has imported the store and opened nothing."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.prompt_store.processes"])
    return context


@pytest.fixture
def database(location: str) -> Iterator[Database]:
    """Each test that takes it runs twice: on SQLite and on PostgreSQL."""
    with Database.open(location) as opened:
        yield opened


@pytest.fixture
def sqlite_database(tmp_path: Path) -> Iterator[Database]:
    """For what SQLite alone has."""
    with Database.open(tmp_path / "store" / "softcue.db") as opened:
        yield opened


@pytest.fixture
def postgresql_database(postgresql_location: str) -> Iterator[Database]:
    """For what PostgreSQL alone has."""
    with Database.open(postgresql_location) as opened:
        yield opened


@pytest.fixture
def empty_registry(database: Database) -> Registry:
    return Registry(database)


@pytest.fixture
def registry(empty_registry: Registry) -> Registry:
    """Knows one base and one task, and has no version yet."""
    empty_registry.register_base(BASE, ANNA)
    empty_registry.apply_task(task(), ANNA)
    return empty_registry


@pytest.fixture
def with_step(tmp_path: Path) -> Callable[[str], Path]:
    """A copy of the migrations with one more step, which ends as given."""

    def make(ending: str) -> Path:
        copy = tmp_path / "migrations"
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(MIGRATIONS, copy, ignore=shutil.ignore_patterns("__pycache__"))
        (copy / "versions" / "r9999_extra.py").write_text(STEP.format(newest=newest_revision(), ending=ending))
        return copy

    return make
