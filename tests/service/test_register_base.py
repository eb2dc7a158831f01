from __future__ import annotations

import json
import shutil
from pathlib import Path

from typer.testing import CliRunner, Result

from prompt_store.database import Database
from prompt_store.prompts.registry import Registry
from softcue import app
from tests.conftest import BASE_FOLDER


def register(store: Path, folder: Path, *arguments: str) -> Result:
    return CliRunner().invoke(app, ["register-base", str(folder), "--store", str(store), *arguments])


def test_a_base_is_known_by_its_first_name(tmp_path: Path) -> None:
    store = tmp_path / "softcue.db"
    first = register(store, BASE_FOLDER, "--name", "ours")
    assert first.exit_code == 0
    assert "the store knows base 'ours' by its fingerprint" in first.stdout
    assert "--base ours` takes a prompt for it" in first.stdout
    second = register(store, BASE_FOLDER, "--name", "theirs")
    assert "it had that name before, which stays; ask for it as 'ours'" in second.stdout
    document = json.loads(register(store, BASE_FOLDER, "--json").stdout)
    with Database.open(store) as database:
        (base,) = Registry(database).bases()
    assert (document["name"], document["fingerprint"], document["layers"]) == ("ours", base.fingerprint, base.layers)


def test_what_is_no_base_is_refused_in_a_line_and_makes_no_store(tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    for folder in (empty, tmp_path / "absent", tmp_path / ("x" * 300)):
        refused = register(tmp_path / "softcue.db", folder)
        assert (refused.exit_code, refused.stdout, len(refused.stderr.splitlines())) == (1, "", 1)
    assert not (tmp_path / "softcue.db").exists()


def test_a_name_that_no_database_can_hold_is_refused(tmp_path: Path) -> None:
    copy = tmp_path / "base"
    shutil.copytree(BASE_FOLDER, copy)
    refused = register(tmp_path / "softcue.db", copy, "--name", "x\udcff")
    assert refused.exit_code == 1
    assert "holds NUL or half a character" in refused.stderr
