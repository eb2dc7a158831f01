import json
import re
import subprocess
import sys
from pathlib import Path

from typer.testing import CliRunner

from prompt_store.commands import app
from prompt_store.prompts.artifact import Artifact, write_artifact
from prompt_store.prompts.soft_prompt import encode
from tests.prompt_store.building import BASE, OTHER_BASE, bundle, prompt
from tests.prompt_store.commands.shell import Shell


def test_a_prompt_goes_from_file_to_production(shell: Shell) -> None:
    path = shell.artifact(1, base_fingerprint=BASE.fingerprint)
    assert "support_intents@v1" in shell.run("publish", "support_intents", path, "--alias", "candidate")
    assert "is already" in shell.run("publish", "support_intents", path)
    assert "production is v1" in shell.run("alias", "support_intents", "production", "candidate", "--reason", "better")
    assert "better" in shell.run("history", "support_intents", "production")
    listed = shell.run("list")
    assert "@candidate @production" in listed
    assert "demo-base" in listed
    assert "candidate=v1, production=v1" in shell.run("tasks")


def test_versions_are_published_as_an_ensemble(shell: Shell) -> None:
    for seed in (1, 2):
        shell.run("publish", "support_intents", shell.artifact(seed, base_fingerprint=BASE.fingerprint))
    told = shell.run("ensemble", "support_intents", "v1", "v2", "--vote", "mean_logprob", "--alias", "candidate")
    assert "the ensemble published as support_intents@v3" in told
    assert "support_intents@candidate is v3" in told
    shown = shell.json("show", "support_intents@candidate")
    members = sorted(shell.json("show", f"support_intents@{label}")["digest"] for label in ("v1", "v2"))
    assert (shown["payload"]["members"], shown["payload"]["vote"]) == (members, "mean_logprob")
    assert "names a member twice" in shell.fail("ensemble", "support_intents", "v1", "v1")
    assert "at least 2 items" in shell.fail("ensemble", "support_intents", "v1")
    assert "vote by majority or mean_logprob" in shell.fail("ensemble", "support_intents", "v1", "v2", "--vote", "all")
    assert "is of kind 'ensemble'; name soft prompts" in shell.fail("ensemble", "support_intents", "v1", "v3")


def test_everything_is_there_as_json(shell: Shell) -> None:
    path = shell.artifact(1, task="support_intents", base_fingerprint=BASE.fingerprint, notes="from file")
    published = shell.json("publish", "support_intents", path, "--alias", "production")
    assert (published["version"], published["created"], published["notes"]) == ("v1", True, "from file")
    assert (
        shell.json("list")
        == shell.json("list", "support_intents")
        == [{key: value for key, value in published.items() if key not in ("created", "report", "recipe")}]
    )
    assert shell.json("show", "support_intents@production")["digest"] == published["digest"]
    shown = shell.json("show", "support_intents")
    assert (shown["labels"], shown["aliases"]) == (["refund", "delivery"], {"production": "v1"})
    assert shell.json("tasks")[0]["versions"] == 1
    assert shell.json("alias", "support_intents", "candidate", "v1")["version"] == "v1"
    (move,) = shell.json("history", "support_intents", "candidate")
    assert (move["target_version"], move["previous_version"]) == ("v1", None)
    assert shell.json("apply-task", str(shell.folder / "task.toml"))["revision"] == 1


def test_the_base_is_named_where_the_file_does_not_say_and_checked_where_it_does(shell: Shell) -> None:
    path = shell.artifact(1)
    assert "name it with --base" in shell.fail("publish", "support_intents", path)
    assert "did you mean 'demo-base'" in shell.fail("publish", "support_intents", path, "--base", "demo-bas")
    shell.run("publish", "support_intents", path, "--base", "demo-base")
    shell.run("publish", "support_intents", path, "--base", OTHER_BASE.fingerprint[:8])
    assert [entry["payload"]["base_fingerprint"] for entry in shell.json("list")] == [
        OTHER_BASE.fingerprint,
        BASE.fingerprint,
    ]
    bound = shell.artifact(2, base_fingerprint=BASE.fingerprint)
    assert "was made for base" in shell.fail("publish", "support_intents", bound, "--base", "other-base")


def test_a_report_and_notes_are_kept(shell: Shell) -> None:
    (shell.folder / "report.json").write_text('{"accuracy": 0.9}')
    path = shell.artifact(1, base_fingerprint=BASE.fingerprint, notes="from file")
    shell.run("publish", "support_intents", path, "--notes", "[red]x", "--report", str(shell.folder / "report.json"))
    entry = shell.json("show", "support_intents@v1")
    assert (entry["notes"], entry["report"]) == ("[red]x", {"accuracy": 0.9})
    assert "[red]x" in shell.run("list")


def test_refusals_are_one_line_with_fact_and_remedy(shell: Shell) -> None:
    (shell.folder / "cut.safetensors").write_bytes(encode(prompt())[:-1])
    path = shell.artifact(1, base_fingerprint=BASE.fingerprint, task="other")
    shell.run("publish", "support_intents", shell.artifact(2, base_fingerprint=BASE.fingerprint))
    refused = [
        (("show", "suport_intents"), "did you mean 'support_intents'"),
        (("show", "support_intents@v9"), "did you mean 'v1'"),
        (("show", "ft:gpt:acme::1"), "lives at a provider"),
        (("list", "suport_intents"), "did you mean 'support_intents'"),
        (("publish", "support_intents", str(shell.folder / "cut.safetensors")), "not whole safetensors"),
        (("publish", "support_intents", str(shell.folder / "absent")), "cannot be read"),
        (("publish", "support_intents", path), "was made for task 'other'"),
        (("alias", "support_intents", "v3", "v1"), "reads as a version number"),
        (("alias", "support_intents", "production", "v1", "--expect", "v1"), "points at nothing"),
        (("history", "support_intents", "production"), "no alias 'production'"),
        (("apply-task", str(shell.folder / "absent.toml")), "cannot be read"),
        (("load", str(shell.folder / "absent")), "there is no folder"),
    ]
    for arguments, reason in refused:
        assert reason in shell.fail(*arguments)
    assert len(shell.json("list")) == 1


def test_reading_commands_do_not_create_a_store(tmp_path: Path) -> None:
    shell = Shell(tmp_path, str(tmp_path / "softcue.db"))
    for arguments in (("list",), ("tasks",), ("show", "x"), ("history", "x", "y")):
        assert "there is no store at" in shell.fail(*arguments)
    assert list(tmp_path.iterdir()) == []


def test_a_task_that_cannot_be_read_makes_no_store(tmp_path: Path) -> None:
    shell = Shell(tmp_path, str(tmp_path / "store" / "softcue.db"))
    assert "cannot be read" in shell.fail("apply-task", str(tmp_path / "absent.toml"))
    assert list(tmp_path.iterdir()) == []


def test_a_folder_is_loaded_once(shell: Shell) -> None:
    inner = bundle(shell.folder / "examples")
    write_artifact(inner / "prompt.safetensors", Artifact(prompt(), base_fingerprint=BASE.fingerprint))
    first, second = (shell.json("load", str(shell.folder / "examples")) for _ in range(2))
    assert (first[0]["version"], first[0]["version_created"], first[0]["alias_set"]) == ("v1", True, True)
    assert (second[0]["version_created"], second[0]["alias_set"]) == (False, False)
    assert "v1" in shell.run("load", str(shell.folder / "examples"))


def test_the_store_may_come_from_the_environment(shell: Shell) -> None:
    result = CliRunner().invoke(app, ["tasks", "--json"], env={"SOFTCUE_STORE_URL": str(shell.store)})
    assert [entry["name"] for entry in json.loads(result.stdout)] == ["support_intents"]


def test_the_help_text_waits_for_nothing_heavy() -> None:
    script = (
        "import sys, prompt_store.commands\n"
        "print([name for name in ('sqlalchemy', 'alembic', 'pydantic', 'numpy', 'rich') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_an_alias_moves_only_from_where_it_is_expected_and_back_again(shell_on_either: Shell) -> None:
    shell = shell_on_either
    shell.publish(1, 2, 3)
    shell.run("alias", "support_intents", "production", "v1", "--reason", "start")
    moved = shell.json("alias", "support_intents", "production", "v2", "--expect", "v1")
    assert moved["version"] == "v2"
    refusal = shell.fail("alias", "support_intents", "production", "v3", "--expect", "v1")
    assert "points at v2" in refusal
    assert "not at v1" in refusal
    shell.run("alias", "support_intents", "production", "v3")
    back = shell.json("rollback", "support_intents", "production", "--reason", "worse")
    assert (back["version"], back["previous_version"]) == ("v2", "v3")
    told = shell.run("rollback", "support_intents", "production")
    assert "is v1" in told
    assert "`softcue prompts alias support_intents production v2` moves it forward again" in told
    assert "has no earlier target" in shell.fail("rollback", "support_intents", "production")
    moves = shell.json("history", "support_intents", "production")
    assert [move["target_version"] for move in moves] == ["v1", "v2", "v3", "v2", "v1"]
    assert (moves[3]["reason"], moves[3]["undoes"]) == ("worse", moves[2]["sequence"])
    assert re.search(r"v3 +v2 +\(rollback\) worse", shell.run("history", "support_intents", "production"))


def test_an_alias_is_removed_and_its_history_stays(shell: Shell) -> None:
    shell.publish(1)
    shell.run("alias", "support_intents", "candidate", "v1")
    shell.publish(2)
    assert "points at v1" in shell.fail("alias", "support_intents", "candidate", "--remove", "--expect", "v2")
    gone = shell.json("alias", "support_intents", "candidate", "--remove")
    assert gone == {"task": "support_intents", "alias": "candidate", "version": None, "digest": None}
    assert "(removed)" in shell.run("history", "support_intents", "candidate")
    assert "no alias 'candidate'" in shell.fail("rollback", "support_intents", "candidate")
    assert "give either a SELECTOR" in shell.misuse("alias", "support_intents", "candidate")
    assert "give either a SELECTOR" in shell.misuse("alias", "support_intents", "candidate", "v1", "--remove")


def test_a_version_is_deleted_only_when_nothing_needs_it(shell_on_either: Shell) -> None:
    shell = shell_on_either
    shell.publish(1, 2, 3)
    shell.run("alias", "support_intents", "production", "v1")
    shell.run("ensemble", "support_intents", "v2", "v3")
    assert "is needed by alias 'production'" in shell.fail("delete", "support_intents", "v1")
    assert "is needed by ensemble v4" in shell.fail("delete", "support_intents", "v2")
    deleted = shell.json("delete", "support_intents", "v4")
    assert (deleted["version"], deleted["deleted"]) == ("v4", True)
    assert "support_intents@v2" in shell.run("delete", "support_intents", "v2")
    assert "no version 'v2'" in shell.fail("delete", "support_intents", "v2")
    assert [entry["version"] for entry in shell.json("list")] == ["v3", "v1"]
