"""Chooses the next token of every row: greedy, or by temperature, top-k and top-p with a random number per row.

A row's random numbers come from its own seed, so the same seed gives the same text whatever else is in the batch.
"""

from __future__ import annotations

import random
from collections.abc import Sequence as Rows
from dataclasses import dataclass, field

import torch
from torch import Tensor

# Dividing logits by less leaves one token with all the probability, or overflows.
_GREEDY_BELOW = 1e-5


@dataclass(slots=True)
class RowSampling:
    """One row's way of choosing. Without a seed, the numbers come from the system."""

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int | None = None
    _random: random.Random = field(init=False)

    def __post_init__(self) -> None:
        self._random = random.Random(self.seed)

    def draw(self) -> float:
        """A number in [0, 1)."""
        return self._random.random()


def choose(logits: Tensor, rows: Rows[RowSampling]) -> list[int]:
    """The next token of each row of float32 [R, V]. Rows must be finite.

    Sampled rows keep the top_k most probable tokens, then the smallest set of those whose probability reaches top_p,
    and one token is drawn from what is left by its probability.
    """
    chosen: list[int] = logits.argmax(dim=-1).tolist()
    sampled = [index for index, row in enumerate(rows) if row.temperature >= _GREEDY_BELOW]
    if not sampled:
        return chosen
    device = logits.device
    temperature = torch.tensor([rows[i].temperature for i in sampled], dtype=torch.float64, device=device)[:, None]
    top_p = torch.tensor([rows[i].top_p for i in sampled], dtype=torch.float64, device=device)[:, None]
    vocabulary = logits.shape[-1]
    top_k = torch.tensor([min(rows[i].top_k or vocabulary, vocabulary) for i in sampled], device=device)[:, None]
    drawn = torch.tensor([rows[i].draw() for i in sampled], dtype=torch.float64, device=device)[:, None]
    scaled = logits[sampled].double() / temperature
    probabilities, tokens = scaled.softmax(dim=-1).sort(dim=-1, descending=True, stable=True)
    ranks = torch.arange(vocabulary, device=device)[None, :]
    probabilities = probabilities.masked_fill(ranks >= top_k, 0.0)
    probabilities /= probabilities.sum(dim=-1, keepdim=True)
    before = probabilities.cumsum(dim=-1) - probabilities
    probabilities = probabilities.masked_fill((before >= top_p) & (ranks > 0), 0.0)
    cumulative = probabilities.cumsum(dim=-1)
    picked = torch.searchsorted(cumulative, drawn * cumulative[:, -1:], right=True)
    kept = (probabilities > 0).sum(dim=-1, keepdim=True)
    picked = picked.clamp(max=vocabulary - 1).minimum(kept - 1)
    for index, token in zip(sampled, tokens.gather(1, picked)[:, 0].tolist(), strict=True):
        chosen[index] = token
    return chosen
