"""The engine on a CUDA device: `varlen_attn` against gathering, captured steps against eager ones."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

from service.engines.base import RawText
from service.engines.base_model import BaseModel
from service.engines.local import attention
from service.engines.local.engine import EngineCore
from service.engines.local.kv_cache import PagedCache
from service.engines.local.model_runner import ModelRunner
from service.engines.local.options import EngineOptions
from service.engines.local.sizing import laid_out
from service.engines.local.survey import survey
from service.engines.local.varlen import PAGE_TOKENS, varlen_for
from service.engines.local.weights import load_weights
from tests.conftest import random_prompt
from tests.service.engines.local.driving import finish, register, score, submit
from tests.service.engines.local.oracle import Oracle
from tests.service.engines.local.test_engine import TEXTS, grouped_model, prompts, save_base
from tests.service.engines.local.test_graphs import decode, prefill, sequences
from tests.service.engines.local.test_varlen import capped_model, mixed_batch, sliding_model

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="NOT RUN: this machine has no CUDA device"),
]
_ROUNDING = 0.05  # of the largest logit


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("make", [grouped_model, sliding_model])
def test_the_kernel_and_gathering_compute_the_same_over_pages(
    tmp_path: Path, make: Callable[[], PreTrainedModel], dtype: torch.dtype
) -> None:
    base = save_base(tmp_path / "base", make())
    model = load_weights(base, device="cuda", attention_implementation="eager", dtype=dtype)
    shape = laid_out(survey(model, base.context_length))
    assert (shape.layout, shape.block_tokens) == ("pages", PAGE_TOKENS)
    model.set_attn_implementation(attention.NAME)
    caches = [PagedCache(shape, 5) for _ in range(2)]
    ours, gathering = (
        ModelRunner(base, model, cache, varlen=varlen)
        for cache, varlen in zip(caches, (varlen_for(caches[0]), None), strict=True)
    )
    for batch in mixed_batch(base.vocabulary_size, PAGE_TOKENS):
        assert_close(ours.run(batch, {}).rows, gathering.run(batch, {}).rows)


@pytest.mark.parametrize("rows", [1, 2, 3, 5, 8, 9])
def test_captured_steps_equal_eager_ones(base: BaseModel, rows: int) -> None:
    options = EngineOptions(device="cuda", dtype="bfloat16", max_sequences=12, kv_memory_bytes=64 * 1024**2)
    replaying = ModelRunner.load(base, options)
    assert replaying.captured
    eager = ModelRunner.over(base, load_weights(base, device="cuda", dtype=torch.bfloat16), options)
    ours, theirs = sequences(rows), sequences(rows)
    tokens = eager.highest(prefill(eager, theirs).rows)
    prefill(replaying, ours)
    for _ in range(5):
        expected = decode(eager, theirs, tokens).rows
        assert_close(decode(replaying, ours, tokens).rows, expected)
        tokens = eager.highest(expected)


def test_the_engine_answers_everything_in_bfloat16(base: BaseModel) -> None:
    core = EngineCore.load(base, EngineOptions(device="cuda", kv_memory_bytes=64 * 1024**2))
    for index, (text, prompt) in enumerate(zip(TEXTS, prompts(), strict=True)):
        digest = register(core, prompt) if prompt is not None else None
        submit(core, str(index), base.lay_out(RawText(text)), digest, temperature=0.8 * (index % 2), seed=index)
    score(core, "scored", base.lay_out(RawText(TEXTS[0])), None, [[5], [6, 7], [6, 8]])
    collected = finish(core)
    assert not collected.failures
    assert len(collected.reasons) == len(TEXTS)


def test_float32_on_the_device_says_what_transformers_says(base: BaseModel) -> None:
    core, oracle = EngineCore.load(base, EngineOptions(device="cuda", dtype="float32")), Oracle.load(base)
    for index, (text, prompt) in enumerate(zip(TEXTS, prompts(), strict=True)):
        ids = base.lay_out(RawText(text))
        submit(core, str(index), ids, register(core, prompt) if prompt is not None else None)
        oracle.assert_equal(finish(core).tokens[str(index)], ids, prompt)
    assert oracle.ties <= 1


def test_capped_scores_are_served_without_captured_steps(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base", capped_model())
    runner = ModelRunner.load(base, EngineOptions(device="cuda"))
    assert not runner.captured
    core = EngineCore(runner, EngineOptions())
    submit(core, "capped", base.lay_out(RawText(TEXTS[0])), register(core, random_prompt(3, 9, hidden_size=48)))
    assert not finish(core).failures


def assert_close(ours: torch.Tensor, expected: torch.Tensor) -> None:
    assert float((ours - expected).abs().max()) <= _ROUNDING * float(expected.abs().max())
