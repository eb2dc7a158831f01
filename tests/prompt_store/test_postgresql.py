"""What PostgreSQL alone has: URLs and passwords, rights, sessions."""

import sys
import traceback
from datetime import UTC

import pytest
from sqlalchemy import make_url

from prompt_store.database import Database
from prompt_store.errors import StoreError, StoreUnavailable
from prompt_store.prompts.registry import Registry
from tests.postgresql import Server
from tests.prompt_store.building import ANNA, BASE, publish, task


def with_options(location: str, options: str) -> str:
    return make_url(location).update_query_dict({"options": options}).render_as_string(hide_password=False)


def test_an_empty_database_is_not_made_a_store_for_reading(empty_postgresql: str) -> None:
    with pytest.raises(StoreUnavailable, match="there is no store at postgresql"):
        Database.open(empty_postgresql, create=False)
    with Database.open(empty_postgresql) as database:
        Registry(database).register_base(BASE, ANNA)
    with Database.open(empty_postgresql, create=False) as database:
        assert Registry(database).bases() == [BASE]


@pytest.mark.parametrize("scheme", ["postgres", "postgresql", "postgresql+psycopg", "postgresql+psycopg2"])
def test_every_common_spelling_of_the_scheme_is_understood(postgresql_location: str, scheme: str) -> None:
    url = postgresql_location.replace("postgresql+psycopg", scheme)
    with Database.open(url, create=False) as database:
        assert database.location == postgresql_location


@pytest.mark.parametrize(
    ("url", "reason"),
    [
        ("postgresql+psycopg://anna:hush@127.0.0.1:1/softcue", "check that the server runs"),
        ("postgresql://anna@127.0.0.1:1/softcue?password=hush", "check that the server runs"),
        ("postgresql://anna:hush@127.0.0.1:port/softcue", "cannot be read; use a file path"),
        ("postgresql://anna:hush@127.0.0.1:1/softcue?colour=red", "take it out of the URL"),
        ("postgresql+asyncpg://anna:hush@127.0.0.1:1/softcue", r"write postgresql\+psycopg://"),
        ("postgres ql://anna:hush@127.0.0.1:1/softcue", "cannot be read; use a file path"),
    ],
)
def test_a_url_that_does_not_work_is_refused_without_showing_the_password(url: str, reason: str) -> None:
    with pytest.raises(StoreError, match=reason) as caught:
        Database.open(url)
    assert "hush" not in "".join(traceback.format_exception(caught.value))


def test_a_database_that_is_not_there_is_said(postgresql: Server) -> None:
    url = postgresql.url.set(database="softcue_absent").render_as_string(hide_password=False)
    with pytest.raises(StoreUnavailable, match=r'"softcue_absent" does not exist; create the database'):
        Database.open(url)


def test_a_missing_driver_is_named_with_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "psycopg", None)
    with pytest.raises(StoreError, match=r"needs the driver psycopg .* pip install 'softcue\[postgres\]'"):
        Database.open("postgresql://db/softcue")


def test_somebody_elses_database_is_refused(empty_postgresql: str) -> None:
    with Database.open(empty_postgresql) as database, database.write() as connection:
        connection.exec_driver_sql("DROP TABLE alembic_version")
    with pytest.raises(StoreError, match="is a database of something else"):
        Database.open(empty_postgresql)


def test_a_user_without_rights_is_told_what_to_grant(postgresql: Server, empty_postgresql: str) -> None:
    name = str(make_url(empty_postgresql).database)
    postgresql.execute(f"CREATE ROLE {name} LOGIN PASSWORD 'hush'")
    try:
        with Database.open(empty_postgresql) as database, database.write() as connection:
            connection.exec_driver_sql(f"GRANT SELECT ON ALL TABLES IN SCHEMA public TO {name}")
        url = make_url(empty_postgresql).set(username=name, password="hush").render_as_string(hide_password=False)
        with Database.open(url) as database:
            assert Registry(database).bases() == []
            with pytest.raises(StoreUnavailable, match=r"permission denied .* grant the user the right") as caught:
                Registry(database).register_base(BASE, ANNA)
        assert "hush" not in "".join(traceback.format_exception(caught.value))
    finally:
        with Database.open(empty_postgresql) as database, database.write() as connection:
            connection.exec_driver_sql(f"DROP OWNED BY {name}")
        postgresql.execute(f"DROP ROLE {name}")


def test_a_database_that_takes_no_writes_can_be_read_and_followed(postgresql_location: str) -> None:
    with (
        Database.open(postgresql_location) as primary,
        Database.open(with_options(postgresql_location, "-c default_transaction_read_only=on")) as standby,
    ):
        watcher = Registry(standby).watch()
        Registry(primary).register_base(BASE, ANNA)
        assert watcher.wait(10.0)
        watcher.close()
        assert Registry(standby).bases() == [BASE]
        with pytest.raises(StoreUnavailable, match="it is read-only, maybe a standby"):
            Registry(standby).apply_task(task(), ANNA)
        assert not standby.healthy


def test_times_are_in_utc_whatever_the_session_thinks(postgresql_location: str) -> None:
    with Database.open(with_options(postgresql_location, "-c timezone=Asia/Kolkata")) as database:
        registry = Registry(database)
        registry.register_base(BASE, ANNA)
        registry.apply_task(task(), ANNA)
        assert publish(registry).version.created_at.tzinfo is UTC


def test_a_read_cannot_write(postgresql_database: Database) -> None:
    registry = Registry(postgresql_database)
    with pytest.raises(StoreUnavailable, match="read-only"), postgresql_database.read() as connection:
        connection.exec_driver_sql("DELETE FROM bases")
    assert registry.bases() == []


def test_a_silent_server_is_given_up_unless_the_url_says_otherwise(postgresql_location: str) -> None:
    named = make_url(postgresql_location).update_query_dict({"tcp_user_timeout": "5000"})
    for url, expected in ((postgresql_location, "30000"), (named.render_as_string(hide_password=False), "5000")):
        with Database.open(url) as database, database.read() as connection:
            assert connection.connection.driver_connection.info.get_parameters()["tcp_user_timeout"] == expected
