"""Chooses the next token of every row: greedy, or drawn by temperature, min-p, top-k and top-p.

A row is chosen for on its own and with random numbers of its own, so that it gives the same tokens, bit for bit,
whatever else is in the batch. Rows that need more than their most probable token are worked on by the CPU, in numpy:
there its calls cost a tenth of torch's.
"""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Collection
from collections.abc import Sequence as Rows

import msgspec
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from service.engines.local.grammar import GrammarState
from service.engines.local.messages import Choosing, Logprob
from service.engines.local.penalties import Penalties

# Dividing logits by less leaves one token with all the probability, or overflows.
_GREEDY_BELOW = 1e-5


class Choice(msgspec.Struct, frozen=True):
    """A row's next token. `logprob` and `top` are set where the row asks for them; see `logprobs_of`."""

    token: int
    logprob: float | None = None
    top: list[tuple[int, float]] = []


class RowSampling:
    """One answer's way of choosing, and what it depends on: the tokens taken so far.

    `choose` changes nothing here: whoever accepts its token calls `take`, so that a choice can be made again.
    """

    def __init__(
        self,
        choosing: Choosing,
        prompt_token_ids: Rows[int] = (),
        eos_token_ids: Collection[int] = (),
        *,
        index: int = 0,
        grammar: GrammarState | None = None,
        logprobs: int | None = None,
    ) -> None:
        """`index` is the answer's place among the n of its request; with a seed, each place has its own numbers.

        `logprobs` counts the alternatives beside each token's log-probability; None wants neither.
        """
        self.temperature = choosing.temperature
        self.top_p = choosing.top_p
        self.top_k = choosing.top_k
        self.min_p = choosing.min_p
        self.logprobs = logprobs
        self.grammar = grammar
        self.greedy = choosing.temperature < _GREEDY_BELOW
        self.taken = 0
        self._penalties = Penalties(choosing, prompt_token_ids) if Penalties.needed(choosing) else None
        self._min_tokens = choosing.min_tokens
        # A grammar that has come to its end leaves nothing else to choose, so there an eos ends in any case.
        eos = frozenset(eos_token_ids)
        self._ends = eos.union(choosing.stop_token_ids)
        if choosing.ignore_eos and grammar is None:
            self._ends = frozenset(choosing.stop_token_ids)
        self._ending = np.array(sorted(self._ends), np.int64)
        self._avoided = np.array(sorted(eos), np.int64) if choosing.ignore_eos and grammar else self._ending[:0]
        seed = os.urandom(8) if choosing.seed is None else (choosing.seed % 2**64).to_bytes(8, "little")
        self._random = hashlib.blake2b(seed + index.to_bytes(8, "little"), digest_size=8)
        self.plain = False
        self._settle()

    def ends(self, token: int) -> bool:
        """Whether a token ends the answer: an eos unless those are ignored, or a stop token."""
        return token in self._ends

    def take(self, token: int) -> None:
        """Go on by a token. Raises InvalidRequest where a grammar does not allow it or grew too complex."""
        self.taken += 1
        if self._penalties is not None:
            self._penalties.take(token)
        if self.grammar is not None:
            self.grammar.take(token)
        if self.taken == self._min_tokens:
            self._settle()

    def draw(self) -> float:
        """The number in [0, 1) that belongs to the next token: a hash of seed, index and position."""
        numbers = self._random.copy()
        numbers.update(self.taken.to_bytes(8, "little"))
        # With 52 bits the largest times a total is less than the total, whatever the rounding.
        return float(int.from_bytes(numbers.digest(), "little") >> 12) * 2.0**-52

    def adjust(self, logits: NDArray[np.float32]) -> NDArray[np.float32]:
        """Float32 [V] with bias, penalties and masks (-inf): a copy, unless there are none."""
        if self._penalties is None and self.grammar is None and self.taken >= self._min_tokens:
            return logits
        logits = logits.copy()
        if self._penalties is not None:
            self._penalties.apply(logits)
        allowed = np.ones(len(logits), np.bool_) if self.grammar is None else self.grammar.allowed()
        barred = self._ending if self.taken < self._min_tokens else self._avoided
        if len(barred):
            rest = allowed.copy()
            rest[barred] = False
            if rest.any():  # otherwise the answer can only end
                allowed = rest
        logits[~allowed] = -np.inf
        return logits

    def _settle(self) -> None:
        """Note whether the most probable token is all that this row needs from now on."""
        self.plain = (
            self.greedy
            and self.logprobs is None
            and self.grammar is None
            and self._penalties is None
            and self.taken >= self._min_tokens
        )


def choose(logits: Tensor, rows: Rows[RowSampling]) -> list[Choice]:
    """The next token of each row of float32 [R, V]. Rows must be finite.

    Log-probabilities are those of the model's own distribution: before temperature, penalties, bias and masks.
    Raises InvalidRequest as `RowSampling.adjust` does for a grammar.
    """
    if logits.device.type == "cpu":
        values = logits.numpy()
        choices = [Choice(token) for token in values.argmax(axis=-1).tolist()]
        special = [(index, values[index]) for index, row in enumerate(rows) if not row.plain]
    else:
        choices = [Choice(token) for token in logits.argmax(dim=-1).tolist()]
        indices = [index for index, row in enumerate(rows) if not row.plain]
        special = list(zip(indices, logits[indices].cpu().numpy(), strict=True)) if indices else []
    if special:
        with np.errstate(over="ignore"):  # far enough below the largest logit is probability 0
            for index, row_values in special:
                choices[index] = _choose_one(row_values, rows[index], choices[index].token)
    return choices


def logprobs_of(logits: Tensor, token_ids: Rows[int], alternatives: int) -> list[Logprob]:
    """Natural log-probabilities of given tokens: of one token for each row of finite float32 [T, V].

    Each comes with the `alternatives` most probable tokens in its place, the first one first, equal ones by id.
    """
    values = logits.cpu().numpy()
    measured = (_measure(row, token, alternatives) for row, token in zip(values, token_ids, strict=True))
    return [Logprob(token, logprob, top) for token, (logprob, top) in zip(token_ids, measured, strict=True)]


def _choose_one(logits: NDArray[np.float32], row: RowSampling, most_probable: int) -> Choice:
    adjusted = row.adjust(logits)
    token = most_probable
    if not row.greedy:
        token = _draw(adjusted, row)
    elif adjusted is not logits:
        token = int(adjusted.argmax())
    if row.logprobs is None:
        return Choice(token)
    return Choice(token, *_measure(logits, token, row.logprobs))


def _draw(logits: NDArray[np.float32], row: RowSampling) -> int:
    """Draw from [V] by probability, among the tokens that min-p, then top-k, then top-p keep.

    Each of the three keeps all tokens from some probability up, so tokens of equal probability stay or go together.
    """
    weights = np.exp((logits - logits.max()) / np.float32(row.temperature))  # the largest is 1
    least = row.min_p
    if 0 < row.top_k < len(weights):
        least = max(least, _nth_largest(weights, row.top_k))
    if row.top_p < 1.0:
        least = _least_of_nucleus(weights[weights >= least], row.top_p)
    if least <= 0.0:
        return _pick(weights, row.draw())
    kept = np.flatnonzero(weights >= least)
    return int(kept[_pick(weights[kept], row.draw())])


def _nth_largest(values: NDArray[np.float32], n: int) -> float:
    place = len(values) - n
    return float(np.partition(values, place)[place])


def _least_of_nucleus(weights: NDArray[np.float32], top_p: float) -> float:
    """The least weight in the smallest set of the largest weights that reaches `top_p` of their sum."""
    total = float(weights.sum(dtype=np.float64))
    # All that weigh less than this together weigh less than 1 - top_p: they are not needed, nor sorted.
    largest = weights[weights >= (1.0 - top_p) * total / len(weights)]
    largest.sort()
    descending = largest[::-1].copy()
    reached = int(_cumulative(descending).searchsorted(top_p * total))
    return float(descending[min(reached, len(descending) - 1)])


def _pick(weights: NDArray[np.float32], number: float) -> int:
    """The place that a number in [0, 1) falls on when weights stand side by side. One of weight 0 is never picked."""
    cumulative = _cumulative(weights)
    return int(cumulative.searchsorted(number * cumulative[-1], side="right"))


def _cumulative(weights: NDArray[np.float32]) -> NDArray[np.float64]:
    # torch adds up a vocabulary four times faster than numpy does
    sums: NDArray[np.float64] = torch.from_numpy(weights).cumsum(0, dtype=torch.float64).numpy()
    return sums


def _measure(logits: NDArray[np.float32], token: int, alternatives: int) -> tuple[float, list[tuple[int, float]]]:
    """A token's log-probability and the most probable alternatives with theirs."""
    largest = float(logits.max())
    logarithm_of_sum = largest + math.log(np.exp(logits - np.float32(largest)).sum(dtype=np.float64))
    top: list[tuple[int, float]] = []
    alternatives = min(alternatives, len(logits))
    if alternatives:
        candidates = np.flatnonzero(logits >= _nth_largest(logits, alternatives))
        order = candidates[np.argsort(-logits[candidates], kind="stable")][:alternatives].tolist()
        top = [(other, float(logits[other]) - logarithm_of_sum) for other in order]
    return float(logits[token]) - logarithm_of_sum, top
