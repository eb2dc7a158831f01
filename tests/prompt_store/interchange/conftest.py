from collections.abc import Iterator
from pathlib import Path

import pytest

from prompt_store.database import Database
from prompt_store.interchange.sharing import Directory
from prompt_store.prompts.registry import Registry


@pytest.fixture
def place(tmp_path: Path) -> Directory:
    return Directory(tmp_path / "shared")


@pytest.fixture
def other(tmp_path: Path) -> Iterator[Registry]:
    """A store that knows nothing yet."""
    with Database.open(tmp_path / "other" / "softcue.db", create=True) as database:
        yield Registry(database)
