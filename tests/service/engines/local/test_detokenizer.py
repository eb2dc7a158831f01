from __future__ import annotations

import subprocess
import sys

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models

from service.engines.base_model import BaseModel
from service.engines.local.detokenizer import Detokenizer, TextDecoder
from service.engines.token_text import token_texts
from tests.conftest import BASE_FOLDER, ROOT

TOKENIZER = Tokenizer.from_file(str(BASE_FOLDER / "tokenizer.json"))
DECODER = TextDecoder(TOKENIZER)


def sentencepiece() -> Tokenizer:
    """A tokenizer as Llama 2 has it: words with their blanks, and bytes for what is no word."""
    words = [
        "<unk>",
        "</s>",
        *(f"<0x{byte:02X}>" for byte in range(256)),
        "▁",
        "▁Hello",
        "lo",
        "▁▁",
        "▁world",
        "é",
        "\ufffd",
    ]
    tokenizer = Tokenizer(models.BPE({word: place for place, word in enumerate(words)}, [], byte_fallback=True))
    tokenizer.add_special_tokens([AddedToken("<unk>"), AddedToken("</s>")])
    parts = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(parts)
    return tokenizer


def byte_level() -> Tokenizer:
    """The demo base's, with added tokens that are text, one of which byte-level BPE has no characters for."""
    tokenizer = Tokenizer.from_file(str(BASE_FOLDER / "tokenizer.json"))
    tokenizer.add_tokens([AddedToken("<think>"), AddedToken("思考 🎉")])
    return tokenizer


def metaspace() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE({"▁a": 0, "b": 1, "▁": 2, "▁▁c": 3, "</s>": 4}, []))
    tokenizer.add_special_tokens([AddedToken("</s>")])
    tokenizer.decoder = decoders.Metaspace()
    return tokenizer


OTHERS = {"sentencepiece": sentencepiece(), "byte level": byte_level(), "metaspace": metaspace()}


def run(detokenizer: Detokenizer, ids: list[int]) -> list[str]:
    return [*(detokenizer.add(token) for token in ids), detokenizer.finish()]


def stream(text: str, *stop: str) -> tuple[list[str], bool]:
    detokenizer = Detokenizer(DECODER, stop)
    pieces = []
    for token in TOKENIZER.encode(text, add_special_tokens=False).ids:
        pieces.append(detokenizer.add(token))
        if detokenizer.stopped:
            return pieces, True
    pieces.append(detokenizer.finish())
    return pieces, detokenizer.stopped


@settings(max_examples=300)
@given(st.text())
def test_the_pieces_of_any_text_join_to_that_text(text: str) -> None:
    decoded = TOKENIZER.decode(TOKENIZER.encode(text, add_special_tokens=False).ids, skip_special_tokens=True)
    assert "".join(stream(text)[0]) == decoded


def test_no_piece_holds_half_a_character() -> None:
    pieces, _ = stream("Grüße 你好 🎉 done")
    assert "".join(pieces) == "Grüße 你好 🎉 done"
    assert not any("\ufffd" in piece for piece in pieces)


def test_a_character_that_never_completes_is_shown_as_the_tokenizer_shows_it() -> None:
    ids = TOKENIZER.encode("🎉", add_special_tokens=False).ids
    detokenizer = Detokenizer(DECODER)
    assert [detokenizer.add(token) for token in ids[:-1]] == [""] * (len(ids) - 1)
    assert detokenizer.finish() == TOKENIZER.decode(ids[:-1])


@settings(max_examples=300)
@given(st.text("abc .", max_size=40), st.text("abc .", min_size=1, max_size=5))
def test_a_stop_string_ends_the_text_before_it_and_no_part_of_it_is_shown(text: str, stop: str) -> None:
    pieces, stopped = stream(text, stop)
    assert stopped == (stop in text)
    assert "".join(pieces) == text.split(stop)[0]


def test_the_first_of_several_stop_strings_wins() -> None:
    pieces, stopped = stream("one two three four", "four", "three")
    assert ("".join(pieces), stopped) == ("one two ", True)


def test_special_tokens_are_not_text(base: BaseModel) -> None:
    detokenizer = Detokenizer(TextDecoder(base.tokenizer))
    assert detokenizer.add(base.eos_token_id) + detokenizer.finish() == ""


@pytest.mark.parametrize("name", OTHERS)
@settings(max_examples=300)
@given(data=st.data())
def test_the_pieces_of_any_tokens_join_to_what_the_tokenizer_decodes(name: str, data: st.DataObject) -> None:
    tokenizer = OTHERS[name]
    size = tokenizer.get_vocab_size()
    token = st.integers(0, size + 2) | st.integers(max(0, size - 9), size - 1)
    ids = data.draw(st.lists(token, max_size=30))
    expected = tokenizer.decode(ids, skip_special_tokens=True)
    pieces = run(Detokenizer(TextDecoder(tokenizer)), ids)
    assert "".join(pieces) == expected
    assert run(Detokenizer(TextDecoder(tokenizer), lazy=True), ids) == [""] * len(ids) + [expected]


def test_a_byte_that_spoils_those_before_it_comes_before_they_are_shown() -> None:
    tokenizer = OTHERS["sentencepiece"]
    ids = [tokenizer.token_to_id(token) for token in ("<0xC3>", "<0xA9>", "<0xFF>", "lo")]
    assert run(Detokenizer(TextDecoder(tokenizer)), ids) == ["", "", "", "\ufffd\ufffd\ufffdlo", ""]


def test_with_stop_strings_a_lazy_text_still_stops() -> None:
    detokenizer = Detokenizer(DECODER, ("three",), lazy=True)
    for token in TOKENIZER.encode("one two three four", add_special_tokens=False).ids:
        detokenizer.add(token)
        if detokenizer.stopped:
            return
    raise AssertionError("it never stopped")


def test_a_stop_string_counts_only_in_what_follows_the_first_min_tokens() -> None:
    ids = TOKENIZER.encode("a.b.c.d", add_special_tokens=False).ids
    assert len(ids) == 7
    for min_tokens, expected in ((0, "a"), (1, "a"), (2, "a.b"), (5, "a.b.c"), (7, "a.b.c.d")):
        detokenizer = Detokenizer(DECODER, (".",), min_tokens=min_tokens)
        text = ""
        for token in ids:
            text += detokenizer.add(token)
            if detokenizer.stopped:
                break
        assert text + detokenizer.finish() == expected


@settings(max_examples=200)
@given(st.text())
@example("Grüße 你好 🎉")
def test_the_bytes_of_tokens_join_to_their_text(text: str) -> None:
    ids = TOKENIZER.encode(text, add_special_tokens=False).ids
    shown = token_texts(TOKENIZER)
    joined = b"".join(shown(token)[1] for token in ids)
    assert joined.decode() == TOKENIZER.decode(ids, skip_special_tokens=False)


def test_a_token_that_is_no_whole_character_is_shown_by_its_bytes() -> None:
    first, *_ = TOKENIZER.encode("🎉", add_special_tokens=False).ids
    assert token_texts(TOKENIZER)(first) == ("\\xf0", b"\xf0")


def test_tokens_are_shown_as_within_a_text() -> None:
    assert token_texts(TOKENIZER)(1) == ("</s>", b"</s>")
    assert token_texts(TOKENIZER)(10**6) == ("", b"")
    shown = OTHERS["sentencepiece"]
    for token, expected in {
        "▁Hello": " Hello", "lo": "lo", "▁": " ", "é": "é", "</s>": "</s>", "<0x41>": "A",
    }.items():  # fmt: skip
        assert token_texts(shown)(shown.token_to_id(token)) == (expected, expected.encode())
    assert token_texts(shown)(shown.token_to_id("<0xC3>")) == ("\\xc3", b"\xc3")
    assert token_texts(OTHERS["metaspace"])(0) == (" a", b" a")
    assert token_texts(OTHERS["byte level"])(OTHERS["byte level"].token_to_id("思考 🎉")) == (
        "思考 🎉",
        "思考 🎉".encode(),
    )


def test_showing_tokens_needs_no_torch() -> None:
    code = "import sys, service.engines.token_text; print('torch' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert result.stdout.strip() == "False"
