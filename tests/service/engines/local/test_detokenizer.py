from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from service.engines.base_model import BaseModel
from service.engines.local.detokenizer import Detokenizer
from tests.conftest import BASE_FOLDER

TOKENIZER = Tokenizer.from_file(str(BASE_FOLDER / "tokenizer.json"))


def stream(text: str, *stop: str) -> tuple[list[str], bool]:
    detokenizer = Detokenizer(TOKENIZER, stop)
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
    detokenizer = Detokenizer(TOKENIZER)
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
    detokenizer = Detokenizer(base.tokenizer)
    assert detokenizer.add(base.eos_token_id) + detokenizer.finish() == ""
