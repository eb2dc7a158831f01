from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.engines.base import TokenLogprob
from service.engines.remote.answer_body import NO_TOKEN_ID
from service.engines.remote.labels import label_scores


def place(text: str, probability: float, **shown: float) -> TokenLogprob:
    """A generated token, and the alternatives that are shown in its place."""
    top = tuple(
        TokenLogprob(NO_TOKEN_ID, math.log(other), (), name, name.encode())
        for name, other in {text: probability, **shown}.items()
    )
    return TokenLogprob(NO_TOKEN_ID, math.log(probability), top, text, text.encode())


def probabilities(tokens: Sequence[TokenLogprob], labels: Sequence[str], chosen: int = 0) -> list[float]:
    scores = label_scores(tokens, labels, chosen)
    assert scores is not None
    return [math.exp(score) for score in scores]


LABELS = ["get refund", "track order", "greeting"]


def test_it_is_exact_where_every_alternative_is_shown() -> None:
    given = probabilities([place("get", 0.6, track=0.3, greeting=0.1), place(" refund", 1.0)], LABELS)
    assert given == pytest.approx([0.6, 0.3, 0.1])


def test_several_labels_behind_one_alternative_share_it() -> None:
    labels = ["yes", "no", "not now"]
    assert probabilities([place("yes", 0.6, no=0.4)], labels) == pytest.approx([0.6, 0.2, 0.2])


def test_labels_that_begin_alike_part_where_their_tokens_do() -> None:
    labels = ["get refund", "get order", "stop"]
    tokens = [place("get", 0.8, stop=0.2), place(" refund", 0.75, **{" order": 0.25})]
    assert probabilities(tokens, labels) == pytest.approx([0.6, 0.2, 0.2])


def test_a_label_that_is_not_shown_gets_no_more_than_the_least_that_is() -> None:
    labels = ["a", "b", "c", "d"]
    few = probabilities([place("a", 0.9, b=0.01)], labels)
    assert few == pytest.approx([0.9 / 0.93, 0.01 / 0.93, 0.01 / 0.93, 0.01 / 0.93])
    rest = probabilities([place("a", 0.9, b=0.09)], labels)
    assert rest == pytest.approx([0.9, 0.09, 0.005, 0.005])


def test_the_end_of_the_text_is_the_alternative_of_a_label_within_another() -> None:
    labels = ["cat food", "cat"]
    tokens = [place("cat", 1.0), place(" food", 0.7, **{"<|im_end|>": 0.3})]
    assert probabilities(tokens, labels) == pytest.approx([0.7, 0.3])
    ended = [place("cat", 1.0), place("<|im_end|>", 0.3, **{" food": 0.7})]
    assert probabilities(ended, labels, chosen=1) == pytest.approx([0.7, 0.3])


def test_a_text_that_goes_on_within_a_word_is_no_label() -> None:
    assert probabilities([place("cat", 0.5, dogma=0.3, dog=0.2)], ["cat", "dog"]) == pytest.approx([5 / 7, 2 / 7])


def test_what_stands_around_a_label_counts_for_none() -> None:
    spelled = [f'{{"choice":"{label}"' for label in ("yes", "no")]
    tokens = [
        place('{"', 0.9, **{"{ ": 0.1}),
        place("choice", 1.0),
        place('":"', 1.0),
        place("yes", 0.6, no=0.3),
        place('"}', 1.0),
    ]
    assert probabilities(tokens, spelled) == pytest.approx([2 / 3, 1 / 3], abs=0.05)


def test_tokens_that_spell_another_label_tell_nothing() -> None:
    assert label_scores([place("track", 0.6, get=0.4)], LABELS, 0) is None
    assert label_scores([place("get it", 0.6)], LABELS, 0) is None
    assert label_scores([], ["a", "ab"], 1) is None


def test_an_answer_whose_own_tokens_had_no_probability_tells_nothing() -> None:
    masked = TokenLogprob(NO_TOKEN_ID, -9999.0, (), "track", b"track")
    assert label_scores([masked], LABELS, 1) is None


@st.composite
def answers(draw: st.DrawFn) -> tuple[list[str], list[TokenLogprob], int]:
    """Labels, one of them as a constrained model would have generated it, and some of the alternatives shown."""
    labels = draw(st.lists(st.text("ab c", min_size=1, max_size=6), min_size=2, max_size=6, unique=True))
    chosen = draw(st.integers(0, len(labels) - 1))
    tokens, rest = [], labels[chosen]
    while rest:
        length = draw(st.integers(1, len(rest)))
        piece, rest = rest[:length], rest[length:]
        others = [
            text for text in draw(st.lists(st.text("ab c<>", max_size=4), max_size=4, unique=True)) if text != piece
        ]
        weights = draw(st.lists(st.floats(0.001, 1.0), min_size=len(others) + 2, max_size=len(others) + 2))
        whole = math.fsum(weights)  # the last is what is not shown
        shown = {text: weight / whole for text, weight in zip(others, weights[1:-1], strict=True)}
        tokens.append(place(piece, weights[0] / whole, **shown))
    return labels, tokens, chosen


@given(answers())
def test_probabilities_sum_to_one_whatever_is_shown(given_: tuple[list[str], list[TokenLogprob], int]) -> None:
    labels, tokens, chosen = given_
    scores = label_scores(tokens, labels, chosen)
    assert scores is not None
    assert math.fsum(map(math.exp, scores)) == pytest.approx(1.0)
    assert all(score > -math.inf for score in scores)


@given(answers())
def test_the_label_that_has_most_of_the_probability_wins(given_: tuple[list[str], list[TokenLogprob], int]) -> None:
    labels, tokens, chosen = given_
    reached = math.exp(math.fsum(token.logprob for token in tokens))
    begins_others = any(other != labels[chosen] and other.startswith(labels[chosen]) for other in labels)
    scores = label_scores(tokens, labels, chosen)
    assert scores is not None
    if reached > 0.5 and not begins_others:
        assert max(scores) == scores[chosen]


@given(st.lists(st.floats(0.01, 1.0), min_size=2, max_size=8), st.data())
def test_it_is_exact_for_any_probabilities_of_labels_that_part_along_the_answer(
    weights: list[float], data: st.DataObject
) -> None:
    """Label i is i times 'a' and then 'b': at every place of the longest one label parts from the others."""
    labels = ["a" * count + "b" for count in range(len(weights))]
    expected = [weight / math.fsum(weights) for weight in weights]
    chosen = data.draw(st.integers(0, len(labels) - 1))
    tokens, left = [], 1.0
    for count in range(chosen):
        tokens.append(place("a", max(1 - expected[count] / left, 1e-9), b=expected[count] / left))
        left -= expected[count]
    ends = min(expected[chosen] / left, 1.0)
    tokens.append(place("b", ends, **({"a": 1 - ends} if ends < 1 else {})))
    given_ = probabilities(tokens, labels, chosen)
    assert given_[: chosen + 1] == pytest.approx(expected[: chosen + 1], rel=1e-6, abs=1e-9)
    beyond = math.fsum(expected[chosen + 1 :])  # those share what the last alternative has
    assert given_[chosen + 1 :] == pytest.approx(
        [beyond / max(1, len(labels) - chosen - 1)] * (len(labels) - chosen - 1), rel=1e-6, abs=1e-9
    )
