"""Routes within routes, for tasks that generate and for those that classify."""

from __future__ import annotations

from typing import Any

import pytest

from service.engines.base import ScoreRequest, Scores, Usage
from service.engines.scripted import ScriptedEngine
from tests.service.routing.routed import (
    LOCAL,
    LOST,
    V2,
    Provider,
    apply,
    ask,
    calibrate,
    counted,
    fails,
    outcomes,
    says,
    serving,
)
from tests.service.serving import Store

ENSEMBLE = {"kind": "ensemble", "members": [LOCAL, V2]}
CASCADE = {"kind": "cascade", "measure": "agreement", "first": ENSEMBLE, "second": V2}
SHADOWED = {"kind": "shadow", "primary": CASCADE, "shadow": LOCAL}
NESTED = {"kind": "fallback", "routes": [SHADOWED, LOCAL]}
SPLIT = {
    "kind": "split",
    "experiment": "first",
    "arms": [{"name": "cascade", "weight": 0.5, "route": CASCADE}, {"name": "local", "weight": 0.5, "route": LOCAL}],
}


class Choosing(Provider):
    """A provider for which the last label is the best, as the first is for the local engine; or one that fails."""

    def __init__(self, *, lost: bool = False, text: str = "remote") -> None:
        super().__init__(fails(LOST) if lost else says(text))
        self.lost = lost

    async def score(self, request: ScoreRequest) -> Scores:
        if self.lost:
            raise LOST
        return Scores((-3.0, -2.0, -1.0), Usage(5, 1))


def local() -> ScriptedEngine:
    return ScriptedEngine(says("local"), scores=lambda _: [-1.0, -2.0, -3.0])


def answer(body: dict[str, Any]) -> str:
    return str(body.get("text") or body["label"])


TASKS = pytest.mark.parametrize(
    ("task", "near", "far"), [("copy", "local", "remote"), ("intents", "get refund", "greeting")]
)


def calibrated(store: Store, task: str) -> None:
    for label in ("v1", "v2"):
        calibrate(store, task, label, "agreement", 0.9)


@TASKS
async def test_a_fallback_of_a_shadowed_cascade_of_an_ensemble(store: Store, task: str, near: str, far: str) -> None:
    calibrated(store, task)
    apply(store, task, NESTED)
    async with serving(store, local(), Choosing()) as client:
        response = await ask(client, task)
        await counted(client, f'softcue_shadow_answers_total{{outcome="answered",task="{task}"}} 1.0')
        metrics = (await client.get("/metrics")).text
    body = response.json()
    assert (answer(body), response.headers["x-softcue-backend"]) == (far, "acme")
    steps = body["softcue"]["route"]
    assert [(step["place"], step["outcome"]) for step in steps] == [
        ("route.routes[0].primary.first.members[0]", "passed_over"),
        ("route.routes[0].primary.first.members[1]", "passed_over"),
        ("route.routes[0].primary.second", "answered"),
    ]
    assert [step.get("confidence") for step in steps] == [0.5, None, None]
    (kept,) = store.registry.shadow_answers(task)
    assert (kept.primary_text, kept.shadow_text, kept.primary_label) == (far, near, f"{task}@v2")
    assert f'softcue_requests_total{{arm="",backend="acme",outcome="stop",task="{task}",version="v2"}} 1.0' in metrics


@TASKS
async def test_what_fails_deep_in_a_route_is_answered_by_the_outermost_fallback(
    store: Store, task: str, near: str, far: str
) -> None:
    calibrated(store, task)
    apply(store, task, NESTED)
    async with serving(store, local(), Choosing(lost=True)) as client:
        body = (await ask(client, task)).json()
    assert answer(body) == near
    assert [outcome for _, outcome in outcomes(body)][1:] == ["failed", "failed", "answered"]
    assert [step["outcome"] for step in body["softcue"]["route"]].count("answered") == 1
    assert store.registry.shadow_answers(task) == []


@TASKS
async def test_an_arm_may_be_a_cascade(store: Store, task: str, near: str, far: str) -> None:
    calibrated(store, task)
    apply(store, task, SPLIT)
    async with serving(store, local(), Choosing()) as client:
        bodies = [(await ask(client, task, unit=str(unit))).json() for unit in range(20)]
    assert {(body["softcue"]["arm"], answer(body)) for body in bodies} == {("cascade", far), ("local", near)}


@TASKS
async def test_an_ensemble_of_a_cascade_and_a_fallback(store: Store, task: str, near: str, far: str) -> None:
    calibrated(store, task)
    fallback = {"kind": "fallback", "routes": [LOCAL, V2]}
    shadow = {"kind": "shadow", "primary": V2, "shadow": LOCAL}
    apply(store, task, {"kind": "ensemble", "members": [CASCADE, fallback, shadow]})
    async with serving(store, local(), Choosing()) as client:
        body = (await ask(client, task)).json()
        await counted(client, f'softcue_shadow_answers_total{{outcome="answered",task="{task}"}} 1.0')
    assert (answer(body), body["agreement"]) == (far, pytest.approx(2 / 3))
    assert [outcome for _, outcome in outcomes(body)].count("answered") == 1


@TASKS
async def test_a_version_that_is_named_is_asked_alone_whatever_the_route_is(
    store: Store, task: str, near: str, far: str
) -> None:
    calibrated(store, task)
    apply(store, task, NESTED)
    async with serving(store, local(), Choosing()) as client:
        bodies = [(await ask(client, task, version=label)).json() for label in ("v1", "v2")]
    assert [answer(body) for body in bodies] == [near, far]
    assert [outcomes(body) for body in bodies] == [[("local", "answered")], [("acme", "answered")]]


@pytest.mark.parametrize("stream", [False, True])
async def test_a_nested_route_streams_nothing_but_its_answer(store: Store, stream: bool) -> None:
    calibrated(store, "copy")
    apply(store, "copy", NESTED)
    async with serving(store, local(), Choosing()) as client:
        body = {"model": "copy", "messages": [{"role": "user", "content": "hi"}], "stream": stream}
        response = await client.post("/v1/chat/completions", json=body)
    assert response.headers["x-softcue-held-back"] == "true"
    assert ("remote" in response.text, 'local"' in response.text.partition('"softcue"')[0]) == (True, False)
