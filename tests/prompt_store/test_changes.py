import threading
import time
from contextlib import closing
from multiprocessing.context import ForkServerContext

import pytest
from sqlalchemy import text

from prompt_store.changes import ChangeWatcher, record
from prompt_store.database import Database
from prompt_store.errors import StoreUnavailable
from prompt_store.prompts.registry import Registry
from prompt_store.routing.registry import utc_now
from tests.prompt_store import processes
from tests.prompt_store.building import ANNA, BASE, publish, task
from tests.prompt_store.processes import finished


def test_the_log_names_every_write_in_order(empty_registry: Registry) -> None:
    empty_registry.register_base(BASE, ANNA)
    revision = empty_registry.apply_task(task(), ANNA)
    version = publish(empty_registry, alias="production").version
    changes = empty_registry.changes_since(0)
    assert [(change.sequence, change.kind, change.task, change.subject) for change in changes] == [
        (1, "base", None, BASE.fingerprint),
        (2, "task", "support_intents", revision.digest),
        (3, "version", "support_intents", version.digest),
        (4, "alias", "support_intents", "production"),
    ]
    assert {change.principal for change in changes} == {"anna"}
    assert empty_registry.changes_since(3) == changes[3:]
    assert empty_registry.changes_since(4) == []


def test_every_change_has_an_audit_entry(registry: Registry) -> None:
    publish(registry, alias="production")
    with registry.database.read() as connection:
        rows = connection.exec_driver_sql("SELECT sequence, action, reason FROM audit ORDER BY sequence").all()
    assert [tuple(row) for row in rows] == [
        (1, "base.register", ""),
        (2, "task.apply", ""),
        (3, "version.publish", "because"),
        (4, "alias.move", "because"),
    ]


# How long a publish may take to reach a running service.
LISTENERS = "FROM pg_stat_activity WHERE datname = current_database() AND query LIKE 'LISTEN%'"


def test_a_watcher_sees_what_another_store_handle_wrote_once(registry: Registry) -> None:
    with closing(registry.watch()) as watcher:
        assert watcher.sequence == 2
        assert not watcher.poll()
        with Database.open(registry.database.location) as other:
            publish(Registry(other))
        assert watcher.wait(10.0)
        assert watcher.sequence == 3
        assert not watcher.poll()


def test_a_watcher_sees_what_its_own_store_handle_wrote(registry: Registry) -> None:
    with closing(registry.watch()) as watcher:
        publish(registry)
        assert watcher.wait(10.0)


def test_a_write_that_is_no_change_wakes_nobody(registry: Registry) -> None:
    with closing(registry.watch()) as watcher:
        registry.database.signing_key()
        assert not watcher.poll()


def test_each_watcher_has_its_own_memory(registry: Registry) -> None:
    with closing(registry.watch()) as one, closing(registry.watch()) as other:
        publish(registry)
        assert one.wait(10.0)
        assert other.wait(10.0)


def test_a_commit_of_another_process_ends_a_wait_within_a_moment(
    registry: Registry, children: ForkServerContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    # So that PostgreSQL's notifications alone can be in time.
    monkeypatch.setattr("prompt_store.postgresql.FALLBACK_POLL_S", 60.0)
    database = registry.database
    asked, ask = children.Pipe(duplex=False)
    told, tell = children.Pipe(duplex=False)
    publisher = children.Process(target=processes.publish_when_asked, args=(database.location, asked, tell))
    publisher.start()
    with closing(ChangeWatcher(database, poll_s=0.02)) as watcher:
        for seed in range(20):
            ask.send(seed)
            until_s = time.monotonic() + 20
            while not watcher.wait(10.0):
                assert time.monotonic() < until_s
            told.recv()
            assert watcher.sequence == 3 + seed
    ask.send(None)
    finished([publisher])


def test_closing_a_watcher_ends_a_wait_in_another_thread(database: Database) -> None:
    watcher = ChangeWatcher(database, poll_s=60.0)
    answers: list[bool] = []
    thread = threading.Thread(target=lambda: answers.append(watcher.wait(60.0)))
    thread.start()
    watcher.close()
    thread.join(5.0)
    assert answers == [False]
    assert not watcher.poll()


def test_a_watcher_whose_connection_was_cut_says_so_and_catches_up(
    postgresql_database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("prompt_store.postgresql.FALLBACK_POLL_S", 60.0)
    registry = Registry(postgresql_database)
    with closing(registry.watch()) as watcher:
        with postgresql_database.read() as connection:
            assert connection.execute(text(f"SELECT pg_terminate_backend(pid, 5000) {LISTENERS}")).all() == [(True,)]
        registry.register_base(BASE, ANNA)
        with pytest.raises(StoreUnavailable, match=r"closed the connection|terminating connection"):
            watcher.wait(5.0)
        assert watcher.wait(5.0)
        assert watcher.sequence == 1
        registry.apply_task(task(), ANNA)
        assert watcher.wait(5.0)
        assert watcher.sequence == 2
    with postgresql_database.read() as connection:
        assert connection.execute(text(f"SELECT count(*) {LISTENERS}")).scalar_one() == 0


def test_a_commit_that_nothing_told_of_is_found_by_polling(
    postgresql_database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("prompt_store.postgresql.FALLBACK_POLL_S", 0.2)
    with closing(ChangeWatcher(postgresql_database)) as watcher:
        # As through a pooler that lends connections by transaction: the change arrives, its notification does not.
        with postgresql_database.storage.engine.begin() as connection:
            record(connection, "task", action="task.apply", task="t", subject="s", principal=ANNA, at=utc_now())
        assert watcher.wait(5.0)
        assert watcher.sequence == 1
