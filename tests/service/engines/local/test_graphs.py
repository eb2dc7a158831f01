"""Decode steps at captured sizes, on a CPU: a stand-in for a graph calls the same function again."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from torch import Tensor

from service.engines.base import RawText
from service.engines.base_model import BaseModel
from service.engines.local.engine import EngineCore
from service.engines.local.graphs import Replay, decode_sizes
from service.engines.local.model_runner import Logits, ModelRunner
from service.engines.local.options import EngineOptions
from service.engines.local.scheduler import Batch, Chunk, Sequence
from tests.service.engines.local.driving import Collected, finish, register, score, submit
from tests.service.engines.local.paged import paged_runner
from tests.service.engines.local.test_engine import TEXTS, prompts, save_base
from tests.service.engines.local.test_varlen import capped_model
from tests.service.engines.local.varlen_reference import ReferenceVarlen


@dataclass
class CallAgain:
    """Calls what it was given, once when it is captured and whenever it is replayed; notes the sizes of both."""

    captured: list[int] = field(default_factory=list)
    replayed: list[int] = field(default_factory=list)

    def __call__(self, function: Callable[[], Tensor]) -> Replay:
        self.captured.append(len(function()))

        def replay() -> Tensor:
            output = function()
            self.replayed.append(len(output))
            return output

        return replay


def runner_with(base: BaseModel, capture: CallAgain | None, most: int = 12) -> ModelRunner:
    runner = paged_runner(base, ReferenceVarlen(), packed=True)
    if capture is not None:
        assert runner.capture(capture, most)
        capture.replayed.clear()
    for cache in (runner.cache.keys, runner.cache.values):
        cache.zero_()
    return runner


def sequences(count: int) -> list[Sequence]:
    """So many, of lengths around the size of a page, each with pages of its own."""
    ids = torch.randint(3, 4096, (count, 40), generator=torch.Generator().manual_seed(2)).tolist()
    return [
        Sequence(str(row), ids[row][: 13 + row], phase="prefill", blocks=[3 * row + 2, 3 * row, 3 * row + 1])
        for row in range(count)
    ]


def prefill(runner: ModelRunner, rows: list[Sequence]) -> Logits:
    return runner.run(Batch([Chunk(row, 0, len(row.token_ids), row.blocks) for row in rows]), {})


def decode(runner: ModelRunner, rows: list[Sequence], tokens: list[int]) -> Logits:
    for row, token in zip(rows, tokens, strict=True):
        row.token_ids.append(token)
    return runner.run(Batch([Chunk(row, len(row.token_ids) - 1, 1, row.blocks) for row in rows]), {})


def test_sizes_are_few_and_reach_the_most() -> None:
    assert decode_sizes(1) == [1]
    assert decode_sizes(6) == [1, 2, 4, 6]
    assert decode_sizes(32) == [1, 2, 4, 8, 16, 24, 32]
    assert decode_sizes(37) == [1, 2, 4, 8, 16, 24, 32, 37]


@pytest.mark.parametrize(("rows", "size"), [(1, 1), (2, 2), (3, 4), (5, 8), (8, 8), (9, 12)])
def test_replayed_steps_equal_eager_ones_bit_for_bit(base: BaseModel, rows: int, size: int) -> None:
    capture = CallAgain()
    replaying, eager = runner_with(base, capture), runner_with(base, None)
    assert capture.captured == [12, 8, 4, 2, 1]
    ours, theirs = sequences(rows), sequences(rows)
    tokens = replaying.highest(prefill(replaying, ours).rows)
    assert tokens == eager.highest(prefill(eager, theirs).rows)
    for _ in range(5):
        logits, expected = decode(replaying, ours, tokens), decode(eager, theirs, tokens)
        assert logits.spans == expected.spans
        assert torch.equal(logits.rows, expected.rows)
        tokens = eager.highest(expected.rows)
    assert capture.replayed == [size] * 5
    for cache, other in ((replaying.cache.keys, eager.cache.keys), (replaying.cache.values, eager.cache.values)):
        assert torch.equal(cache[:, :-1], other[:, :-1]), "idle rows write to the scrap block alone"


def test_a_step_leaves_nothing_for_a_smaller_one_after_it(base: BaseModel) -> None:
    replaying, eager = runner_with(base, CallAgain()), runner_with(base, None)
    ours, theirs = sequences(8), sequences(8)
    tokens = replaying.highest(prefill(replaying, ours).rows)
    prefill(eager, theirs)
    for count in (8, 3, 7, 1):
        step = decode(replaying, ours[:count], tokens[:count])
        assert torch.equal(step.rows, decode(eager, theirs[:count], tokens[:count]).rows)


def test_logits_stay_as_they_are_when_the_next_step_runs(base: BaseModel) -> None:
    runner = runner_with(base, CallAgain())
    rows = sequences(2)
    tokens = runner.highest(prefill(runner, rows).rows)
    first = decode(runner, rows, tokens).rows
    kept = first.clone()
    decode(runner, rows, [5, 6])
    assert torch.equal(first, kept)


def test_only_steps_of_one_token_each_that_fit_are_replayed(base: BaseModel) -> None:
    capture = CallAgain()
    runner = runner_with(base, capture, most=4)
    rows = sequences(6)
    prefill(runner, rows)
    decode(runner, rows, [5] * 6)  # too many
    half = rows[0]
    half.token_ids += [6, 7, 8]
    going_on = Chunk(half, len(half.token_ids) - 3, 2, half.blocks)
    runner.run(Batch([going_on, Chunk(rows[1], len(rows[1].token_ids) - 1, 1, rows[1].blocks)]), {})
    alone = Chunk(half, len(half.token_ids) - 3, 1, half.blocks)  # one token of a prefill that goes on: no logits
    assert not len(runner.run(Batch([alone]), {}).rows)
    assert capture.replayed == []
    decode(runner, rows[:4], [5] * 4)
    assert capture.replayed == [4]


def test_an_engine_that_replays_answers_as_one_that_does_not(base: BaseModel) -> None:
    def answers(capture: CallAgain | None) -> Collected:
        core = EngineCore(runner_with(base, capture, most=6), EngineOptions(max_sequences=6, max_batch_tokens=48))
        for index, (text, prompt) in enumerate(zip(TEXTS, prompts(), strict=True)):
            digest = register(core, prompt) if prompt is not None else None
            submit(core, str(index), base.lay_out(RawText(text)), digest, temperature=0.8 * (index % 2), seed=index)
        score(core, "scored", base.lay_out(RawText(TEXTS[0])), None, [[5], [6, 7], [6, 8]])
        return finish(core)

    capture = CallAgain()
    replayed, eager = answers(capture), answers(None)
    assert replayed.tokens == eager.tokens
    assert replayed.scores == eager.scores
    assert not replayed.failures
    assert capture.replayed


def test_the_scrap_block_is_never_given_to_a_sequence(base: BaseModel) -> None:
    runner = paged_runner(base, ReferenceVarlen(), blocks=70)
    assert runner.blocks == 69
    core = EngineCore(runner, EngineOptions())
    assert core.stats().kv_budget_bytes == 69 * runner.cache.shape.block_bytes


class Failing(CallAgain):
    def __call__(self, function: Callable[[], Tensor]) -> Replay:
        raise RuntimeError("operation not permitted when stream is capturing")


class Stale(CallAgain):
    """A graph that does not read its inputs anew."""

    def __call__(self, function: Callable[[], Tensor]) -> Replay:
        output = function()
        return lambda: output


def test_a_step_that_gathers_is_not_captured(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    runner = paged_runner(save_base(tmp_path / "base", capped_model()), ReferenceVarlen())
    assert not runner.capture(CallAgain(), 4)
    assert not runner.captured
    assert "gathers KV by sequence" in caplog.text


@pytest.mark.parametrize(("capture", "said"), [(Failing(), "not permitted"), (Stale(), "differ from the model")])
def test_what_cannot_be_captured_runs_as_it_is(
    base: BaseModel, capture: CallAgain, said: str, caplog: pytest.LogCaptureFixture
) -> None:
    runner, eager = paged_runner(base, ReferenceVarlen(), packed=True), runner_with(base, None)
    with caplog.at_level(logging.WARNING):
        assert not runner.capture(capture, 4)
    assert said in caplog.text
    ours, theirs = sequences(3), sequences(3)
    prefill(runner, ours)
    prefill(eager, theirs)
    assert torch.equal(decode(runner, ours, [5, 6, 7]).rows, decode(eager, theirs, [5, 6, 7]).rows)
