"""The forward pass as a straight program: what modules do in Python is recorded once, only the computing is left.

The pass is traced twice by torch's `make_fx`, with different counts of tokens N and kept rows R. A size that differs
between the traces must be a multiple of N or of R; views are folded into strides. What depends on the data, or fits no
such rule, cannot be recorded, and the model's own forward stays in use. Whoever records must hold the program against
the model on other sizes (`ModelRunner.record` does).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.passes.shape_prop import ShapeProp

Forward = Callable[[Tensor, Tensor, Tensor], Tensor]
Run = Callable[..., Tensor]
Substitutes = Mapping[Any, tuple[Callable[..., Any], bool]]

# Primes, far from the sizes that models have, and in different ratios.
_TRACES = ((61, 47), (67, 59))
_aten = torch.ops.aten
_DATA_DEPENDENT = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}
# The same functions by their quickest names.
_QUICK: dict[Any, Callable[..., Any]] = {
    _aten.add.Tensor: torch.add,
    _aten.mul.Tensor: torch.mul,
    _aten.sub.Tensor: torch.sub,
    _aten.silu.default: torch.nn.functional.silu,
    _aten.cos.default: torch.cos,
    _aten.sin.default: torch.sin,
    _aten.neg.default: torch.neg,
    _aten.tanh.default: torch.tanh,
    _aten.rsqrt.default: torch.rsqrt,
}


class CannotRecord(Exception):
    """The forward pass does more than a straight program can; the message says what."""


@dataclass(frozen=True, slots=True)
class _View:
    """A tensor as a window on the storage of `root`."""

    root: fx.Node
    size: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int


@dataclass(slots=True)
class _Traced:
    """One trace: its nodes in order, every tensor's window, and the constants."""

    tokens: int
    kept: int
    graph: fx.GraphModule
    views: dict[fx.Node, _View] = field(default_factory=dict)


@torch.no_grad()
def record(
    forward: Forward,
    hidden_size: int,
    substitutes: Substitutes,
    example: Tensor,
    rewrite: Callable[[fx.Graph], None] = lambda graph: None,
) -> Run:
    """A function of (embeddings [1, N, H], positions [1, N], keep [R], plan) that computes what `forward` does.

    `substitutes` replace operators of the trace, each a function and whether it takes `plan` before the arguments.
    `example` gives dtype and device; `rewrite` may join steps of a trace. Raises CannotRecord.
    """
    first, second = (_trace(forward, hidden_size, tokens, kept, example, rewrite) for tokens, kept in _TRACES)
    return _Writer(first, second, substitutes).write()


def _trace(
    forward: Forward, hidden_size: int, tokens: int, kept: int, example: Tensor, rewrite: Callable[[fx.Graph], None]
) -> _Traced:
    device = example.device
    embeddings = torch.randn(1, tokens, hidden_size, dtype=example.dtype, device=device) * 0.1
    positions = torch.arange(tokens, device=device)[None]
    keep = torch.arange(kept, device=device)
    try:
        graph = make_fx(forward, tracing_mode="real")(embeddings, positions, keep)
    except Exception as error:  # whatever tracing meets in foreign code
        raise CannotRecord(f"it cannot be traced: {error}") from error
    for node in graph.graph.nodes:
        if node.op != "call_function":
            continue
        # Whether an indexing depends on the data is for its indices to say.
        if node.target is not _aten.index.Tensor and _DATA_DEPENDENT & set(getattr(node.target, "tags", ())):
            raise CannotRecord(f"{node.target} depends on the data")
        if _writes(node.target):
            raise CannotRecord(f"{node.target} writes into a tensor")
    graph.graph.eliminate_dead_code()
    ShapeProp(graph).propagate(embeddings, positions, keep)
    rewrite(graph.graph)
    traced = _Traced(tokens, kept, graph)
    _Windows(traced).run(embeddings, positions, keep)
    return traced


def _writes(target: Any) -> bool:
    schema = getattr(target, "_schema", None)
    return schema is not None and any(a.alias_info is not None and a.alias_info.is_write for a in schema.arguments)


def _is_integer(indices: Tensor) -> bool:
    return indices.dtype in (torch.int64, torch.int32)


def _kind(tensor: Tensor) -> tuple[torch.dtype, bool, bool]:
    """What strides do not say of a window."""
    return tensor.dtype, tensor.is_conj(), tensor.is_neg()


class _Windows(fx.Interpreter):
    """Runs a trace and notes which tensors are windows on others."""

    def __init__(self, traced: _Traced) -> None:
        super().__init__(traced.graph)
        self._traced = traced
        self._roots: dict[int, fx.Node] = {}
        self._kinds: dict[fx.Node, tuple[torch.dtype, bool, bool]] = {}
        self._alive: list[Tensor] = []

    def run_node(self, n: fx.Node) -> Any:
        if n.target is _aten.index.Tensor:
            indices = self.fetch_args_kwargs_from_env(n)[0][1]
            if any(given is not None and not _is_integer(given) for given in indices):
                raise CannotRecord(f"{n.target} by a mask depends on the data")
        result = super().run_node(n)
        if isinstance(result, Tensor) and not result.is_mkldnn and n.op != "output":
            self._alive.append(result)  # so that no storage is reused while the roots are known by address
            storage = result.untyped_storage()
            root = self._roots.setdefault(storage.data_ptr(), n) if storage.nbytes() else n
            if self._kinds.setdefault(root, _kind(result)) != _kind(result):
                raise CannotRecord(f"{n.target} reads a tensor as another type")
            self._traced.views[n] = _View(root, tuple(result.shape), result.stride(), int(result.storage_offset()))
        return result


class _Writer:
    """Writes the program as Python source, one line an operation, and compiles it."""

    def __init__(self, first: _Traced, second: _Traced, substitutes: Substitutes) -> None:
        self._first, self._second = first, second
        self._substitutes = substitutes
        self._twin = dict(zip(first.graph.graph.nodes, second.graph.graph.nodes, strict=False))
        self._names: dict[Any, str] = {}
        self._globals: dict[str, Any] = {"_strided": torch.as_strided}
        self._shapes: dict[str, str] = {}

    def write(self) -> Run:
        nodes, others = list(self._first.graph.graph.nodes), list(self._second.graph.graph.nodes)
        if [(n.op, str(n.target)) for n in nodes] != [(n.op, str(n.target)) for n in others]:
            raise CannotRecord("it takes other steps for other sizes")
        last_use = self._last_uses(nodes)
        lines: list[str] = []
        for place, node in enumerate(nodes):
            lines += self._node(node)
            ended = [self._names[used] for used in last_use.get(place, ()) if used in self._names]
            if ended and node.op == "call_function":
                lines.append(f"{' = '.join(ended)} = None")
        shapes = [f"{name} = {text}" for text, name in self._shapes.items()]
        body = "\n    ".join([*shapes, *lines])
        source = (
            f"def run(embeddings, positions, keep, plan):\n    n = embeddings.shape[1]; r = keep.shape[0]\n    {body}\n"
        )
        exec(compile(source, "<recorded forward pass>", "exec"), self._globals)
        run: Run = self._globals["run"]
        return run

    def _last_uses(self, nodes: list[fx.Node]) -> dict[int, list[fx.Node]]:
        """For each place, the computed tensors that nothing needs after it."""
        last: dict[fx.Node, int] = {}
        for place, node in enumerate(nodes):
            if self._folded(node):
                continue
            for used in self._roots_of(node):
                last[used] = place
        ends: dict[int, list[fx.Node]] = {}
        for node, place in last.items():
            if node.op == "call_function":
                ends.setdefault(place, []).append(node)
        return ends

    def _roots_of(self, node: fx.Node) -> Iterator[fx.Node]:
        for used in node.all_input_nodes:
            view = self._first.views.get(used)
            yield view.root if view is not None else used

    def _folded(self, node: fx.Node) -> bool:
        """Whether a node only looks at another's storage, so that nothing needs to be done for it."""
        view = self._first.views.get(node)
        return view is not None and view.root is not node and node.op == "call_function"

    def _node(self, node: fx.Node) -> list[str]:
        if node.op == "placeholder":
            self._names[node] = ("embeddings", "positions", "keep")[len(self._names)]
            return []
        if node.op == "get_attr":
            self._names[node] = name = f"c{len(self._globals)}"
            constant: Any = self._first.graph
            for part in str(node.target).split("."):
                constant = getattr(constant, part)
            self._globals[name] = constant.detach() if isinstance(constant, Tensor) else constant
            return []
        if node.op == "output":
            return [f"return {self._text(node.args[0], self._twin[node].args[0])}"]
        if self._folded(node):
            return []
        self._names[node] = name = f"v{len(self._names)}"
        return [f"{name} = {self._call(node)}"]

    def _call(self, node: fx.Node) -> str:
        target, twin = node.target, self._twin[node]
        arguments = [self._text(ours, theirs) for ours, theirs in zip(node.args, twin.args, strict=True)]
        arguments += [f"{key}={self._text(value, twin.kwargs[key])}" for key, value in node.kwargs.items()]
        if target in self._substitutes:
            function, planned = self._substitutes[target]
            arguments = ["plan", *arguments] if planned else arguments
        else:
            function = _QUICK.get(target, target)  # type: ignore[arg-type]
        return f"{self._global(function)}({', '.join(arguments)})"

    def _global(self, value: Any) -> str:
        key = id(value)
        if key not in self._names:
            self._names[key] = name = f"g{len(self._globals)}"
            self._globals[name] = value
        return self._names[key]

    def _text(self, ours: Any, theirs: Any) -> str:
        """An argument as source; both traces' values must follow from N and R."""
        match ours:
            case fx.Node():
                return self._tensor(ours)
            case list() | tuple():
                inside = [self._text(a, b) for a, b in zip(ours, theirs, strict=True)]
                return f"[{', '.join(inside)}]"
            case bool() | None | str() | float():
                if ours != theirs:
                    raise CannotRecord(f"{ours} becomes {theirs} for another size")
                return f'float("{ours}")' if isinstance(ours, float) and not math.isfinite(ours) else repr(ours)
            case int():
                return self._integer(ours, theirs)
            case _:
                return self._global(ours)

    def _tensor(self, node: fx.Node) -> str:
        view = self._first.views.get(node)
        if view is None or view.root is node:
            return self._names[node]
        other = self._second.views[self._twin[node]]
        if self._twin[view.root] is not other.root:
            raise CannotRecord("a tensor is a window on another for other sizes")
        root = self._names[view.root]
        source = self._first.views[view.root]
        if (source.size, source.stride, source.offset) == (view.size, view.stride, view.offset):
            return root
        size = self._shape(view.size, other.size)
        stride = self._shape(view.stride, other.stride)
        return f"_strided({root}, {size}, {stride}, {self._integer(view.offset, other.offset)})"

    def _shape(self, ours: tuple[int, ...], theirs: tuple[int, ...]) -> str:
        text = f"({''.join(self._integer(a, b) + ', ' for a, b in zip(ours, theirs, strict=True))})"
        return self._shapes.setdefault(text, f"s{len(self._shapes)}")

    def _integer(self, ours: int, theirs: int) -> str:
        if ours == theirs:
            return str(ours)
        for name, one, other in (
            ("n", self._first.tokens, self._second.tokens),
            ("r", self._first.kept, self._second.kept),
        ):
            if ours % one == 0 and ours // one * other == theirs:
                return f"{ours // one}*{name}" if ours != one else name
        raise CannotRecord(f"size {ours} becomes {theirs} for another number of tokens")
