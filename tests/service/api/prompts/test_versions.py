"""`/v1/prompts` and `/v1/bases` over a real store on each database."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from litestar.testing import AsyncTestClient
from sqlalchemy import update

from prompt_store.access import ANONYMOUS
from prompt_store.prompts.artifact import Artifact, decode_artifact, encode_artifact
from prompt_store.prompts.registry import NewVersion
from prompt_store.prompts.version import BaseDescription, DatasetUse, Provenance
from prompt_store.tables import tensors, versions
from service.engines.scripted import ScriptedEngine
from tests.conftest import random_prompt
from tests.service.serving import COPY, Store, client_of

SAFETENSORS = {"content-type": "application/octet-stream"}
TEXT = {"payload": {"kind": "text", "messages": [{"role": "user", "content": "Write of {product}"}]}}
OTHER = BaseDescription("e" * 64, "other", 64, 2, 512, 4096, "LlamaForCausalLM")


def artifact(store: Store, seed: int = 7, **changes: Any) -> bytes:
    fields: dict[str, Any] = {"task": "copy", "base_fingerprint": store.base.fingerprint, "notes": "from the file"}
    return encode_artifact(Artifact(random_prompt(seed, 4), **{**fields, **changes}))


async def post(client: AsyncTestClient[Any], task: str = "copy", query: str = "", **request: Any) -> Any:
    return await client.post(f"/v1/prompts/{task}/versions{query}", **request)


async def send(client: AsyncTestClient[Any], data: bytes, query: str = "", **headers: str) -> Any:
    return await post(client, query=query, content=data, headers={**SAFETENSORS, **headers})


def refusal(response: Any) -> tuple[int, str, str]:
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    return response.status_code, error["code"], error["message"]


async def test_versions_are_listed_in_pages_with_their_aliases(client: AsyncTestClient[Any], store: Store) -> None:
    store.publish("intents", random_prompt(5, 4), alias="candidate")
    seen, after = [], ""
    while True:
        page = (await client.get(f"/v1/prompts?limit=2{after}")).json()
        assert page["object"] == "list"
        seen += [(entry["task"], entry["version"], entry["aliases"]) for entry in page["data"]]
        if not page["has_more"]:
            break
        after = f"&after={page['after']}"
    assert page["after"] is None
    assert seen == [
        ("copy", "v1", ["production"]),
        ("intents", "v2", ["candidate"]),
        ("intents", "v1", ["production"]),
        ("query", "v1", ["production"]),
    ]
    of_task = (await client.get("/v1/prompts/intents/versions?limit=1")).json()
    assert ([entry["version"] for entry in of_task["data"]], of_task["has_more"]) == (["v2"], True)
    assert not {"report", "recipe", "provenance"} & set(of_task["data"][0])


async def test_a_version_that_cannot_be_read_is_listed_with_the_reason(
    client: AsyncTestClient[Any], store: Store
) -> None:
    with store.registry.database.write() as connection:
        connection.execute(update(versions).where(versions.c.task == "copy").values(payload="{}"))
    listed = (await client.get("/v1/prompts")).json()["data"]
    assert [(entry["task"], "unreadable" in entry) for entry in listed] == [
        ("copy", True), ("intents", False), ("query", False),
    ]  # fmt: skip
    assert "upgrade Softcue or restore a backup" in listed[0]["unreadable"]


async def test_filters_combine(client: AsyncTestClient[Any]) -> None:
    await post(client, json={**TEXT, "tags": ["brief", "é&="], "alias": "candidate"})

    async def listed(**filters: str) -> list[str]:
        data = (await client.get("/v1/prompts", params=filters)).json()["data"]
        return [f"{entry['task']}@{entry['version']}" for entry in data]

    assert await listed(task="copy") == ["copy@v2", "copy@v1"]
    assert await listed(kind="text") == await listed(tag="é&=") == await listed(alias="candidate") == ["copy@v2"]
    assert await listed(base="demo-base", alias="production") == ["copy@v1", "intents@v1", "query@v1"]
    assert await listed(tag="brief", kind="soft_prompt") == []


async def test_a_task_is_shown_with_its_revision_aliases_and_counts(client: AsyncTestClient[Any]) -> None:
    await post(client, json=TEXT)
    body = (await client.get("/v1/prompts/copy")).json()
    assert (body["object"], body["name"], body["revision"]) == ("prompt.task", "copy", 1)
    assert body["task"]["messages"] == COPY["messages"]
    assert [(alias["alias"], alias["version"]) for alias in body["aliases"]] == [("production", "v1")]
    assert body["versions"] == {"soft_prompt": 1, "text": 1}


async def test_a_tensor_is_published_with_what_file_and_query_say_and_comes_back_as_it_was(
    client: AsyncTestClient[Any], store: Store
) -> None:
    made = Provenance(datasets=(DatasetUse(name="train", digest="d" * 64, rows=9),), seed=3)
    data = artifact(store, provenance=made)
    response = await send(client, data, "?alias=candidate&tag=a&tag=b&author=Ann%C3%A9&reason=try+it")
    body = response.json()
    assert (response.status_code, body["created"], body["version"]) == (201, True, "v2")
    assert (body["tags"], body["notes"], body["author"]) == (["a", "b"], "from the file", "Anné")
    assert response.headers["etag"] == f'"{body["digest"]}"'
    assert response.headers["location"] == "/v1/prompts/copy/versions/v2"
    shown = await client.get(response.headers["location"])
    assert shown.headers["etag"] == response.headers["etag"]
    assert shown.json()["provenance"]["datasets"] == [{"name": "train", "digest": "d" * 64, "rows": 9}]
    moves = store.registry.alias_history("copy", "candidate")
    assert [(move.target, move.reason) for move in moves] == [(body["digest"], "try it")]
    for selector in ("v2", "candidate", body["digest"], body["digest"][:8]):
        tensor = await client.get(f"/v1/prompts/copy/versions/{selector}/tensor")
        assert tensor.headers["content-type"] == "application/vnd.safetensors"
        assert tensor.content == data
    assert decode_artifact(tensor.content, "the answer").prompt.digest == random_prompt(7, 4).digest


async def test_the_same_content_again_is_200_and_the_first_version(client: AsyncTestClient[Any], store: Store) -> None:
    first = await send(client, artifact(store))
    again = await send(client, artifact(store, notes="other notes"), "?alias=candidate")
    assert (first.status_code, again.status_code) == (201, 200)
    assert again.json() == {**first.json(), "created": False}
    assert store.registry.version("copy", "candidate").label == "v2"


async def test_versions_without_a_tensor_are_published_as_json(client: AsyncTestClient[Any], store: Store) -> None:
    store.publish("copy", random_prompt(9, 4), alias=None)
    remote = {"payload": {"kind": "remote_model", "provider": "openai", "model": "ft:gpt:acme::1"}}
    ensemble = {"payload": {"kind": "ensemble", "members": ["v2", "production"], "vote": "mean_logprob"}}
    evidence = {"report": {"accuracy": 0.5}, "recipe": {"steps": 3}, "provenance": {"seed": 1}, "notes": "n"}
    answers = [await post(client, json=body) for body in ({**TEXT, **evidence, "base": "demo-base"}, remote, ensemble)]
    assert [answer.status_code for answer in answers] == [201] * 3
    assert [answer.json()["kind"] for answer in answers] == ["text", "remote_model", "ensemble"]
    whole = (await client.get("/v1/prompts/copy/versions/v3")).json()
    assert (whole["report"], whole["recipe"]) == ({"accuracy": 0.5}, {"steps": 3})
    assert (whole["provenance"]["seed"], whole["provenance"]["base_fingerprint"]) == (1, store.base.fingerprint)
    members = answers[2].json()["payload"]["members"]
    assert members == sorted(store.registry.version("copy", label).digest for label in ("v1", "v2"))


async def test_a_publish_with_a_key_is_done_once_and_answered_as_it_was(
    client: AsyncTestClient[Any], store: Store
) -> None:
    first, again = [await send(client, artifact(store), "?alias=candidate", **{"idempotency-key": "k"}) for _ in "12"]
    assert (first.status_code, again.status_code, again.json()) == (201, 201, first.json())
    other = await send(client, artifact(store, 8), "?alias=candidate", **{"idempotency-key": "k"})
    status, code, message = refusal(other)
    assert (status, code) == (422, "idempotency_key_reused")
    assert "use a new key for a new request" in message
    for key in ("", "x" * 256, "caf\x81"):
        raw = [(b"idempotency-key", key.encode("latin-1")), (b"content-type", b"application/octet-stream")]
        refused = await client.post("/v1/prompts/copy/versions", content=artifact(store, 9), headers=raw)
        assert refusal(refused)[:2] == (400, "invalid_name")
    assert len(store.registry.versions("copy")) == 2


async def test_two_requests_with_one_key_at_once_get_one_answer(client: AsyncTestClient[Any], store: Store) -> None:
    key = {"idempotency-key": "k"}
    answers = await asyncio.gather(*(send(client, artifact(store), "?alias=candidate", **key) for _ in range(6)))
    assert {answer.status_code for answer in answers} == {201}
    assert len({answer.text for answer in answers}) == 1
    assert len(store.registry.alias_history("copy", "candidate")) == 1


async def test_a_version_is_deleted_unless_something_needs_it(client: AsyncTestClient[Any], store: Store) -> None:
    await send(client, artifact(store))
    deleted = await client.delete("/v1/prompts/copy/versions/v2?reason=a+mistake")
    assert (deleted.status_code, deleted.content) == (204, b"")
    gone = await client.get("/v1/prompts/copy/versions/v2")
    assert refusal(gone)[0] == 404
    status, code, message = refusal(await client.delete("/v1/prompts/copy/versions/v1"))
    assert (status, code) == (409, "version_in_use")
    assert "production" in message


async def test_bases_say_what_they_carry_and_what_a_move_needs(client: AsyncTestClient[Any], store: Store) -> None:
    store.registry.register_base(OTHER, ANONYMOUS)
    new = NewVersion(task="intents", payload_content=random_prompt(0, 4, 64), base_fingerprint=OTHER.fingerprint)
    store.registry.publish(new, None, "", ANONYMOUS)
    data = {entry["name"]: entry for entry in (await client.get("/v1/bases")).json()["data"]}
    assert (data["demo-base"]["versions"], data["demo-base"]["tasks_without"]) == (3, [])
    assert (data["other"]["versions"], data["other"]["tasks_without"]) == (1, ["copy", "query"])
    assert data["demo-base"]["fingerprint"] == store.base.fingerprint


async def test_a_body_over_its_limit_is_refused_naming_the_limit(store: Store, engine: ScriptedEngine) -> None:
    data = artifact(store)
    async with client_of(store, engine, max_prompt_bytes=len(data), max_body_bytes=1024) as client:
        assert (await send(client, data)).status_code == 201
        announced = await send(client, data + b"x")
        as_json = await post(client, json={**TEXT, "notes": "x" * 1024})
        other = await client.put("/v1/prompts/copy/aliases/production", json={"version": "v1", "reason": "x" * 1024})
    status, code, message = refusal(announced)
    assert (status, code) == (413, "body_too_large")
    assert f"larger than the limit of {len(data)} bytes; send less, or raise server.max_prompt_bytes" in message
    assert "limit of 1024 bytes; send less, or raise server.max_body_bytes" in refusal(as_json)[2]
    assert "limit of 1024 bytes; send less, or raise server.max_body_bytes" in other.json()["error"]["message"]
    assert len(store.registry.versions("copy")) == 2


async def test_a_body_that_does_not_end_is_read_to_its_limit_only(store: Store, engine: ScriptedEngine) -> None:
    given, answered = 0, []

    async def receive() -> Any:
        nonlocal given
        given += 1
        return {"type": "http.request", "body": b"x" * 1000, "more_body": True}

    async def send(message: Any) -> None:
        answered.append(message)

    scope = {
        "type": "http", "http_version": "1.1", "method": "POST", "scheme": "http", "path": "/v1/prompts/copy/versions",
        "raw_path": b"", "root_path": "", "query_string": b"",
        "headers": [(b"content-type", b"application/octet-stream")],
        "client": ("127.0.0.1", 1), "server": ("127.0.0.1", 2), "state": {},
    }  # fmt: skip
    async with client_of(store, engine, max_prompt_bytes=10_000) as client:
        await client.app(scope, receive, send)
    assert (answered[0]["status"], given) == (413, 11)


@pytest.mark.parametrize(
    "content_type", ["text/plain", "multipart/form-data; boundary=x", "application/x-www-form-urlencoded", ""]
)
async def test_what_a_web_page_may_send_unasked_is_refused(
    client: AsyncTestClient[Any], store: Store, content_type: str
) -> None:
    answer = await post(client, content=artifact(store), headers={"content-type": content_type})
    assert answer.status_code == 415
    assert "application/vnd.safetensors" in answer.json()["error"]["message"]
    move = await client.post(
        "/v1/prompts/copy/aliases/production/rollback", content=b"{}", headers={"content-type": content_type}
    )
    assert move.status_code == 415


NO_SOFT_PROMPTS: list[tuple[Any, ...]] = [
    (b"", "too few for safetensors"),
    (b"\x80\x04\x95" + b"x" * 40, "the body: "),
    (b"PK\x03\x04" + b"\0" * 40, "the body: "),
    (b"\xff" * 8 + b"{", "claims"),
    (b"\x10\0\0\0\0\0\0\0{", "is cut"),
]


async def test_bytes_that_are_no_soft_prompt_are_refused(client: AsyncTestClient[Any], store: Store) -> None:
    for data, said in NO_SOFT_PROMPTS:
        status, code, message = refusal(await send(client, data))
        assert (status, code, said in message) == (400, "invalid_artifact", True), message
    assert len(store.registry.versions("copy")) == 1


CONTRADICTIONS: list[tuple[Any, ...]] = [
    ({"task": "intents"}, "", 400, "was made for task 'intents', not 'copy'"),
    ({"base_fingerprint": None}, "", 400, "give that base's fingerprint"),
    ({"base_fingerprint": None}, "?base=nothing", 404, "no base model 'nothing'"),
    ({}, "?base=other", 400, "leave base out, or retrain it"),
    ({}, "?alias=v7", 400, "reads as a version number"),
    ({}, "?tag=a%00b", 400, "holds NUL"),
    ({}, "?notes=a%00b", 400, "holds NUL"),
    ({}, "?author=a%00b", 400, "holds NUL"),
    ({}, "?reason=a%00b", 400, "holds NUL"),
    ({"notes": "a\0b"}, "", 400, "holds NUL"),
]


async def test_facts_that_contradict_or_cannot_be_kept_are_refused(client: AsyncTestClient[Any], store: Store) -> None:
    store.registry.register_base(OTHER, ANONYMOUS)
    for changes, query, status, said in CONTRADICTIONS:
        answer = refusal(await send(client, artifact(store, **changes), query))
        assert (answer[0], said in answer[2]) == (status, True), (changes, query, answer)
    assert len(store.registry.versions("copy")) == 1


NO_VERSIONS: list[tuple[Any, ...]] = [
    (b"", "Invalid JSON"),
    (b"[]", "the body: Input should be an object"),
    (b'{"payload": 1}', "payload"),
    (b"[" * 100_000, "recursion limit"),
    (b'{"payload": "\xff"}', "Invalid JSON"),
    (b'{"payload": {"kind": "soft_prompt"}}', "payload"),
    (b'{"payload": {"kind": "text", "messages": [{"role": "user", "content": "{nothing}"}]}}', "{nothing}"),
    (b'{"payload": {"kind": "text", "messages": [{"role": "user", "content": "\\ud800"}]}}', "Invalid JSON"),
    (b'{"payload": {"kind": "ensemble", "members": ["v1", "v1"]}}', "twice"),
    (b'{"payload": {"kind": "ensemble", "members": ["v1", "\\u0000"]}}', "selects no version"),
    (b'{"payload": {"kind": "remote_model", "provider": "p", "model": "m"}, "reson": ""}', "reson"),
    (b'{"payload": {"kind": "remote_model", "provider": "p", "model": "m"}, "notes": "\\u0000"}', "holds NUL"),
    (b'{"payload": {"kind": "remote_model", "provider": "p", "model": "m"}, "report": {"a": NaN}}', "NaN"),
]


async def test_json_that_is_no_version_is_refused_with_the_place(client: AsyncTestClient[Any], store: Store) -> None:
    for body, said in NO_VERSIONS:
        status, _, message = refusal(await post(client, content=body, headers={"content-type": "application/json"}))
        assert (status, said in message) == (400, True), (body[:80], message)
    assert len(store.registry.versions("copy")) == 1


async def test_a_query_beside_json_is_refused_rather_than_ignored(client: AsyncTestClient[Any]) -> None:
    assert "leave the query out" in refusal(await post(client, query="?alias=candidate", json=TEXT))[2]


ODD = ["a%00b", "%00", "Copy", "%F0%9F%98%80", "%ED%A0%80", "%FF", "a%2Fb", "x" * 65, "1", "..%2f..%2fetc"]
PLACES = [
    "{}", "{}/versions", "{}/aliases", "copy/versions/{}", "copy/versions/{}/tensor", "copy/aliases/{}",
    "copy/aliases/{}/history",
]  # fmt: skip


@pytest.mark.parametrize("place", PLACES)
async def test_names_outside_the_grammar_are_refused_everywhere(client: AsyncTestClient[Any], place: str) -> None:
    for name in ODD:
        response = await client.get(f"/v1/prompts/{place.format(name)}")
        # A slash makes another path of it.
        assert response.status_code == (404 if "2f" in name.lower() else 400), name
        assert response.json()["error"]["message"]


async def test_filters_that_none_can_be_are_refused(client: AsyncTestClient[Any]) -> None:
    for query in (
        "task=a%00b", "kind=other", "base=", "tag=%00", "alias=v7", "after=x", "after=%00", "after=%FF", "limit=0",
        "limit=201", "limit=99999999999999999999999", "limit=1e3", "limit=", "limit=NaN",
        "task=nothing", "base=nothing",
    ):  # fmt: skip
        response = await client.get(f"/v1/prompts?{query}")
        assert response.status_code == (404 if query in ("base=", "task=nothing", "base=nothing") else 400), query
        assert response.json()["error"]["type"] == "invalid_request_error"


async def test_odd_queries_are_answered(client: AsyncTestClient[Any]) -> None:
    for query in ("tag=%FF", "tag=%ED%A0%80", "tag=&tag=", "%00=%00", "tag=é"):
        assert (await client.get(f"/v1/prompts?{query}")).status_code in (200, 400), query


async def test_a_parameter_that_is_not_taken_is_refused_rather_than_ignored(client: AsyncTestClient[Any]) -> None:
    for method, path, said in (
        ("GET", "?aliass=production", "no query parameter 'aliass' here; did you mean 'alias'? it takes task, kind"),
        ("GET", "/copy/versions?kind=text", "'kind' here; it takes after, limit"),
        ("GET", "/copy?task=intents", "'task' here; it takes none"),
        ("POST", "/copy/versions?idempotency_key=1", "'idempotency_key'"),
        ("DELETE", "/copy/versions/v1?resaon=old", "did you mean 'reason'?"),
        ("GET", "/copy/aliases/production/history?page=2", "it takes after, limit"),
    ):
        answer = await client.request(method, f"/v1/prompts{path}", headers=SAFETENSORS)
        status, code, message = refusal(answer)
        assert (status, code, said in message) == (400, "unknown_parameter", True), message


async def test_a_version_without_a_tensor_has_none_to_download(client: AsyncTestClient[Any]) -> None:
    await post(client, json=TEXT)
    status, _, message = refusal(await client.get("/v1/prompts/copy/versions/v2/tensor"))
    assert status == 404
    assert "it is of kind text" in message


async def test_a_damaged_tensor_is_not_given_out(client: AsyncTestClient[Any], store: Store) -> None:
    with store.registry.database.write() as connection:
        connection.execute(update(tensors).values(data=b"\0" * 16))
    status, code, message = refusal(await client.get("/v1/prompts/copy/versions/v1/tensor"))
    assert (status, code) == (503, "damaged_version")
    assert "damaged on disk" in message
    assert (await client.get("/v1/prompts/copy/versions/v1")).status_code == 200


async def test_what_was_published_is_served_a_moment_later(client: AsyncTestClient[Any], store: Store) -> None:
    await post(client, json={**TEXT, "alias": "candidate"})
    async with asyncio.timeout(10):
        while True:
            answer = await client.post(
                "/v1/tasks/copy@candidate/generate", json={"inputs": {"product": "p", "colour": "c"}}
            )
            if answer.status_code == 200:
                break
            await asyncio.sleep(0.01)
    assert (answer.json()["version"], answer.json()["text"]) == ("copy@v2", "Write of p")
