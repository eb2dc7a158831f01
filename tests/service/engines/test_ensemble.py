from __future__ import annotations

import asyncio
import math

import pytest

from prompt_store.prompts.version import Vote
from service.engines import ensemble
from service.engines.base import (
    Delta,
    Finish,
    GenerationRequest,
    RawText,
    ScoreRequest,
    SoftPromptReference,
    TokenLogprob,
    Usage,
)
from service.engines.collecting import Answer
from service.engines.errors import GenerationFailed, UnsupportedFeature
from service.engines.scripted import Script, ScriptedEngine
from tests.conftest import random_prompt

MEMBERS = tuple(SoftPromptReference.to(random_prompt(seed, 4 + seed), "base") for seed in range(3))


def answer(text: str, *logprobs: float) -> Answer:
    tokens = tuple(TokenLogprob(place, value) for place, value in enumerate(logprobs))
    return Answer(text, tuple(range(len(logprobs))), tokens, "stop")


def test_the_most_frequent_text_wins_and_ties_go_to_the_more_probable() -> None:
    assert ensemble.elect([answer("a", -0.1), answer("b", -3.0), answer("b", -2.0)], "majority") == (2, 2 / 3)
    assert ensemble.elect([answer("a", -2.0, -2.0), answer("b", -1.0, -2.0)], "majority") == (1, 0.5)
    assert ensemble.elect([answer(""), answer("b", -9.0)], "majority") == (1, 0.5)


def test_mean_logprob_takes_the_most_probable_text_however_few_gave_it() -> None:
    votes = [answer("a", -0.1), answer("b", -3.0), answer("b", -2.0)]
    assert ensemble.elect(votes, "mean_logprob") == (0, 1 / 3)


def test_labels_by_mean_log_probability_and_by_majority_can_differ() -> None:
    sure, unsure = [math.log(0.98), math.log(0.02)], [math.log(0.4), math.log(0.6)]
    mean = ensemble.elect_label([sure, unsure, unsure], "mean_logprob")
    first, second = (0.98 * 0.4 * 0.4) ** (1 / 3), (0.02 * 0.6 * 0.6) ** (1 / 3)
    assert mean.order == (0, 1)
    assert mean.probabilities == pytest.approx((first / (first + second), second / (first + second)))
    assert mean.agreement == pytest.approx(1 / 3)
    most = ensemble.elect_label([sure, unsure, unsure], "majority")
    assert (most.order, most.probabilities, most.agreement) == ((1, 0), (1 / 3, 2 / 3), 2 / 3)
    assert ensemble.elect_label([sure, unsure], "majority").order == (0, 1)


def by_member(*scripts: list[str | GenerationFailed | asyncio.Event]) -> Script:
    def script(request: GenerationRequest) -> list[str | GenerationFailed | asyncio.Event]:
        assert request.soft_prompt is not None
        return scripts[[member.digest for member in MEMBERS].index(request.soft_prompt.digest)]

    return script


async def generate(
    engine: ScriptedEngine, vote: Vote = "majority", *, logprobs: int | None = None, n: int = 1
) -> list[object]:
    request = GenerationRequest("id", RawText("x"), logprobs=logprobs, n=n)
    return [event async for event in ensemble.generate(engine, request, MEMBERS, vote)]


async def test_the_chosen_answer_is_one_delta_and_usage_is_everybodys() -> None:
    engine = ScriptedEngine(by_member(["a"], ["b", "c"], ["bc"]))
    assert await generate(engine) == [
        Delta("bc", (1,), finish_reason="stop", agreement=2 / 3),
        Finish("stop", Usage(3, 4, 4 + 5 + 6)),
    ]
    assert [request.id for request in engine.requests] == ["id/0", "id/1", "id/2"]
    assert [request.soft_prompt for request in engine.requests] == list(MEMBERS)
    assert not any(request.stream for request in engine.requests)


async def test_log_probabilities_are_given_only_where_they_were_asked_for() -> None:
    engine = ScriptedEngine(by_member(["a"], ["a"], ["a"]))
    with_them, without = await generate(engine, logprobs=1), await generate(engine)
    assert isinstance(with_them[0], Delta)
    assert isinstance(without[0], Delta)
    assert ([entry.text for entry in with_them[0].logprobs], without[0].logprobs) == (["a"], ())


async def test_a_member_that_fails_fails_the_request_and_the_others_are_cancelled() -> None:
    engine = ScriptedEngine(by_member(["a", asyncio.Event()], [GenerationFailed("it broke")], [asyncio.Event()]))
    with pytest.raises(GenerationFailed, match="it broke"):
        await generate(engine)
    assert engine.running == set()


async def test_leaving_an_ensemble_cancels_its_members() -> None:
    all_run = asyncio.Event()

    def script(request: GenerationRequest) -> list[asyncio.Event]:
        if len(engine.running) == len(MEMBERS):
            all_run.set()
        return [asyncio.Event()]

    engine = ScriptedEngine(script)
    asking = asyncio.create_task(generate(engine))
    await all_run.wait()
    asking.cancel()
    await asyncio.wait([asking])
    assert asking.cancelled()
    assert engine.running == set()


async def test_an_ensemble_gives_one_answer() -> None:
    with pytest.raises(UnsupportedFeature, match="an ensemble gives one answer"):
        await generate(ScriptedEngine(), n=2)


async def test_every_member_scores_the_labels() -> None:
    engine = ScriptedEngine()
    request = ScoreRequest("id", RawText("abc"), ("ab", "x"))
    assert len(await ensemble.score(engine, request, MEMBERS)) == 3
    assert [one.soft_prompt for one in engine.score_requests] == list(MEMBERS)
    assert len(await ensemble.score(engine, request, [None])) == 1
    assert engine.score_requests[-1].id == "id"
