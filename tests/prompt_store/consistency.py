"""What must hold of a store whatever happened to those who wrote it."""

from sqlalchemy import select

from prompt_store.database import Database
from prompt_store.prompts.registry import Registry
from prompt_store.tables import tensors, version_tensors
from prompt_store.upkeep.verifying import Checked, verify


def assert_consistent(location: str) -> None:
    """Nothing damaged, missing or contradictory, no stray tensor, and no number left out."""
    with Database.open(location, create=False) as database:
        checked = Checked()
        assert [str(problem) for problem in verify(database, checked)] == []
        registry = Registry(database)
        snapshot = registry.snapshot()
        assert checked.versions == sum(len(task.versions) for task in snapshot.tasks.values())
        for task in snapshot.tasks.values():
            assert list(task.numbers) == list(range(1, len(task.numbers) + 1))
        with database.read() as connection:
            named = set(connection.execute(select(version_tensors.c.tensor)).scalars())
            assert set(connection.execute(select(tensors.c.digest)).scalars()) == named
