"""Experiments over HTTP."""

from __future__ import annotations

from typing import Any

import pytest
from litestar.testing import AsyncTestClient

from tests.service.experiments.lived import FRIENDLIER, live, prepare
from tests.service.serving import Store

PLACE = "/v1/experiments"
ONE = f"{PLACE}/friendlier"
BETTER = {"control": (400, 200), "candidate": (400, 300)}
UNEVEN = {"control": (300, 150), "candidate": (500, 400)}


@pytest.fixture(autouse=True)
def prepared(store: Store) -> None:
    prepare(store)


async def start(client: AsyncTestClient[Any], **changes: Any) -> Any:
    return await client.post(PLACE, json={**FRIENDLIER, **changes})


async def lived(client: AsyncTestClient[Any], store: Store, units: dict[str, tuple[int, int]]) -> None:
    assert (await start(client)).status_code == 201
    live(store.registry, store.registry.experiment("friendlier"), units)


def refusal(response: Any) -> tuple[int, str, str]:
    error = response.json()["error"]
    return response.status_code, error["code"], error["message"]


async def test_an_experiment_is_started_listed_and_has_a_history(client: AsyncTestClient[Any]) -> None:
    assert (await client.get(PLACE)).json() == {"object": "list", "data": []}
    answer = await client.post(PLACE, json=FRIENDLIER, params={"reason": "support asked"})
    assert (answer.status_code, answer.headers["etag"]) == (201, '"1"')
    body = answer.json()
    assert (body["state"], body["versions"]) == ("running", {"control": ["v1"], "candidate": ["v2"]})
    assert body["weights"] == {"control": 0.5, "candidate": 0.5}
    assert body["experiment"]["metric"] == "helpful"
    assert [entry["name"] for entry in (await client.get(PLACE, params={"task": "copy"})).json()["data"]] == [
        "friendlier"
    ]
    assert (await client.get(PLACE, params={"task": "query"})).json()["data"] == []
    (event,) = (await client.get(f"{ONE}/history")).json()["data"]
    assert (event["action"], event["reason"], event["principal"]) == (
        "experiment.start", "support asked", "anonymous",
    )  # fmt: skip
    assert event["details"]["weights"] == {"control": 0.5, "candidate": 0.5}


async def test_a_dry_run_says_what_starting_would_do_and_starts_nothing(client: AsyncTestClient[Any]) -> None:
    trial = await client.post(PLACE, json=FRIENDLIER, params={"dry_run": "true"})
    assert (trial.status_code, trial.json()["object"]) == (200, "experiment.trial")
    assert trial.json()["route"]["route"]["kind"] == "split"
    assert trial.json()["versions"] == {"control": ["v1"], "candidate": ["v2"]}
    wrong = await client.post(PLACE, json={**FRIENDLIER, "metric": "helpfull"}, params={"dry_run": "true"})
    assert refusal(wrong)[:2] == (400, "invalid_experiment")
    assert (await client.get(PLACE)).json()["data"] == []


async def test_all_that_is_wrong_with_an_experiment_is_said_at_once(client: AsyncTestClient[Any]) -> None:
    status, code, message = refusal(await start(client, control="contrl", metrics=["latency_ms"], alphaa=0.1))
    assert (status, code) == (400, "invalid_experiment")
    assert "did you mean 'alpha'?" in message
    arms = [{"name": "control", "weight": 0.5}, {"name": "candidate", "weight": 0.6, "version": "v9"}]
    assert "sum to 1.1" in refusal(await start(client, arms=arms))[2]
    arms[1]["weight"] = 0.5
    assert "has no version 'v9'" in refusal(await start(client, arms=arms))[2]
    assert refusal(await start(client, task="copi"))[:2] == (404, "model_not_found")


async def test_a_second_experiment_on_a_task_or_under_a_name_is_refused(client: AsyncTestClient[Any]) -> None:
    await start(client)
    assert refusal(await start(client))[:2] == (409, "conflict")
    assert refusal(await start(client, name="another"))[:2] == (409, "conflict")


async def test_a_report_says_what_to_do_with_the_numbers_behind_it(client: AsyncTestClient[Any], store: Store) -> None:
    await lived(client, store, BETTER)
    answer = await client.get(ONE)
    body = answer.json()
    assert (answer.headers["etag"], body["schema"]) == ('"1"', "softcue.experiment-report/1")
    assert body["verdict"] == "promote"
    assert body["sentence"].startswith("Promote candidate: helpful is 25 points higher with candidate than with")
    decision, latency = body["metrics"]
    assert [arm["units"] for arm in decision["arms"]] == [400, 400]
    assert decision["arms"][1]["lift"]["estimate"] == pytest.approx(0.25)
    assert (latency["guardrail"], latency["states"]) == ("held", {"candidate": "held"})
    assert body["sample_ratio"]["observed"] == {"control": 400, "candidate": 400}
    assert [(each["arm"], each["generations"]) for each in body["served"]] == [("control", 400), ("candidate", 400)]
    assert body["record"]["experiment"]["name"] == "friendlier"


async def test_a_report_without_a_unit_has_null_for_what_is_not_known(client: AsyncTestClient[Any]) -> None:
    await start(client)
    body = (await client.get(ONE)).json()
    assert body["sentence"] == "Keep going: no unit has come to an arm yet."
    assert [arm["lift"] for arm in body["metrics"][0]["arms"]] == [None, None]


async def test_the_report_is_a_page_that_runs_nothing(client: AsyncTestClient[Any], store: Store) -> None:
    await lived(client, store, BETTER)
    answer = await client.get(f"{ONE}/report")
    assert answer.headers["content-type"].startswith("text/html")
    assert answer.headers["content-security-policy"].startswith("default-src 'none'")
    assert "Promote candidate" in answer.text
    assert "<svg" in answer.text


async def test_a_winner_is_promoted_by_whoever_knows_how_it_stands(client: AsyncTestClient[Any], store: Store) -> None:
    await lived(client, store, BETTER)
    promotion = {"arm": "candidate", "reason": "it helps more"}
    assert refusal(await client.post(f"{ONE}/promote", json=promotion))[:2] == (428, "precondition_required")
    late = await client.post(f"{ONE}/promote", json=promotion, headers={"if-match": '"2"'})
    assert refusal(late)[:2] == (412, "precondition_failed")
    answer = await client.post(f"{ONE}/promote", json=promotion, headers={"if-match": '"1"'})
    assert (answer.status_code, answer.json()["state"], answer.json()["winner"]) == (200, "promoted", "candidate")
    assert store.registry.alias("copy", "production").version == store.registry.version("copy", "v2").digest
    newest = (await client.get(f"{ONE}/history")).json()["data"][0]
    assert newest["details"]["metrics"]["helpful"]["arms"][1]["lift"]["estimate"] == pytest.approx(0.25)
    again = await client.post(f"{ONE}/promote", json=promotion, headers={"if-match": "*"})
    assert refusal(again)[:2] == (409, "conflict")


async def test_a_mismatch_refuses_a_promotion_unless_somebody_says_why(
    client: AsyncTestClient[Any], store: Store
) -> None:
    await lived(client, store, UNEVEN)
    assert (await client.get(ONE)).json()["verdict"] == "unreadable"
    promotion: dict[str, Any] = {"arm": "candidate"}
    for match in ('"1"', "*"):
        refused = await client.post(f"{ONE}/promote", json=promotion, headers={"if-match": match})
        status, code, message = refusal(refused)
        assert (status, code) == (409, "conflict")
        assert "units came to arms as 37.5 to 62.5 where 50 to 50 was drawn" in message
    promotion["despite_mismatch"] = True
    unexplained = await client.post(f"{ONE}/promote", json=promotion, headers={"if-match": '"1"'})
    assert refusal(unexplained)[:2] == (400, "invalid_experiment")
    promotion["reason"] = "the import of Monday's units is known"
    answer = await client.post(f"{ONE}/promote", json=promotion, headers={"if-match": '"1"'})
    assert answer.json()["state"] == "promoted"
    newest = (await client.get(f"{ONE}/history")).json()["data"][0]
    assert newest["details"]["despite_mismatch"] is True


async def test_weights_change_by_comparison_and_sum_to_one(client: AsyncTestClient[Any]) -> None:
    await start(client)
    weights = {"weights": {"control": 0.2, "candidate": 0.8}}
    assert refusal(await client.post(f"{ONE}/weights", json=weights))[:2] == (428, "precondition_required")
    answer = await client.post(f"{ONE}/weights", json=weights, headers={"if-match": '"1"'})
    assert (answer.headers["etag"], answer.json()["weights"]) == ('"2"', weights["weights"])
    wrong = {"weights": {"control": 0.2, "candidate": 0.9}}
    refused = await client.post(f"{ONE}/weights", json=wrong, headers={"if-match": '"2"'})
    assert refusal(refused)[:2] == (400, "invalid_experiment")
    bad = await client.post(f"{ONE}/weights", json=weights, headers={"if-match": "2"})
    assert refusal(bad)[:2] == (400, "invalid_condition")


async def test_an_experiment_is_stopped_in_haste_or_by_comparison(client: AsyncTestClient[Any], store: Store) -> None:
    await lived(client, store, BETTER)
    late = await client.post(f"{ONE}/stop", json={}, headers={"if-match": '"7"'})
    assert refusal(late)[:2] == (412, "precondition_failed")
    answer = await client.post(f"{ONE}/stop", json={"reason": "too many complaints"})
    assert (answer.json()["state"], answer.json()["reason"]) == ("stopped", "too many complaints")
    sentence = (await client.get(ONE)).json()["sentence"]
    assert sentence.startswith("Stopped on ")
    assert "too many complaints" in sentence


@pytest.mark.parametrize("place", ["", "/history", "/report"])
async def test_an_unknown_experiment_is_not_found(client: AsyncTestClient[Any], place: str) -> None:
    await start(client)
    status, code, message = refusal(await client.get(f"{PLACE}/friendlyer{place}"))
    assert (status, code) == (404, "experiment_not_found")
    assert "did you mean 'friendlier'?" in message
