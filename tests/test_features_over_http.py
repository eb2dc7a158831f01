"""What a request can ask for, by the official client, over a socket, of the real engine on the demo base."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest
from jsonschema import Draft202012Validator

from tests.conftest import BASE_FOLDER
from tests.processes import Server, running

ASKED: Any = [{"role": "user", "content": "can i talk to a person about the heater"}]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("features")
    config = BASE_FOLDER.parent / "softcue.toml"
    arguments = ["serve", "--config", str(config), "--port", "0", "--store", str(folder / "store.db")]
    with running(arguments, folder / "server.log") as server:
        yield server


@pytest.fixture(scope="module")
def client(server: Server) -> Iterator[openai.OpenAI]:
    with server.client as client:
        yield client


def test_seeded_choices_come_again_and_differ_and_carry_log_probabilities(client: openai.OpenAI) -> None:
    def ask(model: str) -> Any:
        return client.chat.completions.create(
            model=model, messages=ASKED, n=3, seed=7, temperature=1.2, max_tokens=12, logprobs=True, top_logprobs=2
        )

    answer = ask("product_copy")
    texts = [choice.message.content for choice in answer.choices]
    assert [choice.message.content for choice in ask("product_copy").choices] == texts
    assert len(set(texts)) > 1
    entries = answer.choices[0].logprobs.content
    assert b"".join(bytes(entry.bytes) for entry in entries).decode().startswith(texts[0])
    assert all(len(entry.top_logprobs) == 2 and entry.logprob <= 0 for entry in entries)
    assert answer.usage.completion_tokens == sum(len(choice.logprobs.content) for choice in answer.choices)


def test_an_echo_scores_its_prompt(client: openai.OpenAI) -> None:
    answer = client.completions.create(
        model="demo-base", prompt=["The house stood", "She looked"], max_tokens=0, echo=True, logprobs=1
    )
    assert [choice.text for choice in answer.choices] == ["The house stood", "She looked"]
    for choice in answer.choices:
        assert choice.logprobs is not None
        first, *others = choice.logprobs.token_logprobs or []
        assert first is None
        assert others
        assert all(math.isfinite(logprob) for logprob in others)


@pytest.mark.parametrize(
    ("form", "pattern"),
    [
        ({"regex": r"[0-9]{3}-[a-c]"}, r"[0-9]{3}-[a-c]"),
        ({"choice": ["violet", "umber"]}, r"violet|umber"),
        ({"json": {"enum": [17, 4]}}, r"17|4"),
    ],
    ids=["regex", "choice", "json"],
)
def test_answers_take_the_form_that_is_asked_for(client: openai.OpenAI, form: dict[str, Any], pattern: str) -> None:
    answer = client.chat.completions.create(
        model="demo-base", messages=ASKED, max_tokens=40, extra_body={"structured_outputs": form}
    )
    assert re.fullmatch(pattern, answer.choices[0].message.content or "")


def test_an_extract_task_is_held_to_its_schema_and_checked_for_what_a_grammar_cannot_say(server: Server) -> None:
    url = f"{server.url}/v1/tasks/data_questions"
    schema = httpx.get(url).json()["json_schema"]
    rows = (BASE_FOLDER.parent / "data_questions" / "test.jsonl").read_text().splitlines()[:8]
    for row in rows:
        answer = httpx.post(f"{url}/generate", json={"inputs": json.loads(row)["inputs"]}).json()
        assert answer["invalid"] is None
        assert Draft202012Validator(schema).is_valid(answer["parsed"])
    answer = httpx.post(f"{url}/generate", json={"inputs": {"question": "hello there"}}).json()
    made = json.loads(answer["text"])
    assert made.keys() <= schema["properties"].keys()
    assert (answer["invalid"] is None) == Draft202012Validator(schema).is_valid(made)


@pytest.mark.parametrize(
    ("options", "status", "said"),
    [
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, 400, "tools is not served"),
        ({"logit_bias": {"4096": 1}}, 400, "outside the vocabulary of 4096"),
        ({"response_format": {"type": "regex", "regex": "("}}, 400, "response_format"),
        ({"extra_body": {"timeout_s": 1e-6}}, 504, "deadline passed"),
    ],
    ids=["tools", "bias", "pattern", "deadline"],
)
def test_what_cannot_be_served_says_so_and_harms_nobody(
    client: openai.OpenAI, options: dict[str, Any], status: int, said: str
) -> None:
    client = client.with_options(max_retries=0)
    extra = {"response_format": options.pop("response_format")} if "response_format" in options else {}
    extra |= options.pop("extra_body", {})
    with pytest.raises(openai.APIStatusError, match=said) as refused:
        client.chat.completions.create(model="support_intents", messages=ASKED, extra_body=extra, **dict(options))
    assert refused.value.status_code == status
    assert client.chat.completions.create(model="support_intents", messages=ASKED).choices[0].message.content
