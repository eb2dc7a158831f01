"""A Recipe: one file that fully describes a training run. Frozen, hashed; paths are relative to the file."""

from __future__ import annotations

import tomllib
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from prompt_store.canonical import canonical_digest
from prompt_store.errors import nearest_name
from training.errors import RecipeError


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class DataRecipe(_Part):
    """JSONL files. Without `test`, `test_fraction` of `train` is held out; validation is always a part of `train`.

    A row's split depends on the hash of its inputs alone, so adding rows never moves others.
    """

    train: Path
    test: Path | None = None
    validation_fraction: float = Field(0.1, gt=0, lt=0.5)
    test_fraction: float = Field(0.1, gt=0, lt=0.5)


class PromptRecipe(_Part):
    """The soft prompt's length P in virtual tokens, how it starts, and how it is stored."""

    length: int = Field(20, ge=1, le=4096)
    initialise: Literal["text", "labels", "vocabulary", "random"] = "text"
    text: str | None = None
    dtype: Literal["F32", "BF16"] = "F32"


class OptimiseRecipe(_Part):
    """AdamW with linear warm-up and cosine decay to zero; early stopping after `patience` validations without gain."""

    learning_rate: float = Field(0.05, gt=0)
    batch_size: int = Field(32, ge=1)
    max_steps: int = Field(600, ge=1)
    warmup_steps: int = Field(30, ge=0)
    weight_decay: float = Field(0.0, ge=0)
    clip_norm: float = Field(1.0, gt=0)
    evaluate_every: int = Field(100, ge=1)
    patience: int = Field(4, ge=1)
    seed: int = 1


class BaselineRecipe(_Part):
    """The hand-written system message that the soft prompt has to beat while nothing is in production."""

    text: str = Field(min_length=1)


class GateRecipe(_Part):
    """Publish only when `metric` gains at least this much on the held-out split."""

    metric: str
    minimum_gain: float = 0.0


class PublishRecipe(_Part):
    alias: str = "candidate"


class Recipe(_Part):
    """A whole run."""

    base: Path
    task: Path
    data: DataRecipe
    prompt: PromptRecipe = PromptRecipe()
    optimise: OptimiseRecipe = OptimiseRecipe()
    baseline: BaselineRecipe
    gate: GateRecipe
    publish: PublishRecipe = PublishRecipe()
    folder: Path = Field(default=Path(), exclude=True)

    @cached_property
    def hash(self) -> str:
        """SHA-256 of the recipe as written, defaults included; it does not depend on where the file lies."""
        return canonical_digest(self.model_dump(mode="json"))

    def path(self, relative: Path) -> Path:
        """A path of the recipe, from its folder."""
        return self.folder / relative.expanduser()


def load_recipe(file: Path) -> Recipe:
    """Read a recipe. Raises RecipeError naming file and key; an unknown key names the nearest known one."""
    try:
        document = tomllib.loads(file.read_text("utf-8"))
    except OSError as error:
        raise RecipeError(f"recipe {file} cannot be read: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise RecipeError(f"recipe {file} is not TOML: {error}") from error
    try:
        recipe = Recipe.model_validate({**document, "folder": file.parent})
    except ValidationError as error:
        raise RecipeError(f"{file}: {_explain(error)}") from error
    if recipe.prompt.initialise == "text" and not recipe.prompt.text:
        raise RecipeError(
            f"{file}: prompt.initialise is 'text' but prompt.text is missing; write the text to start from"
        )
    return recipe


def _explain(error: ValidationError) -> str:
    problems = error.errors()
    problem = next((entry for entry in problems if entry["type"] == "extra_forbidden"), problems[0])
    place = [str(part) for part in problem["loc"]]
    if problem["type"] != "extra_forbidden":
        return f"{'.'.join(place)}: {problem['msg']}"
    model: Any = Recipe
    for part in place[:-1]:
        model = model.model_fields[part].annotation
    nearest = nearest_name(place[-1], [name for name in model.model_fields if name != "folder"])
    return f"there is no key {'.'.join(place)}" + (f"; did you mean {nearest}?" if nearest else "")
