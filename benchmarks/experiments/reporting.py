"""What is measured of a report over a million exposures in PostgreSQL: everything that `show --html` does."""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass
from datetime import UTC, datetime

from markupsafe import escape
from sqlalchemy import text

from prompt_store.access import ANONYMOUS
from prompt_store.database import Database
from prompt_store.experiments.experiment import parse_experiment
from prompt_store.experiments.records import ExperimentRecord
from prompt_store.prompts.registry import NewVersion, Registry
from prompt_store.prompts.task import parse_task
from prompt_store.prompts.version import RemoteModelPayload
from prompt_store.routing.backends import BackendDescription
from prompt_store.routing.routes import DEFAULT_ALIAS
from service.experiments import acting
from service.experiments.advice import sentence_of

TASK, EXPERIMENT = "replies", "tone"
UNITS, EXPOSURES, OUTCOMES, EARLIER = 200_000, 1_000_000, 300_000, 100_000
_STARTED = datetime(2026, 11, 1, tzinfo=UTC)
_DAYS = 14
_PROVIDER = BackendDescription("provider", "openai_compatible", "other", frozenset({"remote_model", "text"}))

# Digits 1 to 8 of a unit's hash draw its arm, 9 to 12 how content it is. Each unit reports one or two of its requests.
_UNITS = """
CREATE TEMPORARY TABLE units AS
SELECT number, substr(hash, 1, 16) AS unit_hash,
       CASE WHEN ('x' || substr(hash, 1, 8))::bit(32)::bigint < 2147483648 THEN 'control' ELSE 'candidate' END AS arm,
       ('x' || substr(hash, 9, 4))::bit(16)::int / 65536.0 AS content
FROM (SELECT number, md5('unit ' || number) AS hash FROM generate_series(0, :units - 1) AS number) AS hashed
"""
_REQUESTS = """
CREATE TEMPORARY TABLE requests AS
SELECT sent.number, substr(sent.hash, 1, 20) AS request, unit_hash, content,
       CASE CAST(:experiment AS text) WHEN '' THEN '' ELSE arm END AS arm,
       ('x' || substr(sent.hash, 21, 4))::bit(16)::int / 65536.0 AS drawn,
       :started_ms + sent.number * (:lasting_ms / :requests) AS at_ms
FROM (SELECT number, md5(:experiment || ' ' || number) AS hash FROM generate_series(0, :requests - 1) AS number) AS sent
JOIN units ON units.number = sent.number % :units
"""
_EXPOSED = """
INSERT INTO exposures (request, task, experiment, arm, allocation, probability, unit_hash, version, forced, at_ms,
                       principal)
SELECT request, :task, :experiment, arm, 1, 0.5, unit_hash, repeat('a', 64), FALSE, at_ms, 'anonymous' FROM requests
"""
_ANSWERED = """
INSERT INTO answers (request, task, experiment, arm, unit_hash, version, backend, outcome, latency_ms, first_token_ms,
                     cost, prompt_tokens, completion_tokens, refused, valid_json, at_ms, principal)
SELECT request, :task, :experiment, arm, unit_hash,
       CASE arm WHEN 'candidate' THEN repeat('b', 64) ELSE repeat('a', 64) END, 'provider',
       CASE WHEN drawn < 0.01 THEN 'error' ELSE 'stop' END, 300 + 200 * content + 400 * drawn, 120 + 100 * drawn,
       0.001 * drawn, 200, (100 * drawn)::int, FALSE, NULL, at_ms + 800, 'anonymous'
FROM requests
"""
_REPORTED = """
INSERT INTO outcomes (request, metric, task, experiment, arm, unit_hash, version, generated_ms, value, text, at_ms,
                      source, principal)
SELECT request, 'helpful', :task, :experiment, arm, unit_hash, repeat('a', 16), at_ms,
       CASE WHEN drawn < 0.3 + 0.4 * content + CASE arm WHEN 'candidate' THEN 0.02 ELSE 0 END THEN 1 ELSE 0 END,
       NULL, at_ms + 60000, 'caller', 'anonymous'
FROM requests WHERE (number + number / :units * 3) % 10 < :reported_of_ten
"""


@dataclass(frozen=True)
class Report:
    """Median seconds of a whole report, and of its parts; `sentence` is what it says."""

    whole_s: float
    figures_s: float
    page_s: float
    sentence: str


def fill(database: Database, scale: float = 1.0) -> None:
    """Exposures, answers and outcomes of an experiment, and those of half its units from before it."""
    registry = Registry(database, now=lambda: _STARTED)
    _start(registry)
    started_ms, lasting_ms = round(_STARTED.timestamp() * 1000), _DAYS * 86_400_000
    with database.write() as connection:
        connection.execute(text(_UNITS), {"units": int(UNITS * scale)})
        for experiment, requests, outcomes, since_ms in (
            ("", EARLIER, EARLIER, started_ms - lasting_ms),
            (EXPERIMENT, EXPOSURES, OUTCOMES, started_ms),
        ):
            about = {
                "task": TASK,
                "experiment": experiment,
                "units": int(UNITS * scale),
                "requests": int(requests * scale),
                "reported_of_ten": 10 * outcomes // requests,
                "started_ms": since_ms,
                "lasting_ms": lasting_ms,
            }
            written = [_REQUESTS, *([_EXPOSED] if experiment else []), _ANSWERED, _REPORTED, "DROP TABLE requests"]
            for statement in written:
                connection.execute(text(statement), about)
    with database.storage.engine.connect() as connection:
        # As the server does by itself, within minutes of so many rows.
        connection.execution_options(isolation_level="AUTOCOMMIT").execute(text("VACUUM ANALYZE"))


def report(database: Database, rounds: int) -> Report:
    """A report as the command line and the API make it, again and again; the first is not counted."""
    registry = Registry(database)
    laps = [_timed(registry) for _ in range(rounds + 1)]
    figures_s, page_s = (statistics.median(part) for part in zip(*(lap for lap, _ in laps[1:]), strict=True))
    whole_s = statistics.median(sum(lap) for lap, _ in laps[1:])
    return Report(whole_s, figures_s, page_s, laps[-1][1])


def _timed(registry: Registry) -> tuple[tuple[float, float], str]:
    """Seconds of sums and statistics, and of the page with its history; and the sentence."""
    began_s = time.perf_counter()
    found = acting.report(registry, EXPERIMENT, round(_STARTED.timestamp() * 1000) + _DAYS * 86_400_000)
    estimated_s = time.perf_counter()
    page = acting.html_report(registry, found)
    ended_s = time.perf_counter()
    sentence = sentence_of(found.figures, found.record)
    if found.figures.exposures < UNITS / 1000 or str(escape(sentence)) not in page:
        raise RuntimeError(f"the report is not of what was filled in: {found.figures.exposures} exposures")
    return (estimated_s - began_s, ended_s - estimated_s), sentence


def _start(registry: Registry) -> ExperimentRecord:
    metrics = [{"name": "helpful", "direction": "maximise", "type": "boolean"}]
    messages = [{"role": "user", "content": "{text}"}]
    document = {"name": TASK, "kind": "generate", "inputs": ["text"], "messages": messages, "metrics": metrics}
    registry.apply_task(parse_task(document), ANONYMOUS)
    for alias in (DEFAULT_ALIAS, "candidate"):
        version = NewVersion(TASK, RemoteModelPayload(provider="other", model=f"model-{alias}"))
        registry.publish(version, alias, "benchmark", ANONYMOUS)
    arms = [{"name": "control", "weight": 0.5}, {"name": "candidate", "weight": 0.5, "version": "candidate"}]
    guardrails = [{"metric": "latency_ms", "margin": 0.1, "relative": True}, {"metric": "error", "margin": 0.01}]
    document = {"name": EXPERIMENT, "task": TASK, "control": "control", "arms": arms, "metric": "helpful"}
    experiment = parse_experiment({**document, "guardrails": guardrails})
    return registry.start_experiment(experiment, ANONYMOUS, backends=[_PROVIDER])
