"""The loop that applies rules, over real stores and what was reported to them."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from sqlalchemy import update

from prompt_store.access import Principal
from prompt_store.database import Database
from prompt_store.experiments.experiment import Experiment
from prompt_store.experiments.records import ExperimentEvent
from prompt_store.leadership import Leadership
from prompt_store.ledger.entries import Answered, Entry, Exposure, Outcome
from prompt_store.prompts.registry import Registry
from prompt_store.tables import experiments
from service.deciding import ROLE, Decider
from service.metrics import Metrics
from tests.postgresql import Server
from tests.prompt_store.building import ANNA, BASE, publish, task
from tests.prompt_store.experiments.stage import METRICS, TASK, experiment, fill

START = datetime(2026, 11, 2, 9, tzinfo=UTC)
SERVICE = Principal("service")


class Clock:
    """Stands still until it is moved; `meanwhile` happens once, when it is next looked at."""

    def __init__(self) -> None:
        self.at = START
        self.meanwhile: Callable[[], object] = bool

    def __call__(self) -> datetime:
        happens, self.meanwhile = self.meanwhile, bool
        happens()
        return self.at

    def pass_by(self, **time: float) -> None:
        self.at += timedelta(**time)


class Stage:
    """A store with an experiment or two, what is reported of it, and replicas that decide."""

    def __init__(self, location: str, stack: ExitStack) -> None:
        self.location = location
        self.stack = stack
        self.clock = Clock()
        self.metrics = Metrics({})
        self.registry = Registry(stack.enter_context(Database.open(location)), now=lambda: self.clock.at)
        self.registry.register_base(BASE, ANNA)
        fill(self.registry)
        self._requests = 0

    def start(self, **rules: Any) -> Experiment:
        return self.start_with(rules=rules)

    def start_with(self, **document: Any) -> Experiment:
        of = experiment(metric="helpful", **document)
        self.registry.start_experiment(of, ANNA)
        return of

    def replica(self, role: str = ROLE) -> Decider:
        """A replica with connections of its own."""
        database = self.stack.enter_context(Database.open(self.location))
        registry = Registry(database, now=lambda: self.clock.at)
        leadership = Leadership(database, role)
        decider = Decider(registry, leadership, self.clock, self.metrics.count_decision, SERVICE)
        self.stack.callback(decider.close)
        return decider

    def report(self, arm: str, units: int, helpful: float, *, of: str = "tone", about: str = TASK) -> None:
        """So many units came to an arm, and this share of them was helped."""
        at_ms = self.now_ms
        entries: list[Entry] = []
        for place in range(units):
            self._requests += 1
            request, unit = f"r{self._requests}", f"{self._requests:064x}"
            entries += [
                Exposure(request, about, of, arm, 1, 0.5, unit, "", False, at_ms, "anna"),
                Outcome(
                    request,
                    about,
                    of,
                    arm,
                    unit,
                    "",
                    at_ms,
                    "helpful",
                    place < helpful * units,
                    at_ms,
                    "caller",
                    "anna",
                ),
            ]
        self.registry.add_entries(entries)

    def answer(self, arm: str, requests: int, errors: int, *, minutes: int = 5, latency_ms: float = 200.0) -> None:
        """Requests of an arm ended in each of the last settled minutes."""
        entries: list[Entry] = []
        for back in range(2, 2 + minutes):
            for place in range(requests):
                self._requests += 1
                outcome = "error" if place < errors else "stop"
                entries.append(
                    Answered(
                        f"r{self._requests}", TASK, "tone", arm, f"{self._requests:064x}", "", "local", outcome,
                        latency_ms, None, 0.0, 5, 5, False, None, self.now_ms - back * 60_000, "anna",
                    )
                )  # fmt: skip
        self.registry.add_entries(entries)

    @property
    def now_ms(self) -> int:
        return round(self.clock.at.timestamp() * 1000)

    def state(self, name: str = "tone") -> str:
        return self.registry.experiment(name).state

    def history(self, name: str = "tone") -> list[ExperimentEvent]:
        """What happened after the start, newest first."""
        return self.registry.experiment_history(name)[:-1]

    def decisions(self, action: str, name: str = "tone") -> float:
        labels = {"experiment": name, "action": action}
        return self.metrics.registry.get_sample_value("softcue_experiment_decisions_total", labels) or 0.0


@pytest.fixture
def stage(location: str) -> Iterator[Stage]:
    with ExitStack() as stack:
        yield Stage(location, stack)


def test_a_better_arm_is_promoted_with_its_numbers_in_the_audit(stage: Stage) -> None:
    stage.start(promote=True)
    decider = stage.replica()
    decider.look()
    assert stage.state() == "running"
    stage.report("old", 300, 0.4)
    stage.report("new", 300, 0.8)
    decider.look()
    record = stage.registry.experiment("tone")
    assert (record.state, record.winner, record.ended_by) == ("promoted", "new", "service")
    assert stage.registry.alias(TASK, "production").number == 2
    (event,) = stage.history()
    assert event.action == "experiment.promote"
    assert event.reason == record.reason
    assert "helpful is 40 points higher with new than with old" in event.reason
    (old, new) = event.details["metrics"]["helpful"]["arms"]
    assert (old["units"], new["units"], old["lift"]) == (300, 300, None)
    assert new["lift"]["estimate"] == pytest.approx(0.4)
    assert 0.0 < new["lift"]["low"] < 0.4 < new["lift"]["high"]
    assert event.details["sample_ratio"]["mismatch"] is False
    decider.look()
    assert len(stage.history()) == 1
    assert stage.decisions("promote") == 1.0


def test_an_experiment_in_which_nothing_can_be_won_is_stopped(stage: Stage) -> None:
    stage.start(promote=True, futile_below=0.3)
    stage.report("old", 400, 0.5)
    stage.report("new", 400, 0.5)
    stage.replica().look()
    assert stage.state() == "stopped"
    (event,) = stage.history()
    assert event.reason.startswith("no arm can be better than old by 30 points; ")
    assert event.details["futile_below"] == 0.3
    assert stage.registry.alias(TASK, "production").number == 1


def test_an_arm_that_fails_is_rolled_back_in_spite_of_a_mismatch_with_its_minutes_in_the_audit(stage: Stage) -> None:
    stage.start(promote=True, roll_back={"error_rate_by": 0.1, "minutes": 5})
    stage.clock.pass_by(hours=1)
    stage.report("old", 600, 0.4)
    stage.report("new", 300, 0.8)
    stage.answer("old", 20, 1)
    stage.answer("new", 20, 8)
    stage.replica().look()
    assert stage.state() == "rolled_back"
    assert stage.registry.alias(TASK, "production").number == 1
    (event,) = stage.history()
    assert event.action == "experiment.roll_back"
    assert "of new 40.0% failed" in event.reason
    minutes = event.details["minutes"]["new"]
    assert [each["control"]["errors"] for each in minutes] == [1] * 5
    assert [each["arm"]["error_rate"] for each in minutes] == [0.4] * 5
    assert minutes[-1]["at_ms"] == stage.now_ms - 2 * 60_000
    assert stage.decisions("roll_back") == 1.0


def test_an_arm_that_is_slow_is_rolled_back(stage: Stage) -> None:
    stage.start(roll_back={"p95_latency_by": 0.5, "minutes": 2})
    stage.clock.pass_by(hours=1)
    stage.answer("old", 20, 0, latency_ms=200.0)
    stage.answer("new", 20, 0, latency_ms=290.0)
    decider = stage.replica()
    decider.look()
    assert stage.state() == "running"
    stage.clock.pass_by(hours=1)
    stage.answer("old", 20, 0, latency_ms=200.0)
    stage.answer("new", 20, 0, latency_ms=310.0)
    decider.look()
    assert stage.state() == "rolled_back"


def test_a_sample_ratio_mismatch_blocks_a_promotion_which_the_audit_says_once(stage: Stage) -> None:
    stage.start(promote=True)
    stage.report("old", 600, 0.4)
    stage.report("new", 300, 0.8)
    decider = stage.replica()
    decider.look()
    decider.look()
    assert stage.state() == "running"
    (event,) = stage.history()
    assert event.action == "experiment.recommend"
    assert (event.details["action"], event.details["arm"]) == ("block", "new")
    assert event.reason.startswith("promotion of new blocked by sample-ratio mismatch")
    assert event.details["sample_ratio"]["observed"] == {"old": 600, "new": 300}
    stage.report("new", 300, 0.8)
    decider.look()
    assert stage.state() == "promoted"
    assert [stage.decisions(action) for action in ("block", "promote")] == [1.0, 1.0]


def test_that_a_mismatch_passed_is_said_once(stage: Stage) -> None:
    stage.start(promote=True)
    stage.report("old", 600, 0.5)
    stage.report("new", 300, 0.5)
    decider = stage.replica()
    decider.look()
    stage.report("new", 300, 0.5)
    decider.look()
    decider.look()
    assert [event.details["action"] for event in stage.history()] == ["resume", "block"]
    assert stage.state() == "running"


def test_weights_follow_what_is_learnt_every_so_many_minutes(stage: Stage) -> None:
    stage.start_with(thompson={"floor": 0.1, "every_minutes": 60})
    stage.report("old", 300, 0.4)
    stage.report("new", 300, 0.8)
    decider = stage.replica()
    stage.clock.pass_by(minutes=59)
    decider.look()
    assert stage.history() == []
    stage.clock.pass_by(minutes=1)
    decider.look()
    assert stage.registry.experiment("tone").weights == pytest.approx({"old": 0.1, "new": 0.9})
    assert stage.registry.snapshot().tasks[TASK].allocations["tone"].number == 2
    (event,) = stage.history()
    assert event.details["best"]["new"] > 0.99
    assert event.details["before"] == {"old": 0.5, "new": 0.5}
    stage.clock.pass_by(minutes=120)
    decider.look()
    assert len(stage.history()) == 1
    assert stage.decisions("reweight") == 1.0


def test_a_dry_run_only_recommends_and_once(stage: Stage) -> None:
    stage.start(promote=True, dry_run=True)
    stage.report("old", 300, 0.4)
    stage.report("new", 300, 0.8)
    before = stage.registry.route(TASK)
    decider = stage.replica()
    decider.look()
    decider.look()
    stage.replica("another").look()
    (event,) = stage.history()
    assert (event.action, event.details["action"], event.details["arm"]) == ("experiment.recommend", "promote", "new")
    assert event.details["metrics"]["helpful"]["arms"][1]["lift"]["low"] > 0.0
    assert stage.state() == "running"
    assert stage.registry.route(TASK) == before
    assert stage.registry.alias(TASK, "production").number == 1
    assert stage.decisions("promote") == 1.0


def test_of_two_replicas_one_decides_and_the_other_follows_it(stage: Stage) -> None:
    stage.start(promote=True)
    first, second = stage.replica(), stage.replica()
    first.look()
    second.look()
    assert (first.leads, second.leads) == (True, False)
    stage.report("old", 300, 0.4)
    stage.report("new", 300, 0.8)
    second.look()
    assert stage.state() == "running"
    first.close()
    first.look()
    second.look()
    assert (first.leads, second.leads) == (False, True)
    assert stage.state() == "promoted"
    assert stage.decisions("promote") == 1.0


def test_of_two_that_believe_to_lead_only_one_acts(stage: Stage, caplog: pytest.LogCaptureFixture) -> None:
    stage.start(promote=True)
    stage.report("old", 300, 0.4)
    stage.report("new", 300, 0.8)
    first, second = stage.replica(), stage.replica("another")
    stage.clock.meanwhile = second.look
    first.look()
    assert (first.leads, second.leads) == (True, True)
    assert len(stage.history()) == 1
    assert stage.decisions("promote") == 1.0
    assert "nothing was decided on experiment 'tone': experiment 'tone' ended with a promotion" in caplog.text
    first.look()
    assert len(stage.history()) == 1


def test_what_a_person_changed_meanwhile_is_not_overruled(stage: Stage) -> None:
    stage.start(promote=True)
    stage.report("old", 300, 0.4)
    stage.report("new", 300, 0.8)
    decider = stage.replica()
    stage.clock.meanwhile = lambda: stage.registry.reweight_experiment("tone", {"old": 0.9, "new": 0.1}, ANNA)
    decider.look()
    assert [event.principal for event in stage.history()] == ["anna"]
    decider.look()
    assert stage.state() == "promoted"


def test_an_experiment_that_fails_does_not_stop_the_others(stage: Stage, caplog: pytest.LogCaptureFixture) -> None:
    stage.start(promote=True)
    stage.registry.apply_task(task("beside", metrics=METRICS), ANNA)
    publish(stage.registry, 1, alias="production", task="beside")
    publish(stage.registry, 2, task="beside")
    stage.start_with(name="other", task="beside", rules={"promote": True})
    stage.report("old", 300, 0.4, of="other", about="beside")
    stage.report("new", 300, 0.8, of="other", about="beside")
    with stage.registry.database.write() as connection:
        connection.execute(update(experiments).where(experiments.c.name == "tone").values(document="{}"))
    decider = stage.replica()
    decider.look()
    decider.look()
    assert stage.state("other") == "promoted"
    assert caplog.text.count("nothing was decided on experiment 'tone'") == 1


def test_an_arm_is_rolled_back_where_statistics_fail(stage: Stage, caplog: pytest.LogCaptureFixture) -> None:
    stage.start(promote=True, roll_back={"error_rate_by": 0.1, "minutes": 1})
    stage.registry.apply_task(task(metrics=[]), ANNA)
    decider = stage.replica()
    decider.look()
    decider.look()
    assert caplog.text.count("nothing was decided on experiment 'tone': task 'support_intents' has no metric") == 1
    stage.answer("old", 20, 0)
    stage.answer("new", 20, 20)
    decider.look()
    assert stage.state() == "rolled_back"


def test_a_leader_that_is_cut_off_while_it_decides_does_nothing(
    postgresql_location: str, postgresql: Server, caplog: pytest.LogCaptureFixture
) -> None:
    with ExitStack() as stack:
        stage = Stage(postgresql_location, stack)
        stage.start(promote=True)
        stage.report("old", 300, 0.4)
        stage.report("new", 300, 0.8)
        decider = stage.replica()
        name = stage.registry.database.storage.engine.url.database
        leaders = (
            f"FROM pg_locks JOIN pg_database d ON d.oid = database WHERE locktype = 'advisory' AND datname = '{name}'"
        )

        def cut() -> None:
            assert postgresql.execute(f"SELECT pg_terminate_backend(pid, 5000) {leaders}") == [(True,)]

        stage.clock.meanwhile = cut
        decider.look()
        assert not decider.leads
        assert stage.history() == []
        assert caplog.text.count("nothing is decided on experiments while the store is away") == 1
        decider.look()
        assert decider.leads
        assert stage.state() == "promoted"


def test_a_store_that_is_away_is_survived_and_logged_once(
    own_postgresql: Server, caplog: pytest.LogCaptureFixture
) -> None:
    url = own_postgresql.create()
    cluster = own_postgresql.cluster
    assert cluster is not None
    with ExitStack() as stack:
        stage = Stage(url, stack)
        stage.start(promote=True)
        stage.report("old", 300, 0.4)
        stage.report("new", 300, 0.8)
        decider = stage.replica()
        cluster.stop()
        try:
            decider.look()
            decider.look()
        finally:
            cluster.start()
        assert not decider.leads
        assert caplog.text.count("nothing is decided on experiments while the store is away") == 1
        decider.look()
        assert stage.state() == "promoted"
        assert caplog.text.count("experiments can be decided on again") == 1
    own_postgresql.drop(url)


async def test_looking_goes_on_whatever_happens_until_it_is_cancelled(
    stage: Stage, caplog: pytest.LogCaptureFixture
) -> None:
    stage.start(promote=True)
    decider = stage.replica()

    def broken() -> None:
        raise RuntimeError("an unforeseen fault")

    stage.clock.meanwhile = broken
    slept: list[float] = []

    async def sleep(seconds: float) -> None:
        slept.append(seconds)
        if len(slept) == 1:
            stage.report("old", 300, 0.4)
            stage.report("new", 300, 0.8)
        else:
            raise asyncio.CancelledError

    with caplog.at_level(logging.ERROR), pytest.raises(asyncio.CancelledError):
        await decider.follow(sleep)
    assert slept == [30.0, 30.0]
    assert "an unforeseen fault" in caplog.text
    assert stage.state() == "promoted"


def test_the_metrics_say_what_was_decided_and_who_leads(stage: Stage) -> None:
    decider = stage.replica()
    stage.metrics.leader.set_function(lambda: decider.leads)
    assert b"\nsoftcue_leader 0.0\n" in stage.metrics.render()
    decider.look()
    assert b"\nsoftcue_leader 1.0\n" in stage.metrics.render()
    stage.metrics.count_decision("tone", "stop")
    assert b'softcue_experiment_decisions_total{action="stop",experiment="tone"} 1.0' in stage.metrics.render()
