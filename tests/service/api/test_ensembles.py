"""Versions that are ensembles, over HTTP."""

from __future__ import annotations

import json

import pytest
from openai.types.chat import ChatCompletion

from prompt_store.access import ANONYMOUS
from prompt_store.prompts.registry import NewVersion
from prompt_store.prompts.version import EnsemblePayload, Vote
from service.engines.base import GenerationRequest, ScoreRequest
from service.engines.scripted import ScriptedEngine
from tests.conftest import random_prompt
from tests.service.api.test_openai import chat, events
from tests.service.serving import Store, client_of

PROMPTS = {name: random_prompt(seed, 4) for name, seed in (("a", 11), ("b", 12), ("c", 13))}
NAMES = {prompt.digest: name for name, prompt in PROMPTS.items()}


def publish(store: Store, task: str, vote: Vote = "majority") -> str:
    """An ensemble of the three prompts in production; returns its label."""
    members = tuple(store.publish(task, prompt, alias=None).digest for prompt in PROMPTS.values())
    payload = EnsemblePayload(members=members, base_fingerprint=store.base.fingerprint, vote=vote)
    return store.registry.publish(NewVersion(task, payload), "production", "", ANONYMOUS).version.label


def two_against_one(request: GenerationRequest) -> list[str]:
    assert request.soft_prompt is not None
    return ["no"] if NAMES[request.soft_prompt.digest] == "a" else ["y", "es"]


async def test_an_ensemble_answers_chat_with_its_agreement(store: Store, engine: ScriptedEngine) -> None:
    label = publish(store, "copy")
    engine.script = two_against_one
    async with client_of(store, engine) as client:
        response = await chat(client, "copy")
        stream = events((await chat(client, "copy", stream=True)).text)
        task = await client.post("/v1/tasks/copy/generate", json={"inputs": {"product": "p", "colour": "c"}})
        refused = await chat(client, "copy", n=2)
    answer = ChatCompletion.model_validate(response.json())
    assert (answer.choices[0].message.content, response.json()["agreement"]) == ("yes", 2 / 3)
    assert response.headers["x-softcue-version"] == f"copy@{label}"
    assert [chunk["choices"][0]["delta"].get("content") for chunk in stream] == ["", "yes", None]
    assert stream[-1]["agreement"] == 2 / 3
    assert (task.json()["text"], task.json()["agreement"]) == ("yes", 2 / 3)
    assert "an ensemble gives one answer" in refused.json()["error"]["message"]


@pytest.mark.parametrize(
    ("vote", "label", "agreement"), [("majority", "track order", 2 / 3), ("mean_logprob", "get refund", 1 / 3)]
)
async def test_an_ensemble_classifies_as_its_vote_says(
    store: Store, engine: ScriptedEngine, vote: Vote, label: str, agreement: float
) -> None:
    def scores(request: ScoreRequest) -> list[float]:
        assert request.soft_prompt is not None
        return [-0.1, -9.0, -9.0] if NAMES[request.soft_prompt.digest] == "a" else [-0.8, -0.7, -9.0]

    publish(store, "intents", vote)
    engine.scores = scores
    async with client_of(store, engine) as client:
        body = (await client.post("/v1/tasks/intents/classify", json={"inputs": {"message": "x"}})).json()
        asked = {"inputs": {"message": "x"}, "calibrate": True}
        calibrated = (await client.post("/v1/tasks/intents/classify", json=asked)).json()
    assert (body["label"], body["agreement"]) == (label, agreement)
    # Each member by its own prior: the same scores for every input leave no label ahead.
    probabilities = [entry["probability"] for entry in calibrated["labels"]]
    assert vote == "majority" or probabilities == pytest.approx([1 / 3] * 3)


async def test_the_members_of_an_ensemble_in_production_are_warm(store: Store, engine: ScriptedEngine) -> None:
    publish(store, "copy")
    async with client_of(store, engine):
        assert set(NAMES) <= engine.warmed


async def test_an_ensemble_is_logged_as_one_request(
    store: Store, engine: ScriptedEngine, caplog: pytest.LogCaptureFixture
) -> None:
    label = publish(store, "copy")
    engine.script = two_against_one
    async with client_of(store, engine) as client:
        with caplog.at_level("INFO", "softcue.requests"):
            await chat(client, "copy")
    (line,) = [json.loads(record.getMessage()) for record in caplog.records if record.name == "softcue.requests"]
    assert (line["version"], line["completion_tokens"], line["prompt_tokens"]) == (label, 5, 9)
