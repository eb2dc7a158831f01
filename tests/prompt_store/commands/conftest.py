from pathlib import Path

import pytest

from prompt_store.database import Database
from prompt_store.prompts.registry import Registry
from tests.prompt_store.building import ANNA, BASE, OTHER_BASE, TASK_TOML
from tests.prompt_store.commands.shell import Shell


def _filled(folder: Path, store: str) -> Shell:
    with Database.open(store) as database:
        for base in (BASE, OTHER_BASE):
            Registry(database).register_base(base, ANNA)
    shell = Shell(folder, store)
    (folder / "task.toml").write_text(TASK_TOML)
    shell.run("apply-task", str(folder / "task.toml"))
    return shell


@pytest.fixture
def shell(tmp_path: Path) -> Shell:
    """A SQLite store that knows two bases and one task."""
    return _filled(tmp_path, str(tmp_path / "softcue.db"))


@pytest.fixture
def shell_on_either(tmp_path: Path, location: str) -> Shell:
    """The same on SQLite, and in another run of the same test on PostgreSQL."""
    return _filled(tmp_path, location)
