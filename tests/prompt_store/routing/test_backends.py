import json
from dataclasses import replace

import pytest
from sqlalchemy import select, update

from prompt_store.errors import InvalidArtifact, InvalidName, SchemaMismatch
from prompt_store.prompts.registry import Registry
from prompt_store.tables import backends
from tests.prompt_store.building import ANNA, BORIS, LOCAL, OPENAI


def test_backends_are_kept_in_the_order_of_the_settings_and_written_only_when_they_change(registry: Registry) -> None:
    registry.register_backends([OPENAI, LOCAL], ANNA)
    assert registry.backends() == [OPENAI, LOCAL]
    before = registry.snapshot().sequence
    registry.register_backends([OPENAI, LOCAL], BORIS)
    assert registry.changes_since(before) == []
    more = replace(LOCAL, features=LOCAL.features | {"tools"})
    registry.register_backends([OPENAI, more], BORIS)
    (change,) = registry.changes_since(before)
    assert (change.kind, change.subject, change.principal) == ("backend", "local", "boris")
    registry.register_backends([more, OPENAI], BORIS)
    assert registry.backends() == [more, OPENAI]


def test_backends_that_another_service_runs_stay(registry: Registry) -> None:
    registry.register_backends([LOCAL], ANNA)
    registry.register_backends([OPENAI], BORIS)
    assert set(registry.backends()) == {LOCAL, OPENAI}


def test_a_description_says_no_more_than_what_is_served(registry: Registry) -> None:
    registry.register_backends([OPENAI], ANNA)
    with registry.database.read() as connection:
        (document,) = connection.execute(select(backends.c.document)).scalars()
    assert json.loads(document) == {
        "name": "openai",
        "kind": "openai",
        "provider": "openai",
        "payload_kinds": ["remote_model", "text"],
        "features": ["scores"],
        "default_model": "m",
    }


def test_a_description_of_a_later_release_is_read_as_far_as_it_is_known(registry: Registry) -> None:
    registry.register_backends([OPENAI], ANNA)
    with registry.database.write() as connection:
        later = json.dumps(OPENAI.document() | {"regions": ["eu"]})
        connection.execute(update(backends).values(document=later))
    assert registry.backends() == [OPENAI]


def test_a_description_that_cannot_be_read_is_written_anew_by_its_service(registry: Registry) -> None:
    registry.register_backends([OPENAI], ANNA)
    with registry.database.write() as connection:
        connection.execute(update(backends).values(document="{}"))
    with pytest.raises(SchemaMismatch, match="start the service that runs it again"):
        registry.backends()
    registry.register_backends([OPENAI], ANNA)
    assert registry.backends() == [OPENAI]


def test_what_a_store_cannot_hold_is_refused(registry: Registry) -> None:
    for wrong, refusal in (
        (replace(OPENAI, name="Open AI"), InvalidName),
        (replace(OPENAI, kind=""), InvalidArtifact),
        (replace(OPENAI, default_model="\0"), InvalidArtifact),
    ):
        with pytest.raises(refusal):
            registry.register_backends([LOCAL, wrong], ANNA)
    assert registry.backends() == []
