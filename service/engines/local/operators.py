"""The kernels as operators of torch, so that a trace of the forward pass shows them; see `program`.

Only traces go through here: a call through torch's dispatcher costs more than a norm.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, fx

from service.engines.local import kernels
from service.engines.local.kernels import Kernels

_SCHEMAS = (
    "rms_norm(Tensor x, Tensor weight, float epsilon) -> Tensor",
    "silu_multiply(Tensor gate, Tensor up) -> Tensor",
    "rotate(Tensor x, Tensor cosine, Tensor sine) -> Tensor",
    "linear(Tensor x, Tensor panels, Tensor? bias, int outputs) -> Tensor",
    "linear_add(Tensor x, Tensor panels, Tensor? bias, int outputs, Tensor added) -> Tensor",
    "linear_int8(Tensor x, Tensor panels, Tensor scales, Tensor? bias, int outputs) -> Tensor",
    "linear_int8_add(Tensor x, Tensor panels, Tensor scales, Tensor? bias, int outputs, Tensor added) -> Tensor",
    "attend(Tensor query, Tensor key, Tensor value, int layer, float scaling, float softcap, int window) -> Tensor",
)
_library: Any = torch.library.Library("softcue", "DEF")  # type: ignore[no-untyped-call]
for _schema in _SCHEMAS:
    _library.define(_schema)

_TRACED = ("rms_norm", "silu_multiply", "rotate", "linear", "linear_int8")


def _shape_of_attention(query: Tensor, *_: Any) -> Tensor:
    """What attention returns for a query [1, heads, N, D], without its values: a trace has no KV."""
    return query.new_zeros(1, query.shape[2], query.shape[1], query.shape[3])


def _kernel(name: str) -> Callable[..., Tensor]:
    def call(*arguments: Any) -> Tensor:
        loaded = kernels.load()
        assert loaded is not None
        made: Tensor = getattr(Kernels, name)(loaded, *arguments)
        return made

    return call


_library.impl("attend", _shape_of_attention, "CompositeExplicitAutograd")
for _name in _TRACED:
    _library.impl(_name, _kernel(_name), "CPU")
for _name in ("linear", "linear_int8"):
    _library.impl(f"{_name}_add", _kernel(_name), "CPU")

_ADDING: dict[Any, Any] = {
    torch.ops.softcue.linear.default: torch.ops.softcue.linear_add.default,
    torch.ops.softcue.linear_int8.default: torch.ops.softcue.linear_int8_add.default,
}

attend: Callable[..., Tensor] = torch.ops.softcue.attend


@contextmanager
def traced(loaded: Kernels | None) -> Iterator[None]:
    """Within, the kernels' methods are the operators."""
    if loaded is None:
        yield
        return
    for name in _TRACED:
        setattr(loaded, name, getattr(torch.ops.softcue, name))
    try:
        yield
    finally:
        for name in _TRACED:
            delattr(loaded, name)


def substitutes(
    loaded: Kernels | None, attention: Callable[..., Tensor]
) -> dict[Any, tuple[Callable[..., Tensor], bool]]:
    """What a program calls in the operators' stead, and whether it is given the plan first."""
    found: dict[Any, tuple[Callable[..., Tensor], bool]] = {torch.ops.softcue.attend.default: (attention, True)}
    if loaded is not None:
        found |= {getattr(torch.ops.softcue, name).default: (getattr(loaded, name), False) for name in _TRACED}
        found[torch.ops.softcue.linear_add.default] = (loaded.linear, False)
        found[torch.ops.softcue.linear_int8_add.default] = (loaded.linear_int8, False)
    return found


def join_additions(graph: fx.Graph) -> None:
    """Let a linear layer add what is added to its output alone: a residual connection is then no step of its own."""
    for node in list(graph.nodes):
        if node.op != "call_function" or node.target is not torch.ops.aten.add.Tensor or node.kwargs:
            continue
        left, right = node.args
        for added, product in ((left, right), (right, left)):
            if not (isinstance(product, fx.Node) and isinstance(added, fx.Node)):
                continue
            adding = _ADDING.get(product.target)
            if adding is not None and len(product.users) == 1 and _alike(added, product):
                with graph.inserting_before(node):
                    joined = graph.call_function(adding, (*product.args, added))
                joined.meta.update(node.meta)
                node.replace_all_uses_with(joined)
                graph.erase_node(node)
                graph.erase_node(product)
                break


def _alike(added: fx.Node, product: fx.Node) -> bool:
    """Whether both are known to be dense and of one shape."""
    ours, theirs = added.meta.get("tensor_meta"), product.meta.get("tensor_meta")
    return ours is not None and theirs is not None and ours.shape == theirs.shape and ours.stride == theirs.stride
