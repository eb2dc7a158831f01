"""Tokens to text as they come: never half a character, never a piece of a stop string.

The window that is decoded again for each token stays short, so a long answer costs no more per token than a short one.
"""

from __future__ import annotations

from tokenizers import Tokenizer

_REPLACEMENT = "\ufffd"


class Detokenizer:
    """The text of one generation."""

    def __init__(self, tokenizer: Tokenizer, stop: tuple[str, ...] = ()) -> None:
        self._tokenizer = tokenizer
        self._stop = stop
        self._ids: list[int] = []
        self._window = 0
        self._read = 0
        self._held = ""
        self.stopped = False

    def add(self, token_id: int) -> str:
        """Take a token; return the text that is certain now. Sets `stopped` when a stop string was completed."""
        self._ids.append(token_id)
        known = self._decode(self._window, self._read)
        text = self._decode(self._window, len(self._ids))
        if len(text) <= len(known) or text.endswith(_REPLACEMENT):
            return ""
        self._window, self._read = self._read, len(self._ids)
        return self._release(text[len(known) :])

    def finish(self) -> str:
        """The text that was held back: an incomplete character, or the beginning of a stop string that never came."""
        if self.stopped:
            return ""
        known = self._decode(self._window, self._read)
        rest = self._release(self._decode(self._window, len(self._ids))[len(known) :])
        self._read = self._window = len(self._ids)
        if self.stopped:
            return rest
        held, self._held = self._held, ""
        return rest + held

    def _decode(self, begin: int, end: int) -> str:
        return self._tokenizer.decode(self._ids[begin:end], skip_special_tokens=True)

    def _release(self, text: str) -> str:
        if not self._stop:
            return text
        text = self._held + text
        found = [at for stop in self._stop if (at := text.find(stop)) >= 0]
        if found:
            self.stopped = True
            self._held = ""
            return text[: min(found)]
        keep = max(_overlap(text, stop) for stop in self._stop)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]


def _overlap(text: str, stop: str) -> int:
    """Characters at the end of `text` that could be the beginning of `stop`."""
    return next((size for size in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:size])), 0)
