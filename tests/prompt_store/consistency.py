"""What must hold of a store whatever happened to those who wrote it."""

from itertools import pairwise

from sqlalchemy import func, select

from prompt_store.database import Database
from prompt_store.prompts.registry import Registry
from prompt_store.tables import alias_moves, audit, tensors, version_tensors, versions


def assert_consistent(location: str) -> None:
    """Numbers dense, every tensor whole and named by a version, history in step with aliases, no gap in the log."""
    with Database.open(location, create=False) as database:
        registry = Registry(database)
        snapshot = registry.snapshot()
        sequences = list(range(1, snapshot.sequence + 1))
        assert [change.sequence for change in registry.changes_since(0)] == sequences
        found = [digest for task in snapshot.tasks.values() for digest in task.versions]
        for name, task in snapshot.tasks.items():
            assert list(task.numbers) == list(range(1, len(task.numbers) + 1))
            for alias, target in task.aliases.items():
                history = registry.alias_history(name, alias)
                assert history[0].previous is None
                assert all(later.previous == earlier.target for earlier, later in pairwise(history))
                assert history[-1].target == target
        for digest in found:
            registry.soft_prompt(digest)
        with database.read() as connection:
            assert connection.execute(select(audit.c.sequence).order_by(audit.c.sequence)).scalars().all() == sequences
            in_log = select(audit.c.sequence).where(audit.c.action == "alias.move").order_by(audit.c.sequence)
            in_history = select(alias_moves.c.sequence).order_by(alias_moves.c.sequence)
            assert connection.execute(in_log).all() == connection.execute(in_history).all()
            named = set(connection.execute(select(version_tensors.c.tensor)).scalars())
            assert set(connection.execute(select(tensors.c.digest)).scalars()) == named
            assert connection.execute(select(func.count()).select_from(versions)).scalar_one() == len(found)
            if database.storage.kind == "sqlite":
                assert connection.exec_driver_sql("PRAGMA integrity_check").all() == [("ok",)]
                assert connection.exec_driver_sql("PRAGMA foreign_key_check").all() == []
