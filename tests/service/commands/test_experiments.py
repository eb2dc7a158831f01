"""`softcue experiments`, on a store of each kind."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from prompt_store.database import Database
from prompt_store.prompts.registry import Registry
from service.commands import experiments
from service.engines.base_model import BaseModel
from tests.prompt_store.commands.shell import Shell
from tests.service.experiments.lived import live, prepare
from tests.service.serving import filled

FRIENDLIER = """\
name = "friendlier"
task = "copy"
control = "control"
metric = "helpful"

[[arms]]
name = "control"
weight = 0.5

[[arms]]
name = "candidate"
weight = 0.5
version = "candidate"

[[guardrails]]
metric = "latency_ms"
margin = 50.0
"""
BETTER = {"control": (400, 200), "candidate": (400, 300)}
UNEVEN = {"control": (300, 150), "candidate": (500, 400)}


class ExperimentsShell(Shell):
    """`softcue experiments` on one store."""

    commands = experiments.app

    def write(self, text: str = FRIENDLIER) -> str:
        path = self.folder / "experiment.toml"
        path.write_text(text)
        return str(path)

    def live(self, units: dict[str, tuple[int, int]]) -> None:
        """The experiment is started, and units come to its arms."""
        self.run("start", self.write())
        with Database.open(self.store) as database:
            registry = Registry(database)
            live(registry, registry.experiment("friendlier"), units)


@pytest.fixture
def shell(tmp_path: Path, location: str, base: BaseModel) -> ExperimentsShell:
    store = filled(location, base)
    with store.registry.database:
        prepare(store)
    return ExperimentsShell(tmp_path, location)


def test_a_dry_run_checks_an_experiment_and_starts_nothing(shell: ExperimentsShell) -> None:
    said = shell.run("start", shell.write(), "--dry-run")
    assert re.search(r"candidate +0\.5 +v2", said)
    assert said.endswith("friendlier would start on copy; leave --dry-run out to start it\n")
    assert shell.json("start", shell.write(), "--dry-run")["route"]["kind"] == "split"
    assert "no experiment; start one" in shell.run("list")


def test_an_experiment_is_started_listed_and_stopped(shell: ExperimentsShell) -> None:
    said = shell.run("start", shell.write(), "--reason", "support asked")
    assert said.endswith("friendlier runs on copy; `softcue experiments show friendlier` says what is known of it\n")
    assert re.search(r"friendlier +copy +running .*helpful +control 50%, candidate 50%", shell.run("list"))
    (listed,) = shell.json("list", "--task", "copy")
    assert (listed["state"], listed["versions"]) == ("running", {"control": ["v1"], "candidate": ["v2"]})
    assert shell.json("list", "--task", "query") == []
    assert "is at revision 1, and 2 was expected" in shell.fail("stop", "friendlier", "--expect", "2")
    said = shell.run("stop", "friendlier", "--reason", "too many complaints", "--expect", "1")
    assert said == "friendlier was stopped, and copy is answered as before\n"
    newest, oldest = shell.json("history", "friendlier")
    assert (newest["action"], newest["reason"]) == ("experiment.stop", "too many complaints")
    assert (oldest["action"], oldest["reason"]) == ("experiment.start", "support asked")
    assert re.search(r"stop +\S+ +too many complaints", shell.run("history", "friendlier"))
    assert "was stopped by" in shell.fail("stop", "friendlier")


def test_what_is_wrong_is_told_a_line_each_with_its_place(shell: ExperimentsShell) -> None:
    file = shell.write(FRIENDLIER.replace('"helpful"', '"helpfull"').replace('"candidate"\n\n', '"v9"\n\n'))
    result = shell.invoke("start", file)
    assert (result.exit_code, result.stdout) == (1, "")
    metric, version = result.stderr.splitlines()
    assert metric.startswith(f"{file}:4: metric: task 'copy' has no metric 'helpfull'; did you mean 'helpful'?")
    assert version.startswith(f"{file}:13: arms[1].version: task 'copy' has no version 'v9'")
    (line,) = shell.invoke("start", shell.write(FRIENDLIER.replace("margin", "margn"))).stderr.splitlines()
    assert line.startswith(f"{file}:17: guardrails[0].margn: there is no such key; did you mean 'margin'?")
    assert "no experiment 'friendlier'" in shell.fail("show", "friendlier")


def test_what_is_known_is_shown_with_the_sentence_first(shell: ExperimentsShell) -> None:
    shell.live(BETTER)
    lines = shell.run("show", "friendlier").splitlines()
    assert lines[0].startswith("Promote candidate: helpful is 25 points higher with candidate than with control")
    text = "\n".join(lines)
    assert re.search(r"control +50\.0% +400 +400 +50% ", text)
    assert re.search(r"candidate +50\.0% +400 +400 +75\.0% .*\+25 points", text)
    assert re.search(r"candidate +400 .* ms .*held", text)
    document = shell.json("show", "friendlier")
    assert (document["schema"], document["verdict"]) == ("softcue.experiment-report/1", "promote")
    assert document["sentence"] == lines[0]


def test_the_report_is_written_as_a_page(shell: ExperimentsShell) -> None:
    shell.live(BETTER)
    page = shell.folder / "report.html"
    assert shell.run("show", "friendlier", "--html", str(page)).endswith(f"the report is in {page}\n")
    text = page.read_text()
    assert "Promote candidate: helpful is 25 points higher" in text
    assert "<svg" in text
    json.loads(shell.run("show", "friendlier", "--html", str(page), "--json"))
    assert "cannot be written" in shell.fail("show", "friendlier", "--html", str(shell.folder / "none" / "report.html"))


def test_an_arm_is_promoted_and_its_version_is_in_production(shell: ExperimentsShell) -> None:
    shell.live(BETTER)
    assert "did you mean 'candidate'?" in shell.fail("promote", "friendlier", "candidat")
    said = shell.run("promote", "friendlier", "candidate", "--reason", "it helps more")
    assert said == "candidate of friendlier was promoted, and answers copy now\n"
    with Database.open(shell.store) as database:
        registry = Registry(database)
        assert registry.alias("copy", "production").version == registry.version("copy", "v2").digest
    assert shell.run("show", "friendlier").startswith("candidate was promoted on ")
    numbers = shell.json("history", "friendlier")[0]["details"]["metrics"]["helpful"]["arms"]
    assert [arm["arm"] for arm in numbers] == ["control", "candidate"]
    assert re.search(r"promoted: candidate", shell.run("list"))


def test_a_mismatch_refuses_a_promotion_unless_somebody_says_why(shell: ExperimentsShell) -> None:
    shell.live(UNEVEN)
    assert shell.run("show", "friendlier").startswith("Do not read this yet: units came to arms as 37.5 to 62.5 where")
    assert "units came to arms as 37.5 to 62.5" in shell.fail("promote", "friendlier", "candidate")
    assert "needs a reason" in shell.fail("promote", "friendlier", "candidate", "--despite-mismatch")
    shell.run("promote", "friendlier", "candidate", "--despite-mismatch", "--reason", "it is known why")
    assert shell.json("history", "friendlier")[0]["details"]["despite_mismatch"] is True


def test_weights_are_given_by_arm(shell: ExperimentsShell) -> None:
    shell.run("start", shell.write())
    said = shell.run("weights", "friendlier", "control=0.2", "candidate=0.8", "--reason", "it looks good")
    assert said == "the weights of friendlier are control 20%, candidate 80%\n"
    assert "sum to 0.9" in shell.fail("weights", "friendlier", "control=0.1", "candidate=0.8")
    for wrong in (["control"], ["control=much"], ["control=0.5", "control=0.5"]):
        assert "is no ARM=SHARE, or that arm has one already" in shell.misuse("weights", "friendlier", *wrong)
    assert shell.json("list")[0]["weights"] == {"control": 0.2, "candidate": 0.8}
