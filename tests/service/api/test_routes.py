"""Routes over HTTP."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime
from typing import Any

import pytest
from litestar.testing import AsyncTestClient

from prompt_store.access import ANONYMOUS
from prompt_store.routing.backends import BackendDescription
from prompt_store.routing.registry import ShadowAnswer
from service.engines.scripted import FEATURES
from tests.conftest import random_prompt
from tests.service.serving import Store

ROUTE = "/v1/tasks/copy/route"
LOCAL = {"kind": "direct", "version": "v1"}
FALLBACK = {"route": {"kind": "fallback", "routes": [LOCAL, {"kind": "direct", "version": "v2"}]}, "deadline_s": 2.5}


@pytest.fixture(autouse=True)
def backends(store: Store) -> None:
    """Two versions and the backend that serves them."""
    kinds = frozenset({"soft_prompt", "prefix", "text"})
    store.registry.register_backends([BackendDescription("local", "local", None, kinds, FEATURES)], ANONYMOUS)
    store.publish("copy", random_prompt(7, 5), alias="candidate")


async def put(client: AsyncTestClient[Any], document: Any, match: str | None = '"0"', **query: Any) -> Any:
    headers = {} if match is None else {"if-match": match}
    return await client.put(ROUTE, json=document, headers=headers, params=query)


def refusal(response: Any) -> tuple[int, str, str]:
    error = response.json()["error"]
    return response.status_code, error["code"], error["message"]


async def test_a_route_is_applied_where_nobody_else_was_first(client: AsyncTestClient[Any]) -> None:
    unapplied = await client.get(ROUTE)
    assert (unapplied.json()["revision"], unapplied.headers["etag"]) == (0, '"0"')
    first = await put(client, FALLBACK, unapplied.headers["etag"], reason="two are better")
    assert (first.status_code, first.headers["etag"], first.json()["changed"]) == (200, '"1"', True)
    shown = await client.get(ROUTE)
    assert shown.headers["etag"] == '"1"'
    body = shown.json()
    assert (body["revision"], body["reason"], body["principal"]) == (1, "two are better", "anonymous")
    assert (body["route"]["route"]["kind"], body["route"]["deadline_s"]) == ("fallback", 2.5)
    late = refusal(await put(client, LOCAL))
    assert late[:2] == (412, "precondition_failed")
    assert "is at revision 1" in late[2]
    same = await put(client, body["route"], '"1"')
    assert (same.json()["revision"], same.json()["changed"]) == (1, False)
    assert (await put(client, LOCAL, "*")).json()["revision"] == 2


async def test_the_first_route_can_be_asked_to_be_the_first(client: AsyncTestClient[Any]) -> None:
    only_new = {"if-none-match": "*"}
    assert (await client.put(ROUTE, json=LOCAL, headers=only_new)).json()["revision"] == 1
    assert refusal(await client.put(ROUTE, json=FALLBACK, headers=only_new))[:2] == (412, "precondition_failed")


@pytest.mark.parametrize(
    ("headers", "status", "code"),
    [
        ({}, 428, "precondition_required"),
        ({"if-match": "1"}, 400, "invalid_condition"),
        ({"if-match": f'"{"a" * 64}"'}, 400, "invalid_condition"),
        ({"if-none-match": '"1"'}, 400, "invalid_condition"),
        ({"if-match": '"0"', "if-none-match": "*"}, 400, "invalid_condition"),
    ],
)
async def test_a_route_is_not_changed_blindly(
    client: AsyncTestClient[Any], headers: dict[str, str], status: int, code: str
) -> None:
    assert refusal(await client.put(ROUTE, json=LOCAL, headers=headers))[:2] == (status, code)
    assert (await client.get(ROUTE)).json()["revision"] == 0


async def test_all_that_is_wrong_with_a_route_is_said_at_once(client: AsyncTestClient[Any]) -> None:
    cascade = {"kind": "cascade", "measure": "margin", "first": {"kind": "direct", "backend": "locl"}, "second": LOCAL}
    status, code, message = refusal(await put(client, cascade))
    assert (status, code) == (400, "invalid_route")
    assert "did you mean 'local'?" in message
    assert message.count("copy.route") > 1
    misshapen = refusal(await put(client, {"kind": "fallback", "routes": [{"kind": "direct", "vers": "v1"}, {}]}))
    assert "routes[0].vers: there is no such field" in misshapen[2]
    assert "routes[1]: the kind is missing" in misshapen[2]
    assert refusal(await put(client, {"kind": "direct", "version": "v9"}))[2].startswith("copy.route")
    deep: Any = LOCAL
    for _ in range(400):
        deep = {"kind": "fallback", "routes": [deep, LOCAL]}
    assert (await put(client, deep)).status_code == 400


async def test_a_trial_says_what_would_change_and_changes_nothing(client: AsyncTestClient[Any]) -> None:
    await put(client, LOCAL)
    trial = (await put(client, FALLBACK, None, dry_run="true")).json()
    assert (trial["object"], trial["revision"], trial["changed"], trial["warnings"]) == ("route.trial", 1, True, [])
    assert trial["current"]["route"] == {**LOCAL, "backend": None}
    assert trial["route"]["deadline_s"] == 2.5
    assert (await put(client, LOCAL, None, dry_run="true")).json()["changed"] is False
    assert refusal(await put(client, {"kind": "direct", "version": "v9"}, None, dry_run="true"))[0] == 400
    assert (await client.get(ROUTE)).json()["revision"] == 1


async def test_a_trial_is_refused_as_the_change_would_be(client: AsyncTestClient[Any]) -> None:
    await put(client, LOCAL)
    for match, status in (('"0"', 412), ("1", 400), ('"1"', 200), ("*", 200), (None, 200)):
        assert (await put(client, FALLBACK, match, dry_run="true")).status_code == status, match
    only_new = {"if-none-match": "*"}
    assert (await client.put(ROUTE, json=LOCAL, headers=only_new, params={"dry_run": "true"})).status_code == 412
    for query in ({"dry_run": "true"}, {}):
        unknown = await client.put(ROUTE.replace("copy", "copi"), json=LOCAL, headers=only_new, params=query)
        assert refusal(unknown)[:2] == (404, "model_not_found")


async def test_a_route_is_rolled_back_and_its_history_tells_so(client: AsyncTestClient[Any]) -> None:
    assert refusal(await client.post(f"{ROUTE}/rollback", json={}))[:2] == (409, "conflict")
    await put(client, LOCAL)
    await put(client, FALLBACK, '"1"')
    wrong = await client.post(f"{ROUTE}/rollback", json={}, headers={"if-match": '"1"'})
    assert refusal(wrong)[:2] == (412, "precondition_failed")
    back = await client.post(f"{ROUTE}/rollback", json={"reason": "slow"}, headers={"if-match": '"2"'})
    assert (back.status_code, back.headers["etag"], back.json()["restores"]) == (200, '"3"', 1)
    assert (await client.post(f"{ROUTE}/rollback", json={"to": 2})).json()["restores"] == 2
    history = (await client.get(f"{ROUTE}/history")).json()["data"]
    assert [(entry["revision"], entry["restores"], entry["reason"]) for entry in history] == [
        (4, 2, ""),
        (3, 1, "slow"),
        (2, None, ""),
        (1, None, ""),
    ]
    assert refusal(await client.post(f"{ROUTE}/rollback", json={"to": 9}))[:2] == (409, "conflict")


async def test_the_routes_that_are_served_follow_the_store(client: AsyncTestClient[Any]) -> None:
    await put(client, FALLBACK)
    async with asyncio.timeout(10):
        while True:
            listed = (await client.get("/v1/routes")).json()["data"]
            if listed[0]["route"]["route"]["kind"] == "fallback":
                break
    assert [entry["task"] for entry in listed] == ["copy", "intents", "query"]
    assert listed[1]["route"]["route"] == {"kind": "direct", "backend": None, "version": "production"}


async def test_shadows_are_shown_with_how_far_they_agree(client: AsyncTestClient[Any], store: Store) -> None:
    def answer(place: int, agreement: float | None, error: str | None = None) -> ShadowAnswer:
        version = store.registry.version("copy", "v1").digest
        said = None if error is not None else "blue bolt"
        at = datetime(2026, 11, 1, 12, place, tzinfo=UTC)
        return ShadowAnswer(
            f"s{place}", f"g{place}", "copy", at, version, "v1", "local", "blue bolt", 10.0,
            version, "v2", "away", said, error, 30.0, agreement,
        )  # fmt: skip

    store.registry.add_shadow_answers([answer(1, 1.0), answer(2, 0.5), answer(3, None, "it was away")])
    body = (await client.get(f"{ROUTE}/shadows", params={"limit": 2})).json()
    (summary,) = body["summary"]
    assert (summary["count"], summary["failed"], summary["agreement"]) == (3, 1, 0.75)
    assert [(entry["id"], entry["shadow_error"]) for entry in body["data"]] == [("s3", "it was away"), ("s2", None)]


@pytest.mark.parametrize("place", ["", "/history", "/shadows"])
async def test_a_task_that_does_not_exist_has_no_route(client: AsyncTestClient[Any], place: str) -> None:
    status, code, message = refusal(await client.get(f"/v1/tasks/copi/route{place}"))
    assert (status, code) == (404, "model_not_found")
    assert "did you mean 'copy'?" in message


async def test_a_mistyped_query_parameter_applies_nothing(client: AsyncTestClient[Any]) -> None:
    status, code, message = refusal(await put(client, LOCAL, dryrun="true"))
    assert (status, code) == (400, "unknown_parameter")
    assert "did you mean 'dry_run'?" in message
    assert (await client.get(ROUTE)).json()["revision"] == 0
