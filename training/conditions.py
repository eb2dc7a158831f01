"""Conditions on captured traffic, such as `outcome.helpful = true and latency_ms < 500`. Pure.

    condition  = all { "or" all }
    all        = term { "and" term }
    term       = "not" term | "(" condition ")" | comparison
    comparison = name ( "=" | "!=" | "<" | "<=" | ">" | ">=" ) value
    value      = "true" | "false" | number | 'text' | "text"

Words are taken in any case. Within a text, the quote that surrounds it is written twice. A metric that is no plain
word is quoted: outcome."is it right". What a name means, `check` is told.
"""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from prompt_store.errors import nearest_name
from training.errors import ConditionError

Operator = Literal["=", "!=", "<", "<=", ">", ">="]
Value = bool | float | str
Kind = Literal["boolean", "number", "text"]

OUTCOME = "outcome."
MAX_DEPTH = 50
_SHOWN = 24

_OPERATORS: Mapping[str, Callable[[Any, Any], bool]] = {
    "=": operator.eq, "!=": operator.ne, "<": operator.lt, "<=": operator.le, ">": operator.gt, ">=": operator.ge,
}  # fmt: skip
_ORDERING = ("<", "<=", ">", ">=")
_QUOTED = r"""'(?:[^']|'')*'|"(?:[^"]|"")*\""""
_PLAIN_METRIC = re.compile(r"[\w.:-]+")
_TOKEN = re.compile(
    rf"(?P<metric>outcome\.(?:{_QUOTED}))|(?P<word>[^\W\d][\w.:-]*)|(?P<number>[+-]?[0-9]+(?:\.[0-9]+)?(?:[eE][+-]?[0-9]+)?)"
    rf"|(?P<text>{_QUOTED})|(?P<operator>!=|<=|>=|=|<|>)|(?P<bracket>[()])"
)
_SPACE = re.compile(r"\s*")
_EXAMPLES: Mapping[Kind, str] = {"boolean": "true or false", "number": "a number", "text": "a text in quotes"}


@dataclass(frozen=True, slots=True)
class Comparison:
    """What `name` holds against a value; `place` is where it stands in what was read, and not part of what it says."""

    name: str
    operator: Operator
    value: Value
    place: int = field(default=0, compare=False)

    def __str__(self) -> str:
        return f"{_name_text(self.name)} {self.operator} {_value_text(self.value)}"


@dataclass(frozen=True, slots=True)
class Not:
    """What the condition does not say."""

    condition: Condition

    def __str__(self) -> str:
        return f"not {_bracketed(self.condition)}"


@dataclass(frozen=True, slots=True)
class All:
    """Two or more conditions that hold together."""

    conditions: tuple[Condition, ...]

    def __str__(self) -> str:
        return " and ".join(map(_bracketed, self.conditions))


@dataclass(frozen=True, slots=True)
class Some:
    """Two or more conditions of which one holds."""

    conditions: tuple[Condition, ...]

    def __str__(self) -> str:
        return " or ".join(str(one) if isinstance(one, All) else _bracketed(one) for one in self.conditions)


Condition = Comparison | Not | All | Some


def parse_condition(text: str) -> Condition:
    """Raises ConditionError with the place of what cannot be read."""
    return _Reader(text).whole()


def check(condition: Condition, known: Mapping[str, Kind]) -> None:
    """That every name is known and compared with a value of its kind. Raises ConditionError naming the nearest name."""
    for comparison in comparisons(condition):
        name, value = comparison.name, comparison.value
        kind = known.get(name)
        if kind is None:
            near = f"{OUTCOME}{name}" if f"{OUTCOME}{name}" in known else nearest_name(name, known)
            listed = ", ".join(map(_name_text, known))
            hint = f"did you mean {_name_text(near)}?" if near is not None else f"there are {listed}"
            raise ConditionError(f"{_at(comparison.place)}: nothing is called {_name_text(name)}; {hint}")
        if kind != _kind(value):
            raise ConditionError(
                f"{_at(comparison.place)}: {_name_text(name)} is not compared with {_value_text(value)}; "
                f"give {_EXAMPLES[kind]}"
            )
        if kind != "number" and comparison.operator in _ORDERING:
            raise ConditionError(
                f"{_at(comparison.place)}: {_name_text(name)} has no order, so {comparison.operator!r} says nothing of "
                "it; use = or !="
            )


def holds(condition: Condition, facts: Mapping[str, Value | None]) -> bool:
    """Whether it is so. A comparison with what is missing is false, by whichever operator; `not` makes that true."""
    match condition:
        case Comparison(name, by, value):
            fact = facts.get(name)
            return fact is not None and _OPERATORS[by](fact, value)
        case Not(inner):
            return not holds(inner, facts)
        case All(conditions):
            return all(holds(one, facts) for one in conditions)
        case Some(conditions):
            return any(holds(one, facts) for one in conditions)


def comparisons(condition: Condition) -> Iterator[Comparison]:
    """All that are in it, in their order."""
    match condition:
        case Comparison():
            yield condition
        case Not(inner):
            yield from comparisons(inner)
        case All(conditions) | Some(conditions):
            for one in conditions:
                yield from comparisons(one)


def replaced(condition: Condition, replace: Callable[[Comparison], Comparison]) -> Condition:
    """The same with each comparison replaced."""
    match condition:
        case Comparison():
            return replace(condition)
        case Not(inner):
            return Not(replaced(inner, replace))
        case All(conditions):
            return All(tuple(replaced(one, replace) for one in conditions))
        case Some(conditions):
            return Some(tuple(replaced(one, replace) for one in conditions))


@dataclass(frozen=True, slots=True)
class _Token:
    kind: str
    text: str
    place: int

    def is_word(self, word: str) -> bool:
        return self.kind == "word" and self.text.lower() == word


class _Reader:
    """One condition, read from left to right by the grammar above: a method a rule."""

    def __init__(self, text: str) -> None:
        self._text = text
        self._tokens = _tokens(text)
        self._next = next(self._tokens)
        self._depth = 0

    def whole(self) -> Condition:
        condition = self._condition()
        if self._next.kind != "end":
            self._expected("'and', 'or' or the end")
        return condition

    def _condition(self) -> Condition:
        found = [self._all()]
        while self._next.is_word("or"):
            self._take()
            found.append(self._all())
        return Some(tuple(found)) if len(found) > 1 else found[0]

    def _all(self) -> Condition:
        found = [self._term()]
        while self._next.is_word("and"):
            self._take()
            found.append(self._term())
        return All(tuple(found)) if len(found) > 1 else found[0]

    def _term(self) -> Condition:
        negated = self._next.is_word("not")
        if not negated and self._next.text != "(":
            return self._comparison()
        opening = self._take()
        self._depth += 1
        if self._depth > MAX_DEPTH:
            raise ConditionError(
                f"{_at(opening.place)}: this is nested more than {MAX_DEPTH} deep; use fewer brackets and nots"
            )
        found: Condition
        if negated:
            found = Not(self._term())
        else:
            found = self._condition()
            if self._next.text != ")":
                self._expected(f"')' for the '(' at character {opening.place + 1}")
            self._take()
        self._depth -= 1
        return found

    def _comparison(self) -> Comparison:
        if self._next.kind not in ("word", "metric"):
            self._expected("a name, such as outcome.helpful or latency_ms")
        token = self._take()
        if token.text.lower() in ("and", "or", "not", "true", "false"):
            raise ConditionError(f"{_at(token.place)}: {token.text!r} is no name; give one, as in cost < 1")
        name = OUTCOME + _unquoted(token.text[len(OUTCOME) :]) if token.kind == "metric" else token.text
        if name == OUTCOME:
            raise ConditionError(f"{_at(token.place)}: 'outcome.' lacks its metric; as in outcome.helpful = true")
        if self._next.kind != "operator":
            self._expected(f"a comparison after {_name_text(name)}, such as {_name_text(name)} = true")
        compared: Any = self._take().text
        return Comparison(name, compared, self._value(), token.place)

    def _value(self) -> Value:
        token = self._next
        if token.is_word("true") or token.is_word("false"):
            return self._take().text.lower() == "true"
        if token.kind == "text":
            return _unquoted(self._take().text)
        if token.kind == "word":
            raise ConditionError(f"{_at(token.place)}: a text stands in quotes; write '{token.text}'")
        if token.kind != "number":
            self._expected("true, false, a number or a text in quotes")
        number = float(self._take().text)
        if not math.isfinite(number):
            raise ConditionError(f"{_at(token.place)}: {_shortened(token.text)} is too large; give a smaller number")
        return number

    def _take(self) -> _Token:
        taken, self._next = self._next, next(self._tokens)
        return taken

    def _expected(self, what: str) -> None:
        rest = self._text[self._next.place :]
        there = f"{_shortened(rest)!r} stands there" if rest else "it ends there"
        raise ConditionError(f"{_at(self._next.place)}: {there}; {what} is needed")


def _tokens(text: str) -> Iterator[_Token]:
    """Ends with a token of the kind `end`. Raises ConditionError where none begins."""
    place = _skipped(text, 0)
    while place < len(text):
        match = _TOKEN.match(text, place)
        if match is None:
            remedy = "close the quote" if text[place] in "'\"" else "remove it, or put texts in quotes"
            raise ConditionError(f"{_at(place)}: {_shortened(text[place:])!r} cannot be read; {remedy}")
        assert match.lastgroup is not None
        yield _Token(match.lastgroup, match.group(), place)
        place = _skipped(text, match.end())
    yield _Token("end", "", len(text))


def _skipped(text: str, place: int) -> int:
    match = _SPACE.match(text, place)
    return match.end() if match is not None else place


def _unquoted(text: str) -> str:
    return text[1:-1].replace(text[0] * 2, text[0])


def _bracketed(condition: Condition) -> str:
    return f"({condition})" if isinstance(condition, All | Some) else str(condition)


def _name_text(name: str) -> str:
    metric = name.removeprefix(OUTCOME)
    if metric == name or _PLAIN_METRIC.fullmatch(metric):
        return name
    return OUTCOME + _value_text(metric)


def _value_text(value: Value) -> str:
    match value:
        case bool():
            return "true" if value else "false"
        case str():
            return "'" + value.replace("'", "''") + "'"
    return repr(int(value)) if value.is_integer() and abs(value) < 1e15 else repr(value)


def _kind(value: Value) -> Kind:
    match value:
        case bool():
            return "boolean"
        case str():
            return "text"
    return "number"


def _shortened(text: str) -> str:
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}…"


def _at(place: int) -> str:
    return f"the condition at character {place + 1}"
