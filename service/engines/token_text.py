"""What single tokens say: their bytes and text. Imports no torch, so that the HTTP process can show them."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from functools import lru_cache

from tokenizers import Tokenizer

TokenText = Callable[[int], tuple[str, bytes]]
"""What a token says, by its id: its text and bytes."""

_CACHED_TEXTS = 1 << 16
_BYTE_FALLBACK = re.compile(r"<0x([0-9A-F]{2})>")


def _byte_level_alphabet() -> dict[str, int]:
    """The character that byte-level BPE writes for each byte: printable ones as they are, others from U+0100 on.

    Source: `bytes_to_unicode` of OpenAI's GPT-2 encoder.py.
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + place): byte for place, byte in enumerate(others)}


_BYTES = _byte_level_alphabet()


class Pieces(dict[int, str | bytes]):
    """The text of each token of a byte-level tokenizer, without special tokens: what `decode` joins.

    A str where the token's bytes are whole characters, else the bytes. Filled as tokens are met.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        super().__init__()
        self._tokenizer = tokenizer
        self._special = special_token_ids(tokenizer)

    def __missing__(self, token_id: int) -> str | bytes:
        data = b"" if token_id in self._special else byte_level_bytes(self._tokenizer, token_id)
        try:
            self[token_id] = data.decode()
        except UnicodeDecodeError:
            self[token_id] = data
        return self[token_id]


def decoder_types(tokenizer: Tokenizer) -> list[str]:
    """The names of a tokenizer's decoders, in the order in which they are applied."""
    if tokenizer.decoder is None:
        return []
    description = json.loads(tokenizer.decoder.__getstate__())
    return [part["type"] for part in description.get("decoders", [description])]


def special_token_ids(tokenizer: Tokenizer) -> frozenset[int]:
    """The tokens that are not text."""
    return frozenset(token for token, added in tokenizer.get_added_tokens_decoder().items() if added.special)


def byte_fallback_ids(tokenizer: Tokenizer) -> frozenset[int]:
    """The tokens that stand for one byte each in a tokenizer with byte fallback, as sentencepiece has it."""
    if "ByteFallback" not in decoder_types(tokenizer):
        return frozenset()
    found = (tokenizer.token_to_id(f"<0x{byte:02X}>") for byte in range(256))
    return frozenset(token for token in found if token is not None)


def byte_level_bytes(tokenizer: Tokenizer, token_id: int) -> bytes:
    """The bytes of a byte-level tokenizer's token, as its decoder has them; none for an id without a token."""
    token = tokenizer.id_to_token(token_id) or ""
    try:
        return bytes([_BYTES[character] for character in token])
    except KeyError:  # an added token, which stands for itself
        return token.encode()


def token_texts(tokenizer: Tokenizer) -> TokenText:
    """What says tokens as log-probabilities show them: as within a text, special tokens by their names.

    Bytes that are no whole character are written `\\xf0` in the text, as OpenAI does. An id that has no token (the
    padding of a model's vocabulary) is empty. What was said of a token is kept, for _CACHED_TEXTS of them.
    """
    types = decoder_types(tokenizer)
    special = special_token_ids(tokenizer)

    @lru_cache(_CACHED_TEXTS)
    def token_text(token_id: int) -> tuple[str, bytes]:
        token = tokenizer.id_to_token(token_id)
        if token is None:
            return "", b""
        if token_id in special:
            data = token.encode()
        elif types == ["ByteLevel"]:
            data = byte_level_bytes(tokenizer, token_id)
        elif "ByteFallback" in types and (match := _BYTE_FALLBACK.fullmatch(token)):
            data = bytes.fromhex(match[1])
        else:  # behind another token, because decoders strip the space that begins a text
            once = tokenizer.decode([token_id], skip_special_tokens=False)
            data = tokenizer.decode([token_id, token_id], skip_special_tokens=False)[len(once) :].encode()
        return data.decode("utf-8", "backslashreplace"), data

    return token_text
