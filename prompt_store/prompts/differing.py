"""What differs between two versions: their facts, their metrics side by side, and how far apart their tensors are."""

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from prompt_store.prompts.lookup import Evidence
from prompt_store.prompts.tensor_file import Tensor
from prompt_store.prompts.version import PromptVersion

# Differs between any two versions, or is compared by itself.
_LEFT_OUT = frozenset({"number", "digest", "payload.tensor_digest", "payload.tensors.prefix"})
_METRICS = ("test_metrics", "metrics")

Side = tuple[PromptVersion, Evidence, Tensor | None]


@dataclass(frozen=True, slots=True)
class Fact:
    """A fact that differs, by its place such as `provenance.seed`; None where a side says nothing."""

    name: str
    first: Any
    second: Any


@dataclass(frozen=True, slots=True)
class MetricPair:
    """A metric of both reports, equal or not; None where a side has it not."""

    name: str
    first: float | None
    second: float | None

    @property
    def change(self) -> float | None:
        return None if self.first is None or self.second is None else self.second - self.first


@dataclass(frozen=True, slots=True)
class Distance:
    """Between two tensors of one shape, a and b: |a-b|/|a|, the largest |a-b| of a value, and cosines of their rows.

    A row is a vector of the last axis; one of zeros has a cosine of 0 with every other.
    """

    relative: float
    largest: float
    mean_cosine: float
    lowest_cosine: float


@dataclass(frozen=True, slots=True)
class Difference:
    """`no_distance` says why there is no `distance` where there are tensors."""

    same: bool
    facts: tuple[Fact, ...]
    metrics: tuple[MetricPair, ...]
    distance: Distance | None
    no_distance: str

    def document(self) -> dict[str, Any]:
        """As JSON values."""
        metrics = [{**asdict(metric), "change": metric.change} for metric in self.metrics]
        return {**asdict(self), "metrics": metrics}


def compare(first: Side, second: Side) -> Difference:
    """The second version beside the first; reports beyond their metrics are not compared."""
    facts = dict(_facts(first)), dict(_facts(second))
    metrics = _metrics(first[1].report), _metrics(second[1].report)
    distance, no_distance = _compared(first[2], second[2])
    return Difference(
        same=first[0].digest == second[0].digest,
        facts=tuple(
            Fact(name, facts[0].get(name), facts[1].get(name))
            for name in dict.fromkeys([*facts[0], *facts[1]])
            if facts[0].get(name) != facts[1].get(name)
        ),
        metrics=tuple(
            MetricPair(name, metrics[0].get(name), metrics[1].get(name))
            for name in dict.fromkeys([*metrics[0], *metrics[1]])
        ),
        distance=distance,
        no_distance=no_distance,
    )


def tensor_distance(first: Tensor, second: Tensor) -> Distance:
    """Of two tensors of one shape, in whatever dtypes."""
    a, b = first.to_float32().astype(np.float64), second.to_float32().astype(np.float64)
    norm = float(np.linalg.norm(a))
    rows_a, rows_b = a.reshape(-1, a.shape[-1]), b.reshape(-1, b.shape[-1])
    norms = np.linalg.norm(rows_a, axis=1) * np.linalg.norm(rows_b, axis=1)
    products = (rows_a * rows_b).sum(axis=1)
    cosines = np.divide(products, norms, out=np.zeros_like(products), where=norms > 0)
    distance = float(np.linalg.norm(a - b))
    return Distance(
        relative=distance / norm if norm else float(distance > 0),
        largest=float(np.abs(a - b).max()),
        mean_cosine=float(cosines.mean()),
        lowest_cosine=float(cosines.min()),
    )


def _compared(first: Tensor | None, second: Tensor | None) -> tuple[Distance | None, str]:
    if first is None or second is None:
        return None, "" if first is second else "only one of them has a tensor"
    if first.shape != second.shape:
        return None, f"their tensors have shapes {list(first.shape)} and {list(second.shape)}"
    return tensor_distance(first, second), ""


def _facts(side: Side) -> Iterator[tuple[str, Any]]:
    version, evidence, _ = side
    document = version.model_dump(mode="json") | {"recipe": evidence.recipe or {}}
    for name, value in _leaves(document):
        if name not in _LEFT_OUT:
            yield name, value


def _metrics(report: dict[str, Any] | None) -> dict[str, float]:
    return {
        name: float(value)
        for part in _METRICS
        for name, value in _leaves((report or {}).get(part, {}))
        if isinstance(value, int | float) and not isinstance(value, bool)
    }


def _leaves(document: Any, place: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(document, dict):
        for key, value in document.items():
            yield from _leaves(value, f"{place}.{key}" if place else str(key))
    elif place:
        yield place, document
