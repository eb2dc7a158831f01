"""`softcue units`, on a store of each kind."""

from __future__ import annotations

from pathlib import Path

import pytest

from service.commands import units
from service.engines.base_model import BaseModel
from tests.prompt_store.commands.shell import Shell
from tests.service.api.test_units import lived
from tests.service.serving import filled


class UnitsShell(Shell):
    """`softcue units` on one store."""

    commands = units.app


@pytest.fixture
def shell(tmp_path: Path, location: str, base: BaseModel) -> UnitsShell:
    store = filled(location, base)
    with store.registry.database:
        lived(store, "user 7", "a/b")
    return UnitsShell(tmp_path, location)


def test_a_unit_is_erased_by_the_name_that_requests_gave_it(shell: UnitsShell) -> None:
    assert shell.run("erase", "user 7") == "erased 1 exposures, 1 answers, 1 outcomes, 1 captures\n"
    assert shell.json("erase", "a/b") == {
        "exposures": 1, "answers": 1, "outcomes": 1, "captures": 1, "shadow_answers": 0,
    }  # fmt: skip


def test_a_unit_of_which_there_is_nothing_is_said_to_have_left_nothing(shell: UnitsShell) -> None:
    assert shell.run("erase", "User 7").startswith("erased nothing: the store has nothing of this unit")
