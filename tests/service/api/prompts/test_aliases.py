"""`/v1/prompts/{task}/aliases`: compare-and-set by ETags, rollback, removal, history."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from litestar.testing import AsyncTestClient

from prompt_store.access import ANONYMOUS, Principal
from tests.conftest import random_prompt
from tests.service.serving import Store

ALIASES = "/v1/prompts/intents/aliases"
PRODUCTION = f"{ALIASES}/production"
BORIS = Principal("boris")


@pytest.fixture
def store(store: Store) -> Store:
    """The task intents with v1 in production, v2 and v3."""
    for seed in (21, 22):
        store.publish("intents", random_prompt(seed, 4), alias=None)
    return store


def etag(store: Store, selector: str) -> str:
    return f'"{store.registry.version("intents", selector).digest}"'


async def put(
    client: AsyncTestClient[Any], version: str, path: str = PRODUCTION, reason: str = "", **headers: str
) -> Any:
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return await client.put(path, json={"version": version, "reason": reason}, headers=named)


def refusal(response: Any) -> tuple[int, str, str]:
    error = response.json()["error"]
    return response.status_code, error["code"], error["message"]


async def test_an_alias_moves_for_who_knows_where_it_points(client: AsyncTestClient[Any], store: Store) -> None:
    shown = await client.get(PRODUCTION)
    assert (shown.json()["version"], shown.headers["etag"]) == ("v1", etag(store, "v1"))
    moved = await put(client, "v2", reason="better", if_match=shown.headers["etag"])
    assert (moved.status_code, moved.json()["version"], moved.headers["etag"]) == (200, "v2", etag(store, "v2"))
    assert (await client.get(PRODUCTION)).json() == moved.json()
    assert store.registry.alias_history("intents", "production")[-1].reason == "better"


async def test_who_does_not_say_where_it_points_is_told_how_to(client: AsyncTestClient[Any], store: Store) -> None:
    for response in (await put(client, "v2"), await client.delete(PRODUCTION)):
        status, code, message = refusal(response)
        assert (status, code) == (428, "precondition_required")
        assert "send If-Match with the ETag that GET gave" in message
        # Only what moves can be created.
        assert ("If-None-Match" in message) is (response.request.method == "PUT")
    assert store.registry.version("intents", "production").label == "v1"


async def test_who_comes_too_late_is_told_where_it_points_and_who_moved_it(
    client: AsyncTestClient[Any], store: Store
) -> None:
    known = etag(store, "v1")
    store.registry.move_alias("intents", "production", "v3", reason="", principal=BORIS)
    moved = refusal(await put(client, "v2", if_match=known))
    removed = refusal(await client.delete(PRODUCTION, headers={"if-match": known}))
    rolled = refusal(await client.post(f"{PRODUCTION}/rollback", json={}, headers={"if-match": known}))
    for status, code, message in (moved, removed, rolled):
        assert (status, code) == (412, "precondition_failed")
        assert "points at v3" in message
        assert "moved there by boris at 20" in message
    assert store.registry.version("intents", "production").label == "v3"


async def test_an_etag_of_a_version_that_is_gone_comes_too_late(client: AsyncTestClient[Any], store: Store) -> None:
    assert refusal(await put(client, "v2", if_match=f'"{"a" * 64}"'))[:2] == (412, "precondition_failed")


async def test_a_star_is_whatever_it_is_as_long_as_it_is(client: AsyncTestClient[Any], store: Store) -> None:
    assert (await put(client, "v2", if_match="*")).status_code == 200
    status, _, message = refusal(await put(client, "v2", f"{ALIASES}/canary", if_match="*"))
    assert status == 412
    assert "send If-None-Match: * instead to create it" in message


async def test_an_alias_is_created_for_who_expects_none(client: AsyncTestClient[Any], store: Store) -> None:
    made = await put(client, "v2", f"{ALIASES}/canary", if_none_match="*")
    assert (made.status_code, made.json()["version"]) == (201, "v2")
    status, _, message = refusal(await put(client, "v3", f"{ALIASES}/canary", if_none_match="*"))
    assert status == 412
    assert "points at v2" in message
    listed = (await client.get(ALIASES)).json()["data"]
    assert [(entry["alias"], entry["version"]) for entry in listed] == [("canary", "v2"), ("production", "v1")]


async def test_conditions_that_no_alias_can_have_are_refused(client: AsyncTestClient[Any], store: Store) -> None:
    tag = etag(store, "v1")
    for headers in (
        {"if_match": ""},
        {"if_match": "v1"},
        {"if_match": f"W/{tag}"},
        {"if_match": tag.strip('"')},
        {"if_match": f"{tag}, {tag}"},
        {"if_none_match": tag},
        {"if_match": "*", "if_none_match": "*"},
    ):
        status, code, _ = refusal(await put(client, "v2", **headers))
        assert (status, code) == (400, "invalid_condition"), headers
    assert store.registry.version("intents", "production").label == "v1"


async def test_of_two_who_promote_at_once_one_wins(client: AsyncTestClient[Any], store: Store) -> None:
    known = etag(store, "v1")
    answers = await asyncio.gather(*(put(client, label, if_match=known) for label in ("v2", "v3")))
    assert sorted(answer.status_code for answer in answers) == [200, 412]
    winner = next(answer for answer in answers if answer.status_code == 200)
    assert store.registry.version("intents", "production").label == winner.json()["version"]
    assert len(store.registry.alias_history("intents", "production")) == 2


async def test_a_rollback_returns_to_where_it_pointed(client: AsyncTestClient[Any], store: Store) -> None:
    await put(client, "v2", if_match="*")
    back = await client.post(
        f"{PRODUCTION}/rollback", json={"reason": "worse"}, headers={"if-match": etag(store, "v2")}
    )
    assert (back.status_code, back.json()["version"], back.headers["etag"]) == (200, "v1", etag(store, "v1"))
    status, code, _ = refusal(await client.post(f"{PRODUCTION}/rollback", json={}))
    assert (status, code) == (409, "conflict")
    moves = (await client.get(f"{PRODUCTION}/history")).json()["data"]
    assert (moves[0]["reason"], moves[0]["undoes"]) == ("worse", moves[1]["sequence"])


async def test_a_removed_alias_leaves_its_history(client: AsyncTestClient[Any], store: Store) -> None:
    headers = {"if-match": etag(store, "v1")}
    removed = await client.delete(f"{PRODUCTION}?reason=retired", headers=headers)
    assert (removed.status_code, removed.content) == (204, b"")
    assert refusal(await client.get(PRODUCTION))[0] == 404
    assert refusal(await client.delete(PRODUCTION, headers={"if-match": "*"}))[0] == 404
    moves = (await client.get(f"{PRODUCTION}/history")).json()["data"]
    assert (moves[0]["target"], moves[0]["reason"]) == (None, "retired")


async def test_history_comes_newest_first_in_pages(client: AsyncTestClient[Any], store: Store) -> None:
    for label in ("v2", "v3"):
        await put(client, label, reason=f"to {label}", if_match="*")
    first = (await client.get(f"{PRODUCTION}/history?limit=2")).json()
    rest = (await client.get(f"{PRODUCTION}/history?limit=2&after={first['after']}")).json()
    assert [move["reason"] for move in first["data"] + rest["data"]] == ["to v3", "to v2", "a test"]
    assert (first["has_more"], rest["has_more"], rest["after"]) == (True, False, None)
    assert first["data"][1]["principal"] == ANONYMOUS.name
    assert refusal(await client.get(f"{PRODUCTION}/history?after=x"))[:2] == (400, "invalid_name")


async def test_a_move_with_a_key_is_done_once_and_answered_as_it_was(
    client: AsyncTestClient[Any], store: Store
) -> None:
    key = {"idempotency_key": "k", "if_match": etag(store, "v1")}
    first = await put(client, "v2", **key)
    store.registry.move_alias("intents", "production", "v3", reason="", principal=BORIS)
    again = await put(client, "v2", **key)
    assert (again.status_code, again.json(), again.headers["etag"]) == (200, first.json(), first.headers["etag"])
    assert refusal(await put(client, "v3", **key))[:2] == (422, "idempotency_key_reused")
    headers = {"idempotency-key": "r"}
    rolled = [await client.post(f"{PRODUCTION}/rollback", json={}, headers=headers) for _ in range(2)]
    assert rolled[0].json() == rolled[1].json()
    headers = {"idempotency-key": "d", "if-match": "*"}
    assert [(await client.delete(PRODUCTION, headers=headers)).status_code for _ in range(2)] == [204, 204]
    assert len(store.registry.alias_history("intents", "production")) == 5


async def test_what_cannot_be_pointed_at_is_refused(client: AsyncTestClient[Any], store: Store) -> None:
    for path, version, reason, status, said in (
        (PRODUCTION, "v9", "", 404, "no version 'v9'"),
        (PRODUCTION, "v99999999999999999999", "", 400, "is not a version number"),
        (PRODUCTION, "a\0b", "", 400, "selects no version"),
        (PRODUCTION, "v2", "a\0b", 400, "holds NUL"),
        (f"{ALIASES}/v7", "v2", "", 400, "reads as a version number"),
        (f"{ALIASES}/a%00b", "v2", "", 400, "is not an alias"),
        ("/v1/prompts/nothing/aliases/production", "v2", "", 404, "no task 'nothing'"),
    ):
        answer = refusal(await put(client, version, path, reason, if_none_match="*"))
        assert (answer[0], said in answer[2]) == (status, True), answer
