"""What every test may use: the shipped demo base, and soft prompts that fit it."""

from __future__ import annotations

import os

# Before torch is imported, here and in child processes: OpenMP threads spin where tests and their servers share cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from sqlalchemy import make_url

from prompt_store.database import Database
from prompt_store.prompts.soft_prompt import SoftPrompt
from service.engines.base_model import BaseModel, open_base_model
from tests.postgresql import Server, running_server

ROOT = Path(__file__).parent.parent
BASE_FOLDER = ROOT / "examples" / "base"


@pytest.fixture(autouse=True, scope="session")
def _private_cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Fingerprints are cached in a folder of this run's own, child processes included."""
    os.environ["XDG_CACHE_HOME"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="session")
def base(_private_cache: None) -> BaseModel:
    return open_base_model(BASE_FOLDER, name="demo-base")


def shared_file(*parts: str) -> Path:
    """A file that lies beside the repository. Without it the test is skipped; CI turns that into a failure."""
    file = ROOT.parent.joinpath("shared", *parts)
    if not file.exists():
        message = f"../shared/{'/'.join(parts)} is missing: this test needs it"
        if os.environ.get("SOFTCUE_NO_SKIPS"):
            pytest.fail(message)
        pytest.skip(message)
    return file


def random_prompt(seed: int, length: int, hidden_size: int = 192, scale: float = 0.3) -> SoftPrompt:
    """A soft prompt [length, hidden_size] of normal numbers, large enough to change what the demo base says."""
    values = np.random.default_rng(seed).normal(0.0, scale, (length, hidden_size)).astype(np.float32)
    return SoftPrompt("F32", values.shape, values.tobytes())


@pytest.fixture(scope="session")
def postgresql() -> Iterator[Server]:
    """A PostgreSQL server for the whole run."""
    with running_server() as server:
        yield server


@pytest.fixture(scope="module")
def own_postgresql() -> Iterator[Server]:
    """A PostgreSQL server that tests may stop and break, if they start and mend it again."""
    with running_server(own=True) as server:
        yield server


@pytest.fixture(scope="session")
def postgresql_template(postgresql: Server) -> Iterator[str]:
    """The name of a database that holds an empty store, from which others are copied in a moment."""
    url = postgresql.create()
    Database.open(url).close()
    yield str(make_url(url).database)
    postgresql.drop(url)


@pytest.fixture
def postgresql_location(postgresql: Server, postgresql_template: str) -> Iterator[str]:
    """The URL of a PostgreSQL database that holds an empty store."""
    url = postgresql.create(template=postgresql_template)
    yield url
    postgresql.drop(url)


@pytest.fixture
def empty_postgresql(postgresql: Server) -> Iterator[str]:
    """The URL of a PostgreSQL database in which nothing is."""
    url = postgresql.create()
    yield url
    postgresql.drop(url)


@pytest.fixture(params=["sqlite", "postgresql"])
def location(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """Where a store lies: a file to come, and in another run of the same test a PostgreSQL database."""
    if request.param == "sqlite":
        return str(tmp_path / "store" / "softcue.db")
    return str(request.getfixturevalue("postgresql_location"))
