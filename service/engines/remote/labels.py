"""A log-probability for each label, from the tokens of one constrained answer and the alternatives beside them. Pure.

The answer spells one label. At each of its places the alternatives that begin or continue other labels hand their mass
to them; labels are compared by their bytes, because a provider's tokenizer is not known here.

It is an approximation of what scoring each label would give, for three reasons:

- Several labels behind one alternative share its mass evenly, since nothing says how it goes on there.
- A label behind none of the alternatives that are shown gets what no label can exceed: the smallest mass that is shown,
  or an even share of what is not shown, whichever is less. So improbable labels are put too high rather than too low.
- Where one label ends inside another, the end of the text is one of the alternatives and often not shown.

It is exact where every alternative is shown, each leads to one label, and the probabilities are those of the
constrained choice. Some providers show what the probabilities were before the constraint; then mass that led to no
label is left out, as if it were spread over the labels as theirs is.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

from service.engines.base import TokenLogprob
from service.engines.scoring import log_softmax

_LEAST_MASS = 1e-12
_END_OF_TEXT = re.compile(rb"(<[^<>]*>)?")


def label_scores(tokens: Sequence[TokenLogprob], spelled: Sequence[str], chosen: int) -> tuple[float, ...] | None:
    """The natural logarithm of each label's probability among the labels, in their order.

    `tokens` are the answer's, in turn, and `spelled[i]` is the whole text that the answer would have been for label i,
    what stands around it included; `chosen` is the label that it was. None where the tokens do not spell that label, or
    are said to have been impossible.
    """
    targets = [text.encode() for text in spelled]
    masses = [0.0] * len(targets)
    active = list(range(len(targets)))
    before, reached, smallest = b"", 1.0, 1.0
    for token in tokens:
        alternatives = _alternatives(token)
        smallest = min(smallest, *alternatives.values())
        follow = {piece: _led_to(piece, targets, active, before) for piece in alternatives}
        taken = follow[token.data]
        if chosen not in taken:
            return None
        unknown = set(active).difference(*follow.values())
        hidden = max(0.0, 1.0 - math.fsum(alternatives.values()))
        for piece, mass in alternatives.items():
            if piece != token.data:
                for label in follow[piece]:
                    masses[label] += reached * mass / len(follow[piece])
        for label in unknown:
            masses[label] += reached * min(hidden / len(unknown), smallest)
        reached *= alternatives[token.data]
        before += token.data
        active = taken
        if active == [chosen]:
            break
    longer = [label for label in active if label != chosen]
    if not _spells(before, targets[chosen], alone=not longer):
        return None
    for label in longer:  # the answer ended where these go on, and its end was not shown
        masses[label] += reached * min(smallest, 1.0 / (len(longer) + 1))
    masses[chosen] += reached * (1.0 - len(longer) * min(smallest, 1.0 / (len(longer) + 1)))
    if not math.fsum(masses) > 0.0:  # what was chosen had no probability until everything else was masked
        return None
    return tuple(log_softmax([math.log(max(mass, _LEAST_MASS)) for mass in masses]))


def _alternatives(token: TokenLogprob) -> dict[bytes, float]:
    """The mass of every text that is shown at a token's place, the token's own among them."""
    masses = {token.data: math.exp(min(token.logprob, 0.0))}
    for other in token.top:
        masses.setdefault(other.data, math.exp(min(other.logprob, 0.0)))
    return masses


def _led_to(piece: bytes, targets: Sequence[bytes], active: Sequence[int], before: bytes) -> list[int]:
    """Which labels a text leads to. A label that is complete is led to by an end of the text alone.

    A text may go past a label's end, as the token of a closing quote and brace does, but not within a word.
    """
    ends = _END_OF_TEXT.fullmatch(piece) is not None
    found: list[int] = []
    for label in active:
        rest = targets[label][len(before) :]
        if not rest:
            if ends:
                found.append(label)
        elif piece and (rest.startswith(piece) or _goes_past(piece, rest)):
            found.append(label)
    return found


def _goes_past(piece: bytes, rest: bytes) -> bool:
    return piece.startswith(rest) and not piece[len(rest) : len(rest) + 1].isalnum()


def _spells(text: bytes, target: bytes, *, alone: bool) -> bool:
    """Whether the text is the label's, or surely becomes it because no other label begins like that."""
    return text.startswith(target) or (alone and target.startswith(text))
