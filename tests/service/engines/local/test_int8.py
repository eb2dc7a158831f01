"""Weights in 8 bits: the kernel against whole numbers, and what an engine makes of them."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from service.engines.base import RawText
from service.engines.base_model import BaseModel
from service.engines.errors import BaseModelError
from service.engines.local import kernels
from service.engines.local.engine import EngineCore
from service.engines.local.kernels import Kernels, int8_panels_of
from service.engines.local.model_runner import ModelRunner
from service.engines.local.options import EngineOptions
from tests.conftest import random_prompt
from tests.service.engines.local.driving import finish, register, submit


@pytest.fixture(scope="module")
def loaded() -> Kernels:
    found = kernels.load()
    assert found is not None, "these tests need a C compiler"
    return found


@pytest.fixture(scope="module")
def rounded(base: BaseModel) -> ModelRunner:
    return ModelRunner.load(base, EngineOptions(quantize="int8"))


def reference(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """The same rounding and the same whole sums, in torch."""
    scales = weight.abs().amax(dim=1) / 127
    whole = (weight / scales[:, None]).round()
    row_scales = x.abs().amax(dim=1, keepdim=True) / 127
    rounded = torch.floor(x * (1 / row_scales) + 0.5)
    return (rounded.double() @ whole.double().t() * row_scales.double() * scales.double()).float()


@pytest.mark.parametrize(("rows", "inputs", "outputs"), [(1, 64, 32), (5, 575, 100), (13, 7, 33), (37, 1536, 64)])
def test_the_kernel_sums_rounded_weights_exactly(loaded: Kernels, rows: int, inputs: int, outputs: int) -> None:
    generator = torch.Generator().manual_seed(rows)
    x = torch.randn(rows, inputs, generator=generator)
    weight = torch.randn(outputs, inputs, generator=generator)
    bias, added = torch.randn(outputs, generator=generator), torch.randn(rows, outputs, generator=generator)
    panels, scales = int8_panels_of(weight)
    made = loaded.linear_int8(x, panels, scales, bias, outputs, added)
    one_step = float((x.abs().amax(dim=1) / 127).max() * weight.abs().max())  # a value on the edge may round either way
    torch.testing.assert_close(made, reference(x, weight) + bias + added, rtol=1e-4, atol=one_step)
    alone = torch.cat([loaded.linear_int8(x[r : r + 1].clone(), panels, scales, bias, outputs) for r in range(rows)])
    assert torch.equal(alone, loaded.linear_int8(x, panels, scales, bias, outputs))


def test_a_row_of_zeros_and_a_weight_of_zeros_give_zeros(loaded: Kernels) -> None:
    panels, scales = int8_panels_of(torch.zeros(32, 8))
    assert torch.equal(loaded.linear_int8(torch.randn(2, 8), panels, scales, None, 32), torch.zeros(2, 32))
    panels, scales = int8_panels_of(torch.randn(32, 8))
    assert torch.equal(loaded.linear_int8(torch.zeros(2, 8), panels, scales, None, 32), torch.zeros(2, 32))


def test_an_engine_says_how_its_weights_are_run(rounded: ModelRunner, runner: ModelRunner) -> None:
    assert rounded.run_as == "int8 weights, float32 on cpu"
    assert runner.run_as == "float32 on cpu"
    assert rounded.recorded
    assert rounded.base.fingerprint == runner.base.fingerprint


def test_rounded_answers_do_not_depend_on_the_batch_and_differ_little(
    base: BaseModel, rounded: ModelRunner, make_core: Callable[..., EngineCore]
) -> None:
    exact, quick = make_core(), EngineCore(rounded, EngineOptions())
    texts = ["I want my money back", "The house stood at the end of", "can you change the address"]
    ids = [base.lay_out(RawText(text)) for text in texts]
    digests = [register(quick, random_prompt(seed, 10 + seed)) for seed in range(3)]
    alone = []
    for place in range(3):
        submit(quick, "alone", ids[place], digests[place])
        alone.append(finish(quick).tokens["alone"])
    for place in range(3):
        submit(quick, str(place), ids[place], digests[place])
        submit(exact, str(place), ids[place], max_tokens=4)
    together = finish(quick).tokens
    assert [together[str(place)] for place in range(3)] == alone
    for place in range(3):
        submit(quick, str(place), ids[place], max_tokens=4)
    plain, expected = finish(quick).tokens, finish(exact).tokens
    same = sum(a == b for p in range(3) for a, b in zip(plain[str(p)], expected[str(p)], strict=True))
    assert same >= 6  # of twelve tokens; a near tie may fall the other way, and what follows with it


def test_without_kernels_rounding_is_refused(base: BaseModel) -> None:
    with pytest.raises(BaseModelError, match=r"quantize = 'int8' needs .* compiled kernels"):
        ModelRunner.load(base, EngineOptions(quantize="int8", kernels=False))
