"""Makes a loaded model quick on a CPU without knowing its architecture: parts are exchanged where they prove equal.

Linear layers get weights packed once for oneDNN; those that are fed the same tensor become one product. Norms, gated
MLPs and rotary embeddings go through `kernels`. Each exchange is held against the original on random input first, and
what differs stays as it is. The original weights are let go, so a packed model can be run, not trained.
"""

from __future__ import annotations

import types
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from service.engines.local.kernels import Kernels, int8_panels_of, panels_of
from service.engines.local.options import Quantization

_TOLERANCE = 1e-5
_PACKED_FOR_ROWS = 32  # the layout that oneDNN picks for this many rows serves one and a thousand rows as well

_linear = torch.ops.mkldnn._linear_pointwise.default
_NO_SCALARS: list[Any] = []


@dataclass(slots=True)
class _Call:
    """A linear layer's place in the model, and what it was fed in the trial run."""

    parent: nn.Module
    name: str
    module: nn.Module
    fed: Tensor


class PackedLinear(nn.Module):
    """y = x W^T + b with W packed. A row's result does not depend on how many rows there are."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self._weight = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), _PACKED_FOR_ROWS)
        self._bias = bias
        trial = torch.randn(2, self.in_features)
        both, alone = self._product(trial), self._product(trial[:1].clone())
        self._pairs_single_rows = not torch.equal(both[:1], alone)

    def forward(self, x: Tensor) -> Tensor:
        if self._pairs_single_rows and x.numel() == self.in_features:
            row = x.reshape(1, self.in_features)
            return self._product(torch.cat((row, row)))[:1].view(*x.shape[:-1], self.out_features)
        return self._product(x)

    def _product(self, x: Tensor) -> Tensor:
        product: Tensor = _linear(x, self._weight, self._bias, "none", _NO_SCALARS, "")
        return product


class KernelLinear(nn.Module):
    """The same by our own kernel, where the processor has the registers for it; quicker than oneDNN for few rows."""

    def __init__(self, weight: Tensor, bias: Tensor | None, loaded: Kernels) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self._panels = panels_of(weight)
        self._bias = bias.contiguous() if bias is not None else None
        self._kernels = loaded

    def forward(self, x: Tensor) -> Tensor:
        return self._kernels.linear(x.contiguous(), self._panels, self._bias, self.out_features)


class Int8Linear(nn.Module):
    """The same with weights rounded to 8 bits."""

    def __init__(self, weight: Tensor, bias: Tensor | None, loaded: Kernels) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self._panels, self._scales = int8_panels_of(weight)
        self._bias = bias.contiguous() if bias is not None else None
        self._kernels = loaded

    def forward(self, x: Tensor) -> Tensor:
        return self._kernels.linear_int8(x.contiguous(), self._panels, self._scales, self._bias, self.out_features)


class _Joined:
    """Linear layers that are fed the same tensor, as one product; the last of them lets go of it."""

    def __init__(self, product: Callable[[Tensor], Tensor]) -> None:
        self._product = product
        self._fed: Tensor | None = None
        self._made: Tensor | None = None

    def take(self, x: Tensor, begin: int, end: int, *, last: bool) -> Tensor:
        if self._fed is not x or self._made is None:
            self._fed, self._made = x, self._product(x)
        made = self._made
        if last:
            self._fed = self._made = None
        return made[..., begin:end]


class _Part(nn.Module):
    """One of the joined layers."""

    def __init__(self, joined: _Joined, begin: int, end: int, *, last: bool) -> None:
        super().__init__()
        self._joined, self._begin, self._end, self._last = joined, begin, end, last

    def forward(self, x: Tensor) -> Tensor:
        return self._joined.take(x, self._begin, self._end, last=self._last)


class _GatedMLP(nn.Module):
    """down(silu(gate(x)) * up(x)) with gate and up as one product."""

    def __init__(self, gate_and_up: nn.Module, down: nn.Module, width: int, kernels: Kernels) -> None:
        super().__init__()
        self._gate_and_up, self._down, self._width, self._kernels = gate_and_up, down, width, kernels

    def forward(self, x: Tensor) -> Tensor:
        both = self._gate_and_up(x).view(-1, 2 * self._width)
        mixed = self._kernels.silu_multiply(both[:, : self._width], both[:, self._width :])
        out: Tensor = self._down(mixed.view(*x.shape[:-1], self._width))
        return out


class _Norm(nn.Module):
    """Root-mean-square norm with a weight of its own."""

    def __init__(self, weight: Tensor, epsilon: float, kernels: Kernels) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight, requires_grad=False)
        self._epsilon, self._kernels = epsilon, kernels

    def forward(self, x: Tensor) -> Tensor:
        return self._kernels.rms_norm(x.contiguous(), self.weight, self._epsilon)


Pack = Callable[[Tensor, "Tensor | None"], nn.Module]


@torch.inference_mode()
def pack(model: PreTrainedModel, kernels: Kernels | None, quantize: Quantization = "none") -> None:
    """Exchange what can be exchanged, in place. The model must be in float32 on the CPU, its attention eager.

    `quantize = "int8"` rounds the weights of linear layers to 8 bits, embeddings not; it needs kernels.
    """
    onednn = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    if kernels is not None and quantize == "int8":
        pack_linear: Pack = partial(Int8Linear, loaded=kernels)
    elif kernels is not None and (kernels.has_wide_registers or not onednn):
        pack_linear = partial(KernelLinear, loaded=kernels)
    elif onednn:
        pack_linear = PackedLinear
    else:
        return  # a build of torch without oneDNN, and no compiler: there is nothing quicker
    calls = _linear_calls(model)
    if kernels is not None:
        _exchange_norms(model, kernels)
        _exchange_rotary(model, kernels)
        calls = _exchange_gated_mlps(model, calls, kernels, pack_linear)
    for together in _fed_together(calls):
        if len(together) == 1:
            call = together[0]
            setattr(call.parent, call.name, pack_linear(*_weights(call.module)))
            continue
        joined = _join([call.module for call in together], pack_linear)
        begin = 0
        for call in together:
            end = begin + _weights(call.module)[0].shape[0]
            setattr(call.parent, call.name, _Part(joined, begin, end, last=call is together[-1]))
            begin = end


def _linear_calls(model: PreTrainedModel) -> list[_Call]:
    """Every linear layer that a forward pass calls exactly once, in the order of the calls."""
    places: dict[nn.Module, tuple[nn.Module, str]] = {
        child: (parent, name)
        for parent in model.modules()
        for name, child in parent.named_children()
        if type(child) is nn.Linear or type(child) is Conv1D
    }
    calls: list[_Call] = []

    def note(module: nn.Module, inputs: tuple[Any, ...]) -> None:
        calls.append(_Call(*places[module], module, inputs[0]))

    hooks = [module.register_forward_pre_hook(note) for module in places]
    try:
        embeddings: Any = model.get_input_embeddings()
        model(inputs_embeds=torch.randn(1, 4, embeddings.weight.shape[1]), use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    modules = [call.module for call in calls]
    return [call for call in calls if modules.count(call.module) == 1]


def _fed_together(calls: Sequence[_Call]) -> list[list[_Call]]:
    """Calls in a row within one parent that were fed the same tensor."""
    groups: list[list[_Call]] = []
    for call in calls:
        if groups and groups[-1][0].fed is call.fed and groups[-1][0].parent is call.parent:
            groups[-1].append(call)
        else:
            groups.append([call])
    return groups


def _weights(module: Any) -> tuple[Tensor, Tensor | None]:
    """Weight [out, in] and bias of a linear layer."""
    weight: Tensor = module.weight.detach()
    if isinstance(module, Conv1D):
        weight = weight.t().contiguous()
    return weight, None if module.bias is None else module.bias.detach()


def _join(modules: Sequence[nn.Module], pack_linear: Pack) -> _Joined:
    weights, biases = zip(*(_weights(module) for module in modules), strict=True)
    bias = None
    if any(given is not None for given in biases):
        bias = torch.cat(
            [torch.zeros(len(w)) if given is None else given for w, given in zip(weights, biases, strict=True)]
        )
    return _Joined(pack_linear(torch.cat(weights), bias))


def _exchange_gated_mlps(
    model: PreTrainedModel, calls: list[_Call], kernels: Kernels, pack_linear: Pack
) -> list[_Call]:
    """Exchange MLPs of the shape down(silu(gate) * up); returns the calls that are left."""
    places = {child: (parent, name) for parent in model.modules() for name, child in parent.named_children()}
    done: set[nn.Module] = set()
    for first, second, third in zip(calls, calls[1:], calls[2:], strict=False):
        mlp = first.parent
        same_parent = mlp is second.parent is third.parent
        if mlp in done or not same_parent or first.fed is not second.fed or first.fed is third.fed:
            continue
        gate, up, down = (_weights(call.module) for call in (first, second, third))
        width, size = gate[0].shape
        if gate[1] is not None or up[1] is not None or up[0].shape != gate[0].shape or down[0].shape[1] != width:
            continue
        if not all(_computes_gated_silu(mlp, gate[0], up[0], *down, trial) for trial in _trials(size)):
            continue
        parent, name = places[mlp]
        both = pack_linear(torch.cat((gate[0], up[0])), None)
        setattr(parent, name, _GatedMLP(both, pack_linear(*down), width, kernels))
        done.add(mlp)
    return [call for call in calls if call.parent not in done]


def _computes_gated_silu(
    mlp: nn.Module, gate: Tensor, up: Tensor, down: Tensor, bias: Tensor | None, x: Tensor
) -> bool:
    try:
        expected = mlp(x)
    except Exception:  # it takes more than one tensor, so it is something else
        return False
    plain = nn.functional.linear(nn.functional.silu(x @ gate.t()) * (x @ up.t()), down, bias)
    return torch.allclose(plain, expected, rtol=1e-4, atol=_TOLERANCE * float(expected.abs().max()))


def _trials(size: int) -> list[Tensor]:
    """Rows [3, size] of several magnitudes: small ones show an epsilon, large ones a clamp."""
    return [torch.randn(3, size) * magnitude for magnitude in (1e-3, 1.0, 100.0)]


def _exchange_norms(model: PreTrainedModel, kernels: Kernels) -> None:
    for parent in list(model.modules()):
        for name, norm in list(parent.named_children()):
            weight: Any = getattr(norm, "weight", None)
            epsilon = getattr(norm, "variance_epsilon", getattr(norm, "eps", None))
            if "RMSNorm" not in type(norm).__name__ or epsilon is None or getattr(weight, "ndim", 0) != 1:
                continue
            trials = _trials(weight.shape[0])
            try:
                expected = [norm(trial) for trial in trials]
            except Exception:  # it takes more than one tensor, so it is something else
                continue
            for candidate in (weight.detach(), weight.detach() + 1):
                made = _Norm(candidate.contiguous(), float(epsilon), kernels)
                pairs = zip(trials, expected, strict=True)
                if all(torch.allclose(made(x), y, rtol=_TOLERANCE, atol=_TOLERANCE) for x, y in pairs):
                    setattr(parent, name, made)
                    break


def _exchange_rotary(model: PreTrainedModel, kernels: Kernels) -> None:
    """Give attention modules a forward of their own whose `apply_rotary_pos_emb` is the kernel's."""
    trusted: dict[Any, bool] = {}
    for module in model.modules():
        forward = type(module).forward
        given = getattr(forward, "__globals__", {}).get("apply_rotary_pos_emb")
        if given is None or "apply_rotary_pos_emb" not in forward.__code__.co_names:
            continue
        if given not in trusted:
            trusted[given] = _rotates_halves(given, kernels)
        if trusted[given]:
            names = {**forward.__globals__, "apply_rotary_pos_emb": _Rotary(given, kernels)}
            copy = types.FunctionType(
                forward.__code__, names, forward.__name__, forward.__defaults__, forward.__closure__
            )
            copy.__kwdefaults__ = forward.__kwdefaults__
            module.forward = types.MethodType(copy, module)


@dataclass(frozen=True, slots=True)
class _Rotary:
    """`apply_rotary_pos_emb` by the kernel where shapes allow it, by the original elsewhere."""

    original: Callable[..., tuple[Tensor, Tensor]]
    kernels: Kernels

    def __call__(self, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *more: Any, **named: Any) -> Any:
        fits = (
            q.dim() == k.dim() == 4
            and q.shape[0] == k.shape[0] == 1
            and cos.shape == sin.shape == (1, q.shape[2], q.shape[3])
            and k.shape[2:] == q.shape[2:]
        )
        if more or named or not fits or q.stride(-1) != 1 or k.stride(-1) != 1 or q.dtype != torch.float32:
            return self.original(q, k, cos, sin, *more, **named)
        cosine, sine = cos[0].contiguous(), sin[0].contiguous()
        rotate = self.kernels.rotate
        return rotate(q[0], cosine, sine)[None], rotate(k[0], cosine, sine)[None]


def _rotates_halves(original: Callable[..., Any], kernels: Kernels) -> bool:
    q, k = torch.randn(1, 2, 5, 8), torch.randn(1, 1, 5, 8)
    cos, sin = torch.randn(1, 5, 8), torch.randn(1, 5, 8)
    try:
        expected = original(q, k, cos, sin)
    except Exception:  # another function of the same name: it stays
        return False
    made = _Rotary(original, kernels)(q, k, cos, sin)
    return all(torch.allclose(ours, theirs, atol=_TOLERANCE) for ours, theirs in zip(made, expected, strict=True))
