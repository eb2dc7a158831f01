import json
import math
from datetime import date

import pytest
from pydantic import ValidationError
from sqlalchemy import select, update

from prompt_store.errors import InvalidArtifact, UnknownTask, UnknownVersion
from prompt_store.prompts.registry import Registry
from prompt_store.prompts.version import RemoteModelPayload
from prompt_store.tables import audit, calibrations
from tests.prompt_store.building import ANNA, calibration, publish

TASK = "support_intents"


def test_a_version_has_one_calibration_a_measure_and_the_newest_counts(registry: Registry) -> None:
    digest = publish(registry).version.digest
    before = registry.snapshot()
    first, second, other = (
        calibration(digest, threshold=-0.3),
        calibration(digest, threshold=-0.2),
        calibration(digest, "margin"),
    )
    for each in (first, other, second):
        registry.calibrate(each, ANNA, reason="new rows")
    assert registry.calibrations(TASK) == [other, second]
    after = registry.snapshot(before).tasks[TASK].calibrations
    assert after == {(digest, "margin"): other, (digest, "mean_logprob"): second}
    assert [change.kind for change in registry.changes_since(before.sequence)] == ["calibration"] * 3
    with registry.database.read() as connection:
        entries = connection.execute(select(audit).where(audit.c.action == "version.calibrate")).all()
    assert [json.loads(entry.details)["threshold"] for entry in entries] == [-0.3, -0.3, -0.2]
    assert {(entry.reason, entry.task, entry.subject) for entry in entries} == {("new rows", TASK, digest)}


def test_a_calibration_goes_with_its_version(registry: Registry) -> None:
    digests = [publish(registry, seed).version.digest for seed in range(2)]
    for digest in digests:
        registry.calibrate(calibration(digest), ANNA)
    registry.delete_version(TASK, "v1", reason="", principal=ANNA)
    assert [entry.version for entry in registry.calibrations(TASK)] == [digests[1]]
    with pytest.raises(UnknownVersion):
        registry.calibrate(calibration(digests[0]), ANNA)
    with pytest.raises(UnknownTask):
        registry.calibrations("other")


@pytest.mark.parametrize(
    "change",
    [{"measure": "luck"}, {"threshold": math.nan}, {"accuracy": 1.1}, {"rows": 0}, {"version": "v1"}],
)
def test_a_contradictory_calibration_is_none(change: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        calibration(**{"version": "a" * 64, **change})  # type: ignore[arg-type]


def test_text_that_no_database_holds_is_refused(registry: Registry) -> None:
    digest = publish(registry).version.digest
    with pytest.raises(InvalidArtifact, match="holds NUL"):
        registry.calibrate(calibration(digest, dataset="\0"), ANNA)


def test_a_calibration_that_cannot_be_read_counts_as_none(registry: Registry) -> None:
    digest = publish(registry).version.digest
    for measure in ("margin", "mean_logprob"):
        registry.calibrate(calibration(digest, measure), ANNA)
    with registry.database.write() as connection:
        connection.execute(update(calibrations).where(calibrations.c.measure == "margin").values(document="{}"))
    assert set(registry.snapshot().tasks[TASK].calibrations) == {(digest, "mean_logprob")}


def test_a_shutdown_date_comes_with_a_remote_model_and_can_be_noted_later(registry: Registry) -> None:
    model, day = RemoteModelPayload(provider="openai", model="ft:gpt:acme::1"), date(2031, 2, 3)
    version = publish(registry, payload_content=model, base_fingerprint=None, shutdown_date=day).version
    assert version.shutdown_date == day
    # The first publisher's facts stay.
    again = publish(registry, payload_content=model, base_fingerprint=None)
    assert (again.created, again.version) == (False, version)
    snapshot = registry.snapshot()
    for later in (date(2031, 1, 1), None):
        assert registry.note_shutdown(TASK, "v1", later, ANNA).shutdown_date == later
        snapshot = registry.snapshot(snapshot)
        known = snapshot.tasks[TASK].versions[version.digest]
        assert known == registry.version(TASK, "v1") == version.model_copy(update={"shutdown_date": later})
    registry.note_shutdown(TASK, "v1", None, ANNA)
    assert registry.snapshot(snapshot).sequence == snapshot.sequence
    with registry.database.read() as connection:
        details = connection.execute(select(audit.c.details).where(audit.c.action == "version.note_shutdown")).scalars()
        assert [json.loads(entry)["shutdown_date"] for entry in details] == ["2031-01-01", None]


def test_only_a_provider_shuts_models_down(registry: Registry) -> None:
    day = date(2031, 2, 3)
    with pytest.raises(InvalidArtifact, match="a soft_prompt payload has no provider"):
        publish(registry, shutdown_date=day)
    publish(registry)
    with pytest.raises(InvalidArtifact, match="leave the shutdown date out"):
        registry.note_shutdown(TASK, "v1", day, ANNA)
