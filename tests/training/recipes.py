"""A small real task on the demo base: three intents, a few dozen rows, learnt in seconds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tests.conftest import BASE_FOLDER

TASK = """
name = "colours"
kind = "classify"
inputs = ["message"]
labels = ["red", "blue"]
[[messages]]
role = "user"
content = "{message}"
[[metrics]]
name = "accuracy"
direction = "maximise"
"""
RECIPE = """
base = "{base}"
task = "task.toml"
[data]
train = "train.jsonl"
test = "test.jsonl"
validation_fraction = 0.2
[prompt]
length = 4
initialise = "labels"
[optimise]
learning_rate = 0.3
batch_size = 8
max_steps = 8
warmup_steps = 2
evaluate_every = 4
seed = 1
[baseline]
text = "Name the colour."
[gate]
metric = "accuracy"
minimum_gain = {minimum_gain}
"""
THINGS = ("car", "house", "door", "hat", "book", "cup", "coat", "boat", "chair", "bag", "lamp", "box", "pen", "ball")


def rows(things: tuple[str, ...]) -> list[dict[str, Any]]:
    return [
        {"inputs": {"message": f"the {thing} looks like {sign}"}, "answer": colour}
        for thing in things
        for sign, colour in (("fire", "red"), ("the sea", "blue"))
    ]


def write_rows(file: Path, content: list[Any]) -> None:
    file.write_text("".join(json.dumps(row) + "\n" for row in content))


def write_recipe(folder: Path, *, minimum_gain: float = -1.0, **replace: str) -> Path:
    """A folder with recipe, task and data; `replace` swaps text in the recipe."""
    folder.mkdir(parents=True, exist_ok=True)
    text = RECIPE.format(base=BASE_FOLDER, minimum_gain=minimum_gain)
    for old, new in replace.items():
        assert old in text
        text = text.replace(old, new)
    (folder / "task.toml").write_text(TASK)
    write_rows(folder / "train.jsonl", rows(THINGS[:11]))
    write_rows(folder / "test.jsonl", rows(THINGS[11:]))
    file = folder / "recipe.toml"
    file.write_text(text)
    return file
