"""Routes as callers see them: who answers, what the answer says of the way to it, and what is never joined or lost."""

from __future__ import annotations

import asyncio
import json
from datetime import UTC, date, datetime, timedelta
from typing import Any

import pytest

from prompt_store.access import ANONYMOUS
from service.engines.base import Messages, ScoreRequest
from service.engines.errors import InvalidRequest
from service.engines.scripted import FEATURES, ScriptedEngine
from service.routing.prices import Price
from tests.conftest import random_prompt
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
    says,
    serving,
)
from tests.service.serving import Store, client_of


async def test_a_fallback_answers_where_the_first_fails_and_says_so(store: Store) -> None:
    apply(store, "copy", FALLBACK)
    async with serving(store, ScriptedEngine(fails(LOST))) as client:
        response = await ask(client)
        body = response.json()
    assert (response.status_code, body["text"]) == (200, "remote answer")
    assert (response.headers["x-softcue-backend"], response.headers["x-softcue-version"]) == ("acme", "copy@v2")
    assert outcomes(body) == [("local", "failed"), ("acme", "answered")]
    first = body["softcue"]["route"][0]
    assert (first["place"], first["provider_request_id"]) == ("route.routes[0]", "req-7")
    assert "it is gone" in first["reason"]


async def test_the_log_has_the_way_of_a_request_and_its_cost_and_no_words_of_a_provider(
    store: Store, caplog: pytest.LogCaptureFixture
) -> None:
    apply(store, "copy", FALLBACK)
    with caplog.at_level("INFO", "softcue.requests"):
        async with serving(store, ScriptedEngine(fails(LOST)), prices={"default": PriceOf(1e6, 0.0)}) as client:
            cost = (await ask(client)).json()["softcue"]["cost"]
            await ask(client, version="v2")
    long, short = (json.loads(entry.getMessage()) for entry in caplog.records if entry.name == "softcue.requests")
    assert long["route"] == [
        {
            "backend": "local",
            "version": "copy@v1",
            "outcome": "failed",
            "error": "ProviderUnavailable",
            "provider_request_id": "req-7",
        },
        {"backend": "acme", "version": "copy@v2", "outcome": "answered"},
    ]
    assert long["cost"] == cost > 0
    assert "route" not in short
    assert str(LOST) not in caplog.text


async def test_a_fallback_never_switches_after_the_first_delta(store: Store) -> None:
    apply(store, "copy", FALLBACK)
    provider = Provider()
    async with serving(store, ScriptedEngine(says("half an", LOST)), provider) as client:
        response = await ask(client, stream=True)
    events = [line.removeprefix("data: ") for line in response.text.split("\n\n") if line]
    assert json.loads(events[0])["delta"] == "half an"
    error = json.loads(events[1])["error"]
    assert error["code"] == "provider_unavailable"
    assert "req-7" in error["message"]
    assert provider.requests == []


async def test_a_fallback_leaves_a_hung_backend_at_its_share_of_the_deadline(store: Store) -> None:
    apply(store, "copy", FALLBACK, deadline_s=0.4)
    hung = ScriptedEngine(lambda _: [asyncio.Event()], features=FEATURES)
    async with serving(store, hung) as client:
        body = (await ask(client)).json()
    assert body["text"] == "remote answer"
    assert outcomes(body) == [("local", "failed"), ("acme", "answered")]
    assert hung.running == set()


async def test_a_request_past_its_deadline_ends_in_one_error(store: Store) -> None:
    apply(store, "copy", FALLBACK, deadline_s=0.2)
    never = asyncio.Event()
    async with serving(store, ScriptedEngine(says(never)), Provider(says(never))) as client:
        response = await ask(client)
    assert (response.status_code, response.json()["error"]["code"]) == (504, "deadline_exceeded")


async def test_where_all_fail_the_error_is_the_providers_with_its_request_id(store: Store) -> None:
    apply(store, "copy", {"kind": "fallback", "routes": [V2, LOCAL]})
    async with serving(store, ScriptedEngine(features=frozenset()), Provider(fails(LOST))) as client:
        response = await ask(client, n=2)
    error = response.json()["error"]
    assert (response.status_code, error["code"]) == (503, "provider_unavailable")
    assert "req-7" in error["message"]


async def test_what_the_caller_must_change_is_not_asked_of_another_backend(store: Store) -> None:
    apply(store, "copy", FALLBACK)
    provider = Provider()
    async with serving(store, ScriptedEngine(fails(InvalidRequest("no", parameter="top_p"))), provider) as client:
        response = await ask(client)
    assert (response.status_code, provider.requests) == (400, [])


@pytest.mark.parametrize(("threshold", "answer"), [(-0.2, "sure"), (-0.1, "remote answer")])
async def test_a_cascade_keeps_an_answer_that_is_sure_enough(store: Store, threshold: float, answer: str) -> None:
    cascade(store, "copy", "mean_logprob", threshold)  # the scripted token has -1/8
    async with serving(store, ScriptedEngine(says("sure"))) as client:
        response = await ask(client)
    body = response.json()
    assert body["text"] == answer
    assert response.headers["x-softcue-held-back"] == "true"
    assert body["softcue"]["route"][0]["confidence"] == -0.125
    assert body["softcue"]["held_back"] is True
    expected = [("local", "answered")] if answer == "sure" else [("local", "passed_over"), ("acme", "answered")]
    assert outcomes(body) == expected


async def test_a_cascade_streams_nothing_of_an_answer_that_is_not_accepted(store: Store) -> None:
    cascade(store, "copy", "mean_logprob", 0.0)
    async with serving(store, ScriptedEngine(says("cheap", " words"))) as client:
        response = await ask(client, stream=True)
    assert "cheap" not in "".join(line for line in response.text.splitlines() if '"delta":""' not in line)
    assert response.headers["x-softcue-version"] == "copy@v2"


async def test_a_cascade_answers_with_what_it_has_where_the_second_fails(store: Store) -> None:
    cascade(store, "copy", "mean_logprob", 0.0)
    async with serving(store, ScriptedEngine(says("cheap")), Provider(fails(LOST))) as client:
        body = (await ask(client)).json()
    assert body["text"] == "cheap"
    assert "the second failed" in body["softcue"]["route"][0]["note"]


async def test_a_cascade_accepts_nothing_of_a_version_it_was_not_calibrated_for(store: Store) -> None:
    cascade(store, "copy", "mean_logprob", -9.0)
    async with serving(store, ScriptedEngine(says("cheap"))) as client:
        assert (await ask(client)).json()["text"] == "cheap"
    store.publish("copy", random_prompt(9, 3))
    async with serving(store, ScriptedEngine(says("cheap"))) as client:
        body = (await ask(client)).json()
    assert body["text"] == "remote answer"
    assert "no calibration" in body["softcue"]["route"][0]["reason"]


@pytest.mark.parametrize(("threshold", "backend"), [(0.1, "local"), (0.99, "acme")])
async def test_a_cascade_of_labels_goes_by_their_margin(store: Store, threshold: float, backend: str) -> None:
    cascade(store, "intents", "margin", threshold)

    def scores(_: ScoreRequest) -> list[float]:
        return [-1.0, -2.0, -3.0]

    async with serving(store, ScriptedEngine(scores=scores)) as client:
        response = await ask(client, "intents")
    assert response.headers["x-softcue-backend"] == backend


@pytest.mark.parametrize("measure", ["margin", "mean_logprob"])
async def test_a_threshold_of_labels_is_not_held_against_an_answer_in_text(store: Store, measure: str) -> None:
    cascade(store, "intents", measure, -1000.0)
    async with serving(store, ScriptedEngine()) as client:
        assert (await ask(client, "intents")).headers["x-softcue-backend"] == "local"
        chat = {"model": "intents", "messages": [{"role": "user", "content": "hi"}]}
        response = await client.post("/v1/chat/completions", json=chat)
    assert response.headers["x-softcue-backend"] == "acme"
    first = response.json()["softcue"]["route"][0]
    assert (first["outcome"], "/classify tells labels" in first["reason"]) == ("passed_over", True)


async def test_a_split_gives_a_unit_the_same_arm_each_time(store: Store) -> None:
    arms = [
        {"name": "tuned", "weight": 0.5, "route": LOCAL},
        {"name": "remote", "weight": 0.5, "route": V2},
    ]
    apply(store, "copy", {"kind": "split", "experiment": "first", "arms": arms})
    async with serving(store, ScriptedEngine()) as client:
        seen = {}
        for unit in map(str, range(40)):
            bodies = [(await ask(client, unit=unit)).json() for _ in range(2)]
            first, second = (body["softcue"]["arm"] for body in bodies)
            assert first == second
            seen[unit] = first
    assert set(seen.values()) == {"tuned", "remote"}


async def test_members_of_an_ensemble_vote_across_backends(store: Store) -> None:
    members = [LOCAL, V2, V2]
    apply(store, "copy", {"kind": "ensemble", "members": members})
    async with serving(store, ScriptedEngine(says("lonely"))) as client:
        body = (await ask(client)).json()
    assert (body["text"], body["agreement"]) == ("remote answer", pytest.approx(2 / 3))
    assert sorted(outcomes(body)) == [("acme", "answered"), ("acme", "passed_over"), ("local", "passed_over")]


async def test_a_shadow_is_recorded_with_its_agreement_and_changes_no_answer(store: Store) -> None:
    apply(store, "copy", {"kind": "shadow", "primary": LOCAL, "shadow": V2})
    async with serving(store, ScriptedEngine(says("remote", " words")), Provider(says("remote answer"))) as client:
        body = (await ask(client)).json()
        assert body["text"] == "remote words"
        await counted(client, 'softcue_shadow_answers_total{outcome="answered",task="copy"} 1.0')
    (kept,) = store.registry.shadow_answers("copy")
    assert (kept.primary_text, kept.shadow_text, kept.agreement) == ("remote words", "remote answer", 0.5)
    assert (kept.primary_label, kept.shadow_label, kept.generation_id) == ("copy@v1", "copy@v2", body["id"])


async def test_a_shadow_that_fails_fails_nothing(store: Store) -> None:
    apply(store, "intents", {"kind": "shadow", "primary": LOCAL, "shadow": V2})

    class Broken(Provider):
        async def score(self, request: ScoreRequest) -> Any:
            raise LOST

    async with serving(store, ScriptedEngine(), Broken()) as client:
        assert (await ask(client, "intents")).status_code == 200
        await counted(client, 'softcue_shadow_answers_total{outcome="failed",task="intents"} 1.0')
    (kept,) = store.registry.shadow_answers("intents")
    assert kept.shadow_text is None
    assert "it is gone" in str(kept.shadow_error)


async def test_past_a_days_ceiling_the_backends_that_cost_are_passed_over(store: Store) -> None:
    apply(store, "copy", {"kind": "fallback", "routes": [V2, LOCAL]}, daily_cost_ceiling=1.5)
    prices: dict[str, Price] = {"default": PriceOf(0.0, 1.0)}
    async with serving(store, ScriptedEngine(says("tuned")), Provider(says("dear")), prices=prices) as client:
        bodies = [(await ask(client)).json() for _ in range(3)]
    assert [body["text"] for body in bodies] == ["dear", "dear", "tuned"]
    assert [body["softcue"]["cost"] for body in bodies] == [1.0, 1.0, 0.0]
    assert "ceiling" in bodies[2]["softcue"]["route"][0]["reason"]
    assert sum(store.registry.spending(datetime.now(UTC).date()).values()) == 2.0


async def test_a_ceiling_without_a_fallback_is_one_clear_refusal(store: Store) -> None:
    apply(store, "copy", V2, daily_cost_ceiling=0.5)
    prices: dict[str, Price] = {"default": PriceOf(0.0, 1.0)}
    async with serving(store, ScriptedEngine(), Provider(says("dear")), prices=prices) as client:
        assert (await ask(client)).status_code == 200
        response = await ask(client)
    assert (response.status_code, response.json()["error"]["code"]) == (429, "cost_ceiling_reached")
    assert int(response.headers["retry-after"]) > 0


async def test_past_its_models_last_day_a_routes_fallback_takes_over(store: Store) -> None:
    store.registry.note_shutdown("copy", "v2", date(2020, 1, 1), ANONYMOUS)
    apply(store, "copy", {"kind": "fallback", "routes": [V2, LOCAL]})
    provider = Provider()
    async with serving(store, ScriptedEngine(says("tuned")), provider) as client:
        body = (await ask(client)).json()
        direct = await ask(client, version="v2")
    assert (body["text"], provider.requests) == ("tuned", [])
    assert "2020-01-01" in body["softcue"]["route"][0]["reason"]
    assert direct.json()["error"]["code"] == "model_retired"


async def test_an_extracted_answer_that_is_not_valid_is_asked_for_once_more(store: Store) -> None:
    apply(store, "query", V2)
    answers = iter(['{"table": 3}', '{"table": "sales"}'])
    provider = Provider(lambda _: [next(answers)])
    async with serving(store, ScriptedEngine(), provider) as client:
        body = (await ask(client, "query")).json()
    assert (body["parsed"], body["invalid"]) == ({"table": "sales"}, None)
    assert outcomes(body) == [("acme", "passed_over"), ("acme", "answered")]
    prompt = provider.requests[1].prompt
    assert isinstance(prompt, Messages)
    assert [message.role for message in prompt.messages] == ["user", "assistant", "user"]


async def test_a_fine_tuned_id_is_answered_by_the_backend_that_has_its_pattern(store: Store) -> None:
    provider = Provider()
    async with serving(store, ScriptedEngine(), provider, models=("ft:*",)) as client:
        body = {"model": "ft:small:me::x", "messages": [{"role": "user", "content": "hi"}]}
        response = await client.post("/v1/chat/completions", json=body)
        unknown = await client.post("/v1/chat/completions", json={**body, "model": "copy@v9"})
    assert response.json()["choices"][0]["message"]["content"] == "remote answer"
    assert response.headers["x-softcue-version"] == "ft:small:me::x"
    assert provider.requests[0].remote_model == "ft:small:me::x"
    assert unknown.status_code == 404


async def test_the_path_of_a_streamed_answer_is_in_its_last_chunk_and_by_its_id(store: Store) -> None:
    apply(store, "copy", FALLBACK)
    prices: dict[str, Price] = {"default": PriceOf(0.5, 2.0)}
    async with serving(store, ScriptedEngine(fails(LOST)), prices=prices) as client:
        body = {"model": "copy", "messages": [{"role": "user", "content": "hi"}], "stream": True}
        response = await client.post("/v1/chat/completions", json=body)
        chunks = [json.loads(line[6:]) for line in response.text.splitlines() if line.startswith("data: {")]
        assert ["softcue" in chunk for chunk in chunks] == [False] * (len(chunks) - 1) + [True]
        assert outcomes(chunks[-1]) == [("local", "failed"), ("acme", "answered")]
        known = (await client.get(f"/v1/generations/{chunks[-1]['id']}")).json()
        other = (await client.get("/v1/generations/chatcmpl-forged.abc")).json()
    assert known["route"] == chunks[-1]["softcue"]["route"]
    assert known["cost"] == chunks[-1]["softcue"]["cost"] == sum(step["cost"] for step in known["route"]) == 2.5
    assert (known["task"], known["version"], known["backend"], known["outcome"]) == ("copy", "v2", "acme", "stop")
    assert other["error"]["code"] == "generation_not_found"


async def test_models_say_when_a_provider_takes_one_away_and_what_it_answers_by(store: Store) -> None:
    store.registry.note_shutdown("copy", "v2", date(2027, 1, 6), ANONYMOUS)
    async with serving(store, ScriptedEngine()) as client:
        listed = {entry["id"]: entry for entry in (await client.get("/v1/models")).json()["data"]}
        one = (await client.get("/v1/models/copy@v2")).json()
    assert (one["shutdown_date"], one["parent"]) == ("2027-01-06", "ft:small:copy")
    assert listed["copy@v2"] == one
    assert (listed["copy@v1"]["parent"], "shutdown_date" in listed["copy@v1"]) == ("demo-base", False)


async def test_metrics_and_log_say_when_a_route_loses_its_model(store: Store, caplog: pytest.LogCaptureFixture) -> None:
    day = datetime.now(UTC).date() + timedelta(days=40)
    store.registry.note_shutdown("copy", "v2", day, ANONYMOUS)
    apply(store, "copy", FALLBACK)
    async with serving(store, ScriptedEngine()) as client:
        scraped = (await client.get("/metrics")).text.splitlines()
    name = 'softcue_model_shutdown_timestamp_seconds{backend="acme",task="copy",version="v2"}'
    (value,) = (line.removeprefix(name) for line in scraped if line.startswith(name))
    assert datetime.fromtimestamp(float(value), UTC).date() == day
    assert f"the route of task 'copy' loses v2 ('ft:small:copy' on backend 'acme') on {day}, in 40 days" in caplog.text


async def test_a_task_that_no_backend_answers_is_not_listed_as_a_model(store: Store) -> None:
    store.registry.move_alias("copy", "production", "v2", reason="", principal=ANONYMOUS)
    async with client_of(store, ScriptedEngine()) as client:
        listed = {entry["id"] for entry in (await client.get("/v1/models")).json()["data"]}
    assert "intents" in listed
    assert "copy" not in listed
