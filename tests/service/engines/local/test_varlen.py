"""Attention over pages by `varlen_attn`'s rules, held against torch's own path and transformers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PretrainedConfig,
    PreTrainedModel,
)

from service.engines.base import RawText
from service.engines.base_model import BaseModel
from service.engines.local.engine import EngineCore
from service.engines.local.kv_cache import KVShape, PagedCache
from service.engines.local.options import EngineOptions
from service.engines.local.scheduler import Batch, Chunk, Sequence
from service.engines.local.varlen import PAGE_TOKENS, VarlenPlan, attend, fits_varlen, varlen_for
from service.engines.local.weights import load_weights
from tests.conftest import random_prompt
from tests.service.engines.local.driving import finish, register, score, submit
from tests.service.engines.local.oracle import Oracle
from tests.service.engines.local.paged import paged_runner
from tests.service.engines.local.test_engine import TEXTS, grouped_model, prompts, save_base
from tests.service.engines.local.varlen_reference import ReferenceVarlen

SIZES = {
    "vocab_size": 4096, "hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 256, "bos_token_id": 0, "eos_token_id": 1,
    "pad_token_id": 2, "initializer_range": 0.4,
}  # fmt: skip


def sliding_model() -> PreTrainedModel:
    """Each token sees seven."""
    return seeded(MistralForCausalLM, MistralConfig(**SIZES, sliding_window=7))


def capped_model() -> PreTrainedModel:
    """Scores are capped at 5."""
    return seeded(Gemma2ForCausalLM, Gemma2Config(**SIZES, attn_logit_softcapping=5.0, sliding_window=7))


def seeded(model: type[PreTrainedModel], config: PretrainedConfig) -> PreTrainedModel:
    torch.manual_seed(0)
    return model(config)


def mixed_batch(vocabulary_size: int, page: int) -> tuple[Batch, Batch]:
    """Four sequences' prefills, and after them a step that decodes two and goes on with two."""
    ids = torch.randint(3, vocabulary_size, (4, 60), generator=torch.Generator().manual_seed(1)).tolist()
    each = max(1, 64 // page)
    pages = [list(range(row * each, (row + 1) * each)) for row in range(4)]
    ends = (17, 33, 40, 21)
    first, second = [], []
    for row, (begun, more) in enumerate(zip((16, 32, 9, 1), (1, 1, 31, 20), strict=True)):
        sequence = Sequence(str(row), ids[row][: ends[row]], phase="prefill", blocks=pages[row])
        first.append(Chunk(sequence, 0, begun, pages[row]))
        second.append(Chunk(sequence, begun, more, pages[row]))
    return Batch(first), Batch(second)


@pytest.mark.parametrize("page", [16, 64])
@pytest.mark.parametrize("make", [grouped_model, sliding_model])
def test_mixed_batches_over_pages_equal_gathering_from_them(
    tmp_path: Path, make: Callable[[], PreTrainedModel], page: int
) -> None:
    base, reference = save_base(tmp_path / "base", make()), ReferenceVarlen()
    ours, gathering = paged_runner(base, reference, page=page), paged_runner(base, None, page=page)
    called = reference.calls
    for batch in mixed_batch(base.vocabulary_size, page):
        logits, expected = ours.run(batch, {}), gathering.run(batch, {})
        assert logits.spans == expected.spans
        torch.testing.assert_close(logits.rows, expected.rows, rtol=1e-4, atol=1e-4)
    assert reference.calls == called + 2 * ours.cache.shape.layers
    torch.testing.assert_close(ours.cache.keys, gathering.cache.keys, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("window", [0, 7])
def test_torch_takes_what_it_is_given(window: int) -> None:
    shape = KVShape(1, 2, 64, torch.bfloat16, torch.device("meta"), layout="pages", block_tokens=PAGE_TOKENS)
    cache = PagedCache(shape, 3)
    plan = VarlenPlan.of(cache, np.array([[0, 1], [2, 0]], dtype=np.int32), pasts=[250, 0], counts=[10, 4])
    query, key, value = (torch.empty(heads, 14, 64, dtype=torch.bfloat16, device="meta") for heads in (4, 2, 2))
    varlen = varlen_for(cache)
    assert varlen is not None
    output = attend(varlen, cache, plan, 0, query, key, value, 0.1, window)
    assert (output.shape, output.dtype) == ((14, 4, 64), torch.bfloat16)


@pytest.mark.parametrize("page", [16, PAGE_TOKENS])
def test_an_engine_over_pages_says_what_transformers_says(base: BaseModel, page: int) -> None:
    runner = paged_runner(base, ReferenceVarlen(), blocks=160 if page == 16 else 24, page=page)
    core, oracle = EngineCore(runner, EngineOptions(max_batch_tokens=48)), Oracle.load(base)
    asked = []
    for index, (text, prompt) in enumerate(zip(TEXTS, prompts(), strict=True)):
        digest = register(core, prompt) if prompt is not None else None
        asked.append((str(index), base.lay_out(RawText(text)), prompt, digest))
        submit(core, str(index), asked[-1][1], digest)
    score(core, "scored", asked[0][1], asked[0][3], [[5], [6, 7], [6, 7, 8]])
    collected = finish(core)
    for name, ids, prompt, _ in asked:
        oracle.assert_equal(collected.tokens[name], ids, prompt)
    assert oracle.ties <= 1
    assert len(collected.scores["scored"]) == 3
    assert not collected.failures


def test_capped_scores_are_gathered_because_the_kernel_knows_no_caps(tmp_path: Path) -> None:
    base, reference = save_base(tmp_path / "base", capped_model()), ReferenceVarlen()
    core = EngineCore(paged_runner(base, reference), EngineOptions())
    oracle = Oracle(load_weights(base, attention_implementation="eager"))
    prompt, ids = random_prompt(3, 9, hidden_size=48, scale=1.0), base.lay_out(RawText(TEXTS[0]))
    submit(core, "capped", ids, register(core, prompt))
    oracle.assert_equal(finish(core).tokens["capped"], ids, prompt)
    assert reference.calls == 0


@pytest.mark.parametrize(
    ("device", "dtype", "head_dim"),
    [("cpu", torch.bfloat16, 64), ("cuda", torch.float32, 64), ("cuda", torch.bfloat16, 264), ("cuda", torch.half, 36)],
)
def test_what_the_kernel_refuses_keeps_the_other_layout(device: str, dtype: torch.dtype, head_dim: int) -> None:
    assert not fits_varlen(torch.device(device), dtype, head_dim)
