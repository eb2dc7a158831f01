"""Write train.jsonl and test.jsonl: English questions about a table of league games, answered by a compact JSON query.

A query has two keys: what to take of which column (`"SELECT MAX": "GAME.CROWD"`) and the condition
(`"GAME.WEEK": 7`).
A question joins an opening to a condition. Some openings and some conditions are kept for the test file, so every test
question has a wording that training never saw in at least one half.
"""

from __future__ import annotations

import json
import random
from pathlib import Path

SEED = 20260402
TRAIN_ROWS = 2000
TEST_ROWS = 250

MEASURES = ["crowd", "attendance", "score", "points"]
FACTS = ["venue", "opponent", "date", "record", "location"]

# Openings by query; the last of each list is used in the test file only.
OPENINGS: dict[str, list[str]] = {
    "SELECT MAX": [
        "what is the highest {column}",
        "what was the highest {column}",
        "what is the largest {column}",
        "tell me the highest {column}",
        "show the highest {column}",
        "name the highest {column}",
    ],
    "SELECT MIN": [
        "what is the lowest {column}",
        "what was the lowest {column}",
        "what is the smallest {column}",
        "tell me the lowest {column}",
        "show the lowest {column}",
        "name the lowest {column}",
    ],
    "SELECT AVG": [
        "what is the average {column}",
        "what was the average {column}",
        "what is the mean {column}",
        "tell me the average {column}",
        "show the average {column}",
        "name the average {column}",
    ],
    "SELECT SUM": [
        "what is the total {column}",
        "what was the total {column}",
        "what is the sum of {column}",
        "tell me the total {column}",
        "show the total {column}",
        "name the total {column}",
    ],
    "SELECT COUNT": [
        "how many {column} entries are there",
        "how many {column} values are there",
        "what is the number of {column} entries",
        "tell me the number of {column} entries",
        "show how many {column} values there are",
        "tell me how many {column} entries there are",
    ],
    "SELECT": [
        "what is the {column}",
        "what was the {column}",
        "which {column} is listed",
        "tell me the {column}",
        "show the {column}",
        "name the {column}",
    ],
}

# Conditions; the last two are used in the test file only.
CONDITIONS = [
    "in {key} {value}",
    "for {key} {value}",
    "when the {key} is {value}",
    "with {key} {value}",
    "where the {key} was {value}",
    "if the {key} is {value}",
    "for the {key} of {value}",
    "when {key} is {value}",
]
HELD_OUT_CONDITIONS = 2
ENDINGS = ["", "?", " ?", " please", "."]


def pick_condition(rng: random.Random) -> tuple[str, int]:
    """Draw the column of the condition and its value."""
    key = rng.choice(["week", "year", "season", "round"])
    bounds = {"week": (1, 20), "year": (1960, 2020), "season": (1980, 2020), "round": (1, 12)}
    return key, rng.randint(*bounds[key])


def make_row(held_out: bool, rng: random.Random) -> dict[str, object]:
    """Make one question and its query."""
    query = rng.choice(list(OPENINGS))
    column = rng.choice(FACTS if query == "SELECT" else MEASURES)
    openings, conditions = OPENINGS[query][:-1], CONDITIONS[:-HELD_OUT_CONDITIONS]
    if held_out:
        which = rng.choice(["opening", "condition", "both"])
        openings = openings if which == "condition" else OPENINGS[query][-1:]
        conditions = conditions if which == "opening" else CONDITIONS[-HELD_OUT_CONDITIONS:]
    key, value = pick_condition(rng)
    question = f"{rng.choice(openings)} {rng.choice(conditions)}".format(column=column, key=key, value=value)
    question += rng.choice(ENDINGS)
    if rng.random() < 0.4:
        question = question[0].upper() + question[1:]
    answer = {query: f"GAME.{column.upper()}", f"GAME.{key.upper()}": value}
    return {"inputs": {"question": question}, "answer": json.dumps(answer, separators=(",", ":"))}


def main() -> None:
    """Write both files beside this one; no question appears twice."""
    rng = random.Random(SEED)
    taken: set[str] = set()
    folder = Path(__file__).parent
    for name, held_out, wanted in (("train", False, TRAIN_ROWS), ("test", True, TEST_ROWS)):
        lines: list[str] = []
        while len(lines) < wanted:
            line = json.dumps(make_row(held_out, rng))
            if line.lower() not in taken:
                taken.add(line.lower())
                lines.append(line)
        (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
