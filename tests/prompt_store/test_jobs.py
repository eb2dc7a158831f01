import pytest
from pydantic import BaseModel
from sqlalchemy import Table

from prompt_store import tables
from prompt_store.jobs import Job, JobEvent, StoredFile


@pytest.mark.parametrize(
    ("shape", "table", "beside"),
    [
        (StoredFile, tables.files, {"content"}),
        (Job, tables.jobs, set()),
        (JobEvent, tables.job_events, set()),
    ],
)
def test_every_shape_has_its_columns(shape: type[BaseModel], table: Table, beside: set[str]) -> None:
    assert set(shape.model_fields) | beside == set(table.columns.keys())
