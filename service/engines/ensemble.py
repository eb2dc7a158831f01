"""Ensembles: several soft prompts answer one request together, and they vote.

The votes are pure. The members are requests of their own, so that an engine with continuous batching runs them as rows
of one batch. Source: Lester et al. 2021, arXiv 2104.08691, section 6 (prompt ensembling).
"""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import AsyncIterator, Sequence

from prompt_store.prompts.version import Vote
from service.engines.base import (
    Delta,
    Engine,
    Finish,
    GenerationEvent,
    GenerationRequest,
    ScoreRequest,
    Scores,
    SoftPromptReference,
)
from service.engines.collecting import Answer, all_or_none, collect, total
from service.engines.errors import UnsupportedFeature
from service.engines.scoring import log_softmax


@dataclasses.dataclass(frozen=True, slots=True)
class LabelVote:
    """Labels by their places, the chosen one first; a probability for each place; the chosen one's share of members."""

    order: tuple[int, ...]
    probabilities: tuple[float, ...]
    agreement: float


async def generate(
    engine: Engine, request: GenerationRequest, members: Sequence[SoftPromptReference | None], vote: Vote
) -> AsyncIterator[GenerationEvent]:
    """The answer that the members choose as one Delta with their agreement, then a Finish with what all of them took.

    A Prompted before it is the chosen member's. A member that fails fails the request, and the others are cancelled.
    Raises UnsupportedFeature for more than one choice: the members' answers are what is chosen from.
    """
    if request.n != 1:
        raise UnsupportedFeature(f"n is {request.n}, but an ensemble gives one answer; leave n out", parameter="n")
    asked = dataclasses.replace(request, stream=False, logprobs=request.logprobs or 0)
    given = await all_or_none(
        collect(engine.generate(dataclasses.replace(asked, id=f"{request.id}/{place}", soft_prompt=member)))
        for place, member in enumerate(members)
    )
    answers = [answer for member in given for answer in member.answers]
    winner, agreement = elect(answers, vote)
    chosen, prompted = answers[winner], given[winner].prompted
    if prompted is not None:
        yield prompted
    logprobs = chosen.logprobs if request.logprobs is not None else ()
    yield Delta(
        chosen.text,
        chosen.token_ids,
        logprobs=logprobs,
        finish_reason=chosen.finish_reason,
        agreement=agreement,
        tool_calls=chosen.tool_calls,
        refusal=chosen.refusal,
    )
    yield Finish(chosen.finish_reason, total(member.usage for member in given))


async def score(
    engine: Engine, request: ScoreRequest, members: Sequence[SoftPromptReference | None]
) -> tuple[Scores, ...]:
    """Each member's scores; a single member needs no ensemble. One that fails fails all."""
    if len(members) == 1:
        return (await engine.score(dataclasses.replace(request, soft_prompt=members[0])),)
    return tuple(
        await all_or_none(
            engine.score(dataclasses.replace(request, id=f"{request.id}/{place}", soft_prompt=member))
            for place, member in enumerate(members)
        )
    )


def elect(answers: Sequence[Answer], vote: Vote) -> tuple[int, float]:
    """The place of the answer that is chosen, and the share of the members whose text is the same.

    `majority` takes the most frequent text, of equally frequent ones that with the highest mean log-probability of its
    tokens; `mean_logprob` looks at the latter alone. The first of equals wins.
    """
    frequency = Counter(answer.text for answer in answers)

    def rank(place: int) -> tuple[int, float]:
        answer = answers[place]
        return (frequency[answer.text] if vote == "majority" else 0, _mean_logprob(answer))

    winner = max(range(len(answers)), key=rank)
    return winner, frequency[answers[winner].text] / len(answers)


def elect_label(members: Sequence[Sequence[float]], vote: Vote) -> LabelVote:
    """What the members make of the labels together; `members[k][i]` is the log-probability of label i by member k.

    `mean_logprob` averages log-probabilities over the members and scales the result to sum to 1. `majority` gives each
    label the share of the members that hold it for the best, and orders equal shares by that mean.
    """
    means = log_softmax([math.fsum(column) / len(members) for column in zip(*members, strict=True)])
    labels = range(len(means))
    votes = Counter(max(labels, key=member.__getitem__) for member in members)
    shares = [votes[label] / len(members) for label in labels]
    if vote == "mean_logprob":
        order = sorted(labels, key=lambda label: -means[label])
        return LabelVote(tuple(order), tuple(map(math.exp, means)), shares[order[0]])
    order = sorted(labels, key=lambda label: (-shares[label], -means[label]))
    return LabelVote(tuple(order), tuple(shares), shares[order[0]])


def _mean_logprob(answer: Answer) -> float:
    """Of no tokens it is the lowest there is, so that an empty answer wins no tie."""
    if not answer.logprobs:
        return -math.inf
    return math.fsum(entry.logprob for entry in answer.logprobs) / len(answer.logprobs)
