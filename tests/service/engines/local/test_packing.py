"""Exchanged parts compute what the originals did, and what does not prove equal stays."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from service.engines.local import kernels as compiled
from service.engines.local.kernels import Kernels
from service.engines.local.packing import KernelLinear, PackedLinear, pack
from tests.service.engines.local.tiny_models import NAMED, UNUSUAL, make_model

SERVED = {**NAMED, **UNUSUAL}
LINEAR = {"PackedLinear", "KernelLinear"}  # which of them, the processor decides


@pytest.fixture(scope="module")
def kernels() -> Kernels:
    loaded = compiled.load()
    assert loaded is not None, "these tests need a C compiler"
    return loaded


def eager(architecture: str) -> PreTrainedModel:
    model = make_model(architecture, SERVED[architecture])
    model.set_attn_implementation("eager")
    return model


def kinds(model: nn.Module) -> set[str]:
    return {type(module).__name__ for module in model.modules()}


def count(model: nn.Module, kind: str) -> int:
    return sum(type(module).__name__ == kind for module in model.modules())


@pytest.mark.parametrize("kind", ["PackedLinear", "KernelLinear"])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("inner", "outer"), [(48, 80), (17, 33), (192, 4096), (576, 7)])
def test_a_packed_row_is_right_and_does_not_depend_on_how_many_there_are(
    kernels: Kernels, inner: int, outer: int, bias: bool, kind: str
) -> None:
    weight, offset = torch.randn(outer, inner), torch.randn(outer) if bias else None
    packed = PackedLinear(weight, offset) if kind == "PackedLinear" else KernelLinear(weight, offset, kernels)
    x = torch.randn(70, inner)
    together = packed(x)
    exact = nn.functional.linear(x.double(), weight.double(), None if offset is None else offset.double())
    torch.testing.assert_close(together.double(), exact, rtol=1e-4, atol=1e-4)
    for rows in (1, 2, 3, 8, 31, 32, 33):
        assert torch.equal(packed(x[:rows]), together[:rows])
    assert torch.equal(packed(x[40:41]), together[40:41])
    assert packed(x[:6].view(1, 2, 3, inner)).shape == (1, 2, 3, outer)
    assert torch.equal(packed(x[:1][None]), together[:1][None])


@pytest.mark.parametrize("with_kernels", [True, False])
@pytest.mark.parametrize("architecture", SERVED)
def test_a_packed_model_computes_the_same(kernels: Kernels, architecture: str, with_kernels: bool) -> None:
    model = eager(architecture)
    ids = torch.randint(0, 4096, (1, 30))
    with torch.inference_mode():
        expected = model(input_ids=ids, use_cache=False).logits
        pack(model, kernels if with_kernels else None)
        got = model(input_ids=ids, use_cache=False).logits
    torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max()))
    assert kinds(model) & LINEAR


def test_layers_that_are_fed_the_same_become_one_product(kernels: Kernels) -> None:
    model = eager("Llama")
    pack(model, kernels)
    attention = model.model.layers[0].self_attn
    parts = [getattr(attention, name) for name in ("q_proj", "k_proj", "v_proj")]
    assert [type(part).__name__ for part in parts] == ["_Part"] * 3
    assert type(attention.o_proj).__name__ in LINEAR
    x, other = torch.randn(2, 1, 5, 48)
    original = eager("Llama").model.layers[0].self_attn
    for fed in (x, other, x):  # and in any order, however often
        for name in ("v_proj", "q_proj", "k_proj", "q_proj"):
            torch.testing.assert_close(
                getattr(attention, name)(fed), getattr(original, name)(fed), rtol=1e-4, atol=1e-4
            )


def test_joined_layers_keep_their_own_biases() -> None:
    model = eager("Qwen2")  # biases for queries, keys and values
    layer = model.model.layers[1].self_attn
    layer.k_proj.bias = None
    original = copy.deepcopy(layer)
    pack(model, None)
    x = torch.randn(1, 4, 48)
    for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
        torch.testing.assert_close(getattr(layer, name)(x), getattr(original, name)(x), rtol=1e-4, atol=1e-4)


def test_norms_mlps_and_rotary_embeddings_are_exchanged_where_they_prove_equal(kernels: Kernels) -> None:
    for architecture, norms, mlps in (("Llama", 7, 3), ("Gemma2", 13, 0), ("Qwen3", 13, 3), ("GPT2", 0, 0)):
        model = eager(architecture)
        pack(model, kernels)
        assert (count(model, "_Norm"), count(model, "_GatedMLP")) == (norms, mlps), architecture
    llama, cohere = eager("Llama"), eager("Cohere")
    for model in (llama, cohere):
        pack(model, kernels)
    assert "forward" in vars(llama.model.layers[0].self_attn)
    assert "forward" not in vars(cohere.model.layers[0].self_attn), "it rotates neighbours, not halves"


def exchange(model: PreTrainedModel, kernels: Kernels, forward: Callable[..., Tensor], place: str) -> nn.Module:
    """Pack a model whose first layer has another forward at `place`; returns what stands there then."""
    layer = model.model.layers[0]
    changed = type(
        "Changed" + type(getattr(layer, place)).__name__, (type(getattr(layer, place)),), {"forward": forward}
    )
    getattr(layer, place).__class__ = changed
    pack(model, kernels)
    return getattr(layer, place)


def test_a_gated_mlp_that_clamps_large_values_stays(kernels: Kernels) -> None:
    def forward(self: nn.Module, x: Tensor) -> Tensor:
        return self.down_proj(nn.functional.silu(self.gate_proj(x)).clamp(max=50) * self.up_proj(x))

    assert type(exchange(eager("Llama"), kernels, forward, "mlp")).__name__ == "ChangedLlamaMLP"


def test_a_norm_with_another_epsilon_than_it_says_stays(kernels: Kernels) -> None:
    def forward(self: nn.Module, x: Tensor) -> Tensor:
        return x * (x.square().mean(-1, keepdim=True) + 1e-5).rsqrt() * self.weight

    model = eager("Llama")
    assert model.config.rms_norm_eps == 1e-6
    assert type(exchange(model, kernels, forward, "input_layernorm")).__name__ == "ChangedLlamaRMSNorm"


def test_a_norm_that_takes_a_gate_stays(kernels: Kernels) -> None:
    model, twice = eager("Llama"), torch.tensor(2.0)

    def forward(self: nn.Module, x: Tensor, gate: Tensor) -> Tensor:
        return x * gate * self.weight

    layer = model.model.layers[0]
    layer.input_layernorm.__class__ = type("GatedRMSNorm", (type(layer.input_layernorm),), {"forward": forward})
    layer.input_layernorm.register_forward_pre_hook(lambda _, given: (*given, twice) if given[0].dim() == 3 else given)
    pack(model, kernels)
    assert type(layer.input_layernorm).__name__ == "GatedRMSNorm"


def test_layers_that_are_called_twice_or_never_stay(kernels: Kernels) -> None:
    model = eager("Llama")
    model.model.layers[0].spare = nn.Linear(48, 48)
    model.model.layers[2].mlp.down_proj = model.model.layers[1].mlp.down_proj
    pack(model, kernels)
    assert type(model.model.layers[0].spare) is nn.Linear
    assert type(model.model.layers[2].mlp.down_proj) is nn.Linear


def test_transposed_layers_are_packed_too() -> None:
    model = eager("GPT2")
    assert "Conv1D" in kinds(model)
    layer: Conv1D = model.transformer.h[0].mlp.c_fc
    x = torch.randn(2, 48)
    expected = layer(x)
    pack(model, None)
    assert "Conv1D" not in kinds(model)
    torch.testing.assert_close(model.transformer.h[0].mlp.c_fc(x), expected, rtol=1e-4, atol=1e-4)
