from __future__ import annotations

import json
from typing import Any

import pytest
from litestar.testing import AsyncTestClient

from prompt_store.prompts.task import Message
from prompt_store.prompts.version import TextPayload
from service.engines.base import Delta, Messages, ResponseFormat, ScoreRequest
from service.engines.scoring import CONTENT_FREE
from service.engines.scripted import ScoreScript, ScriptedEngine
from service.generation_ids import unit_hash, verify
from tests.conftest import random_prompt
from tests.service.serving import QUERY, Store, client_of


async def post(client: AsyncTestClient[Any], path: str, **body: Any) -> Any:
    return await client.post(f"/v1/tasks/{path}", json=body)


async def test_inputs_go_through_the_tasks_template(client: AsyncTestClient[Any], engine: ScriptedEngine) -> None:
    response = await post(client, "copy/generate", inputs={"product": "tea {pot}", "colour": "blue"})
    body = response.json()
    assert (body["task"], body["version"], body["text"]) == ("copy", "copy@v1", "blue tea {pot}")
    assert (body["finish_reason"], body["usage"]["virtual_tokens"]) == ("stop", 5)
    assert engine.requests[0].prompt == Messages((Message(role="user", content="blue tea {pot}"),))


async def test_a_generation_id_is_signed_and_names_task_version_and_unit(
    client: AsyncTestClient[Any], store: Store
) -> None:
    body = (await post(client, "copy/generate", inputs={"product": "p", "colour": "c"}, unit="user 7")).json()
    key = store.registry.database.signing_key()
    tag = verify(body["id"], key)
    version = store.registry.version("copy", "v1")
    assert (tag.task, tag.version, tag.unit_hash) == ("copy", version.digest[:16], unit_hash("user 7", key))


async def test_a_stream_ends_with_the_whole_answers_tail(client: AsyncTestClient[Any]) -> None:
    response = await post(client, "copy/generate", inputs={"product": "p", "colour": "c"}, stream=True)
    *deltas, last, done = [line.removeprefix("data: ") for line in response.text.split("\n\n") if line]
    assert done == "[DONE]"
    assert [json.loads(line)["delta"] for line in deltas] == ["c", " p"]
    assert (json.loads(last)["text"], json.loads(last)["finish_reason"]) == ("c p", "stop")


@pytest.mark.parametrize(
    ("answer", "parsed", "invalid"),
    [
        ('{"table": "orders"}', {"table": "orders"}, None),
        ('{"table": 3}', None, "the answer does not fit the task's schema: 3 is not of type 'string'"),
        ("SELECT", None, "the answer is not JSON"),
        pytest.param("[" * 100_000 + "]" * 100_000, None, "the answer is nested too deeply", id="nested too deeply"),
    ],
)
async def test_an_extracted_answer_is_parsed_and_checked(
    client: AsyncTestClient[Any], engine: ScriptedEngine, answer: str, parsed: object, invalid: str | None
) -> None:
    engine.script = lambda _: [answer]
    body = (await post(client, "query/generate", inputs={"question": "how many"})).json()
    assert (body["text"], body["parsed"]) == (answer, parsed)
    assert (body["invalid"] is None) == (invalid is None)
    assert invalid is None or body["invalid"].startswith(invalid)


async def test_labels_come_with_probabilities_the_most_probable_first(client: AsyncTestClient[Any]) -> None:
    response = await post(client, "intents/classify", inputs={"message": "greetings"})
    body = response.json()
    assert body["label"] == body["labels"][0]["label"] == "greeting"
    probabilities = [label["probability"] for label in body["labels"]]
    assert probabilities == sorted(probabilities, reverse=True)
    assert sum(probabilities) == pytest.approx(1.0)
    assert response.headers["x-softcue-version"] == "intents@v1"


async def test_a_text_prompt_replaces_the_template(store: Store, engine: ScriptedEngine) -> None:
    messages = (Message(role="system", content="Write."), Message(role="user", content="{product} in {colour}"))
    store.publish("copy", TextPayload(messages=messages), alias="candidate")
    async with client_of(store, engine) as client:
        body = (await post(client, "copy/generate", inputs={"product": "p", "colour": "c"}, version="candidate")).json()
    assert (body["version"], body["text"]) == ("copy@v2", "p in c")


async def test_the_path_or_the_body_names_a_version_and_a_missing_alias_names_those_there_are(
    store: Store, engine: ScriptedEngine
) -> None:
    store.publish("intents", random_prompt(7, 4), alias="candidate")
    async with client_of(store, engine) as client:
        path = await post(client, "intents@candidate/classify", inputs={"message": "x"})
        body = await post(client, "intents/classify", inputs={"message": "x"}, version="candidate")
        missing = await post(client, "intents@canary/classify", inputs={"message": "x"})
    assert (path.json()["task"], path.json()["version"]) == ("intents", "intents@v2")
    assert body.json()["version"] == "intents@v2"
    known = "intents@production, intents@candidate, intents@v1, intents@v2"
    assert f"ask for {known}, or point the alias" in missing.json()["error"]["message"]


async def test_tasks_are_listed_with_their_aliases_and_versions(client: AsyncTestClient[Any]) -> None:
    listed = (await client.get("/v1/tasks")).json()["data"]
    assert [task["name"] for task in listed] == ["copy", "intents", "query"]
    one = (await client.get("/v1/tasks/intents")).json()
    assert (one["aliases"], one["versions"], one["labels"][0]) == ({"production": "v1"}, ["v1"], "get refund")


@pytest.mark.parametrize(
    ("path", "body", "status", "said"),
    [
        ("intent/classify", {"inputs": {"message": "x"}}, 404, "no task 'intent'; did you mean 'intents'"),
        ("intents/classify", {"inputs": {}}, 400, "missing input 'message'"),
        ("intents/classify", {"inputs": {"mesage": "x"}}, 400, "unexpected input 'mesage'"),
        ("intents/classify", {"inputs": {"message": "x"}, "version": "v7"}, 404, "no version 'v7'"),
        ("copy/classify", {"inputs": {"product": "p", "colour": "c"}}, 400, "task 'copy' is of kind 'generate'"),
        ("copy/generate", {"inputs": {"product": "p", "colour": "c"}, "n": 0}, 400, "n is 0"),
        ("copy/generate", {"inputs": {"product": "p", "colour": "c"}, "min_p": 2}, 400, "min_p is 2"),
        ("copy/generate", {"inputs": {"product": 3, "colour": "c"}}, 400, "product"),
    ],
)
async def test_bad_input_is_refused_with_fact_and_remedy(
    client: AsyncTestClient[Any], engine: ScriptedEngine, path: str, body: dict[str, Any], status: int, said: str
) -> None:
    response = await post(client, path, **body)
    assert response.status_code == status
    assert said in response.json()["error"]["message"]
    assert engine.running == set()


async def test_a_task_without_a_production_version_says_what_to_do(store: Store, engine: ScriptedEngine) -> None:
    store.task({**_PLAIN, "name": "fresh"})
    async with client_of(store, engine) as client:
        response = await post(client, "fresh/generate", inputs={"text": "x"})
        models = [entry["id"] for entry in (await client.get("/v1/models")).json()["data"]]
    assert response.status_code == 404
    assert "no alias 'production' of task 'fresh'; publish a version of it" in response.json()["error"]["message"]
    assert "fresh" not in models


QUESTION = {"question": "how many"}
ANSWERS = ('{"table": "orders"}', "SELECT")


async def test_an_extract_task_is_held_to_its_schema_unless_told_otherwise_or_the_backend_cannot(
    client: AsyncTestClient[Any], engine: ScriptedEngine
) -> None:
    await post(client, "query/generate", inputs=QUESTION)
    await post(client, "query/generate", inputs=QUESTION, constrained=False)
    engine.features -= {"structured_output"}
    assert (await post(client, "query/generate", inputs=QUESTION)).status_code == 200
    held, free, unable = (request.response_format for request in engine.requests)
    assert (held.kind, held.json_schema) == ("json_schema", QUERY["json_schema"])
    assert free == unable == ResponseFormat()


@pytest.mark.parametrize("stream", [False, True])
async def test_several_answers_come_each_with_its_own_reading(
    client: AsyncTestClient[Any], engine: ScriptedEngine, stream: bool
) -> None:
    engine.script = lambda _: [Delta(text, (1,), index) for index, text in enumerate(ANSWERS)]
    response = await post(client, "query/generate", inputs=QUESTION, n=2, stream=stream)
    body = response.json() if not stream else json.loads(response.text.split("\n\n")[2].removeprefix("data: "))
    assert [(answer["text"], answer["parsed"]) for answer in body["answers"]] == [
        (ANSWERS[0], {"table": "orders"}),
        (ANSWERS[1], None),
    ]
    assert (body["text"], body["parsed"], body["usage"]["completion_tokens"]) == (ANSWERS[0], {"table": "orders"}, 2)
    if stream:
        told = [json.loads(line.removeprefix("data: ")) for line in response.text.split("\n\n")[:2]]
        assert [(event["index"], event["delta"]) for event in told] == list(enumerate(ANSWERS))


def letters(prior: list[float], given: list[float]) -> ScoreScript:
    """Scores that depend on whether the labels follow an input that says nothing."""

    def scores(request: ScoreRequest) -> list[float]:
        assert isinstance(request.prompt, Messages)
        return prior if request.prompt.messages[-1].content == CONTENT_FREE else given

    return scores


async def test_calibration_takes_out_what_the_model_prefers_anyway_and_asks_for_it_once(
    client: AsyncTestClient[Any], engine: ScriptedEngine
) -> None:
    engine.scores = letters(prior=[-1.0, -5.0, -5.0], given=[-2.0, -3.0, -6.0])
    asked = {"inputs": {"message": "where is it"}}
    assert (await post(client, "intents/classify", **asked)).json()["label"] == "get refund"
    calibrated = [(await post(client, "intents/classify", **asked, calibrate=True)).json() for _ in range(3)]
    assert {body["label"] for body in calibrated} == {"track order"}
    assert sum(label["probability"] for label in calibrated[0]["labels"]) == pytest.approx(1.0)
    contents = [request.prompt.messages[-1].content for request in engine.score_requests]
    assert contents.count(CONTENT_FREE) == 1
    assert "agreement" not in calibrated[0]


async def test_length_normalisation_lets_a_longer_label_win(
    client: AsyncTestClient[Any], engine: ScriptedEngine
) -> None:
    engine.scores = lambda _: [-3.0, -9.0, -2.4]  # of 3, 3 and 2 tokens
    asked = {"inputs": {"message": "x"}}
    assert (await post(client, "intents/classify", **asked)).json()["label"] == "greeting"
    assert (await post(client, "intents/classify", **asked, normalise="length")).json()["label"] == "get refund"
    assert (await post(client, "intents/classify", **asked, normalise="words")).status_code == 400


_PLAIN: dict[str, Any] = {
    "name": "plain",
    "kind": "generate",
    "inputs": ["text"],
    "messages": [{"role": "user", "content": "{text}"}],
}
