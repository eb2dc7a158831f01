"""The previous release's code, as it was shipped, before, beside and after this release's migration.

It knew SQLite alone; what holds of schemas on PostgreSQL too is in test_migrating.py.
"""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import date
from pathlib import Path
from typing import Any

import pytest

from prompt_store.database import Database
from prompt_store.migrating import MIGRATIONS, newest_revision
from prompt_store.prompts.registry import NewVersion, Registry
from prompt_store.prompts.soft_prompt import SoftPrompt
from prompt_store.prompts.version import RemoteModelPayload
from prompt_store.routing.routes import DirectRoute, TaskRoute, parse_task_route
from prompt_store.upkeep.verifying import verify
from tests.conftest import ROOT
from tests.prompt_store.building import ANNA, BASE, LOCAL, OPENAI, calibration, prefix, prompt, publish, task
from tests.prompt_store.consistency import assert_consistent
from tests.prompt_store.test_migrating import revision_of

RELEASES = Path(__file__).parent / "releases"
COUNT = 25


@pytest.fixture(scope="module")
def previous(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder in which the previous release's `prompt_store` lies."""
    folder = tmp_path_factory.mktemp("previous")
    shutil.unpack_archive(RELEASES / "prompt_store-0.1.0.zip", folder)
    return folder


@pytest.fixture
def store(tmp_path: Path, previous: Path) -> Path:
    """A store that the previous release made."""
    path = tmp_path / "softcue.db"
    run(previous, "make", path)
    return path


@contextmanager
def running(code: Path, *arguments: object) -> Iterator[subprocess.Popen[str]]:
    """using_store.py with the `prompt_store` that lies in the folder `code`; ended if it does not end."""
    environment = {**os.environ, "PYTHONPATH": str(code), "PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, str(RELEASES / "using_store.py"), *map(str, arguments)]
    with subprocess.Popen(
        command, env=environment, cwd=code, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        try:
            yield process
        finally:
            if process.poll() is None:
                process.kill()


def output(process: subprocess.Popen[str]) -> str:
    out, errors = process.communicate(timeout=60)
    assert process.returncode == 0, errors
    return out


def run(code: Path, *arguments: object) -> str:
    with running(code, *arguments) as process:
        return output(process)


def told(code: Path, store: Path) -> Any:
    return json.loads(run(code, "tell", store))


def test_a_store_of_the_previous_release_is_migrated_in_place_and_reads_the_same(previous: Path, store: Path) -> None:
    assert revision_of(str(store)) == "0001"
    before = told(previous, store)
    assert len(before["versions"]) == 5
    assert told(ROOT, store) == before
    assert revision_of(str(store)) == newest_revision()
    (backup,) = store.parent.glob("softcue.db.schema-0001-*.backup")
    assert revision_of(str(backup)) == "0001"
    assert told(previous, backup) == before


def test_the_previous_release_goes_on_beside_the_migration_and_after_it(previous: Path, store: Path) -> None:
    with running(previous, "work", store, 1000, COUNT) as old:
        assert old.stdout is not None
        assert old.stdout.readline() == "open\n"
        # Its second publish at the latest falls into the migration or after it.
        first = old.stdout.readline().strip()
        with running(ROOT, "work", store, 2000, COUNT) as new:
            published = {first, *output(old).split()} | set(output(new).split())
    assert revision_of(str(store)) == newest_revision()
    published.discard("open")
    assert len(published) == 2 * COUNT
    before = told(ROOT, store)
    assert published <= set(before["versions"])
    assert len(before["versions"]) == 2 * COUNT + 5
    assert told(previous, store) == before
    assert sorted(row[0] for row in before["versions"].values()) == sorted(f"v{n}" for n in range(1, 2 * COUNT + 6))
    # Started after the migration, the previous release writes what this one reads.
    late = set(run(previous, "work", store, 3000, 3).split()) - {"open"}
    assert late <= set(told(ROOT, store)["versions"])
    assert revision_of(str(store)) == newest_revision()
    assert_consistent(str(store))


def test_the_previous_release_reads_and_goes_on_with_all_that_this_one_can_write(previous: Path, store: Path) -> None:
    with Database.open(store) as database:
        registry = Registry(database)
        registry.register_base(BASE, ANNA)
        registry.move_alias("support_intents", "candidate", "v2", reason="", principal=ANNA)
        registry.rollback_alias("support_intents", "candidate", reason="", principal=ANNA)
        registry.remove_alias("support_intents", "candidate", reason="", principal=ANNA)
        registry.rollback_alias("support_intents", "candidate", reason="", principal=ANNA)
        registry.move_alias("support_intents", "gone", "v1", reason="", principal=ANNA)
        registry.remove_alias("support_intents", "gone", reason="", principal=ANNA)
        publish(registry, payload_content=prefix(), alias="prefixed")
        publish(registry, payload_content=RemoteModelPayload(provider="openai", model="ft:gpt:acme::1"), alias="remote")
        half = SoftPrompt("BF16", (1, 16), b"\x80\x3f" * 16)
        publish(registry, payload_content=half, recipe={"seed": 1}, author="boris", report={"accuracy": 1})
        registry.publish(
            NewVersion("support_intents", prompt(50), BASE.fingerprint), None, "", ANNA, idempotency_key="once"
        )
        registry.delete_version("support_intents", "v9", reason="", principal=ANNA)
        registry.add_task_revision(task(description="beside"), ANNA)
        registry.register_backends([LOCAL, OPENAI], ANNA)
        registry.calibrate(calibration(registry.version("support_intents", "v1").digest, "margin"), ANNA)
        registry.note_shutdown("support_intents", "remote", date(2031, 1, 2), ANNA)
        registry.add_spending([(date(2030, 1, 2), "support_intents", "openai", 0.5)])
        registry.apply_route("support_intents", TaskRoute(route=DirectRoute(backend="local")), ANNA, reason="as before")
    before = told(ROOT, store)
    kinds = [row[8] for row in before["versions"].values()]
    assert {"prefix", "remote_model", "soft_prompt", "text", "ensemble"} == set(kinds)
    assert {"candidate", "prefixed", "production", "remote"} == set(before["aliases"])
    assert told(previous, store) == before
    late = set(run(previous, "work", store, 3000, 3).split()) - {"open"}
    after = told(ROOT, store)
    assert {after["versions"][digest][0] for digest in late} == {"v10", "v11", "v12"}
    assert told(previous, store) == after
    with Database.open(store, create=False) as database:
        assert [str(problem) for problem in verify(database)] == []
        # A rollback takes back what the previous release moved.
        back = Registry(database).rollback_alias("support_intents", "production", reason="", principal=ANNA)
        assert back.number == 11


def test_the_previous_release_takes_up_a_store_with_routes_that_it_does_not_know(previous: Path, store: Path) -> None:
    leaves = [{"kind": "direct", "backend": "local", "version": version} for version in ("production", "v1")]
    compound = [
        {"kind": "cascade", "first": leaves[1], "second": leaves[0], "measure": "margin"},
        {"kind": "ensemble", "members": leaves, "vote": "mean_logprob"},
        {"route": leaves[0], "deadline_s": 3},
    ]
    with Database.open(store) as database:
        registry = Registry(database)
        registry.calibrate(calibration(registry.version("support_intents", "v1").digest, "margin"), ANNA)
    for document, seen in zip(compound, ("fallback", "fallback", "direct"), strict=True):
        with Database.open(store) as database:
            route = parse_task_route(document)
            Registry(database).apply_route("support_intents", route, ANNA, backends=[LOCAL])
        assert json.loads(run(ROOT, "glance", store)) == {"support_intents": route.route.kind}
        assert json.loads(run(previous, "glance", store)) == {"support_intents": seen}
    run(previous, "work", store, 3000, 1)


def test_the_previous_release_refuses_a_schema_that_names_no_older_reader(
    previous: Path, store: Path, tmp_path: Path
) -> None:
    migrations = tmp_path / "migrations"
    shutil.copytree(MIGRATIONS, migrations, ignore=shutil.ignore_patterns("__pycache__"))
    step = f'revision = "9999"\ndown_revision = "{newest_revision()}"\n\n\ndef upgrade() -> None:\n    pass\n'
    (migrations / "versions" / "r9999_contract.py").write_text(step)
    Database.open(store, migrations=migrations).close()
    for code, newest in ((previous, "0001"), (ROOT, newest_revision())):
        with running(code, "tell", store) as process:
            _, errors = process.communicate(timeout=60)
        assert process.returncode != 0
        assert f"has schema 9999 but this Softcue knows schemas up to {newest}" in errors
    assert revision_of(str(store)) == "9999"
