"""Server-sent events, cut into any pieces."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.engines.remote.event_stream import EventParser

LINES = (
    b"\xef\xbb\xbfdata: one\n\n: a comment\r\nevent: named\r\ndata: two\rdata:  three\r\r\nid: 7\n\ndata\n\ndata: cut"
)


def parsed(stream: bytes) -> list[bytes]:
    return EventParser(1000).feed(stream)


def test_lines_end_in_any_of_three_ways_and_only_data_counts() -> None:
    assert parsed(LINES) == [b"one", b"two\n three", b""]


@given(st.lists(st.integers(0, len(LINES)), max_size=8))
def test_how_a_stream_is_cut_into_pieces_does_not_matter(cuts: list[int]) -> None:
    parser = EventParser(1000)
    edges = [0, *sorted(cuts), len(LINES)]
    pieces = [LINES[start:end] for start, end in pairwise(edges)]
    assert [event for piece in pieces for event in parser.feed(piece)] == parsed(LINES)


def test_a_stream_may_come_byte_by_byte() -> None:
    parser = EventParser(1000)
    assert [event for byte in LINES for event in parser.feed(bytes([byte]))] == parsed(LINES)


def test_one_space_after_the_colon_is_left_out_and_no_more() -> None:
    assert parsed(b"data:none\n\ndata: one\n\ndata:  two\n\n") == [b"none", b"one", b" two"]


def test_other_separators_of_lines_are_text() -> None:
    text = "a\u2028b\x0bc\x0cd\x85e".encode()
    assert parsed(b"data: " + text + b"\n\n") == [text]


def test_a_field_that_begins_like_data_is_none() -> None:
    assert parsed(b"database: one\n\ndat: two\n\n data: three\n\n") == []


@pytest.mark.parametrize(
    "stream",
    [b"data: " + b"x" * 100, b"x" * 101, b"data: " + b"x" * 100 + b"\n\n", b"data: xxxxxxxxx\n" * 11],
    ids=["an unfinished line", "a line without a field", "a finished line", "many lines"],
)
def test_an_event_above_the_limit_is_refused(stream: bytes) -> None:
    parser = EventParser(100)
    assert parser.feed(b"data: before\n\n" + stream) == [b"before"]
    assert parser.overflowed


def test_the_limit_is_that_of_one_event() -> None:
    parser = EventParser(20)
    assert len(parser.feed(b"data: xxxxxxxxx\n\n" * 100)) == 100
    assert not parser.overflowed
