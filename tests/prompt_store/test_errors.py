import pickle

import pytest

from prompt_store import errors
from prompt_store.access import command_line_principal
from prompt_store.errors import NotFound, StoreError, UnknownTask, UnknownVersion, nearest_name


def test_the_tree_in_the_docstring_names_every_error() -> None:
    found = [value for value in vars(errors).values() if isinstance(value, type) and issubclass(value, StoreError)]
    assert len(found) > 10
    assert errors.__doc__ is not None
    assert [error.__name__ for error in found if error.__name__ not in errors.__doc__] == []


def test_not_found_names_the_nearest_and_the_remedy() -> None:
    error = UnknownTask("suport_intents", ["product_copy", "support_intents"])
    assert isinstance(error, NotFound)
    assert (error.what, error.name, error.nearest) == ("task", "suport_intents", "support_intents")
    assert "did you mean 'support_intents'?" in str(error)
    assert "softcue prompts tasks" in str(error)


def test_not_found_names_nothing_when_nothing_is_near() -> None:
    assert UnknownTask("zzzzzz", ["product_copy"]).nearest is None


@pytest.mark.parametrize(("asked", "nearest"), [("v9", "v12"), ("v2", "v1"), ("v100", "v12")])
def test_the_nearest_version_is_nearest_as_a_number(asked: str, nearest: str) -> None:
    assert nearest_name(asked, ["production", "v1", "v12"]) == nearest


def test_a_store_error_survives_the_way_between_processes() -> None:
    error = UnknownVersion("v9", ["v1"], where=" of task 'x'")
    copy = pickle.loads(pickle.dumps(error))
    assert (type(copy), str(copy), copy.name, copy.nearest) == (UnknownVersion, str(error), "v9", "v1")


def test_the_command_line_principal_names_the_user() -> None:
    assert command_line_principal().name.startswith("cli:")
