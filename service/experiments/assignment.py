"""Which arm of an experiment a unit belongs to: always the same one, wherever and whenever it is asked."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence


def assign(experiment: str, unit: str, weights: Sequence[float]) -> int:
    """The place of the unit's arm; arm i gets the share weights[i] of all units. Weights sum to 1.

    The experiment's name salts the hash, so that arms of two experiments are drawn independently of each other.
    """
    digest = hashlib.sha256(f"{experiment}\0{unit}".encode()).digest()
    position = int.from_bytes(digest[:8], "big") / 2**64
    bounds = (math.fsum(weights[: place + 1]) for place in range(len(weights) - 1))
    return next((place for place, bound in enumerate(bounds) if position < bound), len(weights) - 1)
