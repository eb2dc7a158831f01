import hashlib
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from prompt_store.canonical import canonical_digest, canonical_json

documents = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text('aäé"\\\n'),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=4), inner, max_size=4),
    max_leaves=12,
)


def test_the_spelling_is_fixed() -> None:
    assert (
        canonical_json({"b": [1, 2.5, None], "a": "ä\n", "c": True})
        == '{"a":"ä\\n","b":[1,2.5,null],"c":true}'.encode()
    )
    assert canonical_digest({}) == hashlib.sha256(b"{}").hexdigest()


@given(st.dictionaries(st.text("abcde", max_size=3), documents, max_size=6))
def test_key_order_never_matters(document: dict[str, Any]) -> None:
    assert canonical_json(document) == canonical_json(dict(reversed(document.items())))


@pytest.mark.parametrize(
    "value", [float("nan"), [float("inf")], {1: "a"}, {"a": {True: 1}}, {"a": {1, 2}}, "\ud800", b"bytes"]
)
def test_what_has_no_one_spelling_is_refused(value: object) -> None:
    with pytest.raises(ValueError, match=r"."):
        canonical_json(value)


def test_a_circular_or_very_deep_document_is_refused() -> None:
    circular: list[Any] = []
    circular.append(circular)
    deep: list[Any] = []
    for _ in range(100_000):
        deep = [deep]
    for value in (circular, deep):
        with pytest.raises(ValueError, match=r"."):
            canonical_json(value)
