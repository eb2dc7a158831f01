from __future__ import annotations

from pathlib import Path

import pytest

from tests.training.recipes import write_recipe
from training.errors import RecipeError
from training.recipe import load_recipe


def test_the_hash_depends_on_what_is_written_and_not_on_where(tmp_path: Path) -> None:
    first = load_recipe(write_recipe(tmp_path / "a"))
    assert first.hash == load_recipe(write_recipe(tmp_path / "b")).hash
    assert first.hash != load_recipe(write_recipe(tmp_path / "c", **{"seed = 1": "seed = 2"})).hash
    assert first.path(first.data.train) == tmp_path / "a" / "train.jsonl"


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("max_steps", "max_step", r"no key optimise\.max_step; did you mean max_steps"),
        ("[gate]", "[gates]", r"no key gates; did you mean gate"),
        ("length = 4", "length = 0", r"prompt\.length: .*greater than or equal to 1"),
        ('initialise = "labels"', 'initialise = "text"', r"prompt\.text is missing"),
        ("[data]", "[data", "is not TOML"),
    ],
)
def test_a_mistake_is_named_by_file_and_key(tmp_path: Path, old: str, new: str, said: str) -> None:
    with pytest.raises(RecipeError, match=said):
        load_recipe(write_recipe(tmp_path, **{old: new}))


def test_a_missing_recipe_is_named(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"none\.toml cannot be read"):
        load_recipe(tmp_path / "none.toml")
