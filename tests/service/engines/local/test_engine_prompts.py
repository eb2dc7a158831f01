"""Soft prompts and prefixes: as transformers and PEFT take them, in every dtype, in and out of memory."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from peft import PrefixTuningConfig, get_peft_model
from transformers import DynamicCache

from prompt_store.prompts.soft_prompt import SoftPrompt
from service.engines.base import RawText
from service.engines.base_model import BaseModel
from service.engines.local.engine import EngineCore
from service.engines.local.messages import Register
from service.engines.local.model_runner import ModelRunner, load_weights
from tests.conftest import random_prompt
from tests.service.engines.local.driving import Collected, assert_idle, finish, register, step, submit
from tests.service.engines.local.oracle import TIE, Oracle

TEXT = "I want my money back for the broken kettle"
COUNT = 24


@pytest.fixture
def ids(base: BaseModel) -> list[int]:
    return base.lay_out(RawText(TEXT))


def random_prefix(runner: ModelRunner, seed: int, length: int, scale: float = 1.0) -> torch.Tensor:
    """Keys and values [L, 2, KV heads, P, D]."""
    shape = runner.cache.shape
    size = (shape.layers, 2, shape.kv_heads, length, shape.head_dim)
    return scale * torch.randn(size, generator=torch.Generator().manual_seed(seed))


def bring(core: EngineCore, digest: str, prefix: torch.Tensor, *, pinned: bool = True) -> str:
    core.register(Register(digest, "F32", tuple(prefix.shape), prefix.numpy().tobytes(), pinned))
    return digest


def cache_of(prefix: torch.Tensor) -> DynamicCache:
    return DynamicCache([(key[None], value[None]) for key, value in prefix])


def assert_continues(oracle: Oracle, tokens: list[int], ids: list[int], prefix: torch.Tensor) -> None:
    """Each token is the most probable one after the prefix, the text and the tokens before it, near ties aside."""
    fed = torch.tensor([[*ids, *tokens[:-1]]])
    rows = oracle.model(fed, past_key_values=cache_of(prefix)).logits[0, len(ids) - 1 :]
    for token, row in zip(tokens, rows, strict=True):
        assert float(row.max() - row[token]) < TIE


@pytest.mark.parametrize("length", [1, 16, 37])
def test_a_prefix_stands_before_the_text_as_in_transformers(
    core: EngineCore, runner: ModelRunner, oracle: Oracle, ids: list[int], length: int
) -> None:
    prefix = random_prefix(runner, length, length)
    submit(core, "plain", ids, max_tokens=COUNT)
    submit(core, "prefixed", ids, bring(core, "a" * 64, prefix), max_tokens=COUNT, n=2)
    collected = finish(core)
    first, second = collected.all_tokens("prefixed")
    assert first == second != collected.tokens["plain"]
    assert_continues(oracle, first, ids, prefix)
    oracle.assert_equal(collected.tokens["plain"], ids, None)


def test_a_prefix_answers_as_peft_generates(
    base: BaseModel, core: EngineCore, runner: ModelRunner, ids: list[int]
) -> None:
    length, prefix = 10, random_prefix(runner, 3, 10)
    model = get_peft_model(load_weights(base), PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=length))
    # PEFT keeps a row a virtual token: layer by layer the keys of all heads, then the values.
    rows = prefix.permute(3, 0, 1, 2, 4).reshape(length, -1)
    weight = model.prompt_encoder["default"].embedding.weight
    assert weight.shape == rows.shape
    weight.data = rows
    expected = model.generate(
        input_ids=torch.tensor([ids]),
        attention_mask=torch.ones(1, len(ids), dtype=torch.long),
        max_new_tokens=COUNT,
        do_sample=False,
    )[0, len(ids) :].tolist()
    submit(core, "a", ids, bring(core, "a" * 64, prefix), max_tokens=COUNT)
    assert finish(core).tokens["a"] == expected


def test_prefixes_and_soft_prompts_share_a_batch(
    make_core: Callable[..., EngineCore], runner: ModelRunner, oracle: Oracle, ids: list[int]
) -> None:
    core = make_core(max_batch_tokens=11)
    prefixes = [random_prefix(runner, seed, 5 + 9 * seed) for seed in range(3)]
    soft = random_prompt(4, 19)
    for index, prefix in enumerate(prefixes):
        submit(core, f"prefix {index}", ids, bring(core, f"{index:064}", prefix, pinned=index == 0))
    submit(core, "soft", ids, register(core, soft))
    collected = finish(core)
    for index, prefix in enumerate(prefixes):
        assert_continues(oracle, collected.tokens[f"prefix {index}"], ids, prefix)
    oracle.assert_equal(collected.tokens["soft"], ids, soft)


def test_a_pinned_prefix_that_had_to_go_is_written_again(
    make_core: Callable[..., EngineCore], runner: ModelRunner, oracle: Oracle, ids: list[int]
) -> None:
    core, prefix = make_core(blocks=6), random_prefix(runner, 8, 40)
    digest = bring(core, "a" * 64, prefix)
    assert finish(core).registered == {digest: None}
    assert core.stats().prompts == 1
    submit(core, "wide", (ids * 9)[:70], max_tokens=12)
    collected = finish(core)
    assert core.stats().prompts == 0
    submit(core, "after", ids, digest)
    finish(core, collected)
    assert_continues(oracle, collected.tokens["after"], ids, prefix)
    assert core.stats().prompts == 1


@pytest.mark.parametrize(("dtype", "torch_dtype"), [("BF16", torch.bfloat16), ("F16", torch.float16)])
def test_a_soft_prompt_in_half_precision_answers_as_its_rounded_values_do(
    core: EngineCore, oracle: Oracle, ids: list[int], dtype: str, torch_dtype: torch.dtype
) -> None:
    whole = random_prompt(6, 20)
    rounded = torch.from_numpy(whole.to_float32().copy()).to(torch_dtype)
    half = SoftPrompt(dtype, whole.shape, rounded.view(torch.int16).numpy().tobytes())
    same = SoftPrompt("F32", whole.shape, rounded.float().numpy().astype(np.float32).tobytes())
    submit(core, "half", ids, register(core, half))
    submit(core, "whole", ids, register(core, same))
    collected = finish(core)
    assert collected.tokens["half"] == collected.tokens["whole"]
    oracle.assert_equal(collected.tokens["half"], ids, same)


def test_many_pinned_prompts_are_warmed_within_the_budget_while_others_are_served(
    make_core: Callable[..., EngineCore], oracle: Oracle, ids: list[int]
) -> None:
    core, collected = make_core(blocks=12, max_batch_tokens=32), Collected()
    submit(core, "stream", ids, max_tokens=60)
    step(core, collected)
    prompts = [random_prompt(seed, 30) for seed in range(20)]
    digests = [register(core, prompt) for prompt in prompts]
    finish(core, collected)
    assert collected.registered == dict.fromkeys(digests, None)
    assert core.stats().preemptions == 0
    assert core.stats().kv_bytes <= core.stats().kv_budget_bytes
    oracle.assert_equal(collected.tokens["stream"], ids, None)
    for digest, prompt in zip(digests[:2], prompts, strict=False):
        submit(core, digest, ids, digest)
        oracle.assert_equal(finish(core).tokens[digest], ids, prompt)
    assert_idle(core)


def test_a_prefix_of_another_shape_is_refused_with_the_one_that_fits(core: EngineCore, runner: ModelRunner) -> None:
    shape = runner.cache.shape
    wrong = torch.zeros(shape.layers, 2, shape.kv_heads + 1, 4, shape.head_dim)
    with pytest.raises(ValueError, match=rf"takes \[{shape.layers}, 2, {shape.kv_heads}, P, {shape.head_dim}\]"):
        bring(core, "a" * 64, wrong)
