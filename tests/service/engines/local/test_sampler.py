from __future__ import annotations

import math
from collections import Counter

import torch

from service.engines.local.sampler import RowSampling, choose

LOGITS = torch.log(torch.tensor([0.5, 0.25, 0.15, 0.1]))


def draw(count: int, **options: float) -> Counter[int]:
    row = RowSampling(seed=1, **options)
    return Counter(choose(LOGITS[None], [row])[0] for _ in range(count))


def test_temperature_zero_takes_the_most_probable_token() -> None:
    assert choose(torch.stack([LOGITS, LOGITS.flip(0)]), [RowSampling(), RowSampling()]) == [0, 3]


def test_sampled_tokens_follow_their_probabilities() -> None:
    counts = draw(4000, temperature=1.0)
    for token, probability in enumerate((0.5, 0.25, 0.15, 0.1)):
        spread = 4 * math.sqrt(4000 * probability * (1 - probability))
        assert abs(counts[token] - 4000 * probability) < spread


def test_top_k_and_top_p_keep_the_fewest_tokens_that_they_allow() -> None:
    assert set(draw(400, temperature=1.0, top_k=2)) == {0, 1}
    assert set(draw(400, temperature=1.0, top_p=0.5)) == {0}
    assert set(draw(400, temperature=1.0, top_p=0.51)) == {0, 1}
    assert set(draw(400, temperature=1.0, top_p=1e-9)) == {0}
    assert set(draw(400, temperature=2.0, top_k=3, top_p=0.99)) == {0, 1, 2}


def test_a_seed_gives_the_same_tokens_whatever_else_is_in_the_batch() -> None:
    alone = RowSampling(temperature=1.0, seed=7)
    expected = [choose(LOGITS[None], [alone])[0] for _ in range(20)]
    together = RowSampling(temperature=1.0, seed=7)
    other = RowSampling(temperature=1.3, top_k=2, seed=8)
    rows = torch.stack([LOGITS.flip(0), LOGITS, LOGITS])
    assert [choose(rows, [other, together, RowSampling()])[1] for _ in range(20)] == expected


def test_without_a_seed_draws_differ() -> None:
    flat = torch.zeros(1, 1000)
    assert len({choose(flat, [RowSampling(temperature=1.0)])[0] for _ in range(20)}) > 10
