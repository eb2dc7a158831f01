"""From measured rates to the figures that are claimed: medians, ratios, targets, tables and the JSON object."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from rich.table import Table

Figures = Mapping[str, float | None]


@dataclass(frozen=True)
class Target:
    """What a figure must reach, and what it should; at most that where `at_most`."""

    figure: str
    floor: float
    goal: float
    at_most: bool = False

    def verdict(self, value: float | None) -> str:
        """goal, floor, missed, or not measured."""
        if value is None:
            return "not measured"
        sign = -1 if self.at_most else 1
        if sign * value >= sign * self.goal:
            return "goal"
        return "floor" if sign * value >= sign * self.floor else "missed"


TARGETS = (
    Target("vs_vllm_c32_8m", 1.5, 2.5),
    Target("vs_vllm_c32_115m", 2.0, 3.0),
    Target("vs_vllm_c1_8m", 1.1, 1.5),
    Target("vs_vllm_c1_115m", 1.1, 1.5),
    Target("vs_peft", 10.0, 10.0),
    Target("vs_transformers_cb", 2.0, 2.0),
    Target("prompts_1000_vs_1", 0.95, 0.95),
    Target("ttft_p100_vs_none", 1.1, 1.1, at_most=True),
    Target("decode_peak_fraction", 0.5, 0.6),
    Target("gap_p99_vs_median", 3.0, 3.0, at_most=True),
)
# Each figure here is the ratio of two others.
RATIOS = {
    "vs_vllm_c32_8m": (("softcue", 32, "8m"), ("vllm", 32, "8m")),
    "vs_vllm_c8_8m": (("softcue", 8, "8m"), ("vllm", 8, "8m")),
    "vs_vllm_c1_8m": (("softcue", 1, "8m"), ("vllm", 1, "8m")),
    "vs_vllm_c32_115m": (("softcue", 32, "115m"), ("vllm", 32, "115m")),
    "vs_vllm_c8_115m": (("softcue", 8, "115m"), ("vllm", 8, "115m")),
    "vs_vllm_c1_115m": (("softcue", 1, "115m"), ("vllm", 1, "115m")),
    "vs_peft": (("softcue", 32, "8m"), ("peft", 1, "8m")),
    "vs_transformers_cb": (("softcue", 32, "8m"), ("transformers", 32, "8m")),
    "int8_vs_float32_c32_115m": (("int8", 32, "115m"), ("softcue", 32, "115m")),
    "int8_vs_float32_c1_115m": (("int8", 1, "115m"), ("softcue", 1, "115m")),
}
CONCURRENCIES = (1, 8, 32)
SIDES = {
    "softcue": "softcue serve",
    "vllm": "vLLM CPU, prompt_embeds",
    "int8": "softcue serve, int8",
    "peft": "PeftModel.generate, one at a time",
    "transformers": "transformers generate_batch, token ids for the soft prompt",
}


def median(values: Sequence[float]) -> float:
    return statistics.median(values)


def quantile(values: Sequence[float], fraction: float) -> float:
    """The smallest value that at least this fraction of the values does not exceed."""
    return sorted(values)[max(0, math.ceil(fraction * len(values)) - 1)]


def rate_name(side: str, concurrency: int, shape: str) -> str:
    """The figure that holds a side's tokens per second."""
    return f"{side}_tokens_per_s_c{concurrency}_{shape}"


def with_ratios(figures: Figures) -> dict[str, float | None]:
    """The figures, every ratio of RATIOS among them: None where a side of it was not measured."""
    found = dict(figures)
    for name, (ours, theirs) in RATIOS.items():
        over, under = figures.get(rate_name(*ours)), figures.get(rate_name(*theirs))
        found[name] = over / under if over is not None and under is not None else None
    for target in TARGETS:
        found.setdefault(target.figure, None)
    return found


def throughput_table(shape: str, figures: Figures) -> Table:
    """Tokens per second of each side by concurrency."""
    table = Table(f"{shape}, tokens/s at concurrency", *map(str, CONCURRENCIES))
    for side, title in SIDES.items():
        rates = [figures.get(rate_name(side, concurrency, shape)) for concurrency in CONCURRENCIES]
        if any(rate is not None for rate in rates):
            table.add_row(title, *("–" if rate is None else f"{rate:,.0f}" for rate in rates))
    return table


def target_table(figures: Figures) -> Table:
    """Each figure that has a target, beside it."""
    table = Table("figure", "measured", "floor", "goal", "reached")
    for target in TARGETS:
        value = figures.get(target.figure)
        shown = "–" if value is None else f"{value:.2f}"
        table.add_row(target.figure, shown, f"{target.floor:g}", f"{target.goal:g}", target.verdict(value))
    return table


def json_line(figures: Figures, about: Mapping[str, object]) -> str:
    """One JSON object on one line, figures to four significant digits."""
    rounded = {name: None if value is None else float(f"{value:.4g}") for name, value in figures.items()}
    return json.dumps({**about, **rounded})
