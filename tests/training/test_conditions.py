from __future__ import annotations

import re
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from training.conditions import (
    MAX_DEPTH,
    All,
    Comparison,
    Condition,
    Kind,
    Not,
    Some,
    check,
    comparisons,
    holds,
    parse_condition,
)
from training.errors import ConditionError

KNOWN: dict[str, Kind] = {
    "outcome.helpful": "boolean",
    "outcome.stars": "number",
    "latency_ms": "number",
    "arm": "text",
}

WORDS = st.from_regex(r"[a-z_][a-z0-9_.:-]{0,8}", fullmatch=True).filter(
    lambda word: word not in ("and", "or", "not", "true", "false", "outcome.")
)
NAMES = WORDS | st.text(min_size=1).map("outcome.{}".format)
VALUES = st.booleans() | st.floats(allow_nan=False, allow_infinity=False) | st.text()
COMPARISONS = st.builds(Comparison, NAMES, st.sampled_from(["=", "!=", "<", "<=", ">", ">="]), VALUES)


def _joined(inner: st.SearchStrategy[Condition]) -> st.SearchStrategy[Condition]:
    several = st.lists(inner, min_size=2, max_size=4).map(tuple)
    return st.builds(Not, inner) | st.builds(All, several) | st.builds(Some, several)


CONDITIONS = st.recursive(COMPARISONS, _joined, max_leaves=12)


@given(CONDITIONS)
def test_what_is_printed_is_read_as_the_same_condition(condition: Condition) -> None:
    again = parse_condition(str(condition))
    assert again == condition
    kinds = [(type(one.value), one.value) for one in comparisons(condition)]
    assert [(type(one.value), one.value) for one in comparisons(again)] == kinds  # True == 1.0, so equality hides kinds


PIECES = [
    "outcome.",
    "outcome.helpful",
    "'",
    '"',
    "''",
    "(",
    ")",
    "and",
    "or",
    "not",
    "=",
    "!",
    "<=",
    "1",
    "-",
    "1e999",
]


@given(st.text() | st.lists(st.sampled_from([*PIECES, "true", "latency_ms", " "])).map(" ".join))
@example("(" * 100_000)
@example("not " * 100_000)
@example("a = 1" + " and a = 1" * 10_000)
@example("\ud800 = 1")
def test_any_text_is_a_condition_or_refused_with_its_place(text: str) -> None:
    try:
        condition = parse_condition(text)
    except ConditionError as error:
        place = re.match(r"the condition at character (\d+): ", str(error))
        refused_at = int(place[1]) if place is not None else 0
    else:
        assert parse_condition(str(condition)) == condition
        return
    assert 1 <= refused_at <= len(text) + 1


def test_and_binds_tighter_than_or_and_not_tighter_than_both() -> None:
    a, b, c = (Comparison(name, "=", 1.0) for name in "abc")
    assert parse_condition("a = 1 or b = 1 and not c = 1") == Some((a, All((b, Not(c)))))
    assert parse_condition("(a = 1 OR b = 1) And NOT (c=1)") == All((Some((a, b)), Not(c)))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", r"character 1: it ends there; a name, such as outcome\.helpful or latency_ms is needed"),
        (
            "outcome.helpful",
            r"character 16: it ends there; a comparison after outcome\.helpful, such as outcome\.helpful = ",
        ),
        ("outcome.helpful = ", "character 19: it ends there; true, false, a number or a text in quotes is needed"),
        ("arm = fast", "character 7: a text stands in quotes; write 'fast'"),
        ("cost < 1 cost > 2", r"character 10: 'cost > 2' stands there; 'and', 'or' or the end is needed"),
        ("(cost < 1", r"character 10: it ends there; '\)' for the '\(' at character 1 is needed"),
        ("arm = 'fast", 'character 7: "\'fast" cannot be read; close the quote'),
        ("cost == 1", "character 7: '= 1' stands there; true, false, a number"),
        ("cost < 1 && cost > 0", "character 10: '&& cost > 0' cannot be read; remove it"),
        ("and = 1", "character 1: 'and' is no name"),
        ("outcome. = 1", "character 1: 'outcome.' lacks its metric"),
        ("cost < 1e999", "character 8: 1e999 is too large"),
        ("(" * (MAX_DEPTH + 1), f"character {MAX_DEPTH + 1}: this is nested more than {MAX_DEPTH} deep"),
    ],
)
def test_what_cannot_be_read_is_refused_at_its_place_with_the_remedy(text: str, said: str) -> None:
    with pytest.raises(ConditionError, match=said):
        parse_condition(text)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("arm = 'a' and outcome.helpfull = true", r"character 15: nothing is called outcome\.helpfull; did you mean o"),
        ("helpful = true", r"nothing is called helpful; did you mean outcome\.helpful\?"),
        ("zzz = 1", r"nothing is called zzz; there are outcome\.helpful, outcome\.stars, latency_ms, arm"),
        ("outcome.helpful = 1", r"character 1: outcome\.helpful is not compared with 1; give true or false"),
        ("latency_ms = true", "latency_ms is not compared with true; give a number"),
        ("not arm = 5", "character 5: arm is not compared with 5; give a text in quotes"),
        ("arm < 'a'", "arm has no order, so '<' says nothing of it; use = or !="),
        ("outcome.helpful >= true", "has no order"),
    ],
)  # fmt: skip
def test_what_the_task_does_not_have_is_refused_naming_the_nearest(text: str, said: str) -> None:
    with pytest.raises(ConditionError, match=said):
        check(parse_condition(text), KNOWN)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("outcome.helpful = true", True),
        ("outcome.helpful != true", False),
        ("latency_ms <= 250 and latency_ms >= 250", True),
        ("latency_ms < 250 or latency_ms > 250", False),
        ("arm = 'it''s' and arm = \"it's\"", True),
        ('outcome."is it right" = true', True),
        ("outcome.stars = 5", False),
        ("outcome.stars != 5", False),
        ("not outcome.stars = 5", True),
    ],
)
def test_a_comparison_with_what_is_missing_is_false(text: str, *, expected: bool) -> None:
    facts: dict[str, Any] = {"outcome.helpful": 1.0, "latency_ms": 250.0, "arm": "it's", "outcome.is it right": 1.0}
    assert holds(parse_condition(text), {**facts, "outcome.stars": None}) is expected
