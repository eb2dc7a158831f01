"""Limits in time: deadlines, and how much prefill goes beside streams. Clocks are turned by hand."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from service.engines.base import RawText
from service.engines.base_model import BaseModel
from service.engines.local.engine import EngineCore
from service.engines.local.scheduler import Batch
from tests.conftest import random_prompt
from tests.service.engines.local.driving import Clock, Collected, assert_idle, finish, register, score, step, submit
from tests.service.engines.local.oracle import Oracle


@pytest.fixture
def ids(base: BaseModel) -> list[int]:
    return base.lay_out(RawText("She looked at the sea. " * 12))


@pytest.mark.parametrize(
    ("stage", "steps", "limits"),
    [
        ("waiting", 1, {"max_sequences": 1}),
        ("computing its prompt", 1, {"max_batch_tokens": 8}),
        ("prefilling", 6, {"max_batch_tokens": 8}),
        ("decoding", 12, {}),
    ],
)
def test_a_deadline_ends_a_request_at_every_stage_and_no_other(
    make_core: Callable[..., EngineCore], oracle: Oracle, ids: list[int], stage: str, steps: int, limits: dict[str, int]
) -> None:
    clock, collected = Clock(), Collected()
    core = make_core(clock=clock, **limits)
    digest = register(core, random_prompt(1, 20), pinned=False)
    submit(core, "other", ids[:4], max_tokens=16)
    submit(core, "late", ids, digest, max_tokens=50, n=2, deadline_s=5.0)
    for _ in range(steps):
        step(core, collected)
    assert (stage == "decoding") == bool(collected.choices.get("late"))
    clock.now_s = 4.9
    step(core, collected)
    assert not collected.failures
    clock.now_s = 5.0
    step(core, collected)
    assert collected.kinds == {"late": "deadline"}
    assert "deadline passed" in collected.failures["late"]
    finish(core, collected)
    oracle.assert_equal(collected.tokens["other"], ids[:4], None)
    assert_idle(core)


def test_deadlines_hold_for_labels_and_one_that_has_passed_already_costs_no_pass(
    make_core: Callable[..., EngineCore], ids: list[int]
) -> None:
    clock, batches = Clock(), []
    core = make_core(clock=clock, before=batches.append)
    score(core, "late", ids, None, [[5, 6]], deadline_s=-0.1)
    score(core, "in time", ids[:9], None, [[5, 6]], deadline_s=1.0)
    collected = finish(core)
    assert (collected.kinds, set(collected.scores)) == ({"late": "deadline"}, {"in time"})
    assert {chunk.sequence.id for batch in batches for chunk in batch.chunks} == {"in time"}


def test_a_deadline_that_was_met_is_forgotten(make_core: Callable[..., EngineCore], ids: list[int]) -> None:
    clock = Clock()
    core = make_core(clock=clock)
    submit(core, "a", ids[:4], max_tokens=3, deadline_s=5.0)
    finish(core)
    clock.now_s = 9.0
    submit(core, "a", ids[:4], max_tokens=3)
    assert not finish(core).failures


class Costs:
    """Passes that take 100 ms and 1 ms more for each token of prefill."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self.prefilled: list[int] = []
        self.streams: list[int] = []

    def __call__(self, batch: Batch) -> None:
        decoding = sum(chunk.sequence.phase == "decode" for chunk in batch.chunks)
        self.prefilled.append(sum(chunk.count for chunk in batch.chunks) - decoding)
        self.streams.append(decoding)
        self._clock.now_s += (0.100 if decoding else 0.0) + 0.001 * self.prefilled[-1]


def test_a_long_prompt_beside_streams_goes_in_pieces_that_make_a_step_half_as_long_again(
    make_core: Callable[..., EngineCore], oracle: Oracle, ids: list[int]
) -> None:
    clock, collected = Clock(), Collected()
    costs = Costs(clock)
    core = make_core(clock=clock, before=costs)
    for name in "ab":
        submit(core, name, ids[:20], max_tokens=30)
    for _ in range(3):
        step(core, collected)
    costs.prefilled.clear()
    costs.streams.clear()
    long = (ids * 9)[:450]
    submit(core, "long", long, max_tokens=4)
    finish(core, collected)
    assert costs.prefilled[:10] == pytest.approx([50] * 9 + [0], abs=1)  # a mean of measures
    assert costs.streams[:9] == [2] * 9
    oracle.assert_equal(collected.tokens["long"], long, None)


def test_without_streams_a_long_prompt_takes_all_that_a_step_carries(
    make_core: Callable[..., EngineCore], ids: list[int]
) -> None:
    clock = Clock()
    costs = Costs(clock)
    core = make_core(clock=clock, before=costs)
    submit(core, "warm-up", ids[:20], max_tokens=3)
    finish(core)
    costs.prefilled.clear()
    submit(core, "long", (ids * 20)[:900], max_tokens=1)
    finish(core)
    assert costs.prefilled == [512, 388]


def test_a_flood_of_one_task_delays_another_by_no_more_than_what_runs(
    make_core: Callable[..., EngineCore], oracle: Oracle, ids: list[int]
) -> None:
    core, collected = make_core(max_sequences=4, max_batch_tokens=64), Collected()
    for number in range(200):
        submit(core, f"flood {number}", ids[:30], max_tokens=6, ignore_eos=True, task="flood")
    for _ in range(8):
        step(core, collected)
    submit(core, "other", ids[:30], task="other", max_tokens=6, ignore_eos=True)
    steps = 0
    while "other" not in collected.ended:
        step(core, collected)
        steps += 1
    assert steps <= 2 * 6 + 4
    oracle.assert_equal(collected.tokens["other"], ids[:30], None)
