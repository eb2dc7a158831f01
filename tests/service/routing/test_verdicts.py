"""What a judge's answer says in numbers, and which answers can be put before one."""

from __future__ import annotations

from typing import Any

import pytest

from prompt_store.prompts.task import Message, parse_task
from service.engines.base import GenerationRequest, Messages, RawText
from service.routing.judging import judged_inputs, verdict
from service.routing.leaf_classification import LabelQuestion
from service.routing.questions import Question
from tests.service.serving import COPY, INTENTS, QUERY

GENERATE, CLASSIFY = parse_task(COPY), parse_task(INTENTS)
EXTRACT = parse_task({**QUERY, "json_schema": {"type": "object", "required": ["score"]}})


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("7", 7.0), ("Score: -0.25.", -0.25), ("1e-3", 0.001), (" 80% ", 80.0), ("I give it 9", 9.0),
        ("7/10", None), ("7 or 8", None), ("0,5", None), ("v2 is fine", None), ("1.2.3", None), ("", None),
        ("good", None), ("1e999", None), ("nan", None),
    ],
)  # fmt: skip
def test_a_text_stands_for_the_one_number_that_is_in_it(text: str, number: float | None) -> None:
    assert verdict(GENERATE, text, {}) == number


@pytest.mark.parametrize(
    ("text", "number"), [("good", 1.0), (" Good.\n", 1.0), ("bad", 0.0), ("3", 3.0), ("not good", None)]
)
def test_a_label_or_text_stands_for_the_score_that_it_was_given(text: str, number: float | None) -> None:
    scores = {"good": 1.0, "bad": 0.0}
    assert verdict(GENERATE, text, scores) == verdict(CLASSIFY, text, scores) == number


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ('{"score": 4}', 4.0), ('{"score": true}', 1.0), ('{"score": "0.5"}', 0.5), ('{"score": "good"}', 1.0),
        ('{"score": null}', None), ('{"score": [4]}', None), ('{"points": 4}', None), ("4", None), ("[4]", None),
        ('{"score": 1' + "0" * 400 + "}", None), ('{"score": NaN}', None),
    ],
)  # fmt: skip
def test_the_score_of_an_extract_tasks_answer_is_its_verdict(text: str, number: float | None) -> None:
    assert verdict(EXTRACT, text, {"good": 1.0}) == number


def chat(*turns: tuple[Any, str], wire: tuple[Any, ...] = ()) -> Question:
    messages = tuple(Message(role=role, content=text) for role, text in turns)
    return Question(GenerationRequest(id="", prompt=Messages(messages, wire)))


def test_inputs_are_judged_as_they_came() -> None:
    inputs = {"product": "mug", "colour": "red"}
    asked = Question(GenerationRequest(id="", prompt=Messages(())), inputs=inputs)
    assert judged_inputs(GENERATE, asked) == inputs
    assert judged_inputs(CLASSIFY, LabelQuestion({"message": "hi"})) == {"message": "hi"}


def test_a_conversation_of_one_turn_is_the_only_input_of_its_task() -> None:
    assert judged_inputs(CLASSIFY, chat(("system", "be kind"), ("user", "hi"))) == {"message": "hi"}
    assert judged_inputs(GENERATE, chat(("user", "a red mug"))) is None


@pytest.mark.parametrize(
    "question",
    [
        chat(("user", "hi"), ("assistant", "hello"), ("user", "and you?")),
        chat(("user", "look"), wire=({"role": "user", "content": []},)),
        chat(("system", "be kind")),
        Question(GenerationRequest(id="", prompt=RawText("hi"))),
    ],
    ids=["several turns", "more than text", "nothing asked", "raw text"],
)
def test_what_the_judge_would_not_know_whole_is_not_judged(question: Question) -> None:
    assert judged_inputs(CLASSIFY, question) is None
