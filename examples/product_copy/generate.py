"""Write train.jsonl and test.jsonl: the fields of a product, and one line of shop copy in the house style.

The house style: `The {product} for the {place} in {colour}.` and then one of three closing lines, chosen by what the
product is bought for. The copy is a function of the fields, so that exact match says whether the style was followed and
every field kept.
One pairing of colour and product in four is kept for the test file, so training never saw those two together.
"""

from __future__ import annotations

import json
import random
from pathlib import Path

SEED = 20260403
TRAIN_ROWS = 900
TEST_ROWS = 250

COLOURS = ["red", "gold", "green", "white", "black"]
PRODUCTS = ["dress", "box", "screen", "clock", "bowl", "basket", "lamp", "phone", "window", "table", "bed", "pen"]
PLACES = ["garden", "hotel", "school", "office", "farm", "street", "hall"]
CLOSINGS = {"gift": "A fine gift.", "work": "Strong for work.", "rest": "Soft for rest."}


def write_copy(fields: dict[str, str]) -> str:
    """Write the line of copy that the house style asks for."""
    return "The {product} for the {place} in {colour}. ".format_map(fields) + CLOSINGS[fields["purpose"]]


def is_held_out(fields: dict[str, str]) -> bool:
    """Say whether this pairing of colour and product is kept for the test file."""
    return (COLOURS.index(fields["colour"]) + PRODUCTS.index(fields["product"])) % 4 == 1


def main() -> None:
    """Write both files beside this one; no set of fields appears twice."""
    rng = random.Random(SEED)
    rows: dict[bool, list[str]] = {False: [], True: []}
    everything = [
        {"colour": colour, "product": product, "place": place, "purpose": purpose}
        for colour in COLOURS
        for product in PRODUCTS
        for place in PLACES
        for purpose in CLOSINGS
    ]
    rng.shuffle(everything)
    for fields in everything:
        rows[is_held_out(fields)].append(json.dumps({"inputs": fields, "answer": write_copy(fields)}))
    folder = Path(__file__).parent
    for name, held_out, wanted in (("train", False, TRAIN_ROWS), ("test", True, TEST_ROWS)):
        (folder / f"{name}.jsonl").write_text("\n".join(rows[held_out][:wanted]) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
