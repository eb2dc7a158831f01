"""The only forward pass: lays chunks of many sequences out in one row and returns the logits that are needed.

Loads the weights, proves at load that the model computes the same through our attention function as through eager
attention, and computes the KV of soft prompts.
"""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Mapping
from collections.abc import Sequence as Rows
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from transformers import PreTrainedModel

from service.engines.base_model import BaseModel
from service.engines.errors import BaseModelError
from service.engines.local import attention, kernels, operators
from service.engines.local.attention import AttentionPlan, Segment, TracedPlan
from service.engines.local.blocks import BLOCK_TOKENS
from service.engines.local.graphs import Capture, CudaCapture, DecodeGraphs, decode_sizes
from service.engines.local.kernels import Kernels
from service.engines.local.kv_cache import KVCache
from service.engines.local.options import EngineOptions
from service.engines.local.packing import pack
from service.engines.local.program import Run, record
from service.engines.local.scheduler import Batch, Chunk, Sequence
from service.engines.local.sizing import cache_within, fits_kernels, laid_out
from service.engines.local.survey import survey
from service.engines.local.varlen import VarlenAttention, VarlenPlan, varlen_for
from service.engines.local.weights import load_weights, weights_dtype

log = logging.getLogger(__name__)

# Of the largest logit. 32 layers of large random weights that round in two orders differ by a half of it in bfloat16
# and float16; what loses its mask differs by 1 and more.
# Where activations are rounded to 8 bits, a difference in the last place may round the other way.
_ROUNDED_TOLERANCE = 2e-2
PROBE_TOLERANCE = {torch.float32: 1e-3, torch.float16: 2e-2, torch.bfloat16: 0.15}
# Passes that a recorded program is tried on: (sequence, first token, tokens) of each chunk. Of the second sequence
# only the last token's logits are asked for.
_SIZES = (
    ((0, 0, 11), (1, 0, 7), (2, 0, 1)), ((0, 11, 1),), ((1, 7, 1), (2, 1, 1)), ((2, 2, 2), (0, 12, 1)),
    ((0, 13, 1), (1, 8, 1), (2, 4, 1)), ((1, 9, 7), (2, 5, 11)), ((0, 14, 2),),
)  # fmt: skip
_VARYING_ROPE = {"dynamic", "longrope"}


@dataclass(frozen=True, slots=True)
class Logits:
    """Logits of a forward pass: rows [R, V] float32, and for each chunk where its own begin and end among them."""

    rows: Tensor
    spans: list[tuple[int, int]]


class ModelRunner:
    """Runs forward passes of one model over one KVCache, of which `blocks` are for sequences and prompts.

    Attention goes through `kernels` on a CPU and `varlen` over pages, and through torch where neither is given.
    """

    def __init__(
        self,
        base: BaseModel,
        model: PreTrainedModel,
        cache: KVCache,
        *,
        kernels: Kernels | None = None,
        varlen: VarlenAttention | None = None,
    ) -> None:
        self.base = base
        self.model = model
        self.device = model.device
        self.dtype = model.dtype
        self.embedding = model.get_input_embeddings()
        self.cache = cache
        self.blocks = cache.blocks - cache.shape.scrap_blocks
        self._kernels = kernels
        self._varlen = varlen
        self._program: Run | None = None
        self._graphs: DecodeGraphs | None = None
        self._calls = 0
        self._rounded = False
        self.run_as = f"{str(self.dtype).removeprefix('torch.')} on {self.device.type}"

    @classmethod
    def load(cls, base: BaseModel, options: EngineOptions) -> ModelRunner:
        """Load the weights, prove that they can be served exactly, and make them quick. Raises BaseModelError."""
        torch.set_num_threads(options.threads or len(os.sched_getaffinity(0)))
        dtype = weights_dtype(base, options)
        model = load_weights(base, device=options.device, attention_implementation="eager", dtype=dtype)
        check_positions(model)
        shape = laid_out(survey(model, base.context_length))
        expected = eager_logits(model, probe_ids(base.vocabulary_size))
        fits = fits_kernels(shape) and options.kernels
        loaded = kernels.load() if fits else None
        if options.quantize != "none" and loaded is None:
            raise BaseModelError(
                f"quantize = '{options.quantize}' needs a float32 CPU engine with compiled kernels; install a C "
                "compiler, or set quantize = 'none'"
            )
        if fits:
            pack(model, loaded, options.quantize)
        cache = cache_within(options.kv_memory_bytes, shape, base)
        runner = cls(base, model, cache, kernels=loaded, varlen=varlen_for(cache))
        if options.quantize == "none":
            runner.hold_against(expected)
        else:
            runner.report_rounding(expected)
            runner.run_as = f"{options.quantize} weights, {runner.run_as}"
            runner._rounded = True
        runner.record()
        if shape.layout == "pages":
            torch.cuda.set_device(model.device)
            runner.capture(CudaCapture(), options.max_sequences)
        return runner

    @classmethod
    def over(cls, base: BaseModel, model: PreTrainedModel, options: EngineOptions) -> ModelRunner:
        """Run a model that others use too: nothing in it is exchanged. Raises BaseModelError."""
        check_positions(model)
        shape = laid_out(survey(model, base.context_length))
        loaded = kernels.load() if fits_kernels(shape) and options.kernels else None
        cache = cache_within(options.kv_memory_bytes, shape, base)
        runner = cls(base, model, cache, kernels=loaded, varlen=varlen_for(cache))
        runner.hold_against(eager_logits(model, probe_ids(base.vocabulary_size)))
        return runner

    @property
    def recorded(self) -> bool:
        """Whether forward passes run as a recorded program."""
        return self._program is not None

    @property
    def captured(self) -> bool:
        """Whether decode steps run as captured graphs."""
        return self._graphs is not None

    def check_prompt(self, tensor: Tensor) -> None:
        """Raise ValueError for a soft prompt or prefix that does not fit this model."""
        shape = self.cache.shape
        if tensor.dim() == 2 and tensor.shape[1] != self.base.hidden_size:
            raise ValueError(
                f"soft prompt has H={tensor.shape[1]} but base model '{self.base.name}' has "
                f"H={self.base.hidden_size}; retrain it on this base"
            )
        fitting = (shape.layers, 2, shape.kv_heads, shape.head_dim)
        if tensor.dim() == 5 and (*tensor.shape[:3], tensor.shape[4]) != fitting:
            raise ValueError(
                f"prefix has shape {list(tensor.shape)} but base model '{self.base.name}' takes [{shape.layers}, 2, "
                f"{shape.kv_heads}, P, {shape.head_dim}]; retrain it on this base"
            )

    def highest(self, rows: Tensor) -> list[int]:
        """The most probable token of each row of logits [R, V]; -1 where a row is not finite."""
        if self._kernels is not None:
            places: list[int] = self._kernels.highest(rows).tolist()
            return places
        if rows.device.type == "cpu":  # numpy's takes a twentieth of torch's time
            finite = torch.from_numpy(np.isfinite(rows.numpy()).all(axis=-1))
        else:
            finite = rows.isfinite().all(dim=-1)
        found: list[int] = torch.where(finite, rows.argmax(dim=-1), -1).tolist()
        return found

    @torch.inference_mode()
    def run(self, batch: Batch, tensors: Mapping[str, Tensor]) -> Logits:
        """Compute the chunks, KV into their blocks. `tensors` holds the soft prompts [P, H] that are computed.

        A batch's copies are made before, once, by `Passes`.
        """
        spans = [(0, 0)] * len(batch.chunks)
        fed: list[int] = []
        for index, chunk in enumerate(batch.chunks):
            tensor = tensors.get(chunk.sequence.id) if chunk.sequence.computes is not None else None
            if tensor is not None and tensor.dim() == 5:
                self._write_prefix(tensor, chunk)
            else:
                fed.append(index)
        if not fed:
            return Logits(torch.empty(0, self.base.vocabulary_size), spans)
        # Sequences behind one prompt stand beside each other, so that what they share is read from memory once.
        order = sorted(fed, key=lambda index: batch.chunks[index].blocks[0])
        ids: list[int] = []
        positions: list[int] = []
        segments: list[Segment] = []
        soft: list[tuple[int, Tensor]] = []
        kept: list[int] = []
        for row, index in enumerate(order):
            chunk = batch.chunks[index]
            begin, past = len(ids), chunk.past
            segments.append(Segment(begin, chunk.count, row, past))
            if chunk.sequence.computes is not None:
                vectors = tensors[chunk.sequence.id][chunk.start : chunk.start + chunk.count]
                soft.append((begin, vectors))
                ids += [0] * chunk.count
            elif chunk.branch is not None:
                ids += chunk.branch
            else:
                ids += chunk.sequence.token_ids[chunk.start : chunk.start + chunk.count]
            positions += range(past, past + chunk.count)
            wanted = {"nothing": 0, "last": 1, "all": chunk.count}[chunk.wanted]
            spans[index] = (len(kept), len(kept) + wanted)
            kept += range(len(ids) - wanted, len(ids))
        tables = [batch.chunks[index].blocks for index in order]
        # A single token of each sequence, with logits wanted of each: that is what was captured.
        if self._graphs is not None and len(kept) == len(ids) == len(order) and not soft and self._graphs.fit(tables):
            return Logits(self._graphs.run(ids, positions, tables).clone(), spans)
        embeddings = self.embedding(self._indices(ids))
        for begin, vectors in soft:
            embeddings[begin : begin + len(vectors)] = vectors.to(self.device, self.dtype)
        plan = AttentionPlan(self.cache, self._table(tables), segments, self._kernels, self._varlen)
        keep = self._indices(kept or [len(ids) - 1])
        rows = self._forward(embeddings, self._indices(positions), plan, keep)
        return Logits(rows if kept else rows[:0], spans)

    def _write_prefix(self, prefix: Tensor, chunk: Chunk) -> None:
        """Lay keys and values of a prefix [L, 2, KV heads, P, D] into the chunk's blocks, at their positions."""
        positions = torch.arange(chunk.start, chunk.start + chunk.count, device=self.device)
        size = self.cache.shape.block_tokens
        blocks = self._indices(chunk.blocks)[positions // size]
        for layer in range(prefix.shape[0]):
            key, value = prefix[layer, :, :, chunk.start : chunk.start + chunk.count].to(self.device, self.dtype)
            self.cache.write(layer, blocks, positions % size, key, value)

    @torch.inference_mode()
    def hold_against(self, expected: Tensor) -> None:
        """Compare with eager attention's logits [T, V] of `probe_ids`. Raises BaseModelError where they differ."""
        architecture = type(self.model).__name__
        ids = probe_ids(self.base.vocabulary_size).tolist()
        self.model.set_attn_implementation(attention.NAME)
        try:
            ours, calls = self._probe_paths(ids)
        except Exception as error:  # whatever a foreign architecture raises, it cannot be served
            raise BaseModelError(
                f"{architecture} cannot run with a registered attention function ({error}); "
                "serve it through vLLM instead"
            ) from error
        layers = self.cache.shape.layers
        expected = expected[-len(ours) :]
        difference = float((ours - expected).abs().max())
        scale = float(expected.abs().max())
        if calls != len(ours) * layers or not difference <= PROBE_TOLERANCE[self.dtype] * scale:
            raise BaseModelError(
                f"{architecture} called the registered attention function {calls} times for {len(ours)} passes over "
                f"{layers} layers and its logits differ from eager attention by {difference:.2g}, so it would be "
                "served wrongly; serve it through vLLM instead"
            )

    @torch.inference_mode()
    def report_rounding(self, expected: Tensor) -> None:
        """Say how far rounded weights move the logits of `probe_ids`. Raises BaseModelError where none is finite."""
        self.model.set_attn_implementation(attention.NAME)
        ours, _ = self._probe_paths(probe_ids(self.base.vocabulary_size).tolist())
        wanted = expected[-len(ours) :]
        error = float((ours - wanted).norm() / wanted.norm())
        if not math.isfinite(error):
            raise BaseModelError(
                f"'{self.base.name}' gives no finite logits with rounded weights; set quantize = 'none'"
            )
        log.warning("weights are rounded to 8 bits: logits of a short probe move by %.1f%%", 100 * error)

    def _probe_paths(self, ids: list[int]) -> tuple[Tensor, int]:
        """The logits [3, V] of the last three tokens, made by a prefill in two chunks, a decode and a branch.

        Also returns how often these three passes called the attention function.
        """
        sequence = Sequence("probe", ids[:-2], phase="prefill", blocks=[0])
        self.run(Batch([Chunk(sequence, 0, 4, [0])]), {})
        self._calls = 0
        rows = [self.run(Batch([Chunk(sequence, 4, len(ids) - 6, [0])]), {}).rows]
        sequence.token_ids.append(ids[-2])
        rows.append(self.run(Batch([Chunk(sequence, len(ids) - 2, 1, [0])]), {}).rows)
        rows.append(self.run(Batch([Chunk(sequence, len(ids) - 1, 1, [0], branch=ids[-1:])]), {}).rows)
        return torch.cat(rows), self._calls

    def _passes_of_many_sizes(self) -> Tensor:
        """Logits [R, V] of prefills and decoding, side by side and each alone, over ids from all the vocabulary."""
        ids = torch.linspace(0, self.base.vocabulary_size - 1, 3 * BLOCK_TOKENS).long().tolist()
        sequences = [
            Sequence(str(place), ids[place::3], phase="prefill", blocks=[place], wants_all=place != 1)
            for place in range(3)
        ]
        rows = []
        for batch in _SIZES:
            chunks = [Chunk(sequences[which], begin, count, [which]) for which, begin, count in batch]
            rows.append(self.run(Batch(chunks), {}).rows)
        return torch.cat(rows)

    def record(self) -> bool:
        """Record the forward pass as a straight program, and use it if it computes the same. Says whether it does."""

        def forward(embeddings: Tensor, positions: Tensor, keep: Tensor) -> Tensor:
            return self._through_model(embeddings, positions, keep, TracedPlan())

        with torch.inference_mode(False), torch.no_grad():
            self.model.set_attn_implementation(attention.NAME)
            expected = self._passes_of_many_sizes()
            substitutes = operators.substitutes(self._kernels, attention.attend_planned)
            try:
                with operators.traced(self._kernels):
                    example = self.embedding(self._indices([0]))
                    run = record(forward, self.base.hidden_size, substitutes, example, operators.join_additions)
                self._program = run
                ours = self._passes_of_many_sizes()
            except Exception as error:  # foreign code in an unforeseen form: its own forward stays in use
                self._program = None
                log.warning("%s runs without a recorded program: %s", type(self.model).__name__, error)
                return False
        if not self._agree(ours, expected):
            self._program = None
            log.warning("%s runs without a recorded program: it differs from the model", type(self.model).__name__)
        return self._program is not None

    @torch.inference_mode()
    def capture(self, capture: Capture, max_sequences: int) -> bool:
        """Capture decode steps for up to so many sequences, and use them if they compute the same. Says whether."""
        varlen, cache, name = self._varlen, self.cache, type(self.model).__name__
        assert varlen is not None, "steps are captured over pages"

        def step(ids: Tensor, positions: Tensor, planned: VarlenPlan) -> Tensor:
            plan = AttentionPlan.fixed(cache, varlen, planned)
            return self._forward(self.embedding(ids), positions, plan, planned.starts[:-1].long())

        sizes = decode_sizes(max_sequences)
        expected = self._decodes(sizes)
        try:
            self._graphs = DecodeGraphs(
                step, capture, cache, sizes=sizes, context_length=self.base.context_length, scrap=cache.blocks - 1
            )
        except Exception as error:  # foreign code may wait for the device, or keep state: it runs as it is
            log.warning("%s decodes without captured steps: %s", name, error)
            return False
        if not self._agree(self._decodes(sizes), expected):
            self._graphs = None
            log.warning("%s decodes without captured steps: they differ from the model", name)
        return self._graphs is not None

    def _decodes(self, sizes: list[int]) -> Tensor:
        """Logits [R, V] of the first and the last row of a step of each size, in which all decode the same token."""
        ids = probe_ids(self.base.vocabulary_size).tolist()
        sequence = Sequence("probe", ids, phase="prefill", blocks=[0])
        self.run(Batch([Chunk(sequence, 0, len(ids) - 1, [0])]), {})
        decoded = Chunk(sequence, len(ids) - 1, 1, [0])
        return torch.cat([self.run(Batch([decoded] * size), {}).rows[[0, -1]] for size in sizes])

    def _agree(self, ours: Tensor, expected: Tensor) -> bool:
        """Whether the same arithmetic made both of these logits."""
        tolerance = _ROUNDED_TOLERANCE if self._rounded else PROBE_TOLERANCE[self.dtype] / 10
        return torch.allclose(ours, expected, rtol=tolerance, atol=tolerance * float(expected.abs().max()))

    def _forward(self, embeddings: Tensor, positions: Tensor, plan: AttentionPlan, keep: Tensor) -> Tensor:
        """Logits [R, V] of the kept tokens, for embeddings [N, H] at positions [N]."""
        run = self._program or self._through_model
        logits = run(embeddings[None], positions[None], keep, plan)
        self._calls += plan.calls
        return logits[0].float()

    def _through_model(
        self, embeddings: Tensor, positions: Tensor, keep: Tensor, plan: AttentionPlan | TracedPlan
    ) -> Tensor:
        with attention.planned(plan):
            output: Any = self.model(
                inputs_embeds=embeddings, position_ids=positions, use_cache=False, logits_to_keep=keep
            )
        logits: Tensor = output.logits
        return logits

    def _table(self, rows: Rows[list[int]]) -> npt.NDArray[np.int32]:
        table = np.zeros((len(rows), max(map(len, rows))), dtype=np.int32)
        for row, blocks in enumerate(rows):
            table[row, : len(blocks)] = blocks
        return table

    def _indices(self, values: list[int]) -> Tensor:
        return torch.tensor(values, dtype=torch.long, device=self.device)


def check_positions(model: PreTrainedModel) -> None:
    """Raise BaseModelError for rotary embeddings that one sequence of a batch would change for another."""
    varying = rope_types(model) & _VARYING_ROPE
    if varying:
        raise BaseModelError(
            f"{type(model).__name__} scales its positions by the longest sequence in the batch (rope type "
            f"'{min(varying)}'), so one request would change another's answer; serve it through vLLM instead"
        )


def probe_ids(vocabulary_size: int) -> Tensor:
    """Nine token ids [9], always the same."""
    return torch.randint(0, vocabulary_size, (9,), generator=torch.Generator().manual_seed(0))


@torch.inference_mode()
def eager_logits(model: PreTrainedModel, ids: Tensor) -> Tensor:
    """What transformers computes with eager attention: float32 [T, V]. Leaves the model set to eager attention."""
    model.set_attn_implementation("eager")
    logits: Tensor = model(input_ids=ids[None].to(model.device), use_cache=False).logits[0].float()
    return logits


def rope_types(model: PreTrainedModel) -> set[str]:
    """The kinds of rotary embedding that a model's configuration names, one per kind of layer in some."""
    parameters = getattr(model.config.get_text_config(), "rope_parameters", None) or {}
    each = [parameters, *(value for value in parameters.values() if isinstance(value, dict))]
    return {str(entry["rope_type"]) for entry in each if "rope_type" in entry}
