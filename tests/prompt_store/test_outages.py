"""A server that stops and comes back under an open store, and a writer that hangs."""

from collections.abc import Callable, Iterator
from contextlib import closing
from multiprocessing.context import ForkServerContext

import pytest
from sqlalchemy import update

from prompt_store.changes import ChangeWatcher
from prompt_store.database import Database
from prompt_store.errors import StoreUnavailable
from prompt_store.prompts.registry import Registry
from prompt_store.tables import tasks
from tests.postgresql import Server
from tests.prompt_store import processes
from tests.prompt_store.building import ANNA, BASE, prompt, publish, task
from tests.prompt_store.consistency import assert_consistent
from tests.prompt_store.processes import finished


@pytest.fixture
def registry_there(own_postgresql: Server) -> Iterator[Registry]:
    url = own_postgresql.create()
    with Database.open(url) as database:
        registry = Registry(database)
        registry.register_base(BASE, ANNA)
        registry.apply_task(task(), ANNA)
        yield registry
    own_postgresql.drop(url)


def write_twice(database: Database, meanwhile: Callable[[], None]) -> None:
    """One transaction of two statements, with something between them."""
    with database.write() as connection:
        connection.execute(update(tasks).values(last_version=tasks.c.last_version + 1000))
        meanwhile()
        connection.execute(update(tasks).values(last_version=tasks.c.last_version + 1000))


@pytest.mark.parametrize("mode", ["fast", "immediate"])
def test_a_server_that_stops_and_starts_is_used_again_and_nothing_is_lost(
    own_postgresql: Server, registry_there: Registry, mode: str
) -> None:
    registry = registry_there
    database = registry.database
    cluster = own_postgresql.cluster
    assert cluster is not None
    first = publish(registry, seed=1, alias="production").version
    with closing(ChangeWatcher(database)) as watcher:
        cluster.stop(mode=mode)
        try:
            for _ in range(2):
                with pytest.raises(StoreUnavailable, match="cannot be used now: "):
                    registry.version("support_intents", "production")
                assert not database.healthy
                with pytest.raises(StoreUnavailable, match="cannot be used now: "):
                    publish(registry, seed=2)
                with pytest.raises(StoreUnavailable, match="cannot be used now: "):
                    watcher.wait(1.0)
                with pytest.raises(StoreUnavailable, match="cannot be used now: "):
                    watcher.poll()
                assert not database.healthy
            with pytest.raises(StoreUnavailable, match="check that the server runs"):
                Database.open(database.location)
        finally:
            cluster.start()
        assert registry.version("support_intents", "production") == first
        assert database.healthy
        with Database.open(database.location) as other:
            second = publish(Registry(other), seed=2, alias="production").version
        assert watcher.wait(5.0)
        assert watcher.sequence == registry.snapshot().sequence
        assert registry.version("support_intents", "production") == second
        assert registry.soft_prompt(first.digest) == prompt(1)
        assert database.healthy
    assert_consistent(database.location)


def test_a_restart_that_nobody_saw_fails_nobody(own_postgresql: Server, registry_there: Registry) -> None:
    registry = registry_there
    cluster = own_postgresql.cluster
    assert cluster is not None
    publish(registry, seed=1, alias="production")
    cluster.stop(mode="fast")
    cluster.start()
    assert publish(registry, seed=2, alias="production").version.label == "v2"
    assert registry.version("support_intents", "production").label == "v2"


def test_a_server_that_crashes_within_a_publish_leaves_all_or_nothing(
    own_postgresql: Server, registry_there: Registry
) -> None:
    registry = registry_there
    cluster = own_postgresql.cluster
    assert cluster is not None
    publish(registry, seed=1, alias="production")

    def crash() -> None:
        assert cluster is not None
        cluster.stop(mode="immediate")
        cluster.start()

    with pytest.raises(StoreUnavailable, match="cannot be used now: "):
        write_twice(registry.database, crash)
    assert publish(registry, seed=2, alias="production").version.label == "v2"
    assert_consistent(registry.database.location)


def test_a_connection_cut_within_a_publish_leaves_nothing_of_it(
    registry_there: Registry, own_postgresql: Server
) -> None:
    registry = registry_there

    def cut() -> None:
        writers = "FROM pg_stat_activity WHERE state = 'idle in transaction'"
        assert own_postgresql.execute(f"SELECT pg_terminate_backend(pid, 5000) {writers}") == [(True,)]

    with pytest.raises(StoreUnavailable, match="cannot be used now: "):
        write_twice(registry.database, cut)
    assert publish(registry, seed=1).version.label == "v1"
    assert registry.database.healthy


@pytest.fixture
def hanging(registry: Registry, children: ForkServerContext) -> Iterator[Callable[[], None]]:
    """Another process is within a writing transaction; calling this lets it go on to its commit."""
    inside, go = children.Event(), children.Event()
    writer = children.Process(target=processes.hold_a_write, args=(registry.database.location, inside, go))
    writer.start()

    def go_on() -> None:
        go.set()
        finished([writer])

    try:
        assert inside.wait(60)
        yield go_on
    finally:
        writer.kill()
        writer.join()


def test_a_writer_that_hangs_is_waited_for_and_then_said(
    registry: Registry, hanging: Callable[[], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("prompt_store.sqlite.BUSY_TIMEOUT_S", 0.3)
    monkeypatch.setattr("prompt_store.postgresql.LOCK_TIMEOUT_S", 0.3)
    with Database.open(registry.database.location) as impatient:
        with pytest.raises(StoreUnavailable, match="another process holds it for long; try again"):
            publish(Registry(impatient), seed=1)
        assert not impatient.healthy
        # Readers do not wait.
        assert Registry(impatient).versions("support_intents") == []
        hanging()
        assert publish(Registry(impatient), seed=1).version.label == "v1001"


def test_a_writer_that_hangs_for_good_is_thrown_out(
    postgresql_database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    registry = Registry(postgresql_database)
    registry.register_base(BASE, ANNA)
    registry.apply_task(task(), ANNA)

    def publish_elsewhere() -> None:
        # Waits for the lock until the server has ended the transaction that holds it.
        monkeypatch.undo()
        with Database.open(postgresql_database.location) as other:
            assert publish(Registry(other)).version.label == "v1"

    # A transaction takes the limit along that it began with.
    monkeypatch.setattr("prompt_store.postgresql.IDLE_TIMEOUT_S", 1)
    with pytest.raises(StoreUnavailable, match="cannot be used now: "):
        write_twice(postgresql_database, publish_elsewhere)
    assert publish(registry, seed=2).version.label == "v2"
