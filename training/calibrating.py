"""From which confidence on answers are good enough: a cascade's threshold, from answers that were judged. Pure."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

from training.errors import CalibrationError

FEWEST_ROWS = 20

# The 0.975 quantile of the standard normal distribution, for intervals that hold in 95 of 100 cases.
_Z = 1.959963984540054


@dataclass(frozen=True, slots=True)
class Judged:
    """One answer: how sure it was, None where that is not known, and what it was worth, in [0, 1]."""

    confidence: float | None
    score: float


@dataclass(frozen=True, slots=True)
class Share:
    """The mean score of so many answers."""

    mean: float
    rows: int

    @property
    def interval(self) -> tuple[float, float]:
        """Where the true mean lies with 95% confidence: Wilson's score interval.

        With p the mean of n rows and z = 1.96, it is (p + z²/2n ± z √(p (1-p)/n + z²/4n²)) / (1 + z²/n), exact in level
        for right and wrong, wider than needed for scores between them. Source: Wilson 1927, Journal of the American
        Statistical Association 22, 209-212.
        """
        spread = _Z * _Z / self.rows
        middle = (self.mean + spread / 2) / (1 + spread)
        half = _Z * math.sqrt(self.mean * (1 - self.mean) / self.rows + spread / (4 * self.rows)) / (1 + spread)
        return max(0.0, middle - half), min(1.0, middle + half)


@dataclass(frozen=True, slots=True)
class Threshold:
    """Answers with a confidence of at least `value` are accepted; `unknown` rows had none and never are.

    `accepted` are those that it accepts of the rows that it was found on, `all_rows` every one of them. The latter is
    also what is to be expected of as many answers accepted at random, for the same cost: what the measure is worth
    shows in the difference.
    """

    value: float
    accepted: Share
    all_rows: Share
    unknown: int

    @property
    def accepted_share(self) -> float:
        return self.accepted.rows / self.all_rows.rows


def find_threshold(judged: Sequence[Judged], target: float) -> Threshold:
    """The lowest threshold whose accepted answers have a mean score of at least `target` on these rows.

    Lower ones accept more and are wrong more often on these rows; higher ones may be too, as a mean does not have to
    rise with the threshold. Raises CalibrationError with fewer than 20 rows, without any confidence, and where no
    threshold reaches the target.
    """
    if len(judged) < FEWEST_ROWS:
        raise CalibrationError(f"{len(judged)} rows are too few to calibrate on; give at least {FEWEST_ROWS}")
    all_rows = Share(math.fsum(row.score for row in judged) / len(judged), len(judged))
    known = [(row.confidence, row.score) for row in judged if row.confidence is not None]
    if not known:
        raise CalibrationError(
            "no answer had a confidence by this measure; use one that the version's backend can give: mean_logprob "
            "needs log-probabilities, margin a task with labels, agreement an ensemble"
        )
    found: Threshold | None = None
    best = Share(0.0, 0)
    total, count = 0.0, 0
    # From the most certain answer down; answers of equal confidence are accepted together or not at all.
    for value, rows in groupby(sorted(known, reverse=True), key=lambda row: row[0]):
        scores = [score for _, score in rows]
        total, count = total + math.fsum(scores), count + len(scores)
        accepted = Share(min(1.0, total / count), count)
        if accepted.mean >= best.mean:
            best = accepted
        if accepted.mean >= target:
            found = Threshold(value, accepted, all_rows, len(judged) - len(known))
    if found is None:
        raise CalibrationError(
            f"no threshold reaches {target:g}: the best accepts {best.rows} of {len(judged)} rows with "
            f"{best.mean:.4g}; aim lower, try another measure, or answer with a better version"
        )
    return found
