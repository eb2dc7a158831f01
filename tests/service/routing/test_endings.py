"""How requests end that do not go well: in one way each, with everything given back, accounted for and told."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import AsyncGenerator, Iterator
from datetime import date
from typing import Any, cast

import httpx
import pytest

from prompt_store.access import ANONYMOUS
from service.engines.base import Delta, Finish, GenerationEvent, GenerationRequest, RawText, ScoreRequest, Scores, Usage
from service.engines.errors import EngineError, GenerationFailed
from service.engines.scripted import ScriptedEngine
from service.generation_ids import unit_hash
from service.routing.backends import Backend
from service.routing.leaf_generation import Begun
from service.routing.plan import Target
from service.routing.run import Step
from tests.service.routing.routed import (
    FALLBACK,
    LOCAL,
    LOST,
    V2,
    PriceOf,
    Provider,
    apply,
    ask,
    cascade,
    counted,
    fails,
    outcomes,
    publish_remote,
    says,
    serving,
)
from tests.service.serving import Store, listening


def logged(caplog: pytest.LogCaptureFixture) -> list[dict[str, Any]]:
    return [json.loads(each.getMessage()) for each in caplog.records if each.name == "softcue.requests"]


async def test_a_stream_that_hangs_after_its_first_delta_ends_at_its_deadline(
    store: Store, caplog: pytest.LogCaptureFixture
) -> None:
    apply(store, "copy", FALLBACK, deadline_s=0.3)
    hung = ScriptedEngine(says("half an", asyncio.Event()))
    with caplog.at_level("INFO", "softcue.requests"):
        async with serving(store, hung) as client:
            response = await ask(client, stream=True)
    delta, error = [json.loads(line[6:]) for line in response.text.splitlines() if line]
    assert (delta["delta"], error["error"]["code"]) == ("half an", "deadline_exceeded")
    assert hung.running == set()
    (line,) = logged(caplog)
    assert (line["outcome"], line["backend"], line["completion_tokens"]) == ("error", "local", 1)
    assert line["route"] == [
        {"backend": "local", "version": "copy@v1", "outcome": "failed", "error": "DeadlineExceeded"}
    ]


async def test_a_client_that_leaves_while_a_cascade_holds_ends_the_work(
    store: Store, caplog: pytest.LogCaptureFixture
) -> None:
    cascade(store, "copy", "mean_logprob", 0.0)
    holding, ended = asyncio.Event(), asyncio.Event()
    loop = asyncio.get_running_loop()

    def script(_: GenerationRequest) -> Iterator[Any]:
        try:
            yield "cheap"
            loop.call_soon_threadsafe(holding.set)
            yield asyncio.Event()
        finally:
            loop.call_soon_threadsafe(ended.set)

    engine, provider = ScriptedEngine(script), Provider()
    acme = Backend("acme", provider, "openai_compatible", "acme")
    with caplog.at_level("INFO", "softcue.requests"), listening(store, engine, backends=[acme]) as url:
        async with httpx.AsyncClient(base_url=url) as client, asyncio.timeout(10):
            asking = asyncio.create_task(ask(client, stream=True))
            await holding.wait()
            asking.cancel()
            await asyncio.gather(asking, return_exceptions=True)
            await ended.wait()
    assert (engine.running, provider.requests) == (set(), [])
    (line,) = logged(caplog)
    assert (line["outcome"], line["backend"]) == ("cancelled", "local")


async def test_of_several_prompts_one_that_fails_ends_the_streams_of_the_others(store: Store) -> None:
    apply(store, "copy", LOCAL)
    begun = asyncio.Event()
    scripts: list[Iterator[Any]] = []

    def script(request: GenerationRequest) -> Iterator[Any]:
        def play() -> Iterator[Any]:
            if request.prompt.text == "bad":  # type: ignore[union-attr]
                yield begun
                yield GenerationFailed("it is bad")
            begun.set()
            yield "good"
            yield asyncio.Event()

        scripts.append(play())  # kept, so that nobody but the service ends it
        return scripts[-1]

    engine = ScriptedEngine(script)
    async with serving(store, engine) as client:
        response = await client.post("/v1/completions", json={"model": "copy", "prompt": ["good", "bad"]})
        assert (response.json()["error"]["code"], engine.running) == ("generation_failed", set())


async def test_a_cascades_first_that_hangs_is_named_as_what_failed(store: Store) -> None:
    cascade(store, "copy", "mean_logprob", -9.0, deadline_s=0.4)
    engine = ScriptedEngine(says("cheap", asyncio.Event()))
    async with serving(store, engine) as client:
        body = (await ask(client)).json()
    assert (body["text"], engine.running) == ("remote answer", set())
    assert outcomes(body) == [("local", "failed"), ("acme", "answered")]
    assert "not there whole" in body["softcue"]["route"][0]["reason"]


async def test_where_a_member_of_an_ensemble_fails_the_others_have_not_answered(store: Store) -> None:
    apply(store, "copy", {"kind": "fallback", "routes": [{"kind": "ensemble", "members": [LOCAL, V2]}, LOCAL]})
    done = asyncio.Event()

    def first(_: GenerationRequest) -> Iterator[Any]:
        yield "tuned"
        done.set()

    async with serving(store, ScriptedEngine(first), Provider(says(done, LOST))) as client:
        body = (await ask(client)).json()
    assert body["text"] == "tuned"
    assert outcomes(body) == [("local", "passed_over"), ("acme", "failed"), ("local", "answered")]


async def test_what_no_ensemble_gives_is_refused_before_a_member_is_asked(store: Store) -> None:
    apply(store, "copy", {"kind": "ensemble", "members": [LOCAL, V2]})
    engine, provider = ScriptedEngine(), Provider()
    async with serving(store, engine, provider) as client:
        response = await ask(client, n=2)
    assert (response.status_code, response.json()["error"]["param"]) == (400, "n")
    assert (engine.requests, provider.requests) == ([], [])


@pytest.mark.parametrize("order", [[0, 1], [1, 0]])
async def test_a_provider_that_failed_says_more_than_a_model_that_is_gone(store: Store, order: list[int]) -> None:
    publish_remote(store, "copy", model="ft:small:old")
    store.registry.note_shutdown("copy", "v3", date(2020, 1, 1), ANONYMOUS)
    routes = [V2, {"kind": "direct", "version": "v3"}]
    apply(store, "copy", {"kind": "fallback", "routes": [routes[place] for place in order]})
    async with serving(store, ScriptedEngine(), Provider(fails(LOST))) as client:
        response = await ask(client)
    assert (response.status_code, response.json()["error"]["code"]) == (503, "provider_unavailable")


async def test_inputs_that_one_version_does_not_take_go_to_a_version_that_does(store: Store) -> None:
    document = store.registry.task("copy").task.model_dump(mode="json")
    messages = [{"role": "user", "content": "{material}"}]
    store.task({**document, "inputs": ["material"], "messages": messages})
    publish_remote(store, "copy")  # of the task as it is now
    apply(store, "copy", {"kind": "fallback", "routes": [V2, {"kind": "direct", "version": "v3"}]})
    async with serving(store, ScriptedEngine()) as client:
        new = await client.post("/v1/tasks/copy/generate", json={"inputs": {"material": "clay"}})
        neither = await client.post("/v1/tasks/copy/generate", json={"inputs": {"shape": "round"}})
    assert new.headers["x-softcue-version"] == "copy@v3"
    assert (neither.status_code, neither.json()["error"]["code"]) == (400, "invalid_inputs")


@pytest.mark.parametrize("hangs", [False, True])
async def test_a_repair_that_fails_or_hangs_leaves_the_first_answer(store: Store, hangs: bool) -> None:
    apply(store, "query", {"kind": "fallback", "routes": [V2, LOCAL]}, deadline_s=0.6)

    def script(request: GenerationRequest) -> list[Any]:
        if not request.id.endswith("/repair"):
            return ["no JSON"]
        return [asyncio.Event() if hangs else LOST]

    async with serving(store, ScriptedEngine(), Provider(script)) as client:
        body = (await ask(client, "query")).json()
    assert (body["text"], outcomes(body)) == ("no JSON", [("acme", "answered"), ("acme", "failed")])


async def test_what_a_failed_request_did_is_told_by_its_id(store: Store, caplog: pytest.LogCaptureFixture) -> None:
    apply(store, "copy", FALLBACK)
    with caplog.at_level("INFO", "softcue.requests"):
        async with serving(store, ScriptedEngine(fails(GenerationFailed("no"))), Provider(fails(LOST))) as client:
            assert (await ask(client)).status_code == 503
            (line,) = logged(caplog)
            known = (await client.get(f"/v1/generations/{line['id']}")).json()
    assert (known["outcome"], [step["outcome"] for step in known["route"]]) == ("error", ["failed", "failed"])
    assert [step.get("provider_request_id") for step in line["route"]] == [None, "req-7"]
    assert [step["error"] for step in line["route"]] == ["GenerationFailed", "ProviderUnavailable"]


class Scoring(Provider):
    """A provider that says of labels what it is told to."""

    def __init__(self, *answers: Scores | EngineError) -> None:
        super().__init__()
        self.answers = iter(answers)

    async def score(self, request: ScoreRequest) -> Scores:
        answer = next(self.answers)
        if isinstance(answer, EngineError):
            raise answer
        return answer


def scores(*values: float, choice_only: bool = False) -> Scores:
    return Scores(values, Usage(5, 1), choice_only=choice_only)


INPUTS = {"message": "hi"}
CHOSEN = scores(-float("inf"), 0.0, -float("inf"), choice_only=True)


async def test_labels_that_cannot_be_normalised_are_a_failure_that_was_paid_for(store: Store) -> None:
    apply(store, "intents", {"kind": "fallback", "routes": [V2, LOCAL]})
    prices = {"default": PriceOf(1.0, 0.0)}
    async with serving(store, ScriptedEngine(), Scoring(scores(-1.0, -2.0, -3.0)), prices=prices) as client:
        body = (await ask(client, "intents", normalise="length")).json()
    assert outcomes(body) == [("acme", "failed"), ("local", "answered")]
    assert body["softcue"]["cost"] == 5.0


async def test_a_prior_is_paid_for_by_whoever_asked_for_it(store: Store) -> None:
    apply(store, "intents", V2)
    prices = {"default": PriceOf(1.0, 0.0)}
    provider = Scoring(*[scores(-1.0, -2.0, -3.0)] * 3)
    async with serving(store, ScriptedEngine(), provider, prices=prices) as client:
        costs = [(await ask(client, "intents", calibrate=True)).json()["softcue"]["cost"] for _ in range(2)]
    assert costs == [10.0, 5.0]


async def test_a_prior_of_which_only_the_choice_is_known_divides_nothing(store: Store) -> None:
    apply(store, "intents", V2)
    async with serving(store, ScriptedEngine(), Scoring(scores(-1.0, -2.0, -3.0), CHOSEN)) as client:
        body = (await ask(client, "intents", calibrate=True)).json()
    assert body["label"] == "get refund"
    assert sum(label["probability"] for label in body["labels"]) == pytest.approx(1.0)


async def test_a_backend_that_hangs_over_a_prior_holds_up_no_other(store: Store) -> None:
    asked, go_on, loop = asyncio.Event(), threading.Event(), asyncio.get_running_loop()

    class Hanging(Provider):
        async def score(self, request: ScoreRequest) -> Scores:
            if request.id.endswith("/prior"):
                loop.call_soon_threadsafe(asked.set)
                await asyncio.to_thread(go_on.wait, 10)
            return scores(-1.0, -2.0, -3.0)

    acme = Backend("acme", Hanging(), "openai_compatible", "acme")
    with listening(store, ScriptedEngine(), backends=[acme]) as url:
        async with httpx.AsyncClient(base_url=url) as client:
            hung = asyncio.create_task(ask(client, "intents", version="v2", calibrate=True))
            await asked.wait()
            other = await ask(client, "intents", version="v1", calibrate=True)
            assert (other.status_code, hung.done()) == (200, False)
            go_on.set()
            assert (await hung).status_code == 200


async def test_members_that_tell_their_choice_alone_elect_a_label_that_one_of_them_chose(store: Store) -> None:
    publish_remote(store, "intents", model="ft:small:other")
    members = [V2, {"kind": "direct", "version": "v3"}]
    apply(store, "intents", {"kind": "ensemble", "members": members, "vote": "mean_logprob"})
    other = scores(-float("inf"), -float("inf"), 0.0, choice_only=True)
    async with serving(store, ScriptedEngine(), Scoring(CHOSEN, other)) as client:
        body = (await ask(client, "intents")).json()
    assert (body["label"], body["agreement"]) == ("track order", 0.5)


async def test_versions_of_revisions_with_other_labels_vote_by_name(store: Store) -> None:
    document = store.registry.task("intents").task.model_dump(mode="json")
    store.task({**document, "labels": ["greeting", "farewell"]})
    publish_remote(store, "intents")
    members = [LOCAL, V2, {"kind": "direct", "version": "v3"}]
    apply(store, "intents", {"kind": "ensemble", "members": members})

    def local(_: ScoreRequest) -> list[float]:
        return [-3.0, -2.0, -1.0]

    provider = Scoring(scores(-1.0, -2.0, -3.0), scores(-1.0, -2.0))
    async with serving(store, ScriptedEngine(scores=local), provider) as client:
        body = (await ask(client, "intents")).json()
    assert (body["label"], body["agreement"]) == ("greeting", pytest.approx(2 / 3))
    assert {label["label"] for label in body["labels"]} == {"get refund", "track order", "greeting", "farewell"}


async def test_a_shadow_is_compared_with_the_first_of_several_answers(store: Store) -> None:
    apply(store, "copy", {"kind": "shadow", "primary": LOCAL, "shadow": V2})
    async with serving(store, ScriptedEngine(says("the", " same")), Provider(says("the", " same"))) as client:
        assert (await ask(client, n=2, unit="user 7")).status_code == 200
        await counted(client, 'softcue_shadow_answers_total{outcome="answered",task="copy"} 1.0')
    (kept,) = store.registry.shadow_answers("copy")
    assert (kept.primary_text, kept.shadow_text, kept.agreement) == ("the same", "the same", 1.0)
    assert kept.unit_hash == unit_hash("user 7", store.registry.database.signing_key())


async def test_a_shadow_that_fails_is_counted_with_who_failed(store: Store) -> None:
    apply(store, "copy", {"kind": "shadow", "primary": LOCAL, "shadow": V2})
    async with serving(store, ScriptedEngine(), Provider(fails(LOST))) as client:
        await ask(client)
        await counted(client, 'softcue_shadow_answers_total{outcome="failed",task="copy"} 1.0')
        metrics = (await client.get("/metrics")).text
    (kept,) = store.registry.shadow_answers("copy")
    assert (kept.shadow_label, kept.shadow_backend, kept.shadow_text) == ("copy@v2", "acme", None)
    assert 'softcue_route_steps_total{backend="acme",outcome="failed",task="copy",version="v2"} 1.0' in metrics


async def test_shadows_deep_in_a_route_are_kept_apart(store: Store) -> None:
    shadow = {"kind": "shadow", "primary": LOCAL, "shadow": V2}
    arms = [{"name": letter * 60, "weight": 0.5, "route": shadow} for letter in "ab"]
    apply(store, "copy", {"kind": "split", "experiment": "first", "arms": arms})
    async with serving(store, ScriptedEngine()) as client:
        for _ in range(2):
            await ask(client, unit="somebody")
        await counted(client, 'softcue_shadow_answers_total{outcome="answered",task="copy"} 2.0')
    assert len(store.registry.shadow_answers("copy")) == 2


async def test_log_probabilities_that_a_cascade_measures_by_are_not_shown(store: Store) -> None:
    cascade(store, "copy", "mean_logprob", -9.0)
    async with serving(store, ScriptedEngine(says("sure"))) as client:
        body = (await client.post("/v1/responses", json={"model": "copy", "input": "hi"})).json()
        stream = await client.post("/v1/responses", json={"model": "copy", "input": "hi", "stream": True})
    assert body["output"][0]["content"][0]["logprobs"] == []
    assert '"logprobs":[{' not in stream.text


async def test_what_every_leaf_took_is_priced_to_the_token(store: Store) -> None:
    """The provider's answer is dearer than the one that was passed over, and its cached tokens are cheaper."""
    cascade(store, "copy", "mean_logprob", 0.0)
    provider = Provider(lambda _: [Delta("dear", finish_reason="stop"), Finish("stop", Usage(1000, 30, 0, 400))])
    price = PriceOf(2.0, 10.0, cached_input=0.5)
    async with serving(store, ScriptedEngine(), provider, prices={"default": price}) as client:
        body = (await ask(client)).json()
        metrics = (await client.get("/metrics")).text
    expected = 600 * 2.0 + 400 * 0.5 + 30 * 10.0
    assert [step["cost"] for step in body["softcue"]["route"]] == [0.0, expected]
    assert body["softcue"]["cost"] == expected
    assert f'softcue_cost_total{{backend="acme",task="copy",version="v2"}} {expected}' in metrics


async def test_what_another_service_on_the_store_spent_counts_for_the_ceiling(store: Store) -> None:
    apply(store, "copy", {"kind": "fallback", "routes": [V2, LOCAL]}, daily_cost_ceiling=1.0)
    prices = {"default": PriceOf(0.0, 1.0)}
    backends = []
    for _ in range(2):
        async with serving(store, ScriptedEngine(), Provider(says("dear")), prices=prices) as client:
            backends.append((await ask(client)).headers["x-softcue-backend"])
    assert backends == ["acme", "local"]


async def test_an_answer_that_began_and_was_never_read_ends_the_engines_work() -> None:
    engine = ScriptedEngine(says("a beginning", asyncio.Event()))
    source = cast(AsyncGenerator[GenerationEvent], engine.generate(GenerationRequest("1", RawText("hi"))))
    await anext(source)

    async def read() -> AsyncGenerator[GenerationEvent]:
        async for event in source:
            yield event

    step = Step("route", None, 0.0)
    begun = Begun(Target("local"), step, read(), source=source)
    assert engine.running == {"1"}
    await begun.aclose()
    await begun.aclose()
    assert (engine.running, step.outcome) == (set(), "cancelled")
