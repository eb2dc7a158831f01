"""How many tokens a step may carry: beside the streams that decode in it, and within memory. Pure arithmetic."""

from __future__ import annotations

from dataclasses import dataclass

_FEWEST = 16
_WEIGHT = 0.2
_STEADY_PASSES = 64
_UNBOUNDED = 2**31


@dataclass(slots=True)
class Pacer:
    """Learns what steps cost, and allows so many prefill tokens that a step takes at most `stretch` times as long as
    one that only decodes: no stream waits longer between two tokens, however long the prompts of others are.

    Both estimates are exponentially weighted means in seconds.
    """

    most: int
    stretch: float = 1.5
    _decode_s: float = 0.0
    _token_s: float = 0.0

    def prefill_tokens(self, decoding: int) -> int:
        """Tokens of prefill for the next step, with so many sequences decoding."""
        if decoding == 0 or self._decode_s == 0.0 or self._token_s == 0.0:
            return self.most
        allowed = (self.stretch - 1.0) * self._decode_s / self._token_s
        return min(self.most, max(_FEWEST, int(allowed)))

    def learn(self, decoding: int, prefilled: int, seconds: float) -> None:
        """Take the measure of a step."""
        if prefilled == 0:
            self._decode_s = _mix(self._decode_s, seconds)
        elif decoding == 0:
            self._token_s = _mix(self._token_s, seconds / prefilled)
        elif seconds > self._decode_s:
            self._token_s = _mix(self._token_s, (seconds - self._decode_s) / prefilled)


@dataclass(slots=True)
class Ceiling:
    """Tokens that memory lets a forward pass carry: any number until it runs out, then half of what was too many.

    Doubles after every so many passes that held, because what took the memory may have given it back.
    """

    tokens: int = _UNBOUNDED
    _steady: int = 0

    def lower(self, tried: int) -> None:
        """Memory ran out for so many tokens."""
        self.tokens = max(1, min(self.tokens, tried // 2))
        self._steady = 0

    def held(self) -> None:
        """A pass had the memory that it needed."""
        self._steady += 1
        if self._steady == _STEADY_PASSES:
            self.tokens, self._steady = min(2 * self.tokens, _UNBOUNDED), 0


def _mix(known: float, seen: float) -> float:
    return seen if known == 0.0 else known + _WEIGHT * (seen - known)
