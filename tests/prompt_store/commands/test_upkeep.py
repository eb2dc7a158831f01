import json
from pathlib import Path

from typer.testing import CliRunner

from prompt_store.commands import app
from prompt_store.database import Database
from prompt_store.prompts.registry import Registry
from prompt_store.prompts.version import payload_tensors
from tests.prompt_store.building import publish
from tests.prompt_store.commands.shell import Shell
from tests.prompt_store.upkeep.damage import flip_tensor_byte


def test_gc_says_what_it_would_do_before_it_does_it(shell_on_either: Shell) -> None:
    shell = shell_on_either
    assert shell.run("gc") == "nothing to delete: everything is named\n"
    shell.publish(1, 2)
    shell.run("alias", "support_intents", "production", "v1")
    assert shell.run("gc") == "nothing to delete; 1 version that nothing names waits for 30d to pass\n"
    planned = shell.json("gc", "--grace", "0m")
    assert (planned["deleted"], [entry["version"] for entry in planned["versions"]]) == (False, ["support_intents@v2"])
    told = shell.run("gc", "--grace", "0m")
    assert "would delete 1 version and 0 stray tensors" in told
    assert "add --delete to do it" in told
    assert len(shell.json("list")) == 2
    assert "deleted 1 version" in shell.run("gc", "--grace", "0m", "--delete")
    assert [entry["version"] for entry in shell.json("list")] == ["v1"]
    assert "'1x' is no period" in shell.misuse("gc", "--grace", "1x")


def test_verify_names_what_is_damaged_and_ends_with_1(shell_on_either: Shell) -> None:
    shell = shell_on_either
    shell.publish(1)
    assert "1 task, 1 version, 1 tensor" in shell.run("verify")
    assert shell.json("verify")["whole"] is True
    with Database.open(shell.store) as database:
        version = publish(Registry(database), 2).version
        (tensor,) = payload_tensors(version.payload).values()
        flip_tensor_byte(database, tensor)
    plain = CliRunner().invoke(app, ["verify", "--store", shell.store])
    assert plain.exit_code == 1
    assert f"damaged: tensor {tensor[:12]}" in plain.stderr
    assert "concerns support_intents@v2" in plain.stderr
    assert plain.stdout.endswith(": 1 problem\n")
    as_json = CliRunner().invoke(app, ["verify", "--json", "--store", shell.store])
    assert (as_json.exit_code, as_json.stderr) == (1, "")
    document = json.loads(as_json.stdout)
    assert (document["whole"], document["problems"][0]["versions"]) == (False, ["support_intents@v2"])


def test_a_backup_becomes_a_store_of_either_kind(shell: Shell, empty_postgresql: str) -> None:
    shell.publish(1, 2)
    shell.run("alias", "support_intents", "production", "v1")
    file = str(shell.folder / "store.backup")
    assert shell.json("backup", file)["versions"] == 2
    assert "exists and is kept" in shell.fail("backup", file)
    assert "restore into an empty or a new one" in shell.fail("restore", file)
    sqlite, postgresql = Shell(shell.folder, str(shell.folder / "new.db")), Shell(shell.folder, empty_postgresql)
    assert "restored 1 task, 2 versions" in sqlite.run("restore", file)
    assert postgresql.json("restore", file)["versions"] == 2
    for other in (sqlite, postgresql):
        assert other.json("list") == shell.json("list")
        assert other.json("verify")["whole"]
    assert Shell(shell.folder, file).json("list") == shell.json("list")


def test_what_the_system_refuses_is_one_line_too(shell: Shell, tmp_path: Path) -> None:
    long = tmp_path / ("x" * 300)
    assert "cannot be" in shell.fail("load", str(long))
    assert "cannot be used (File name too long)" in Shell(tmp_path, str(long)).fail("list")
    assert "there is no file" in shell.fail("restore", str(tmp_path / "absent"))
