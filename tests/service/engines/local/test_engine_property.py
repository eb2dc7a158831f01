"""Whatever comes, in whatever order and memory, each request gets what it gets alone.

Rows of the compiled kernels are the same bits in any batch, so there equality is exact. Without a compiler rows may
differ in their last bits: there a greedy comparison ends at the first token whose choice was a near tie.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from service.engines.base import RawText
from service.engines.base_model import BaseModel
from service.engines.local.engine import EngineCore
from service.engines.local.kernels import load as load_kernels
from tests.conftest import random_prompt
from tests.service.engines.local.driving import Collected, assert_idle, finish, register, score, step, submit
from tests.service.engines.local.oracle import TIE

PROMPTS = [random_prompt(seed, length) for seed, length in ((1, 3), (2, 16), (3, 37))]
LONGEST = 37 + 40 + 24
FEWEST_BLOCKS = -(-LONGEST // 16) + 2
TASKS = ("", "a", "b")


@dataclass(frozen=True)
class Ask:
    """A request. `labels` makes it a score request; `cancelled_after` counts steps, None lets it end."""

    begin: int
    length: int
    prompt: int | None
    task: str
    n: int
    new: int
    seed: int | None
    labels: tuple[tuple[int, ...], ...]
    cancelled_after: int | None

    @property
    def what(self) -> tuple[object, ...]:
        """All that its answer depends on."""
        return (self.begin, self.length, self.prompt, self.new, self.seed, self.labels)


@dataclass(frozen=True)
class Let:
    """Let go of a prompt; it is brought again for who asks next."""

    prompt: int


labels = st.lists(st.lists(st.integers(3, 4000), min_size=1, max_size=8).map(tuple), min_size=1, max_size=4)
asks = st.builds(
    Ask,
    begin=st.integers(0, 8),
    length=st.integers(1, 40),
    prompt=st.sampled_from([None, 0, 1, 2]),
    task=st.sampled_from(TASKS),
    n=st.sampled_from([1, 1, 2, 4]),
    new=st.integers(1, 24),
    seed=st.sampled_from([None, None, 7, 8]),
    labels=st.one_of(st.just(()), st.just(()), labels.map(tuple)),
    cancelled_after=st.sampled_from([None, None, None, 0, 2, 9]),
)
acts = st.tuples(st.integers(0, 5), st.one_of(asks, asks, asks, st.builds(Let, st.integers(0, 2))))


class Alone:
    """Answers of an engine that is asked one thing at a time, each asked once."""

    def __init__(self, core: EngineCore, text: list[int]) -> None:
        self._core = core
        self._text = text
        self._digests = [register(core, prompt) for prompt in PROMPTS]
        self._known: dict[tuple[object, ...], Collected] = {}

    def answer(self, ask: Ask) -> Collected:
        known = self._known.get(ask.what)
        if known is None:
            known = self._known[ask.what] = Collected()
            digest = self._digests[ask.prompt] if ask.prompt is not None else None
            send(self._core, "alone", ask, self._text, digest, n=4)
            finish(self._core, known)
        return known


def send(core: EngineCore, name: str, ask: Ask, text: list[int], digest: str | None, n: int) -> None:
    ids = text[ask.begin : ask.begin + ask.length]
    if ask.labels:
        score(core, name, ids, digest, [list(label) for label in ask.labels], task=ask.task)
        return
    how = {} if ask.seed is None else {"temperature": 1.0, "seed": ask.seed}
    submit(core, name, ids, digest, max_tokens=ask.new, n=n, task=ask.task, logprobs=2, **how)


def assert_same(got: Collected, name: str, ask: Ask, alone: Collected, exact: bool) -> None:
    """What came of a request, all of it or until it was cancelled, is what comes of it alone."""
    if ask.labels:
        assert got.scores[name] == pytest.approx(alone.scores["alone"], abs=1e-3)
        return
    for index, mine in got.choices[name].items():
        other = alone.choices["alone"][index]
        if not exact and (at := first_difference(mine.tokens, other.tokens)) is not None:
            (_, first), (_, second) = other.logprobs[at].top[:2]
            assert ask.seed is not None or first - second < TIE
            continue
        assert mine.tokens == other.tokens[: len(mine.tokens)]
        if mine.reason is not None:
            assert (mine.tokens, mine.text, mine.reason) == (other.tokens, other.text, other.reason)


def first_difference(tokens: list[int], others: list[int]) -> int | None:
    pairs = enumerate(zip(tokens, others, strict=False))
    return next((at for at, (one, other) in pairs if one != other), None)


def is_whole(got: Collected, name: str, ask: Ask) -> bool:
    if ask.labels:
        return name in got.scores
    choices = got.choices.get(name, {})
    return len(choices) == ask.n and all(choice.reason is not None for choice in choices.values())


@pytest.fixture(scope="module")
def text(base: BaseModel) -> list[int]:
    return base.lay_out(
        RawText("The house stood at the end of a long road, and nobody had lived there for years. " * 3)
    )


@pytest.fixture(scope="module")
def exact() -> bool:
    return load_kernels() is not None


@pytest.fixture(scope="module")
def known() -> dict[str, Alone]:
    return {}


@settings(
    max_examples=300,
    deadline=None,
    derandomize=True,
    phases=[Phase.explicit, Phase.generate, Phase.shrink],
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(
    work=st.lists(acts, min_size=1, max_size=14),
    blocks=st.sampled_from([FEWEST_BLOCKS, FEWEST_BLOCKS + 3, 24, 128]),
    sequences=st.sampled_from([1, 3, 16]),
    budget=st.sampled_from([1, 7, 32, 512]),
)
def test_each_request_gets_what_it_gets_alone_and_nothing_is_kept(
    make_core: Callable[..., EngineCore],
    known: dict[str, Alone],
    text: list[int],
    exact: bool,
    work: list[tuple[int, Ask | Let]],
    blocks: int,
    sequences: int,
    budget: int,
) -> None:
    if not known:
        known["alone"] = Alone(make_core(), text)
    alone = known["alone"]
    core, got = make_core(blocks=blocks, max_sequences=sequences, max_batch_tokens=budget), Collected()
    digests: dict[int, str] = {}
    asked: dict[str, Ask] = {}
    cancels: dict[int, list[str]] = {}
    steps = 0

    def go_on() -> None:
        nonlocal steps
        for name in cancels.pop(steps, []):
            core.cancel(name)
        step(core, got)
        stats = core.stats()
        assert stats.kv_bytes <= stats.kv_budget_bytes
        assert stats.running <= sequences
        steps += 1

    for pause, act in work:
        if isinstance(act, Let):
            if act.prompt in digests:
                core.release(digests.pop(act.prompt))
        else:
            name = str(len(asked))
            asked[name] = act
            if act.prompt is not None and act.prompt not in digests:
                digests[act.prompt] = register(core, PROMPTS[act.prompt], pinned=act.prompt == 1)
            send(core, name, act, text, digests.get(act.prompt) if act.prompt is not None else None, act.n)
            if act.cancelled_after is not None:
                cancels.setdefault(steps + act.cancelled_after, []).append(name)
        for _ in range(pause):
            go_on()
    while core.has_work or cancels:
        go_on()
        assert steps < 5000, "the engine never came to an end"
    assert not got.failures
    for name, ask in asked.items():
        assert is_whole(got, name, ask) or ask.cancelled_after is not None, f"request {name} never ended"
        if name in got.scores or name in got.choices:
            assert_same(got, name, ask, alone.answer(ask), exact)
    assert_idle(core)
    for digest in digests.values():
        core.release(digest)
    assert core.stats().kv_bytes == 0
