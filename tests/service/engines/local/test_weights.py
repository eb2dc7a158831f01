"""The dtype that weights and KV have, and what is served in another than float32."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from service.engines.base import RawText
from service.engines.base_model import BaseModel
from service.engines.errors import BaseModelError
from service.engines.local.engine import EngineCore
from service.engines.local.model_runner import ModelRunner
from service.engines.local.options import EngineOptions, Precision
from service.engines.local.weights import load_weights, weights_dtype
from tests.conftest import random_prompt
from tests.service.engines.local.driving import finish, register, score, submit
from tests.service.engines.local.oracle import TIE, as_tensor
from tests.service.engines.local.test_engine import TEXTS


@pytest.mark.parametrize(
    ("device", "chosen", "config", "dtype"),
    [
        ("cpu", "auto", {"dtype": "bfloat16"}, torch.float32),
        ("cpu", "bfloat16", {"dtype": "float32"}, torch.bfloat16),
        ("cuda", "auto", {"dtype": "float16"}, torch.float16),
        ("cuda", "auto", {"torch_dtype": "float16"}, torch.float16),
        ("cuda", "auto", {"text_config": {"dtype": "float16"}, "dtype": "float32"}, torch.float16),
        ("cuda", "auto", {"dtype": "float32"}, torch.bfloat16),
        ("cuda", "auto", {}, torch.bfloat16),
        ("cuda:1", "float32", {"dtype": "float16"}, torch.float32),
    ],
)
def test_the_dtype_is_the_chosen_one_or_follows_from_device_and_configuration(
    base: BaseModel, device: str, chosen: Precision, config: dict[str, Any], dtype: torch.dtype
) -> None:
    options = EngineOptions(device=device, dtype=chosen)
    assert weights_dtype(replace(base, config=config), options) == dtype


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_as_wide_weights_are_served_with_float32_logits_and_cast_prompts(
    base: BaseModel, dtype: Precision
) -> None:
    runner = ModelRunner.load(base, EngineOptions(dtype=dtype))
    assert runner.recorded
    assert runner.cache.shape.dtype == runner.dtype == getattr(torch, dtype)
    core, prompt = EngineCore(runner, EngineOptions()), random_prompt(1, 12)
    ids, digest = base.lay_out(RawText(TEXTS[0])), register(core, prompt)
    submit(core, "plain", ids, digest, max_tokens=6, logprobs=2)
    submit(core, "drawn", ids, digest, max_tokens=6, temperature=0.7, seed=1)
    score(core, "scored", ids, digest, [[5], [6, 7]])
    collected = finish(core)
    assert not collected.failures
    model = load_weights(base, dtype=runner.dtype)
    text = model.get_input_embeddings()(torch.tensor([ids]))
    logits = model(inputs_embeds=torch.cat([as_tensor(prompt)[None].to(runner.dtype), text], dim=1)).logits[0, -1]
    expected = logits.float().log_softmax(dim=-1)
    rounding = 0.3 if dtype == "bfloat16" else 0.05
    assert collected.scores["scored"][0] == pytest.approx(float(expected[5]), abs=rounding)
    first, second = expected.topk(2).values.tolist()
    if first - second > max(rounding, TIE):
        assert collected.tokens["plain"][0] == int(expected.argmax())


def test_a_half_as_wide_dtype_halves_the_kv(base: BaseModel) -> None:
    wide, narrow = (ModelRunner.load(base, EngineOptions(dtype=dtype)).cache.shape for dtype in ("auto", "bfloat16"))
    assert wide.dtype == torch.float32
    assert wide.block_bytes == 2 * narrow.block_bytes


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a CUDA device")
def test_a_device_that_is_not_there_is_named_with_the_remedy(base: BaseModel) -> None:
    with pytest.raises(BaseModelError, match=r"no CUDA device for device 'cuda'; install a CUDA build .* or set"):
        ModelRunner.load(base, EngineOptions(device="cuda"))
