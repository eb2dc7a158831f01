import re
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from prompt_store.commands import routes
from prompt_store.database import Database
from prompt_store.prompts.registry import Registry
from prompt_store.routing.shadows import ShadowAnswer
from tests.prompt_store.building import ANNA, LOCAL, OPENAI, calibration
from tests.prompt_store.commands.shell import Shell

FALLBACK = """\
[support_intents]
deadline_s = 8.0

[support_intents.route]
kind = "fallback"
routes = [{ version = "v2", backend = "openai" }, "ours"]

[support_intents.parts.ours]
version = "v1"
"""


class RoutesShell(Shell):
    """`softcue routes` on one store."""

    commands = routes.app

    def write(self, text: str) -> str:
        path = self.folder / "routes.toml"
        path.write_text(text)
        return str(path)

    def refusals(self, *arguments: str) -> list[str]:
        """The lines on stderr of a command that is refused."""
        result = self.invoke(*arguments)
        assert (result.exit_code, result.stdout) == (1, ""), result.output
        return result.stderr.splitlines()


@pytest.fixture
def router(shell_on_either: Shell) -> RoutesShell:
    """A store with two backends, a soft prompt v1 and a model at a provider v2."""
    shell = shell_on_either
    shell.publish(1)
    shell.run("remote", "support_intents", "openai", "ft:gpt:acme::1", "--alias", "production")
    with Database.open(shell.store) as database:
        Registry(database).register_backends([LOCAL, OPENAI], ANNA)
    return RoutesShell(shell.folder, shell.store)


def test_a_dry_run_shows_what_applying_changes_and_writes_nothing(router: RoutesShell) -> None:
    file = router.write(FALLBACK)
    said = router.run("apply", file, "--dry-run")
    assert ' [support_intents]\n-route = { version = "production" }\n+deadline_s = 8.0\n' in said
    assert '+    { backend = "openai", version = "v2" },\n+    { version = "v1" },\n+]\n' in said
    assert "the route of support_intents would change; leave --dry-run out" in said
    (entry,) = router.json("apply", file, "--dry-run")
    assert (entry["changed"], entry["revision"], entry["warnings"]) == (True, None, [])
    assert router.json("history", "support_intents") == []


def test_a_route_is_applied_shown_and_rolled_back(router: RoutesShell) -> None:
    assert "no route was applied" in router.run("history", "support_intents")
    assert router.json("show", "support_intents") == {
        "task": "support_intents",
        "revision": 0,
        "document": {"kind": "direct", "version": "production"},
    }
    file = router.write(FALLBACK)
    said = router.run("apply", file, "--reason", "cheaper", "--expect", "0")
    assert said.endswith("the route of support_intents is at revision 1\n")
    assert router.run("apply", file) == "the route of support_intents is in force already\n"
    shown = router.json("show", "support_intents")
    assert (shown["revision"], shown["reason"], shown["document"]["deadline_s"]) == (1, "cheaper", 8.0)
    assert "fallback(v2 at openai, v1)" in router.run("list")
    assert router.json("list")["support_intents"] == shown["document"]
    # What is shown as TOML is what apply takes.
    assert router.run("apply", router.write(router.run("show", "support_intents", "--toml"))).endswith("already\n")
    router.run("apply", router.write('[support_intents.route]\nversion = "v1"\n'), "--expect", "1")
    assert "deadline_s" in router.run("rollback", "support_intents", "--reason", "worse")
    newest, *_ = router.json("history", "support_intents")
    assert (newest["revision"], newest["restores"], newest["reason"]) == (3, 1, "worse")
    assert "(back to 1) worse" in router.run("history", "support_intents")
    assert router.json("show", "support_intents", "--revision", "2")["document"]["version"] == "v1"
    assert router.json("rollback", "support_intents", "--to", "2")["revision"] == 4


def test_what_is_wrong_is_told_a_line_each_and_nothing_is_applied(router: RoutesShell) -> None:
    file = router.write(
        FALLBACK.replace('"v1"', '"v7"').replace('"openai"', '"opnai"') + "[nobody.route]\nversion = 'v1'\n"
    )
    first, second, third = (line.removeprefix(f"{file}:") for line in router.refusals("apply", file))
    assert first.startswith("6: support_intents.route.routes[0].backend: no backend 'opnai'; did you mean 'openai'?")
    assert second.startswith("9: support_intents.parts.ours.version: task 'support_intents' has no version 'v7'")
    assert third.startswith("10: nobody: no task 'nobody'")
    for dry_run in ([], ["--dry-run"]):
        assert len(router.refusals("apply", file, *dry_run)) == 3
    assert router.json("list")["support_intents"] == {"kind": "direct", "version": "production"}
    (line,) = router.refusals("apply", router.write("[support_intents.route]\nversion = 'v0'\n"))
    assert ":2: support_intents.route.version: 'v0' is not a version number" in line


def test_a_lost_comparison_and_unknown_revisions_are_refused(router: RoutesShell) -> None:
    file = router.write(FALLBACK)
    for dry_run in ([], ["--dry-run"]):
        assert "was never applied, and 4 was expected" in router.fail("apply", file, "--expect", "4", *dry_run)
    two = router.write(FALLBACK + "[other.route]\nversion = 'v1'\n")
    assert "--expect is of one task's route" in router.misuse("apply", two, "--expect", "0")
    assert "has no route to roll back" in router.fail("rollback", "support_intents")
    assert "has no revision 3; `softcue routes history" in router.fail("show", "support_intents", "--revision", "3")
    assert "no task 'nobody'" in router.fail("show", "nobody")
    assert "cannot be read" in router.fail("apply", str(router.folder / "missing.toml"))


def test_a_route_over_a_model_that_goes_away_is_applied_with_a_warning(router: RoutesShell) -> None:
    soon = datetime.now(UTC).date() + timedelta(days=30)
    with Database.open(router.store) as database:
        Registry(database).note_shutdown("support_intents", "v2", soon, ANNA)
    said = router.run("apply", router.write(FALLBACK))
    assert "warning: support_intents.route.routes[0]: the model ft:gpt:acme::1 of support_intents@v2" in said
    assert "is shut down on" in said
    (entry,) = router.json("apply", router.write(FALLBACK))
    assert len(entry["warnings"]) == 1


def test_a_cascade_without_calibration_names_the_command_that_measures_one(router: RoutesShell) -> None:
    file = router.write(
        '[support_intents.route]\nkind = "cascade"\nmeasure = "margin"\nfirst = { version = "v1" }\nsecond = {}\n'
    )
    (line,) = router.refusals("apply", file)
    assert re.search(r":4: .*`softcue routes calibrate support_intents --version v1 --measure margin --data", line)
    with Database.open(router.store) as database:
        registry = Registry(database)
        registry.calibrate(calibration(registry.version("support_intents", "v1").digest, "margin"), ANNA)
    router.run("apply", file)


def test_backends_are_listed_as_services_made_them_known_or_as_settings_have_them(router: RoutesShell) -> None:
    assert router.json("backends") == [LOCAL.document(), OPENAI.document()]
    assert "prefix, soft_prompt, text" in router.run("backends")
    settings = str(router.folder / "softcue.toml")
    assert "nothing here reads a service's settings" in router.misuse("backends", "--config", settings)
    asked: list[Path] = []

    def reader(path: Path) -> list[Any]:
        asked.append(path)
        return [LOCAL]

    router.context = reader
    assert router.json("backends", "--config", settings) == [LOCAL.document()]
    (line,) = router.refusals("apply", router.write(FALLBACK), "--config", settings)
    assert "no backend 'openai'" in line
    assert asked == [Path(settings)] * 2
    elsewhere = RoutesShell(router.folder, str(router.folder / "none.db"), reader)
    assert elsewhere.json("backends", "--config", settings) == [LOCAL.document()]


def test_a_model_of_a_provider_that_no_backend_has_is_published_with_a_hint(router: RoutesShell) -> None:
    shell = Shell(router.folder, router.store)
    said = shell.run("remote", "support_intents", "acme", "ft:x")
    assert "no service on this store has a backend of provider 'acme' yet, only of openai" in said
    assert "yet" not in shell.run("remote", "support_intents", "openai", "ft:y")


def test_recorded_shadow_answers_are_summed_up_and_the_newest_shown(router: RoutesShell) -> None:
    assert "no shadow answer of support_intents is recorded" in router.run("shadows", "support_intents")
    at = datetime(2030, 1, 7, 12, tzinfo=UTC)
    with Database.open(router.store) as database:
        Registry(database).add_shadow_answers(
            ShadowAnswer(
                f"s{n}", f"gen_{n}", "support_intents", at + timedelta(seconds=n), "a" * 64,
                "support_intents@v1", "local", "refund", 12.0, "b" * 64, "support_intents@v2", "openai",
                None if n == 2 else f"answer {n}", "timeout" if n == 2 else None, 250.0, None if n == 2 else 0.5,
            )
            for n in range(3)
        )  # fmt: skip
    said = router.run("shadows", "support_intents", "--limit", "2")
    assert re.search(r"support_intents@v2 +openai +3 +1 +0\.5 +12\.0 +250\.0", said)
    assert "v2: timeout" in said
    assert "v2: answer 1" in said
    assert "answer 0" not in said
    document = router.json("shadows", "support_intents")
    assert (document["summaries"][0]["count"], [entry["id"] for entry in document["newest"]]) == (3, ["s2", "s1", "s0"])


def test_shutdown_dates_show_in_lists_with_the_days_that_are_left(shell_on_either: Shell) -> None:
    shell = shell_on_either
    shell.publish(1)
    today = datetime.now(UTC).date()
    for model, days in (("one", 400), ("two", 59), ("three", -1)):
        day = (today + timedelta(days=days)).isoformat()
        shell.run("remote", "support_intents", "openai", model, "--shutdown-date", day)
    listed = shell.run("list")
    assert f"shut down on {today + timedelta(days=400)}, in 400 days" in listed
    assert f"warning: shut down on {today + timedelta(days=59)}, in 59 days" in listed
    assert f"retired on {today - timedelta(days=1)}" in listed
    assert "in 59 days" in shell.run("show", "support_intents@v3")
    assert shell.json("show", "support_intents@v3")["days_left"] == 59
    assert "days_left" not in shell.json("show", "support_intents@v1")
    assert "v2: retired on 2020-01-31" in shell.run("shutdown", "support_intents", "v2", "2020-01-31")
    assert shell.json("shutdown", "support_intents", "v2", "--clear")["shutdown_date"] is None
    assert "a soft_prompt payload has no provider" in shell.fail("shutdown", "support_intents", "v1", "2030-01-01")
    assert "give either a DATE" in shell.misuse("shutdown", "support_intents", "v2")
    assert "this is no remote model: model" in shell.fail("remote", "support_intents", "openai", "")
    assert date.fromisoformat(shell.json("show", "support_intents@v3")["shutdown_date"]) > today


def test_a_first_route_that_says_what_held_without_one_is_a_change(router: RoutesShell) -> None:
    default = router.write("[support_intents.route]\n")
    assert router.run("apply", default) == "the route of support_intents is at revision 1\n"
    (again,) = router.json("apply", default)
    assert (again["changed"], again["revision"]) == (False, 1)
