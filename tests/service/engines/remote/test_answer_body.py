from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import pytest

from service.engines.base import Delta, Finish, GenerationEvent, ToolCallPiece, Usage
from service.engines.collecting import Answer, Answers, assemble
from service.engines.errors import ProviderMisbehaved, ProviderUnavailable
from service.engines.remote.answer_body import StreamedAnswer, read_answer
from service.engines.remote.request_body import Endpoint
from tests.openai_contract import check, contract
from tests.service.engines.remote.answers import CALLS, USAGE, chat, choice, chunk, completion, piece, stream, token
from tests.service.engines.remote.official import read_by_client, streamed_by_client


def read(document: Any, endpoint: Endpoint = "chat/completions", n: int = 1, **more: Any) -> Answers:
    deltas, finish = read_answer(document, endpoint, n=n, **more)
    return assemble([*deltas, finish], n)


def read_stream(documents: Sequence[Any], n: int = 1) -> Answers:
    reading = StreamedAnswer(n)
    events: list[GenerationEvent] = [delta for document in documents for delta in reading.read(document)]
    return assemble([*events, reading.finish()], n)


def test_usage_names_the_tokens_that_came_from_the_providers_cache() -> None:
    assert read(chat()).usage == Usage(19, 4, 0, 16)
    assert read(chat(usage={**USAGE, "virtual_tokens": 5, "prompt_tokens_details": None})).usage == Usage(19, 4, 5, 0)
    assert read(chat(usage=None)).usage == Usage(0, 0)


def test_the_request_id_is_the_headers_or_else_the_answers_own() -> None:
    assert read(chat(), request_id="req_1").provider_request_id == "req_1"
    assert read(chat()).provider_request_id == "chatcmpl-1"


# What is accepted, held against OpenAI's description and against what the official client reads of the same bytes.

WHOLE: dict[str, tuple[dict[str, Any], int]] = {
    "text": (chat(), 1),
    "no text": (chat(choice("")), 1),
    "cut": (chat(choice("Hel", reason="length")), 1),
    "filtered": (chat(choice("", reason="content_filter")), 1),
    "several": (chat(choice("a"), choice("b", 1, "length")), 2),
    "in another order": (chat(choice("b", 1), choice("a", 0)), 2),
    "tools": (chat(choice(None, reason="tool_calls", tool_calls=CALLS)), 1),
    "a refusal": (chat(choice(None, refusal="I will not")), 1),
    "log-probabilities": (
        chat(choice("hé!", tokens=[token("hé", -0.25, hé=-0.25, no=-1.5), token("!", -0.5)])),
        1,
    ),
}


@pytest.mark.parametrize("case", WHOLE)
def test_a_whole_answer_is_read_as_the_official_client_reads_it(case: str) -> None:
    document, n = WHOLE[case]
    check(contract(), "CreateChatCompletionResponse", document)
    ours = read(document, n=n)
    theirs = read_by_client(document)
    assert ours.provider_request_id == theirs.id
    assert (ours.usage.prompt_tokens, ours.usage.completion_tokens) == (
        theirs.usage.prompt_tokens,
        theirs.usage.completion_tokens,
    )
    assert ours.usage.cached_prompt_tokens == theirs.usage.prompt_tokens_details.cached_tokens
    for answer, expected in zip(ours.answers, sorted(theirs.choices, key=lambda one: one.index), strict=True):
        _same(answer, expected.message, expected)
        calls = [(call.id, call.function.name, call.function.arguments) for call in expected.message.tool_calls or ()]
        assert [(call.id, call.name, call.arguments) for call in answer.tool_calls] == calls


def _same(answer: Answer, message: Any, expected: Any) -> None:
    assert answer.text == (message.content or "")
    assert answer.refusal == (message.refusal or "")
    assert answer.finish_reason == expected.finish_reason
    entries = expected.logprobs.content if expected.logprobs is not None else []
    assert [(entry.text, entry.logprob, list(entry.data)) for entry in answer.logprobs] == [
        (entry.token, entry.logprob, entry.bytes) for entry in entries
    ]
    assert [[(other.text, other.logprob) for other in entry.top] for entry in answer.logprobs] == [
        [(other.token, other.logprob) for other in entry.top_logprobs] for entry in entries
    ]


def call(index: int, **more: Any) -> dict[str, Any]:
    return {"index": index, **more}


STREAMS: dict[str, tuple[list[dict[str, Any]], int]] = {
    "text": (stream("Hel", "lo ", "there"), 1),
    "nothing": (stream(), 1),
    "cut": (stream("a", reason="length"), 1),
    "several at once": (
        [
            chunk(piece(0, content="a")),
            chunk(piece(1, content="b")),
            chunk(piece(0, content="c"), piece(1, "stop", content="d")),
            chunk(piece(0, "length")),
            chunk(usage=USAGE),
        ],
        2,
    ),
    "tools": (
        [
            chunk(
                piece(tool_calls=[call(0, id="call_1", type="function", function={"name": "look_up", "arguments": ""})])
            ),
            chunk(piece(tool_calls=[call(0, function={"arguments": '{"of"'})])),
            chunk(piece(tool_calls=[call(0, function={"arguments": ': "heater"}'})])),
            chunk(
                piece(tool_calls=[call(1, id="call_2", type="function", function={"name": "say", "arguments": "{}"})])
            ),
            chunk(piece(reason="tool_calls")),
            chunk(usage=USAGE),
        ],
        1,
    ),
    "a refusal": ([chunk(piece(refusal="I ")), chunk(piece(refusal="will not")), chunk(piece(reason="stop"))], 1),
    "log-probabilities": (
        [
            chunk(piece(content="h", tokens=[token("h", -0.25, h=-0.25, n=-1.5)])),
            chunk(piece(content="i!", tokens=[token("i", -0.5), token("!", 0.0)])),
            chunk(piece(reason="stop")),
            chunk(usage=USAGE),
        ],
        1,
    ),
}


@pytest.mark.parametrize("case", STREAMS)
def test_a_stream_is_read_as_the_official_client_reads_it(case: str) -> None:
    documents, n = STREAMS[case]
    for document in documents:
        check(contract(), "CreateChatCompletionStreamResponse", document)
    ours, theirs = read_stream(documents, n), streamed_by_client(documents)
    for index, answer in enumerate(ours.answers):
        pieces = [one for part in theirs for one in part.choices if one.index == index]
        assert answer.text == "".join(one.delta.content or "" for one in pieces)
        assert answer.refusal == "".join(one.delta.refusal or "" for one in pieces)
        assert [answer.finish_reason] == [one.finish_reason for one in pieces if one.finish_reason]
        entries = [entry for one in pieces if one.logprobs for entry in one.logprobs.content]
        assert [(entry.text, entry.logprob) for entry in answer.logprobs] == [
            (one.token, one.logprob) for one in entries
        ]
        calls: dict[int, list[str]] = {}
        for said in (said for one in pieces for said in one.delta.tool_calls or ()):
            known = calls.setdefault(said.index, [said.id, said.function.name, ""])
            known[2] += said.function.arguments or ""
        assert [[one.id, one.name, one.arguments] for one in answer.tool_calls] == list(calls.values())
    counted = [part.usage for part in theirs if part.usage is not None]
    if counted:
        assert ours.usage == Usage(counted[-1].prompt_tokens, counted[-1].completion_tokens, 0, 16)


def test_a_completion_is_read_as_the_official_client_reads_it() -> None:
    document = completion("a b", "c")
    document["choices"][0]["logprobs"] = {
        "tokens": ["a", " b"],
        "token_logprobs": [-0.5, -0.25],
        "top_logprobs": [{"x": -2.0, "a": -0.5}, {" b": -0.25}],
        "text_offset": [0, 1],
    }
    check(contract(), "CreateCompletionResponse", document)
    first, second = read(document, "completions", n=2).answers
    theirs = read_by_client(document, "completions")
    assert [first.text, second.text] == [one.text for one in theirs.choices]
    assert [entry.text for entry in first.logprobs] == theirs.choices[0].logprobs.tokens
    assert [entry.logprob for entry in first.logprobs] == theirs.choices[0].logprobs.token_logprobs
    assert [other.text for other in first.logprobs[0].top] == ["a", "x"]  # the most probable first


def test_completions_stream_text_and_count_what_came_where_the_provider_does_not() -> None:
    def part(text: str, reason: str | None = None) -> Any:
        return {"id": "cmpl-1", "choices": [{"index": 0, "text": text, "logprobs": None, "finish_reason": reason}]}

    documents = [part("a"), part(" b"), part("", "stop")]
    ours = read_stream(documents)
    theirs = streamed_by_client(
        [{"object": "text_completion", "created": 1, "model": "m", **one} for one in documents], "completions"
    )
    assert ours.answers[0].text == "".join(one.choices[0].text for one in theirs) == "a b"
    assert ours.usage == Usage(0, 2)


def test_chats_log_probabilities_may_have_the_form_of_completions() -> None:
    given = choice("a b")
    given["logprobs"] = {"tokens": ["a", " b"], "token_logprobs": [None, -0.5], "token_ids": [1, 2]}
    (entry,) = read(chat(given)).answers[0].logprobs
    assert (entry.text, entry.logprob, entry.data, entry.top) == (" b", -0.5, b" b", ())


def test_what_is_not_known_is_let_pass() -> None:
    given = choice(None, reason="function_call", tool_calls=[{"function": {"name": "f", "arguments": {"a": 1}}}])
    answer = read(chat(given, citations=["x"], usage={**USAGE, "cost": "much"})).answers[0]
    assert answer.tool_calls == (ToolCallPiece(0, '{"a":1}', "", "f"),)
    assert answer.finish_reason == "tool_calls"
    empty = choice(None, reason="tool_calls", tool_calls=[{"function": {"name": "f", "arguments": {}}}])
    assert read(chat(empty)).answers[0].tool_calls[0].arguments == "{}"
    assert read(chat(choice(reason="eos"))).answers[0].finish_reason == "stop"
    assert read(chat(choice(reason="model_length"))).answers[0].finish_reason == "length"
    filters = {"id": "", "choices": [], "prompt_filter_results": [{}]}  # Azure's first chunk
    assert read_stream([filters, *stream("a")]).answers[0].text == "a"


def broken(change: Callable[[Any], object]) -> Any:
    document = copy.deepcopy(chat(choice(tokens=[token("a", -1.0)])))
    change(document)
    return document


@pytest.mark.parametrize(
    ("document", "said"),
    [
        (broken(lambda it: it.pop("choices")), "missing required field `choices`"),
        (broken(lambda it: it.update(choices=None)), r"Expected `array`.*\$\.choices"),
        (broken(lambda it: it.update(choices=[])), r"asked for 1 choices and answered with those at \[\]"),
        (broken(lambda it: it["choices"].append(choice(index=1))), r"those at \[0, 1\]"),
        (broken(lambda it: it["choices"][0].update(index=3)), r"those at \[3\]"),
        (broken(lambda it: it["choices"][0].pop("message")), "`message`"),
        (broken(lambda it: it["choices"][0]["message"].update(content=None)), "choice 0 .* has no content"),
        (broken(lambda it: it["choices"][0]["message"].update(content=["a"])), r"\$\.choices\[0\]\.message\.content"),
        (broken(lambda it: it["choices"][0].update(finish_reason=None)), "does not say why it ended"),
        (broken(lambda it: it["choices"][0].update(finish_reason=4)), r"finish_reason"),
        (broken(lambda it: it["choices"][0]["message"].update(tool_calls=[{"id": "x"}])), "`function`"),
        (broken(lambda it: it["choices"][0]["logprobs"]["content"][0].update(bytes=[300])), "bytes"),
        (broken(lambda it: it["usage"].update(prompt_tokens=-1)), "prompt_tokens"),
        (broken(lambda it: it["usage"].update(completion_tokens=10**12)), "completion_tokens"),
        (broken(lambda it: it["choices"][0].update(logprobs={"tokens": ["a"], "token_logprobs": []})), "zip"),
        ([], "Expected `object`"),
    ],
)
def test_an_answer_that_is_none_is_the_providers_fault(document: Any, said: str) -> None:
    with pytest.raises(ProviderMisbehaved, match=said) as refused:
        read_answer(document, "chat/completions", request_id="req_7")
    assert refused.value.request_id == "req_7"
    assert "req_7" in str(refused.value)


def test_an_answers_own_id_is_made_fit_for_a_header() -> None:
    assert read(chat(id="a\r\nset-cookie: b" + "c" * 500)).provider_request_id == "aset-cookie:b" + "c" * 115
    answer = read_stream([{**one, "id": "a\r\nb: c"} for one in stream("x")])
    assert answer.provider_request_id == "ab:c"


def called(name: str, arguments: str, **more: Any) -> dict[str, Any]:
    return {"function": {"name": name, "arguments": arguments}, **more}


def test_tool_calls_of_a_whole_answer_are_told_apart_by_their_order() -> None:
    calls = [called("a", "{}", id="1", index=0), called("b", '{"x":1}', id="2", index=0)]
    answer = read(chat(choice(None, reason="tool_calls", tool_calls=calls))).answers[0]
    assert answer.tool_calls == (ToolCallPiece(0, "{}", "1", "a"), ToolCallPiece(1, '{"x":1}', "2", "b"))


def test_streamed_tool_calls_without_a_place_are_told_apart_by_their_ids() -> None:
    documents = [
        chunk(piece(tool_calls=[called("a", '{"x"', id="1")])),
        chunk(piece(tool_calls=[{"function": {"arguments": ":1}"}}])),
        chunk(piece(tool_calls=[called("b", "{}", id="2"), called("c", "{}", id="3")])),
        chunk(piece(reason="tool_calls")),
    ]
    answer = read_stream(documents).answers[0]
    assert answer.tool_calls == (
        ToolCallPiece(0, '{"x":1}', "1", "a"),
        ToolCallPiece(1, "{}", "2", "b"),
        ToolCallPiece(2, "{}", "3", "c"),
    )


def test_streamed_tool_calls_that_are_all_numbered_alike_are_told_apart_by_their_ids() -> None:
    documents = [
        chunk(piece(tool_calls=[called("a", "{}", id="1", index=0), called("b", '{"x"', id="2", index=0)])),
        chunk(piece(reason="tool_calls")),
    ]
    answer = read_stream(documents).answers[0]
    assert answer.tool_calls == (ToolCallPiece(0, "{}", "1", "a"), ToolCallPiece(1, '{"x"', "2", "b"))


def test_a_tool_call_whose_pieces_each_have_an_id_of_their_own_stays_one() -> None:
    documents = [
        chunk(piece(tool_calls=[called("a", '{"x"', id="1", index=0)])),
        chunk(piece(tool_calls=[{"index": 0, "id": "2", "function": {"arguments": ":1}"}}])),
        chunk(piece(reason="tool_calls")),
    ]
    assert read_stream(documents).answers[0].tool_calls == (ToolCallPiece(0, '{"x":1}', "1", "a"),)


@pytest.mark.parametrize("said", ["error", "abort"])
def test_an_answer_that_the_provider_gave_up_is_none(said: str) -> None:
    for call in (lambda: read(chat(choice(reason=said))), lambda: read_stream(stream("a", reason=said))):
        with pytest.raises(ProviderUnavailable, match=rf"gave the answer up \({said}\)"):
            call()


def test_a_bare_number_is_the_log_probability_of_the_deltas_one_token() -> None:
    first = {**piece(content="Hel"), "logprobs": -0.25, "top_logprobs": {"Hal": -2.0, "Hel": -0.25}}
    answer = read_stream([chunk(first), chunk({**piece(content="lo"), "logprobs": -1}), chunk(piece(reason="stop"))])
    one, two = answer.answers[0].logprobs
    assert (one.text, one.logprob, [other.text for other in one.top]) == ("Hel", -0.25, ["Hel", "Hal"])
    assert (two.text, two.logprob, two.top) == ("lo", -1.0, ())


def test_alternatives_that_belong_to_no_token_are_left_aside() -> None:
    given = {**choice("a"), "logprobs": {"tokens": ["a"], "token_logprobs": [-0.5], "top_logprobs": {"b": -1.0}}}
    (entry,) = read(chat(given)).answers[0].logprobs
    assert (entry.text, entry.logprob, entry.top) == ("a", -0.5, ())


def test_of_a_content_in_parts_the_text_is_the_answer() -> None:
    parts: Any = [{"type": "thinking", "thinking": [{"type": "text", "text": "hm"}]}, {"type": "text", "text": "yes"}]
    assert read(chat(choice(parts))).answers[0].text == "yes"
    assert read_stream([chunk(piece(content=parts)), chunk(piece(reason="stop"))]).answers[0].text == "yes"


def test_streamed_tool_calls_are_put_together_in_whatever_order_their_pieces_come() -> None:
    documents = [
        chunk(piece(tool_calls=[called("b", "[1", id="2", index=1)])),
        chunk(piece(tool_calls=[called("a", "[3", id="1", index=0)])),
        chunk(piece(tool_calls=[{"index": 1, "function": {"arguments": ",2]"}}])),
        chunk(piece(tool_calls=[{"index": 0, "function": {"arguments": ",4]"}}])),
        chunk(piece(reason="tool_calls")),
    ]
    answer = read_stream(documents).answers[0]
    assert answer.tool_calls == (ToolCallPiece(0, "[3,4]", "1", "a"), ToolCallPiece(1, "[1,2]", "2", "b"))


def test_an_end_that_is_said_once_more_with_the_usage_is_passed_over() -> None:
    *said, usage = stream("a")
    assert read_stream([*said, {**usage, "choices": [piece(reason="stop")]}]).answers[0].text == "a"


@pytest.mark.parametrize(
    ("documents", "said"),
    [
        ([chunk(piece(content="a"))], r"ended before its choices \[0\] did"),
        ([], r"ended before its choices \[0\] did"),
        ([*stream("a"), chunk(piece(content="b"))], "goes on with choice 0, which has ended"),
        ([chunk(piece(1, content="b"))], "choice 1, which was not asked for"),
        ([chunk(piece(content=3))], "content"),
        ([{"choices": "none"}], "choices"),
    ],
)
def test_a_stream_that_is_none_is_the_providers_fault(documents: list[Any], said: str) -> None:
    with pytest.raises(ProviderMisbehaved, match=said):
        read_stream(documents)


def test_a_choice_within_json_comes_out_of_it_with_its_own_tokens() -> None:
    parts = ['{"', "choice", '":', ' "', "gét", " refund", '"}']
    document = chat(choice("".join(parts), tokens=[token(part, -0.5) for part in parts]))
    deltas, finish = read_answer(document, "chat/completions", wrapped=True)
    assert [delta.text for delta in deltas] == ["gét refund"]
    assert [entry.text for entry in deltas[0].logprobs] == ["gét", " refund"]
    assert finish == Finish("stop", Usage(19, 4, 0, 16), "chatcmpl-1")


def test_a_refusal_is_not_taken_for_a_choice_and_another_form_is_the_providers_fault() -> None:
    deltas, _ = read_answer(chat(choice(None, refusal="no")), "chat/completions", wrapped=True)
    assert deltas == [Delta("", (), 0, (), "stop", None, (), "no")]
    with pytest.raises(ProviderMisbehaved, match="answered with another form; it was cut, so raise max_tokens"):
        read_answer(chat(choice('{"choice": "ge', reason="length")), "chat/completions", wrapped=True)
