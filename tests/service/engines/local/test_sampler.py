from __future__ import annotations

import math
import random
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from service.engines.local.messages import Choosing
from service.engines.local.sampler import RowSampling, choose, logprobs_of

LOGITS = torch.log(torch.tensor([0.5, 0.25, 0.15, 0.1]))


def tokens(logits: Tensor, rows: list[RowSampling]) -> list[int]:
    """A step of each row."""
    chosen = [choice.token for choice in choose(logits, rows)]
    for row, token in zip(rows, chosen, strict=True):
        row.take(token)
    return chosen


def draw(count: int, logits: Tensor = LOGITS, **options: float) -> Counter[int]:
    row = RowSampling(Choosing(**{"seed": 1, "temperature": 1.0, **options}))
    return Counter(tokens(logits[None], [row])[0] for _ in range(count))


def assert_follows(counts: Counter[int], probabilities: list[float]) -> None:
    total = counts.total()
    for token, probability in enumerate(probabilities):
        spread = 4 * math.sqrt(total * probability * (1 - probability))
        assert abs(counts[token] - total * probability) <= spread


def test_temperature_zero_takes_the_most_probable_token() -> None:
    rows = [RowSampling(Choosing()), RowSampling(Choosing()), RowSampling(Choosing())]
    assert tokens(torch.stack([LOGITS, LOGITS.flip(0), torch.zeros(4)]), rows) == [0, 3, 0]


def test_sampled_tokens_follow_their_probabilities() -> None:
    assert_follows(draw(4000), [0.5, 0.25, 0.15, 0.1])


def test_temperature_sharpens_and_flattens_the_distribution() -> None:
    for temperature in (0.5, 2.0):
        assert_follows(draw(4000, temperature=temperature), (LOGITS / temperature).softmax(-1).tolist())


def test_what_is_kept_is_drawn_by_its_share_of_what_is_kept() -> None:
    assert_follows(draw(4000, top_k=2), [2 / 3, 1 / 3, 0.0, 0.0])
    assert_follows(draw(4000, top_p=0.8), [0.5 / 0.9, 0.25 / 0.9, 0.15 / 0.9, 0.0])
    assert_follows(draw(4000, min_p=0.4), [2 / 3, 1 / 3, 0.0, 0.0])


def test_top_k_and_top_p_keep_the_fewest_tokens_that_they_allow() -> None:
    assert set(draw(400, top_k=2)) == {0, 1}
    assert set(draw(400, top_p=0.49)) == {0}
    assert set(draw(400, top_p=0.51)) == {0, 1}
    assert set(draw(400, top_p=1e-9)) == {0}
    assert set(draw(400, temperature=2.0, top_k=3, top_p=0.99)) == {0, 1, 2}


def test_top_p_counts_among_what_top_k_and_min_p_have_left() -> None:
    assert set(draw(400, top_k=2, top_p=0.66)) == {0}  # two thirds of what top_k leaves
    assert set(draw(400, min_p=0.4, top_p=0.66)) == {0}
    assert set(draw(400, top_k=2, top_p=0.68)) == {0, 1}


def test_min_p_keeps_what_has_that_part_of_the_largest_probability_at_the_temperature() -> None:
    assert set(draw(400, min_p=0.29)) == {0, 1, 2}
    assert set(draw(400, min_p=0.31)) == {0, 1}
    assert set(draw(400, min_p=1.0)) == {0}
    assert set(draw(800, min_p=0.31, temperature=2.0)) == {0, 1, 2, 3}


def test_tokens_of_equal_probability_stay_or_go_together() -> None:
    logits = torch.tensor([0.0, 1.0, 1.0, 1.0, -1.0])
    assert set(draw(400, logits, top_k=2)) == {1, 2, 3}
    assert set(draw(400, logits, top_p=0.1)) == {1, 2, 3}


@settings(max_examples=200)
@given(st.integers(0, 2**32), st.integers(1, 60), st.floats(0.05, 0.999), st.floats(0.0, 0.5), st.floats(0.3, 2.0))
def test_what_can_be_drawn_is_what_a_full_sort_would_keep(
    seed: int, top_k: int, top_p: float, min_p: float, temperature: float
) -> None:
    logits = torch.randn(50, generator=torch.Generator().manual_seed(seed)) * 3
    probabilities = (logits.double() / temperature).softmax(-1)
    order = probabilities.argsort(descending=True).tolist()
    kept = [token for token in order if probabilities[token] >= min_p * probabilities.max()][:top_k]
    total, reached, expected = float(probabilities[kept].sum()), 0.0, []
    margin = min(abs(float(probability / probabilities.max()) - min_p) for probability in probabilities)
    for token in kept:
        expected.append(token)
        reached += float(probabilities[token])
        margin = min(margin, abs(reached / total - top_p))
        if reached / total >= top_p:
            break
    drawn = set(draw(40, logits, top_k=top_k, top_p=top_p, min_p=min_p, temperature=temperature, seed=seed))
    if margin > 1e-5:  # nearer to an edge, float32 may fall on either side
        assert drawn <= set(expected)
        assert len(drawn) == 1 or len(expected) > 1


ANY_CHOOSING = st.builds(
    Choosing,
    temperature=st.sampled_from([0.0, 0.7, 1.3]),
    top_p=st.sampled_from([1.0, 0.9, 0.3]),
    top_k=st.sampled_from([0, 1, 5, 40]),
    min_p=st.sampled_from([0.0, 0.05]),
    seed=st.integers(-(2**63), 2**63 - 1),
    min_tokens=st.integers(0, 3),
    frequency_penalty=st.sampled_from([0.0, 1.5]),
    repetition_penalty=st.sampled_from([1.0, 1.3]),
    logit_bias=st.sampled_from([{}, {3: 4.0, 7: -100.0}]),
)


@settings(max_examples=100, deadline=None)
@given(st.lists(ANY_CHOOSING, min_size=2, max_size=6), st.integers(1, 300), st.randoms(use_true_random=False))
def test_a_seeded_row_gives_the_same_tokens_whatever_else_is_in_the_batch(
    batch: list[Choosing], vocabulary: int, order: random.Random
) -> None:
    vocabulary += 8
    logits = torch.randn(5, len(batch), vocabulary, generator=torch.Generator().manual_seed(vocabulary)) * 3
    alone = []
    for place, choosing in enumerate(batch):
        row = RowSampling(choosing, [1, 2, 3], [0], logprobs=2)
        steps = []
        for step in range(5):
            steps += choose(logits[step, place][None].clone(), [row])
            row.take(steps[-1].token)
        alone.append(steps)
    places = list(range(len(batch)))
    rows = [RowSampling(choosing, [1, 2, 3], [0], logprobs=2) for choosing in batch]
    together: list[list[object]] = [[] for _ in batch]
    for step in range(5):
        order.shuffle(places)
        for place, choice in zip(places, choose(logits[step, places], [rows[place] for place in places]), strict=True):
            together[place].append(choice)
            rows[place].take(choice.token)
    assert together == alone


def test_a_choice_can_be_made_again_until_it_is_taken() -> None:
    flat = torch.zeros(1, 1000)
    row = RowSampling(Choosing(temperature=1.0, seed=3))
    first = choose(flat, [row])
    assert choose(flat, [row]) == first
    row.take(first[0].token)
    assert choose(flat, [row]) != first


def test_each_answer_of_a_seeded_request_has_numbers_of_its_own() -> None:
    flat = torch.zeros(1, 1000)
    texts = []
    for index in (0, 1, 2, 0):
        row = RowSampling(Choosing(temperature=1.0, seed=3), index=index)
        texts.append([tokens(flat, [row])[0] for _ in range(10)])
    assert texts[0] == texts[3]
    assert len({tuple(text) for text in texts}) == 3


def test_without_a_seed_draws_differ() -> None:
    flat = torch.zeros(1, 1000)
    rows = [RowSampling(Choosing(temperature=1.0)) for _ in range(20)]
    assert len(set(tokens(flat.expand(20, -1), rows))) > 10


def test_draws_are_even_over_all_seeds() -> None:
    numbers = [RowSampling(Choosing(seed=seed)).draw() for seed in range(20_000)]
    assert 0.0 <= min(numbers) < 0.001
    assert 0.999 < max(numbers) < 1.0
    counts = Counter(int(number * 10) for number in numbers)
    assert all(abs(count - 2000) < 4 * math.sqrt(20_000 * 0.1 * 0.9) for count in counts.values())


def test_logits_as_large_as_floats_go_leave_one_token() -> None:
    logits = torch.tensor([3e38, -3e38, 0.0])
    assert set(draw(20, logits, temperature=0.01)) == {0}


def test_logprobs_are_the_models_own_before_temperature_penalties_and_masks() -> None:
    logits = torch.randn(2, 500, generator=torch.Generator().manual_seed(1)) * 4
    expected = logits.double().log_softmax(-1)
    choosing = Choosing(temperature=1.7, seed=5, min_tokens=2, presence_penalty=1.0, logit_bias={9: 100.0})
    biased, greedy = choose(logits, [RowSampling(choosing, [], [9], logprobs=5), RowSampling(Choosing(), logprobs=0)])
    assert biased.logprob == pytest.approx(float(expected[0, biased.token]), abs=1e-5)
    values, best = expected[0].topk(5)
    assert [token for token, _ in biased.top] == best.tolist()
    assert [logprob for _, logprob in biased.top] == pytest.approx(values.tolist(), abs=1e-5)
    assert greedy.logprob == pytest.approx(float(expected[1].max()), abs=1e-5)
    assert greedy.top == []


def test_the_logprobs_of_given_tokens_are_those_of_log_softmax() -> None:
    logits = torch.randn(3, 50, generator=torch.Generator().manual_seed(2))
    expected = logits.log_softmax(-1)
    for row, measured in enumerate(logprobs_of(logits, [4, 0, 49], 50)):
        assert measured.token_id == [4, 0, 49][row]
        assert measured.logprob == pytest.approx(float(expected[row, measured.token_id]), abs=1e-5)
        assert len(measured.top) == 50
        assert dict(measured.top) == pytest.approx(dict(enumerate(expected[row].tolist())), abs=1e-5)
    (tied,) = logprobs_of(torch.tensor([[1.0, 2.0, 2.0, 2.0]]), [0], 2)
    assert [token for token, _ in tied.top] == [1, 2]


def test_no_row_is_changed_by_choosing() -> None:
    logits = torch.randn(3, 50)
    before = logits.clone()
    choosing = Choosing(temperature=1.0, min_tokens=4, repetition_penalty=2.0, logit_bias={1: 5.0}, top_p=0.5)
    tokens(logits, [RowSampling(choosing, [1, 2], [3], logprobs=3), RowSampling(Choosing()), RowSampling(choosing)])
    assert logits.equal(before)


def test_nothing_that_ends_is_chosen_before_min_tokens() -> None:
    logits = torch.tensor([[1.0, 9.0, 8.0, 0.0]])
    row = RowSampling(Choosing(min_tokens=2, stop_token_ids=[2]), [], [1])
    assert [tokens(logits, [row])[0] for _ in range(4)] == [0, 0, 1, 1]


def test_an_ending_is_chosen_early_where_there_is_nothing_else() -> None:
    row = RowSampling(Choosing(min_tokens=2, stop_token_ids=[0]), [], [1])
    assert tokens(torch.tensor([[1.0, 2.0]]), [row]) == [1]


def test_an_answer_ends_at_eos_unless_ignored_and_at_stop_tokens() -> None:
    usual = RowSampling(Choosing(stop_token_ids=[7]), [], [1, 2])
    assert [token for token in range(9) if usual.ends(token)] == [1, 2, 7]
    endless = RowSampling(Choosing(stop_token_ids=[7], ignore_eos=True), [], [1, 2])
    assert [token for token in range(9) if endless.ends(token)] == [7]
    held = RowSampling(Choosing(ignore_eos=True, min_tokens=3), [], [1])
    assert tokens(torch.tensor([[1.0, 9.0]]), [held]) == [1]  # which is text then, and no ending


def test_rows_that_need_nothing_stay_plain_and_others_become_so() -> None:
    assert RowSampling(Choosing(top_p=0.5, top_k=3, stop_token_ids=[1])).plain
    waiting = RowSampling(Choosing(min_tokens=1), [], [1])
    assert not waiting.plain
    waiting.take(0)
    assert waiting.plain
    for choosing in (Choosing(temperature=0.5), Choosing(presence_penalty=0.1), Choosing(logit_bias={1: 1.0})):
        assert not RowSampling(choosing).plain
    assert not RowSampling(Choosing(), logprobs=0).plain


def test_a_row_without_changes_is_not_copied() -> None:
    values = np.zeros(8, np.float32)
    assert RowSampling(Choosing(temperature=1.0)).adjust(values) is values
