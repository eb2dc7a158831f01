"""Writes what gbstats says of the sums in golden_gbstats.json, from which it takes the cases, back into that file.

Not run by tests, nor is gbstats installed with ours. Run it with gbstats 0.8.0 in an environment of its own, under
which the file stays the same byte for byte:

    python3 -m venv ../gbstats && ../gbstats/bin/pip install gbstats==0.8.0
    ../gbstats/bin/python tests/service/experiments/make_golden_gbstats.py

A new case needs its name, alpha, binary and both arms' sums; the rest is added.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from gbstats.frequentist.tests import SequentialConfig, SequentialTwoSidedTTest
from gbstats.models.statistics import (
    ProportionStatistic,
    RegressionAdjustedStatistic,
    SampleMeanStatistic,
    compute_theta,
)

GOLDEN = Path(__file__).parent / "golden_gbstats.json"
TUNED_UNITS = 5000


def statistics(control: dict[str, Any], first: dict[str, Any], binary: bool) -> list[Any]:
    """Of both arms, as gbstats has them; with the one theta that it computes from both where there is an x."""
    arms = (control, first)
    after = [
        ProportionStatistic(arm["n"], arm["y"]) if binary else SampleMeanStatistic(arm["n"], arm["y"], arm["yy"])
        for arm in arms
    ]
    if "x" not in control:
        return after
    before = [SampleMeanStatistic(arm["n"], arm["x"], arm["xx"]) for arm in arms]
    adjusted = [
        RegressionAdjustedStatistic(arm["n"], after[place], before[place], arm["xy"], 0.0)
        for place, arm in enumerate(arms)
    ]
    theta = compute_theta(*adjusted)
    for each in adjusted:
        each.theta = theta
    return adjusted


def told(case: dict[str, Any]) -> dict[str, float]:
    config = SequentialConfig(difference_type="absolute", alpha=case["alpha"], sequential_tuning_parameter=TUNED_UNITS)
    test = SequentialTwoSidedTTest(*statistics(case["control"], case["first"], case["binary"]), config)
    low, high = test.confidence_interval
    return {"lift": test.point_estimate, "variance": test.variance, "low": low, "high": high}


if __name__ == "__main__":
    golden = json.loads(GOLDEN.read_text())
    for each in golden["cases"]:
        each.update(told(each))
    GOLDEN.write_text(json.dumps(golden, indent=1) + "\n")
