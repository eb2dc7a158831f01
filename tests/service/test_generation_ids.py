from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.generation_ids import GenerationTag, sign, unit_hash, verify
from service.routing.errors import UnknownGeneration

KEY = b"k" * 32
TAG = GenerationTag("support_intents", "ab" * 8, "b", unit_hash("user 7", KEY), 1_795_000_000_000, "5f-1", "tone")


def test_an_id_says_what_the_generation_was_with_or_without_openais_prefix() -> None:
    generation = sign(TAG, KEY)
    assert verify(generation, KEY) == verify(f"chatcmpl-{generation}", KEY) == TAG


def test_an_id_that_an_earlier_release_signed_verifies() -> None:
    """Bodies then wrote what is not ASCII as escapes."""
    body = "WyJhIiwiIiwiclx1MDBmY2Nrd2VnIiwiYmU4ODMzNjE2N2NiNzJlNCIsMSwiMDEyMzQ1Njc4OWFiIl0"
    assert verify(f"{body}.MIdgYc0tgxC8FVZe", KEY) == GenerationTag(
        "a", "", "rückweg", unit_hash("", KEY), 1, "0123456789ab"
    )


def test_another_key_does_not_verify() -> None:
    with pytest.raises(UnknownGeneration):
        verify(sign(TAG, KEY), b"x" * 32)


@given(st.integers(0, 500), st.integers(1, 127))
def test_a_changed_id_does_not_verify(position: int, change: int) -> None:
    generation = bytearray(sign(TAG, KEY).encode())
    position %= len(generation)
    changed = bytes([generation[position] ^ change])
    forged = (generation[:position] + changed + generation[position + 1 :]).decode("latin-1")
    try:
        verified = verify(forged, KEY)
    except UnknownGeneration:
        return
    # Base64's last character may carry bits that mean nothing; nothing else may change and pass.
    assert verified == TAG
    assert position in (generation.index(b"."[0]) - 1, len(generation) - 1)


@given(st.text(max_size=200))
def test_any_other_text_is_refused_and_nothing_else_is_raised(text: str) -> None:
    with pytest.raises(UnknownGeneration):
        verify(text, KEY)
