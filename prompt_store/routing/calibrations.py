"""Calibrations: from which confidence on a version's answers are good enough, as measured on validation data.

They are of a version's content and go with it. How they are measured is the service's business.
"""

from collections.abc import Collection
from datetime import datetime

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator
from sqlalchemy import Connection, delete, insert, select

from prompt_store.access import Principal
from prompt_store.changes import record
from prompt_store.errors import InvalidArtifact
from prompt_store.names import check_texts
from prompt_store.prompts.lookup import read_version
from prompt_store.prompts.revisions import require_task
from prompt_store.prompts.version import Digest
from prompt_store.routing.routes import check_measure
from prompt_store.tables import calibrations, versions


class Calibration(BaseModel):
    """Answers of `version` whose confidence by `measure` is at least `threshold` are accepted.

    `target` is the accuracy that was aimed at, `accuracy` what the accepted of `rows` validation rows had, and
    `accepted_share` how many of them that was. `dataset` says which rows: a name, or a content hash.
    """

    model_config = ConfigDict(frozen=True, extra="ignore", hide_input_in_errors=True)

    version: Digest
    measure: str
    threshold: float = Field(allow_inf_nan=False)
    target: float = Field(ge=0.0, le=1.0, allow_inf_nan=False)
    accuracy: float = Field(ge=0.0, le=1.0, allow_inf_nan=False)
    accepted_share: float = Field(ge=0.0, le=1.0, allow_inf_nan=False)
    rows: int = Field(ge=1)
    dataset: str = ""

    _measured = field_validator("measure")(check_measure)


def calibrate(
    connection: Connection, calibration: Calibration, principal: Principal, at: datetime, reason: str = ""
) -> None:
    """Keeps a calibration in place of the version's earlier one for the same measure.

    Raises UnknownVersion, and InvalidArtifact for text that a database cannot hold.
    """
    check_texts("dataset", calibration.dataset, InvalidArtifact)
    version = read_version(connection, calibration.version)
    here = (calibrations.c.version == version.digest) & (calibrations.c.measure == calibration.measure)
    connection.execute(delete(calibrations).where(here))
    connection.execute(
        insert(calibrations).values(
            version=version.digest,
            measure=calibration.measure,
            document=calibration.model_dump_json(),
            at=at,
            principal=principal.name,
        )
    )
    record(
        connection,
        "calibration",
        action="version.calibrate",
        task=version.task,
        subject=version.digest,
        principal=principal,
        at=at,
        reason=reason,
        details=calibration.model_dump(mode="json"),
    )


def task_calibrations(connection: Connection, task: str) -> list[Calibration]:
    """A task's calibrations, by version and measure. Raises UnknownTask."""
    require_task(connection, task)
    return list(read_calibrations(connection, [task]).get(task, {}).values())


def read_calibrations(
    connection: Connection, tasks: Collection[str] | None = None
) -> dict[str, dict[tuple[str, str], Calibration]]:
    """Every task's calibrations, or those of `tasks`, by version digest and measure.

    One that this code cannot read is left out, as if it had not been measured; `softcue prompts verify` names it.
    """
    query = (
        select(versions.c.task, calibrations.c.version, calibrations.c.measure, calibrations.c.document)
        .join(versions, versions.c.digest == calibrations.c.version)
        .order_by(versions.c.task, versions.c.number, calibrations.c.measure)
    )
    if tasks is not None:
        query = query.where(versions.c.task.in_(tasks))
    found: dict[str, dict[tuple[str, str], Calibration]] = {}
    for row in connection.execute(query):
        try:
            calibration = Calibration.model_validate_json(row.document)
        except ValidationError:
            continue
        found.setdefault(row.task, {})[row.version, row.measure] = calibration
    return found
