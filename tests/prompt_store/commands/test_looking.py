import os
import pty
import re
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest
from sqlalchemy import update

from prompt_store.access import Principal
from prompt_store.commands.printing import in_words
from prompt_store.database import Database
from prompt_store.prompts.registry import NewVersion, Registry
from prompt_store.prompts.version import DatasetUse, Provenance
from prompt_store.tables import versions
from tests.prompt_store.building import ANNA, BASE, OTHER_BASE, prefix, prompt, publish, task
from tests.prompt_store.commands.shell import Shell

ROOT = Path(__file__).parents[3]


@pytest.fixture
def filled(shell_on_either: Shell) -> Shell:
    """v1 and v2 are soft prompts with reports, v3 and v4 prefixes, the last of them for the other base."""
    with Database.open(shell_on_either.store) as database:
        registry = Registry(database)
        provenance = Provenance(recipe_hash="ab" * 32, datasets=(DatasetUse(name="train", digest="cd" * 32, rows=9),))
        report = {"test_metrics": {"soft prompt": {"accuracy": 0.75}}}
        publish(registry, 1, "production", report=report, provenance=provenance, tags=("good",), notes="the first")
        report = {"test_metrics": {"soft prompt": {"accuracy": 0.875}, "no prompt": {"accuracy": 0.5}}}
        publish(registry, 2, "candidate", report=report, recipe={"seed": 3})
        publish(registry, payload_content=prefix(3))
        publish(registry, payload_content=prefix(4), base_fingerprint=OTHER_BASE.fingerprint)
    return shell_on_either


def labels(shell: Shell, *filters: str) -> list[str]:
    return [entry["version"] for entry in shell.json("list", *filters)]


def test_a_list_is_narrowed_by_each_filter(filled: Shell) -> None:
    assert labels(filled) == labels(filled, "support_intents") == ["v4", "v3", "v2", "v1"]
    assert labels(filled, "--kind", "prefix") == ["v4", "v3"]
    assert labels(filled, "--base", "demo-base") == ["v3", "v2", "v1"]
    assert labels(filled, "--base", OTHER_BASE.fingerprint[:8]) == ["v4"]
    assert labels(filled, "--tag", "good") == labels(filled, "--alias", "production") == ["v1"]
    assert labels(filled, "--kind", "prefix", "--alias", "production") == []
    assert labels(filled, "--limit", "3") == ["v4", "v3", "v2"]
    assert "the first 3; name a task" in filled.run("list", "--limit", "3")
    assert "@production #good the first" in filled.run("list")


def test_a_list_that_is_empty_says_why(shell: Shell) -> None:
    assert "no version; publish one with" in shell.run("list")
    assert shell.run("list", "--tag", "x") == "no version fits; leave a filter out to see more\n"
    refusal = shell.fail("list", "--kind", "soft")
    assert refusal.startswith("no kind 'soft'; did you mean 'soft_prompt'? There are soft_prompt, prefix, text, ")
    assert "did you mean 'demo-base'" in shell.fail("list", "--base", "demo-bas")


def test_a_list_longer_than_a_page_is_whole(shell: Shell) -> None:
    with Database.open(shell.store) as database:
        for seed in range(103):
            publish(Registry(database), seed)
    assert labels(shell) == [f"v{number}" for number in range(103, 0, -1)]


def test_lists_show_what_cannot_be_read_and_the_rest(shell_on_either: Shell) -> None:
    shell = shell_on_either
    shell.publish(1, 2, 3)
    with Database.open(shell.store) as database, database.write() as connection:
        connection.execute(update(versions).where(versions.c.number == 2).values(payload="{}"))
    third, unreadable, first = shell.json("list")
    assert (third["version"], unreadable["version"], first["version"]) == ("v3", "v2", "v1")
    assert "upgrade Softcue or restore a backup" in unreadable["unreadable"]
    assert labels(shell, "--limit", "2") == ["v3", "v2"]
    assert "unreadable: version v2" in shell.run("list")
    assert shell.json("tasks")[0]["versions"] == 3
    assert "version v2 of task" in shell.fail("show", "support_intents@v2")


def test_show_says_what_a_version_is_and_where_it_came_from(filled: Shell) -> None:
    shown = filled.run("show", "support_intents@production")
    for part in ("payload.shape", "4, 16", "name=train digest=cdcdcdcdcdcd rows=9", "soft prompt.accuracy", "0.75"):
        assert part in shown
    document = filled.json("show", "support_intents@production")
    assert document["provenance"]["datasets"] == [{"name": "train", "digest": "cd" * 32, "rows": 9}]
    assert filled.json("show", "support_intents@v2")["recipe"] == {"seed": 3}
    assert filled.json("show", "support_intents")["route"]["version"] == "production"
    assert "aliases.production" in filled.run("show", "support_intents")


def test_diff_sets_facts_metrics_and_tensors_side_by_side(filled: Shell) -> None:
    found = filled.json("diff", "support_intents", "production", "candidate")
    assert (found["first"], found["second"], found["same"]) == ("v1", "v2", False)
    facts = {fact["name"]: (fact["first"], fact["second"]) for fact in found["facts"]}
    assert facts["provenance.recipe_hash"] == ("ab" * 32, None)
    assert facts["recipe.seed"] == (None, 3)
    assert "payload.shape" not in facts
    metrics = {metric["name"]: metric["change"] for metric in found["metrics"]}
    assert metrics == {"soft prompt.accuracy": 0.125, "no prompt.accuracy": None}
    assert 0.5 < found["distance"]["relative"] < 3
    shown = filled.run("diff", "support_intents", "v1", "v2")
    assert re.search(r"soft prompt.accuracy +0.75 +0.875 +\+0.125", shown)
    assert "relative distance" in shown


def test_diff_compares_prefixes_and_says_where_tensors_cannot_be_compared(filled: Shell) -> None:
    assert filled.json("diff", "support_intents", "v3", "v4")["distance"]["largest"] > 0
    shown = filled.run("diff", "support_intents", "v1", "v3")
    assert "no distance: their tensors have shapes [4, 16] and [2, 2, 2, 3, 8]" in shown
    assert re.search(r"payload.kind +soft_prompt +prefix", shown)
    assert filled.json("diff", "support_intents", "v1", "v3")["distance"] is None
    assert "are the same version" in filled.run("diff", "support_intents", "v1", "production")
    assert filled.json("diff", "support_intents", "v1", "production")["same"]
    assert "did you mean 'v4'" in filled.fail("diff", "support_intents", "v1", "v9")


def test_bases_say_what_a_move_to_each_still_needs(filled: Shell) -> None:
    with Database.open(filled.store) as database:
        registry = Registry(database)
        registry.apply_task(task("other_task"), ANNA)
        new = NewVersion(task="other_task", payload_content=prompt(9), base_fingerprint=BASE.fingerprint)
        registry.publish(new, None, "", Principal("anna"))
    demo, other = filled.json("bases")
    assert demo["versions"] == {"other_task": ["v1"], "support_intents": ["v1", "v2", "v3"]}
    assert other["missing"] == ["other_task"]
    assert filled.json("bases", "other-base") == [other]
    assert "still needs 1 task:" in filled.run("bases", "other-base")
    assert re.search(r"demo-base .* 4 for 2 tasks +nothing", filled.run("bases"))


def test_an_empty_store_says_what_to_do_next(tmp_path: Path) -> None:
    Database.open(tmp_path / "softcue.db").close()
    shell = Shell(tmp_path, str(tmp_path / "softcue.db"))
    assert "softcue prompts apply-task FILE" in shell.run("tasks")
    assert "softcue register-base FOLDER" in shell.run("bases")
    assert shell.json("tasks") == shell.json("bases") == shell.json("list") == []


def test_tables_lose_nothing_on_a_terminal_of_80_columns(filled: Shell) -> None:
    with Database.open(filled.store) as database:
        words = " ".join(f"word{number}" for number in range(30))
        publish(Registry(database), 7, "a-rather-long-name-of-an-alias", notes=words)
    for command in ("list", "tasks", "history support_intents production", "diff support_intents v1 v5"):
        arguments = command.split()
        shown = _on_terminal(80, *arguments, "--store", filled.store)
        lines = shown.splitlines()
        assert max(map(len, lines)) <= 80
        assert "…" not in shown
        if arguments[0] in ("list", "diff"):
            assert set(words.split()) <= set(shown.split())
        if arguments[0] == "list":
            assert any(line.split()[:3] == ["support_intents@v5", "soft_prompt", "demo-base"] for line in lines)


def test_values_in_cells_are_short() -> None:
    assert in_words(None) == ""
    assert in_words("ab" * 32) == "abababababab"
    assert in_words([30, 192]) == "30, 192"
    assert in_words([{"a": 1}, {"a": True}]) == "a=1\na=true"
    assert in_words(0.8916666666666667) == "0.891667"


def _on_terminal(columns: int, *arguments: str) -> str:
    """What a command writes to a pseudo-terminal, without colours."""
    controller, terminal = pty.openpty()
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": str(columns), "TERM": "dumb", "NO_COLOR": "1"}
    with subprocess.Popen(
        [sys.executable, "-m", "softcue", "prompts", *arguments],
        stdin=subprocess.DEVNULL, stdout=terminal, stderr=terminal, env=environment,
    ) as process:  # fmt: skip
        os.close(terminal)
        written = b""
        with suppress(OSError):  # Linux says so when the other end is closed
            while part := os.read(controller, 2**16):
                written += part
        os.close(controller)
    assert process.returncode == 0, written
    return re.sub(r"\x1b\[[0-9;]*m", "", written.decode()).replace("\r", "")
