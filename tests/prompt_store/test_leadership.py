"""Who leads: one at a time, whatever becomes of processes, connections and servers."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from multiprocessing.context import ForkServerContext
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest

from prompt_store.database import Database
from prompt_store.errors import StoreUnavailable
from prompt_store.leadership import Leadership
from tests.postgresql import Server
from tests.processes import eventually
from tests.prompt_store import processes

LOCKS = "FROM pg_locks WHERE locktype = 'advisory' AND granted"


class Candidate:
    """Another process that leads where it may."""

    def __init__(self, process: BaseProcess, ask: Callable[[], bool]) -> None:
        self.process = process
        self.leads = ask


@pytest.fixture
def candidate(location: str, children: ForkServerContext) -> Iterator[Callable[[], Candidate]]:
    @contextmanager
    def running() -> Iterator[Candidate]:
        asked, ask = children.Pipe(duplex=False)
        told, tell = children.Pipe(duplex=False)
        process = children.Process(target=processes.lead_when_asked, args=(location, asked, tell))
        process.start()

        def leads() -> bool:
            ask.send(True)
            assert told.poll(60)
            return bool(told.recv())

        try:
            yield Candidate(process, leads)
            if process.is_alive():
                ask.send(None)
                processes.finished([process])
        finally:
            process.kill()
            process.join()

    Database.open(location).close()
    with ExitStack() as stack:
        yield lambda: stack.enter_context(running())


def test_of_two_processes_exactly_one_leads_and_goes_on_to(candidate: Callable[[], Candidate]) -> None:
    first, second = candidate(), candidate()
    assert [first.leads(), second.leads()] == [True, False]
    assert [second.leads(), first.leads()] == [False, True]


def test_a_leader_that_is_killed_is_followed_by_another(candidate: Callable[[], Candidate]) -> None:
    first, second = candidate(), candidate()
    assert [first.leads(), second.leads()] == [True, False]
    first.process.kill()
    first.process.join()
    assert eventually(second.leads, bool)


def test_a_leader_that_gives_up_is_followed_at_once_and_leads_no_more(database: Database) -> None:
    with Leadership(database, "decisions") as first, Leadership(database, "decisions") as second:
        assert [first.held(), second.held()] == [True, False]
        first.close()
        first.close()
        assert eventually(second.held, bool)
        assert not first.held()


def test_roles_of_other_names_and_other_stores_are_led_apart(
    sqlite_database: Database, postgresql_database: Database
) -> None:
    stores = (sqlite_database, postgresql_database)
    with ExitStack() as stack:
        roles = [Leadership(store, name) for store in stores for name in ("decisions", "upkeep")]
        for role in roles:
            stack.enter_context(role)
        assert [role.held() for role in roles] == [True] * 4


def test_a_leader_does_not_lose_its_role_to_what_else_it_does(database: Database) -> None:
    with Leadership(database, "decisions") as leader, Leadership(database, "decisions") as other:
        assert leader.held()
        with database.write():
            assert leader.held()
            assert not other.held()
        with Database.open(database.location):
            assert leader.held()
        assert not other.held()


def test_a_leader_whose_connection_is_cut_asks_anew_and_never_leads_beside_another(
    postgresql_database: Database, postgresql: Server
) -> None:
    with (
        Leadership(postgresql_database, "decisions") as first,
        Leadership(postgresql_database, "decisions") as second,
    ):
        assert first.held()
        holders = f"{LOCKS} AND database = (SELECT oid FROM pg_database WHERE datname = '{_name(postgresql_database)}')"
        assert postgresql.execute(f"SELECT pg_terminate_backend(pid, 5000) {holders}") == [(True,)]
        assert second.held()
        with pytest.raises(StoreUnavailable, match="cannot be used now: "):
            first.held()
        assert [first.held(), second.held()] == [False, True]


def test_a_server_that_restarts_has_one_leader_again(own_postgresql: Server) -> None:
    url = own_postgresql.create()
    cluster = own_postgresql.cluster
    assert cluster is not None
    with Database.open(url) as database:
        leaders = [Leadership(database, "decisions") for _ in range(2)]
        assert [each.held() for each in leaders] == [True, False]
        cluster.stop(mode="immediate")
        try:
            for each in leaders:
                with pytest.raises(StoreUnavailable, match="cannot be used now: "):
                    each.held()
                assert not database.healthy
        finally:
            cluster.start()
        assert [each.held() for each in reversed(leaders)] == [True, False]
        assert database.healthy
        for each in leaders:
            each.close()
    own_postgresql.drop(url)


def test_a_leader_that_stays_silent_is_dismissed_by_the_server(
    postgresql_database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("prompt_store.postgresql.LEADER_TIMEOUT_S", 0.05)
    with (
        Leadership(postgresql_database, "decisions") as silent,
        Leadership(postgresql_database, "decisions") as other,
    ):
        assert silent.held()
        assert eventually(other.held, bool)


def test_candidates_that_do_not_lead_hold_no_connection(postgresql_database: Database, postgresql: Server) -> None:
    connections = f"SELECT count(*) FROM pg_stat_activity WHERE datname = '{_name(postgresql_database)}'"
    with Leadership(postgresql_database, "decisions") as leader:
        assert leader.held()
        ((before,),) = postgresql.execute(connections)
        with closing(Leadership(postgresql_database, "decisions")) as other:
            assert not other.held()
            assert eventually(lambda: postgresql.execute(connections), lambda rows: rows == [(before,)])


def test_a_folder_that_takes_no_lock_is_said_with_its_remedy(sqlite_database: Database) -> None:
    location = Path(sqlite_database.location)
    location.with_name(f"{location.name}.decisions.lock").mkdir()
    with Leadership(sqlite_database, "decisions") as leader, pytest.raises(StoreUnavailable, match="check its and its"):
        leader.held()


def _name(database: Database) -> str:
    return str(database.storage.engine.url.database)
