"""Tokens to text as they come: never half a character, never a piece of a stop string.

A byte-level tokenizer's text is joined from its tokens' bytes; for others a short window is decoded again for each
token, so a long answer costs no more per token than a short one.
"""

from __future__ import annotations

import codecs
from typing import Protocol

from tokenizers import Tokenizer

from service.engines.token_text import Pieces, byte_fallback_ids, decoder_types, special_token_ids

_REPLACEMENT = "\ufffd"
_WINDOW_TOKENS = 4


class TextDecoder:
    """How a tokenizer's ids become text; made once for a base model and shared by its generations."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._pieces = Pieces(tokenizer) if decoder_types(tokenizer) == ["ByteLevel"] else None
        self._special = special_token_ids(tokenizer)
        self.byte_ids = byte_fallback_ids(tokenizer)

    def decode(self, ids: list[int]) -> str:
        """The text of these tokens, without special ones."""
        return self._tokenizer.decode(ids, skip_special_tokens=True)

    def is_text(self, token_id: int) -> bool:
        """Whether `decode` minds a token: neither a special one nor an id without a token."""
        return token_id not in self._special and self._tokenizer.id_to_token(token_id) is not None

    def stream(self, *, lazy: bool) -> _Stream:
        """Begin a text."""
        if lazy:
            return _Whole(self)
        return _Window(self) if self._pieces is None else _Bytes(self._pieces)


class Detokenizer:
    """The text of one generation.

    A stop string counts in the text of what comes after the first `min_tokens` tokens. `lazy` says that nobody reads
    along: without stop strings, all text then comes from `finish`.
    """

    def __init__(
        self, decoder: TextDecoder, stop: tuple[str, ...] = (), *, min_tokens: int = 0, lazy: bool = False
    ) -> None:
        self._stream = decoder.stream(lazy=lazy and not stop)
        self._stop = stop
        self._unsearched = min_tokens
        self._held = ""
        self.stopped = False

    def add(self, token_id: int) -> str:
        """Take a token; return the text that is certain now. Sets `stopped` when a stop string was completed."""
        text = self._stream.add(token_id)
        if not self._stop:
            return text
        if self._unsearched:
            self._unsearched -= 1
            return text
        return self._release(text) if text else ""

    def finish(self) -> str:
        """The text that was held back: an incomplete character, or the beginning of a stop string that never came."""
        if self.stopped:
            return ""
        rest = self._stream.finish()
        if self._stop:
            rest = self._release(rest)
        if self.stopped:
            return rest
        held, self._held = self._held, ""
        return rest + held

    def _release(self, text: str) -> str:
        """What of more text can be shown: all that cannot be part of a stop string."""
        text = self._held + text
        end = len(text)
        for stop in self._stop:
            at = text.find(stop)
            if at >= 0:
                self.stopped = True
                end = min(end, at)
        if self.stopped:
            self._held = ""
            return text[:end]
        for stop in self._stop:
            end = min(end, _beginning(text, stop))
        self._held = text[end:]
        return text[:end]


class _Stream(Protocol):
    """Text by token. `add` returns what is certain, `finish` the rest; together they are what `decode` gives."""

    def add(self, token_id: int) -> str: ...

    def finish(self) -> str: ...


class _Whole:
    """All text at the end."""

    def __init__(self, decoder: TextDecoder) -> None:
        self._decoder = decoder
        self._ids: list[int] = []

    def add(self, token_id: int) -> str:
        self._ids.append(token_id)
        return ""

    def finish(self) -> str:
        ids, self._ids = self._ids, []
        return self._decoder.decode(ids)


class _Bytes:
    """Text of a byte-level tokenizer. What can be no character is replaced where `decode` replaces it."""

    def __init__(self, pieces: Pieces) -> None:
        self._pieces = pieces
        self._incomplete = b""

    def add(self, token_id: int) -> str:
        piece = self._pieces[token_id]
        if isinstance(piece, str):
            if not self._incomplete:
                return piece
            piece = piece.encode()
        data = self._incomplete + piece
        text, used = codecs.utf_8_decode(data, "replace", False)
        self._incomplete = data[used:]
        return text

    def finish(self) -> str:
        rest, self._incomplete = self._incomplete.decode("utf-8", "replace"), b""
        return rest


class _Window:
    """Text of any other tokenizer: decode the last few tokens, and show what goes beyond the text known before.

    Bytes of byte fallback are held until a token of another kind comes, because one that is no character makes the
    decoder replace all before it.
    """

    def __init__(self, decoder: TextDecoder) -> None:
        self._decoder = decoder
        self._ids: list[int] = []
        self._known = ""
        self._read = 0  # tokens of the window that `known` is the text of

    def add(self, token_id: int) -> str:
        if not self._decoder.is_text(token_id):
            return ""
        self._ids.append(token_id)
        if token_id in self._decoder.byte_ids:
            return ""
        text = self._decoder.decode(self._ids)
        known = len(self._known)
        if len(text) <= known or text.endswith(_REPLACEMENT):
            return ""
        if len(self._ids) > _WINDOW_TOKENS:  # go on with the tokens of this piece alone
            del self._ids[: self._read]
            self._known = self._decoder.decode(self._ids)
        else:
            self._known = text
        self._read = len(self._ids)
        return text[known:]

    def finish(self) -> str:
        rest = self._decoder.decode(self._ids)[len(self._known) :]
        self._ids, self._known, self._read = [], "", 0
        return rest


def _beginning(text: str, stop: str) -> int:
    """Where at the end of `text` a stop string may have begun; the text's length where it has not."""
    at = text.find(stop[0], max(0, len(text) - len(stop) + 1))
    while at >= 0 and not stop.startswith(text[at:]):
        at = text.find(stop[0], at + 1)
    return at if at >= 0 else len(text)
