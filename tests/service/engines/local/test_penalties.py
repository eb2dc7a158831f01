from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import RepetitionPenaltyLogitsProcessor

from service.engines.local.messages import Choosing
from service.engines.local.penalties import Penalties

LOGITS = [2.0, -2.0, 1.0, 0.0, -1.0, 3.0]


def penalised(choosing: Choosing, prompt: list[int], answer: list[int]) -> list[float]:
    penalties = Penalties(choosing, prompt)
    for token in answer:
        penalties.take(token)
    logits = np.array(LOGITS, np.float32)
    penalties.apply(logits)
    return logits.tolist()


def test_frequency_counts_each_time_in_the_answer_and_not_in_the_prompt() -> None:
    changed = penalised(Choosing(frequency_penalty=0.5), [0, 0, 1], [5, 2, 5, 5])
    assert changed == [2.0, -2.0, 0.5, 0.0, -1.0, 1.5]


def test_presence_counts_once_in_the_answer_and_not_in_the_prompt() -> None:
    changed = penalised(Choosing(presence_penalty=-1.0), [0, 0, 1], [5, 2, 5, 5])
    assert changed == [2.0, -2.0, 2.0, 0.0, -1.0, 4.0]


def test_repetition_divides_positive_and_multiplies_negative_logits_of_prompt_and_answer() -> None:
    changed = penalised(Choosing(repetition_penalty=2.0), [0, 1, 0], [5, 3, 5])
    assert changed == [1.0, -4.0, 1.0, 0.0, -1.0, 1.5]


def test_repetition_is_that_of_transformers() -> None:
    scores = RepetitionPenaltyLogitsProcessor(1.3)(torch.tensor([[0, 1, 0, 5, 4]]), torch.tensor([LOGITS]))
    assert penalised(Choosing(repetition_penalty=1.3), [0, 1, 0], [5, 4]) == scores[0].tolist()


def test_bias_is_added_first() -> None:
    changed = penalised(Choosing(logit_bias={1: 4.0, 2: -100.0}, repetition_penalty=2.0), [1], [])
    assert changed == [2.0, 1.0, -99.0, 0.0, -1.0, 3.0]


def test_what_is_not_asked_for_needs_no_work() -> None:
    assert not Penalties.needed(Choosing(temperature=1.0, top_k=4, min_tokens=3, stop_token_ids=[4]))
    for choosing in (
        Choosing(logit_bias={1: 1.0}),
        Choosing(frequency_penalty=0.1),
        Choosing(presence_penalty=0.1),
        Choosing(repetition_penalty=0.9),
    ):
        assert Penalties.needed(choosing)


@settings(max_examples=100)
@given(
    st.lists(st.integers(0, 299), max_size=200),
    st.lists(st.integers(0, 299), max_size=300),
    st.sampled_from([0.5, 1.0, 1.3]),
    st.sampled_from([-1.0, 0.0, 0.7]),
    st.sampled_from([0.0, 1.1]),
)
def test_penalties_are_those_of_the_formula(
    prompt: list[int], answer: list[int], repetition: float, frequency: float, presence: float
) -> None:
    choosing = Choosing(
        repetition_penalty=repetition, frequency_penalty=frequency, presence_penalty=presence, logit_bias={7: 3.0}
    )
    penalties = Penalties(choosing, prompt)
    for token in answer:
        penalties.take(token)
    before = np.random.default_rng(0).normal(size=300).astype(np.float32)
    logits = before.copy()
    penalties.apply(logits)
    for token in range(300):
        value = float(before[token]) + (3.0 if token == 7 else 0.0)
        if token in prompt or token in answer:
            value = value / repetition if value > 0 else value * repetition
        value -= frequency * answer.count(token) + presence * (token in answer)
        assert logits[token] == pytest.approx(value, abs=1e-4)
