from __future__ import annotations

import json
import re
import subprocess
import sys
from typing import Any

import jsonschema
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers

from service.engines.errors import InvalidRequest, UnsupportedFeature
from service.engines.local.grammar import MAX_GRAMMAR_BYTES, GrammarFactory, GrammarState, check_grammar
from service.engines.local.messages import Choosing, Grammar
from service.engines.local.sampler import RowSampling, choose
from tests.conftest import BASE_FOLDER, ROOT

TOKENIZER = Tokenizer.from_file(str(BASE_FOLDER / "tokenizer.json"))
EOS = 1
VOCABULARY = TOKENIZER.get_vocab_size() + 37  # a model's is often larger than its tokenizer's
FACTORY = GrammarFactory(TOKENIZER, VOCABULARY, [EOS])

PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "mood": {"enum": ["good", "bad", None, 3]},
        "scores": {"type": "array", "items": {"type": "number"}, "maxItems": 3},
        "home": {
            "type": "object",
            "properties": {"city": {"type": "string", "pattern": "^[A-Z][a-z]{2,8}$"}, "visited": {"type": "boolean"}},
            "required": ["city"],
            "additionalProperties": False,
        },
    },
    "required": ["name", "age", "home"],
    "additionalProperties": False,
}
SCHEMAS: list[dict[str, Any]] = [
    PERSON,
    {"type": "array", "items": {"enum": ["a", "b", "longer text"]}, "minItems": 1, "maxItems": 4},
    {"type": "array", "items": PERSON["properties"]["home"], "maxItems": 2},
    {"type": "number", "minimum": -2.5, "exclusiveMaximum": 7},
    {"type": "string", "maxLength": 6},
    {"const": {"é🎉": ["\"quoted\"", 1]}},
    {"anyOf": [{"type": "integer"}, {"type": "null"}, {"type": "string", "enum": ["\n"]}]},
    {"$defs": {"n": {"type": "object", "properties": {"next": {"$ref": "#/$defs/n"}}, "additionalProperties": False}},
     "$ref": "#/$defs/n"},
]  # fmt: skip


def json_schema(schema: object) -> Grammar:
    return Grammar("json_schema", json.dumps(schema))


def choices(*texts: str) -> Grammar:
    return Grammar("choice", json.dumps(texts))


def sample(grammar: Grammar, seed: int, max_tokens: int = 300, **options: Any) -> str | None:
    """Text drawn at temperature 1 from random logits; None where it has not ended after `max_tokens`."""
    generator = torch.Generator().manual_seed(seed)
    choosing = Choosing(temperature=1.0, seed=seed, **options)
    row = RowSampling(choosing, [], [EOS], grammar=FACTORY.start(grammar))
    ids: list[int] = []
    for _ in range(max_tokens):
        (choice,) = choose(torch.randn(1, VOCABULARY, generator=generator) * 2, [row])
        if row.ends(choice.token):
            return TOKENIZER.decode(ids)
        row.take(choice.token)
        ids.append(choice.token)
    return None


def follow(state: GrammarState, text: str) -> None:
    for token in TOKENIZER.encode(text, add_special_tokens=False).ids:
        assert state.allowed()[token], f"{TOKENIZER.id_to_token(token)!r} of {text!r}"
        state.take(token)


@pytest.mark.parametrize("schema", SCHEMAS, ids=lambda schema: next(iter(schema)))
def test_random_answers_to_a_json_schema_are_valid(schema: dict[str, Any]) -> None:
    ended = 0
    for seed in range(12):
        text = sample(json_schema(schema), seed)
        if text is not None:
            jsonschema.validate(json.loads(text), schema)
            ended += 1
    assert ended >= 8


@pytest.mark.parametrize(
    "pattern", [r"[a-c]{2,5}-\d{3}", r"(yes|no)( please)?", r"a/b\n\"é🎉+?", r"[^x]{3}", r"[A-Z][a-zé]{0,9}"]
)
def test_random_answers_to_a_pattern_match_all_of_it(pattern: str) -> None:
    for seed in range(10):
        text = sample(Grammar("regex", pattern), seed)
        assert text is not None
        assert re.fullmatch(pattern, text, re.DOTALL), text


def test_random_answers_to_a_choice_are_one_of_them() -> None:
    texts = ("yes", "yes please", "no (not \\ now)", "[a-z]+", "🎉", 'with "quotes"\n', "$^", "x/y", "")
    drawn = {sample(choices(*texts), seed) for seed in range(60)}
    assert drawn <= set(texts)
    assert len(drawn) >= 6


@settings(max_examples=100, deadline=None)
@given(st.lists(st.text(st.characters(codec="utf-8"), max_size=10), min_size=1, max_size=4))
def test_any_text_can_be_a_choice(texts: list[str]) -> None:
    for text in texts:
        state = FACTORY.start(choices(*texts))
        for token in TOKENIZER.encode(text, add_special_tokens=False).ids:
            state.take(token)
        assert state.can_end
        assert state.allowed()[EOS]


def test_only_tokens_of_the_tokenizer_are_allowed_and_an_end_where_it_may_be() -> None:
    state = FACTORY.start(Grammar("regex", "[^x]*"))
    allowed = state.allowed()
    assert allowed.shape == (VOCABULARY,)
    assert not allowed[TOKENIZER.get_vocab_size() :].any()
    assert not allowed[[0, 2, 3, 4, 5]].any()  # special tokens are no text
    assert allowed[EOS]
    assert not FACTORY.start(Grammar("regex", "a+")).allowed()[EOS]


def test_every_end_of_sequence_token_is_allowed_at_the_end() -> None:
    state = GrammarFactory(TOKENIZER, VOCABULARY, [2, 1]).start(choices("yes"))
    follow(state, "yes")
    assert np.flatnonzero(state.allowed()).tolist() == [1, 2]


def test_an_answer_knows_when_it_can_and_when_it_must_end() -> None:
    state = FACTORY.start(choices("yes", "yes please"))
    assert (state.can_end, state.must_end) == (False, False)
    follow(state, "yes")
    assert (state.can_end, state.must_end) == (True, False)
    follow(state, " please")
    assert (state.can_end, state.must_end) == (True, True)
    assert np.flatnonzero(state.allowed()).tolist() == [EOS]
    state.take(EOS)
    assert state.must_end


def test_forks_go_their_own_ways() -> None:
    state = FACTORY.start(choices("no way", "no more"))
    follow(state, "no")
    other = state.fork()
    follow(state, " way")
    assert state.must_end
    assert not other.can_end
    follow(other, " more")
    assert other.must_end
    assert not FACTORY.start(choices("no way", "no more")).can_end


def test_a_token_that_is_not_allowed_is_refused() -> None:
    state = FACTORY.start(choices("yes"))
    with pytest.raises(InvalidRequest):
        state.take(TOKENIZER.encode("no", add_special_tokens=False).ids[0])


def test_blanks_between_tokens_of_json_are_allowed_and_bounded() -> None:
    state = FACTORY.start(json_schema({"type": "object"}))
    follow(state, '{\n    "a": [\n        1\n    ],' + " " * 33)
    blanks = [token for token in range(TOKENIZER.get_vocab_size()) if TOKENIZER.decode([token]).strip(" \n\t\r") == ""]
    assert not state.allowed()[[token for token in blanks if token > 5]].any()


def test_min_tokens_and_ignore_eos_hold_while_the_grammar_has_more_to_say() -> None:
    assert sample(Grammar("regex", "a{2}"), 0, min_tokens=50) == "aa"
    text = sample(Grammar("regex", "[a-z ]{0,40}"), 0, min_tokens=15)
    assert text is not None
    assert len(text) >= 15
    text = sample(Grammar("regex", "[a-z ]{0,40}"), 0, ignore_eos=True)
    assert text is not None
    assert len(text) == 40


def test_a_greedy_row_takes_the_most_probable_allowed_token() -> None:
    row = RowSampling(Choosing(), [], [EOS], grammar=FACTORY.start(choices("yes", "no")), logprobs=1)
    logits = torch.zeros(1, VOCABULARY)
    no = TOKENIZER.encode("no", add_special_tokens=False).ids[0]
    logits[0, no], logits[0, 3000] = 1.0, 5.0
    (choice,) = choose(logits, [row])
    assert choice.token == no
    assert choice.logprob == pytest.approx(float(logits.log_softmax(-1)[0, no]), abs=1e-5)
    assert choice.top[0][0] == 3000  # the model's own distribution knows of no grammar


REFUSED = {
    "not json": Grammar("json_schema", '{"type":'),
    "no schema": Grammar("json_schema", "[1]"),
    "unknown type": json_schema({"type": "text"}),
    "no value": json_schema({"type": "integer", "minimum": 3, "maximum": 2}),
    "not served": json_schema({"type": "array", "uniqueItems": True, "contains": {"type": "integer"}}),
    "elsewhere": json_schema({"$ref": "http://example.com/schema"}),
    "endless": json_schema({"$ref": "#"}),
    "open group": Grammar("regex", "(a"),
    "look-ahead": Grammar("regex", "(?=a)b"),
    "back reference": Grammar("regex", r"(a)\1"),
    "no text": Grammar("regex", "[a&&b]"),
    "choices not json": Grammar("choice", "yes"),
    "no choices": choices(),
    "choices of numbers": Grammar("choice", "[1, 2]"),
    "half a character": Grammar("choice", '["\\ud800"]'),
    "deep": Grammar("json_schema", '{"items":' * 1500 + "{}" + "}" * 1500),
    "parentheses": Grammar("regex", "(" * 5000 + ")" * 5000),
    "large": Grammar("regex", "a" * (MAX_GRAMMAR_BYTES + 1)),
    "product": json_schema(
        {"allOf": [{"anyOf": [{"properties": {f"{i}{j}": {"type": "null"}}} for j in range(4)]} for i in range(12)]}
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_grammar_that_cannot_be_followed_is_refused_in_one_line(name: str) -> None:
    for refuse in (check_grammar, FACTORY.start):
        with pytest.raises(InvalidRequest) as caught:
            refuse(REFUSED[name])
        assert caught.value.parameter == "response_format"
        assert re.fullmatch(r"no answer can be made to follow response_format: .{3,220}; correct or simplify it",
                            str(caught.value))  # fmt: skip


def test_what_can_be_followed_passes_the_check() -> None:
    for grammar in (*map(json_schema, SCHEMAS), Grammar("regex", r"\d+"), choices("a", "")):
        check_grammar(grammar)


HOSTILE = """
import json, resource, sys
from service.engines.errors import InvalidRequest
from service.engines.local.grammar import check_grammar, GrammarFactory
from service.engines.local.messages import Grammar
from tokenizers import Tokenizer
import numpy as np
resource.setrlimit(resource.RLIMIT_CPU, (20, 20))
factory = GrammarFactory(Tokenizer.from_file(sys.argv[1]), 4096, [1])
def part(i): return {"anyOf": [{"type": "object", "properties": {f"p{i}{j}": {"type": "null"}}} for j in range(4)]}
grammars = [("regex", text) for text in (
    "(?:a{1000}){1000}", "((a{1000}){1000}){1000}", "(a|b)*a(a|b){200}", "(.*a.*b.*c){40}",
    r"[\\p{L}\\p{N}]{1,1000}" * 20, "(.*a.{100}&&.*)", ".{0,100000}x")]
grammars += [("json_schema", json.dumps(schema)) for schema in (
    {"allOf": [part(i) for i in range(6)]}, {"type": "integer", "multipleOf": 999999937},
    {"anyOf": [{"type": "string", "pattern": f".*a.{{{i}}}b.*"} for i in range(200)]},
    {"type": "object", "properties": {str(i): {} for i in range(2000)}},
    {"type": "array", "minItems": 10**9, "items": {"type": "string", "minLength": 10**9}})]
numbers = np.random.default_rng(0)
for kind, text in grammars:
    try:
        check_grammar(Grammar(kind, text))
        state = factory.start(Grammar(kind, text))
        for _ in range(200):
            state.take(int(numbers.choice(np.flatnonzero(state.allowed()))))
    except InvalidRequest:
        continue
status = open("/proc/self/status").read()
print(int(status.split("VmHWM:")[1].split()[0]) // 1024)
"""


def test_hostile_grammars_cost_little_time_and_memory() -> None:
    command = [sys.executable, "-c", HOSTILE, str(BASE_FOLDER / "tokenizer.json")]
    result = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=True)
    assert int(result.stdout) < 600  # MiB, with Python and all twelve kept


def test_a_tokenizer_that_no_grammar_can_be_followed_with_is_named() -> None:
    words = Tokenizer(models.WordLevel({"a": 0, "b": 1}, unk_token="a"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    with pytest.raises(UnsupportedFeature, match="tokenizer cannot follow a grammar"):
        GrammarFactory(words, 2, [1]).start(choices("a"))


def test_checking_a_grammar_needs_no_torch() -> None:
    code = "import sys, service.engines.local.grammar; print('torch' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert result.stdout.strip() == "False"


def test_alternatives_of_one_of_are_followed_as_any_of() -> None:
    form = {"oneOf": [{"type": "string", "enum": ["low", "high"]}, {"type": "integer", "minimum": 10, "maximum": 12}]}
    seen = {sample(json_schema(form), seed) for seed in range(20)}
    assert seen <= {'"low"', '"high"', "10", "11", "12"}
    assert len(seen) > 2


def test_a_lenient_grammar_leaves_out_what_cannot_be_followed_and_keeps_the_rest() -> None:
    text = json.dumps({"type": "array", "items": {"enum": [1, 2]}, "uniqueItems": True})
    with pytest.raises(InvalidRequest, match="uniqueItems"):
        check_grammar(Grammar("json_schema", text))
    lenient = Grammar("json_schema", text, lenient=True)
    check_grammar(lenient)
    follow(FACTORY.start(lenient), "[1, 2, 1]")
    with pytest.raises(AssertionError, match="'3' of"):
        follow(FACTORY.start(lenient), "[1, 3]")


def test_a_schema_may_ask_to_be_followed_leniently_as_with_vllm() -> None:
    form = {"type": "array", "items": {"enum": [1, 2]}, "uniqueItems": True, "x-guidance": {"lenient": True}}
    check_grammar(Grammar("json_schema", json.dumps(form)))
    follow(FACTORY.start(Grammar("json_schema", json.dumps(form))), "[1, 2, 1]")
    with pytest.raises(AssertionError, match="'3' of"):
        follow(FACTORY.start(Grammar("json_schema", json.dumps(form))), "[1, 3]")
