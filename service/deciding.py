"""Rules of experiments, applied: one of all replicas reads what is known, decides and acts, every so often.

What is decided is `experiments.decisions`; here it is read and done. Each act is compare-and-set on the experiment's
revision, so a leader that was cut off, or a person, cannot be overruled by figures from before.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Awaitable, Callable
from datetime import datetime

from prompt_store.access import Principal
from prompt_store.errors import StoreError, StoreUnavailable
from prompt_store.experiments.records import ExperimentRecord
from prompt_store.leadership import Leadership
from prompt_store.prompts.registry import Registry
from service.experiments import decisions
from service.experiments.acting import report
from service.experiments.decisions import Block, Decision, Promote, Resume, Reweight, RollBack, Stop

log = logging.getLogger(__name__)

ROLE = "decisions"
"""The name of the leadership that a Decider asks for."""

EVERY_S = 30.0


class Decider:
    """Decides on the running experiments while this process leads; `leads` says whether it did last.

    `count(experiment, action)` is told of each decision that was carried out or recommended. Acts are those of
    `principal`. Call `close` before the registry's database closes.
    """

    def __init__(
        self,
        registry: Registry,
        leadership: Leadership,
        now: Callable[[], datetime],
        count: Callable[[str, str], object],
        principal: Principal,
        *,
        every_s: float = EVERY_S,
    ) -> None:
        self._registry = registry
        self._leadership = leadership
        self._now = now
        self._count = count
        self._principal = principal
        self._every_s = every_s
        self._looking = threading.Lock()
        self._closing = threading.Event()
        self._failing: set[str] = set()  # experiments whose failure is in the log already
        self._away = False
        self.leads = False

    async def follow(self, sleep: Callable[[float], Awaitable[object]] = asyncio.sleep) -> None:
        """Look every so often, until cancelled."""
        while True:
            try:
                await asyncio.to_thread(self.look)
            except Exception:  # requests are answered all the same
                log.exception("experiments could not be decided on")
            await sleep(self._every_s)

    def look(self) -> None:
        """Decide once what there is to decide. Blocks, for as long as statistics are read.

        An experiment that fails is logged, once until it works again, and the others are decided on; a store that is
        away likewise.
        """
        with self._looking:
            try:
                self._lead()
                for name in self._registry.running_experiments() if self.leads else ():
                    if not self.leads or self._closing.is_set():
                        break
                    self._look_at(name)
            except StoreUnavailable as error:
                self.leads = False
                if not self._away:
                    log.warning("nothing is decided on experiments while the store is away: %s", error)
                self._away = True
            else:
                if self._away:
                    log.warning("experiments can be decided on again")
                self._away = False

    def close(self) -> None:
        """Let another replica lead. Blocks until what is being decided is done."""
        self._closing.set()
        with self._looking:
            self.leads = False
            self._leadership.close()

    def _lead(self) -> bool:
        """Whether to decide now. Raises StoreUnavailable."""
        self.leads = not self._closing.is_set() and self._leadership.held()
        return self.leads

    def _look_at(self, name: str) -> None:
        try:
            record = self._registry.experiment(name)
            decision = self._decide(record) if record.state == "running" else None
            # Reading takes its time, in which another may have come to lead.
            if decision is not None and self._lead():
                self._act(record, decision)
                self._count(name, decision.action)
                log.info("experiment '%s': %s: %s", name, decision.action, decision.reason)
        except StoreUnavailable:
            raise
        except Exception as error:  # others are decided on all the same
            if name not in self._failing:
                unexpected = None if isinstance(error, StoreError) else error
                log.error("nothing was decided on experiment '%s': %s", name, error, exc_info=unexpected)
            self._failing.add(name)
        else:
            self._failing.discard(name)

    def _decide(self, record: ExperimentRecord) -> Decision | None:
        """What is to be done that was not said already. Raises StoreError."""
        experiment = record.experiment
        now_ms = round(self._now().timestamp() * 1000)
        decision: Decision | None = None
        if experiment.rules.roll_back is not None:
            since_ms = decisions.health_since_ms(experiment.rules.roll_back, now_ms)
            decision = decisions.roll_back(record, self._registry.health(experiment.name, since_ms), now_ms)
        history = self._registry.experiment_history(experiment.name)
        if decision is None and decisions.rests_on_figures(record):
            decision = decisions.judge(record, report(self._registry, experiment.name, now_ms).figures, history, now_ms)
        if decision is None or (_is_recommended(record, decision) and decisions.was_said(decision, history)):
            return None
        return decision

    def _act(self, record: ExperimentRecord, decision: Decision) -> None:
        """Raises Conflict where the experiment is not as it was when this was decided."""
        registry, name, principal = self._registry, record.experiment.name, self._principal
        reason, details, expected = decision.reason, decision.numbers, record.revision
        if _is_recommended(record, decision):
            registry.recommend(name, decision.action, principal, reason=reason, details=details, expected=expected)
            return
        match decision:
            case Promote(arm=arm):
                registry.promote_arm(name, arm, principal, reason=reason, details=details, expected=expected)
            case Stop():
                registry.stop_experiment(name, principal, reason=reason, details=details, expected=expected)
            case RollBack():
                registry.roll_back_experiment(name, principal, reason=reason, details=details, expected=expected)
            case Reweight(weights=weights):
                registry.reweight_experiment(
                    name, weights, principal, reason=reason, details=details, expected=expected
                )


def _is_recommended(record: ExperimentRecord, decision: Decision) -> bool:
    """Whether it is only written down."""
    return record.experiment.rules.dry_run or isinstance(decision, Block | Resume)
