"""Answers of a running experiment before a judge: what is recorded, and what is counted instead."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from litestar.testing import AsyncTestClient
from sqlalchemy import select

from prompt_store.access import ANONYMOUS
from prompt_store.experiments.experiment import parse_experiment
from prompt_store.ledger.entries import HOLDOUT
from prompt_store.tables import outcomes
from service.engines.base import GenerationRequest
from service.engines.errors import ProviderUnavailable
from service.engines.scripted import ScriptedEngine, words
from service.generation_ids import unit_hash, verify
from service.routing.backends import Backend
from service.routing.judging import Judges
from service.routing.plan import Plan
from service.routing.run import Caller, Run
from tests.conftest import random_prompt
from tests.service.routing.routed import PriceOf, Provider, ask, counted, publish_remote, says, serving
from tests.service.serving import COPY, INTENTS, Store, client_of

METRIC = {"name": "quality", "direction": "maximise"}
JUDGE: dict[str, Any] = {
    "name": "quality",
    "kind": "generate",
    "inputs": ["product", "colour", "answer"],
    "messages": [{"role": "user", "content": "judge {product} {colour} {answer}"}],
}
LABELS = {**JUDGE, "kind": "classify", "labels": ["good", "bad"]}
EXTRACT = {**JUDGE, "kind": "extract", "json_schema": {"type": "object", "required": ["score"]}}


def judged(
    store: Store, judge: dict[str, Any] = JUDGE, *, task: dict[str, Any] = COPY, type: str = "number", **how: Any
) -> None:
    """A running experiment on a task whose answers the judge's task is to judge."""
    store.task({**task, "metrics": [{**METRIC, "type": type}]})
    store.publish(store.task(judge).name, random_prompt(8, 4))
    publish_remote(store, "quality")
    local = Backend("local", ScriptedEngine())
    experiment = {
        "name": "tone",
        "task": task["name"],
        "control": "a",
        "arms": [{"name": name, "weight": 0.5, "version": "v1"} for name in "ab"],
        "metric": "quality",
        "judge": {"task": "quality", "metric": "quality", "sample": 1.0, **how},
    }
    store.registry.start_experiment(parse_experiment(experiment), ANONYMOUS, backends=[local.describe()])


def speaks(verdict: Any, answer: str = "a mug") -> ScriptedEngine:
    """An engine that gives this verdict as a judge, and this answer to all else."""

    def script(request: GenerationRequest) -> list[Any]:
        return [verdict] if request.task == "quality" else [answer]

    return ScriptedEngine(script)


def kept(store: Store) -> list[Any]:
    with store.registry.database.read() as connection:
        return list(connection.execute(select(outcomes).order_by(outcomes.c.generated_ms)))


async def judgements(client: AsyncTestClient[Any], outcome: str, count: int = 1, task: str = "copy") -> None:
    await counted(client, f'softcue_judgements_total{{outcome="{outcome}",task="{task}"}} {count}.0')


@pytest.mark.parametrize(
    ("judge", "verdict", "scores", "value"),
    [
        (JUDGE, "8", {}, 8.0),
        (JUDGE, "I say: Good!", {"i say: good": 0.75}, 0.75),
        (EXTRACT, '{"score": 0.5, "why": "in part"}', {}, 0.5),
    ],
    ids=["a number", "a text", "a field"],
)
async def test_a_verdict_is_an_outcome_of_the_answer(
    store: Store, judge: dict[str, Any], verdict: str, scores: dict[str, float], value: float
) -> None:
    judged(store, judge, scores=scores)
    engine = speaks(verdict)
    async with client_of(store, engine) as client:
        body = (await ask(client, unit="user 7")).json()
        await judgements(client, "recorded")
    key = store.registry.database.signing_key()
    tag = verify(body["id"], key)
    (row,) = kept(store)
    assert (row.request, row.task, row.version) == (tag.request, "copy", tag.version)
    assert (row.experiment, row.arm) == ("tone", body["softcue"]["arm"])
    assert (row.metric, row.value, row.source, row.principal) == ("quality", value, "judge", "anonymous")
    assert (row.unit_hash, row.generated_ms) == (unit_hash("user 7", key), tag.at_ms)
    (asked,) = [request for request in engine.requests if request.task == "quality"]
    assert "".join(words(asked.prompt)) == "judge mug red a mug"


async def test_the_label_of_a_judge_stands_for_its_score(store: Store) -> None:
    judged(store, LABELS, type="boolean", scores={"good": 1.0, "bad": 0.0})
    engine = ScriptedEngine(scores=lambda request: [float(text == "good") for text in request.continuations])
    async with client_of(store, engine) as client:
        await ask(client)
        await judgements(client, "recorded")
    assert [row.value for row in kept(store)] == [1.0]


async def test_streamed_answers_and_labels_are_judged_too(store: Store) -> None:
    judge = {**JUDGE, "inputs": ["message", "answer"], "messages": [{"role": "user", "content": "{message} {answer}"}]}
    judged(store, judge, task=INTENTS)
    engine = speaks("3")
    async with client_of(store, engine) as client:
        label = (await ask(client, "intents")).json()["label"]
        await judgements(client, "recorded", 1, "intents")
        chat = {"model": "intents", "messages": [{"role": "user", "content": "hello"}], "stream": True}
        assert (await client.post("/v1/chat/completions", json=chat)).status_code == 200
        await judgements(client, "recorded", 2, "intents")
    asked = ["".join(words(request.prompt)) for request in engine.requests if request.task == "quality"]
    assert asked == [f"hi {label}", "hello a mug"]
    assert [row.value for row in kept(store)] == [3.0, 3.0]


@pytest.mark.parametrize(
    ("type", "verdict"), [("number", "it is fine"), ("number", "7/10"), ("boolean", "0.5"), ("boolean", "7")]
)
async def test_a_verdict_without_a_value_of_the_metric_is_counted_and_not_recorded(
    store: Store, type: str, verdict: str
) -> None:
    judged(store, type=type)
    async with client_of(store, speaks(verdict)) as client:
        await ask(client)
        await judgements(client, "unclear")
    assert kept(store) == []


async def test_a_judge_that_fails_is_counted_and_in_nobodys_way(store: Store) -> None:
    judged(store)
    async with client_of(store, speaks(ProviderUnavailable("it is gone; wait"))) as client:
        assert (await ask(client)).json()["text"] == "a mug"
        await judgements(client, "failed")
    assert kept(store) == []


async def test_a_judge_that_nothing_answers_is_counted_and_logged_once(
    store: Store, caplog: pytest.LogCaptureFixture
) -> None:
    judged(store)
    store.registry.remove_alias("quality", "production", reason="a test", principal=ANONYMOUS)
    async with client_of(store, speaks("8")) as client:
        for asked in (1, 2):
            assert (await ask(client)).json()["text"] == "a mug"
            await judgements(client, "failed", asked)
    told = [record for record in caplog.records if "are not judged" in record.getMessage()]
    assert len(told) == 1


async def test_a_conversation_that_no_input_stands_for_is_left_out(store: Store) -> None:
    judged(store)
    engine = speaks("8")
    async with client_of(store, engine) as client:
        chat = {"model": "copy", "messages": [{"role": "user", "content": "a red mug"}]}
        assert (await client.post("/v1/chat/completions", json=chat)).status_code == 200
        await judgements(client, "left_out")
    assert [request.task for request in engine.requests] == ["copy"]


async def test_an_answer_that_broke_off_is_not_judged(store: Store) -> None:
    judged(store)
    broken = ScriptedEngine(lambda _: ["a mu", ProviderUnavailable("it is gone; wait")])
    async with client_of(store, broken) as client:
        assert (await ask(client)).status_code == 503
        metrics = (await client.get("/metrics")).text
    assert "softcue_judgements_total{" not in metrics
    assert len(broken.requests) == 1


def test_a_sample_of_what_counts_is_drawn(store: Store) -> None:
    judged(store, sample=0.25)
    plan = Plan(task=store.registry.snapshot().tasks["copy"])
    draws = iter([0.24, 0.25])
    judges = Judges(lambda _, __: plan, lambda _: None, lambda _, __: None, draw=lambda: next(draws))

    def run(experiment: str, arm: str) -> Run:
        return Run("r", plan, Caller(ANONYMOUS), "unit", "hash", experiment=experiment, arm=arm)

    drawn = judges.drawn(run("tone", "a"))
    assert drawn is not None
    assert drawn.task == "quality"
    assert judges.drawn(run("tone", "b")) is None
    # Neither of these is drawn for at all: who sees no arm, and who counts for no experiment, as a forced arm does.
    assert judges.drawn(run("tone", HOLDOUT)) is None
    assert judges.drawn(run("", "a")) is None


async def test_of_judges_that_hang_so_many_are_asked_and_the_rest_left_out(store: Store) -> None:
    judged(store)
    hung = speaks(asyncio.Event())
    async with asyncio.timeout(30):
        async with client_of(store, hung) as client:
            texts = [(await ask(client)).json()["text"] for _ in range(19)]
            await judgements(client, "left_out", 3)
            assert len(hung.running) == 16
        assert hung.running == set()
    assert texts == ["a mug"] * 19
    assert kept(store) == []


async def test_a_judge_spends_of_the_money_of_its_own_task(store: Store) -> None:
    judged(store, version="v2")
    local, provider = speaks("1"), Provider(says("8"))
    async with serving(store, local, provider, prices={"ft:small:quality": PriceOf(1, 1)}) as client:
        await ask(client)
        await judgements(client, "recorded")
        metrics = (await client.get("/metrics")).text
    assert 'softcue_cost_total{backend="acme",task="quality",version="v2"}' in metrics
    assert 'softcue_cost_total{backend="acme",task="copy"' not in metrics
    assert [row.value for row in kept(store)] == [8.0]
