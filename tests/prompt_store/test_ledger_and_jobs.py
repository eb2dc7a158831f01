from datetime import UTC, datetime
from typing import Any

import pytest
from pydantic import BaseModel, ValidationError
from sqlalchemy import Table

from prompt_store import tables
from prompt_store.jobs import Job, JobEvent, StoredFile
from prompt_store.ledger import Exposure, Outcome

NOW = datetime(2026, 5, 1, tzinfo=UTC)
EXPOSURE: dict[str, Any] = {
    "id": "1", "generation_id": "g", "experiment": "e", "task": "t", "arm": "a", "version": "a" * 64,
    "unit_hash": "u", "assignment_probability": 0.5, "at": NOW, "principal": "anna",
}  # fmt: skip
OUTCOME: dict[str, Any] = {
    "id": "1", "generation_id": "g", "task": "t", "metric": "m", "value": 1.0, "at": NOW, "principal": "anna",
}  # fmt: skip


@pytest.mark.parametrize(
    ("shape", "table", "beside"),
    [
        (Exposure, tables.exposures, set()),
        (Outcome, tables.outcomes, set()),
        (StoredFile, tables.files, {"content"}),
        (Job, tables.jobs, set()),
        (JobEvent, tables.job_events, set()),
    ],
)
def test_every_shape_has_its_columns(shape: type[BaseModel], table: Table, beside: set[str]) -> None:
    assert set(shape.model_fields) | beside == set(table.columns.keys())


@pytest.mark.parametrize("probability", [0.0, -0.1, 1.1, float("nan")])
def test_an_exposure_needs_a_probability_above_zero(probability: float) -> None:
    assert Exposure(**EXPOSURE).forced is False
    assert Exposure(**{**EXPOSURE, "assignment_probability": 1.0}).assignment_probability == 1.0
    with pytest.raises(ValidationError):
        Exposure(**{**EXPOSURE, "assignment_probability": probability})


@pytest.mark.parametrize("value", [float("nan"), float("inf"), "much"])
def test_an_outcome_needs_a_finite_value(value: object) -> None:
    assert Outcome(**OUTCOME).value == 1.0
    with pytest.raises(ValidationError):
        Outcome(**{**OUTCOME, "value": value})


def test_times_without_a_zone_are_refused() -> None:
    with pytest.raises(ValidationError):
        Exposure(**{**EXPOSURE, "at": datetime(2026, 5, 1)})
