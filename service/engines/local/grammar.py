"""Structured output: the tokens an answer may go on with, so that it fits a JSON schema, a pattern or a choice.

llguidance compiles and follows the grammar; this module bounds what a request may make it do, and says what is wrong
in one line. Imports no torch, so that the HTTP process can refuse a grammar before any compute.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection
from functools import cache, cached_property, lru_cache
from typing import Any

import numpy as np
from llguidance import LLMatcher, LLParserLimits, LLTokenizer, TokenizerWrapper
from numpy.typing import NDArray
from tokenizers import Tokenizer

from service.engines.errors import InvalidRequest, UnsupportedFeature
from service.engines.local.messages import Grammar

MAX_GRAMMAR_BYTES = 32 * 1024
_CACHED_GRAMMARS = 32
_MAX_REASON_CHARACTERS = 200
# A model that is lost in a grammar likes to write blanks for ever. These are enough for JSON indented by eight levels.
_BLANKS = r"[\x20\x0A\x0D\x09]{1,33}"


def _json_options(lenient: bool) -> Any:
    """oneOf is followed as anyOf: most schemas' alternatives exclude each other, and no grammar counts matches.

    A schema may ask to be followed leniently itself, by the word that vLLM takes: `"x-guidance": {"lenient": true}`.
    """
    options = {"whitespace_pattern": _BLANKS, "coerce_one_of": True}
    return options | {"lenient": True} if lenient else options


def _limits() -> LLParserLimits:
    """What one grammar may cost: at most 0.3 s to compile, some 10 ms a token, and tens of megabytes."""
    return LLParserLimits(
        initial_lexer_fuel=100_000,
        step_lexer_fuel=100_000,
        step_max_items=20_000,
        max_lexer_states=20_000,
        max_grammar_size=50_000,
        verbose_errors=False,
    )


class GrammarState:
    """Where one answer stands in its grammar."""

    def __init__(self, matcher: LLMatcher, vocabulary_size: int) -> None:
        self._matcher = matcher
        self._vocabulary_size = vocabulary_size

    def allowed(self) -> NDArray[np.bool_]:
        """Whether each token may come next: bool [V]. End-of-sequence tokens are allowed where the answer may end.

        Raises InvalidRequest when no text fits the grammar, or when it grew too complex to follow.
        """
        bits = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)
        if self._matcher.is_error():
            raise _refusal(self._matcher.get_error())
        return np.unpackbits(bits, count=self._vocabulary_size, bitorder="little").view(np.bool_)

    def take(self, token: int) -> None:
        """Go on by a token. Raises InvalidRequest when it was not allowed, or as `allowed` does."""
        if not self._matcher.consume_token(token):
            raise _refusal(self._matcher.get_error())

    @property
    def can_end(self) -> bool:
        """Whether what was taken is a whole answer."""
        return self._matcher.is_accepting()

    @property
    def must_end(self) -> bool:
        """Whether nothing can follow but an end-of-sequence token."""
        return self._matcher.is_stopped()

    def fork(self) -> GrammarState:
        """Another answer that stands where this one stands."""
        return GrammarState(self._matcher.deep_copy(), self._vocabulary_size)


class GrammarFactory:
    """Compiles grammars for a base model. The last ones that were used are kept compiled."""

    def __init__(self, tokenizer: Tokenizer, vocabulary_size: int, eos_token_ids: Collection[int]) -> None:
        self._tokenizer = tokenizer
        self._vocabulary_size = vocabulary_size
        self._eos_token_ids = sorted(eos_token_ids)
        self._compiled = lru_cache(_CACHED_GRAMMARS)(self._compile)

    def start(self, grammar: Grammar) -> GrammarState:
        """The beginning of an answer that fits a grammar.

        Raises InvalidRequest when the grammar cannot be followed, UnsupportedFeature when the base model's tokenizer
        cannot follow any.
        """
        return self._compiled(grammar).fork()

    @cached_property
    def _vocabulary(self) -> LLTokenizer:
        """Made when first needed: it takes a second for a vocabulary of 128,000."""
        tokenizer = Tokenizer.from_str(self._tokenizer.to_str())
        tokenizer.no_padding()
        tokenizer.no_truncation()
        size = max(self._vocabulary_size, tokenizer.get_vocab_size(with_added_tokens=True))
        try:
            return LLTokenizer(tokenizer.to_str(), n_vocab=size, eos_token=self._eos_token_ids)
        except ValueError as error:
            raise UnsupportedFeature(
                f"this base model's tokenizer cannot follow a grammar ({_one_line(str(error))}); leave it out",
                parameter="response_format",
            ) from error

    def _compile(self, grammar: Grammar) -> GrammarState:
        return _compile(grammar, self._vocabulary, self._vocabulary_size)


def check_grammar(grammar: Grammar) -> None:
    """Raise InvalidRequest when no answer can follow a grammar, whatever the base model.

    Takes about a millisecond, and for a hostile grammar up to 0.3 s, most of it without the interpreter lock.
    """
    _checked(grammar)


@lru_cache(_CACHED_GRAMMARS)
def _checked(grammar: Grammar) -> GrammarState:
    return _compile(grammar, _byte_vocabulary(), 257)


class _ByteTokenizer:
    """A token for each byte, and an end: llguidance's description of a tokenizer."""

    eos_token_id = 256
    bos_token_id = None
    tokens = (*(bytes([byte]) for byte in range(256)), b"<eos>")
    special_token_ids = (256,)

    def __call__(self, text: bytes) -> list[int]:
        return list(text)


@cache
def _byte_vocabulary() -> LLTokenizer:
    return LLTokenizer(TokenizerWrapper(_ByteTokenizer()))


def _compile(grammar: Grammar, vocabulary: LLTokenizer, vocabulary_size: int) -> GrammarState:
    size_bytes = len(grammar.text.encode())
    if size_bytes > MAX_GRAMMAR_BYTES:
        raise _refusal(f"it has {size_bytes:,} bytes and may have {MAX_GRAMMAR_BYTES:,}")
    matcher = LLMatcher(vocabulary, _source(grammar), log_level=0, limits=_limits())
    if matcher.is_error():
        raise _refusal(matcher.get_error())
    state = GrammarState(matcher, vocabulary_size)
    state.fork().allowed()  # what no text can fit compiles and fails here
    return state


def _source(grammar: Grammar) -> str:
    """A grammar in llguidance's own language."""
    match grammar.kind:
        case "json_schema":
            try:
                return LLMatcher.grammar_from_json_schema(grammar.text, overrides=_json_options(grammar.lenient))
            except ValueError as error:
                raise _refusal(str(error)) from error
        case "regex":
            return LLMatcher.grammar_from_regex(grammar.text)
        case "choice":
            return LLMatcher.grammar_from_regex("|".join(map(_literally, _choices(grammar.text))))


def _choices(text: str) -> list[str]:
    try:
        choices = json.loads(text)
    except ValueError as error:
        raise _refusal(f"the choices are not JSON: {error}") from error
    if not isinstance(choices, list) or not choices or not all(isinstance(choice, str) for choice in choices):
        raise _refusal("the choices are not a list of one or more texts")
    return choices


def _literally(text: str) -> str:
    """A pattern that fits this text alone."""
    return re.sub(r"[^A-Za-z0-9]", lambda match: f"\\x{{{ord(match[0]):x}}}", text)


def _refusal(reason: str) -> InvalidRequest:
    return InvalidRequest(
        f"no answer can be made to follow response_format: {_one_line(reason)}; correct or simplify it",
        parameter="response_format",
    )


def _one_line(reason: str) -> str:
    """The gist of llguidance's message: what stands after `error:` in a pattern's, else the first line."""
    found = re.search(r"^error: (.*)$", reason, re.MULTILINE)
    line = found[1] if found else reason.strip().partition("\n")[0]
    if line == "NoExtensionBias":
        return "no text fits it"
    return line if len(line) <= _MAX_REASON_CHARACTERS else line[:_MAX_REASON_CHARACTERS] + "..."
