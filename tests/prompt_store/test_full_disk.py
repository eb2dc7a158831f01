"""A disk that is really full: the publish is refused with the remedy, the store stays whole, and goes on afterwards."""

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from prompt_store.database import Database
from prompt_store.errors import StoreUnavailable
from prompt_store.prompts.registry import Registry
from tests.postgresql import Server
from tests.prompt_store.building import ANNA, BASE, prompt, publish, task
from tests.prompt_store.consistency import assert_consistent
from tests.prompt_store.mounting import fill, small_disk


@dataclass(frozen=True)
class Small:
    """A store on a small disk, and a file there that takes what is left when it is filled."""

    location: str
    filler: Path


@pytest.fixture(params=["sqlite", "postgresql"])
def small(request: pytest.FixtureRequest) -> Iterator[Small]:
    if request.param == "sqlite":
        with small_disk(2) as disk:
            yield Small(str(disk / "softcue.db"), disk / "filler")
        return
    server: Server = request.getfixturevalue("own_postgresql")
    # An empty database takes seven of these.
    with small_disk(20, owner="postgres" if os.getuid() == 0 else None) as disk:
        server.execute(f"CREATE TABLESPACE small LOCATION '{disk}'")
        try:
            url = server.create(tablespace="small")
            yield Small(url, disk / "filler")
            server.drop(url)
        finally:
            server.execute("DROP TABLESPACE small")


def publish_until_refused(registry: Registry) -> tuple[int, StoreUnavailable]:
    """How many were published before."""
    for seed in range(1000):
        try:
            publish(registry, seed=1000 + seed, alias="candidate", notes="x" * 5000, payload_content=prompt(seed, 60))
        except StoreUnavailable as refusal:
            return seed, refusal
    raise AssertionError("the disk never was full")


def test_a_full_disk_refuses_a_publish_and_loses_nothing(small: Small) -> None:
    with Database.open(small.location) as database:
        registry = Registry(database)
        registry.register_base(BASE, ANNA)
        registry.apply_task(task(), ANNA)
        publish(registry, seed=1, alias="production")
        fill(small.filler)
        published, refusal = publish_until_refused(registry)
        assert "free disk space" in str(refusal)
        assert "try again" in str(refusal)
        assert not database.healthy
        # Reading goes on, of what was there.
        assert len(registry.versions("support_intents")) == 1 + published
        assert registry.soft_prompt(registry.version("support_intents", "production").digest) == prompt(1)
        assert database.healthy
        small.filler.unlink()
        assert publish(registry, seed=2, alias="candidate").version.number == 2 + published
    assert_consistent(small.location)


def test_a_full_disk_under_the_copy_leaves_the_store_as_it_was(
    registry: Registry, with_step: Callable[[str], Path]
) -> None:
    for seed in range(200):
        publish(registry, seed=seed, notes="x" * 5000)
    with small_disk(1) as disk:
        with pytest.raises(StoreUnavailable, match=r"cannot take the copy \(.*full\); free space there"):
            Database.open(registry.database.location, migrations=with_step("pass"), backups=disk / "backups")
        assert list((disk / "backups").iterdir()) == []
    assert_consistent(registry.database.location)


def test_a_file_that_may_not_grow_is_as_good_as_a_full_disk(sqlite_database: Database) -> None:
    # Where nothing can be mounted this is what is left of the tests above.
    registry = Registry(sqlite_database)
    registry.register_base(BASE, ANNA)
    registry.apply_task(task(), ANNA)
    publish(registry, seed=1)
    with sqlite_database.write() as connection:
        pages = connection.exec_driver_sql("PRAGMA page_count").scalar_one()
        connection.exec_driver_sql(f"PRAGMA max_page_count = {pages}")
    published, refusal = publish_until_refused(registry)
    assert "free disk space" in str(refusal)
    with sqlite_database.read() as connection:
        connection.exec_driver_sql("PRAGMA max_page_count = 1000000")
    assert publish(registry, seed=2).version.number == 2 + published
    assert_consistent(sqlite_database.location)
