"""The only forward pass: lays chunks of many sequences out in one row and returns the logits that are needed.

Loads the weights, proves at load that the model computes the same through our attention function as through eager
attention, and computes the KV of soft prompts.
"""

from __future__ import annotations

from collections.abc import Sequence as Rows
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from service.engines.base_model import BaseModel
from service.engines.errors import BaseModelError
from service.engines.local import attention
from service.engines.local.attention import AttentionPlan, Segment
from service.engines.local.kv_cache import KVShape, Prefix, SlotCache
from service.engines.local.scheduler import Chunk, Sequence

_PROBE_TOLERANCE = 1e-3
_VARYING_ROPE = {"dynamic", "longrope"}


def load_weights(base: BaseModel, *, device: str = "cpu", attention_implementation: str = "sdpa") -> PreTrainedModel:
    """Load the frozen base model in float32; safetensors only, nothing fetched, no parameter learns.

    Raises BaseModelError when transformers cannot load it.
    """
    attention.register()
    transformers.logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
            base.folder,
            dtype=torch.float32,
            attn_implementation=attention_implementation,
            use_safetensors=True,
            local_files_only=True,
        )
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        raise BaseModelError(f"transformers cannot load {base.folder}: {error}") from error
    model.requires_grad_(False)
    torch.nn.Module.to(model, torch.device(device))
    torch.nn.Module.eval(model)
    return model


class ModelRunner:
    """Runs forward passes of one model over one SlotCache."""

    def __init__(self, base: BaseModel, model: PreTrainedModel, *, slots: int) -> None:
        self.base = base
        self.model = model
        self.device = model.device
        self.dtype = model.dtype
        self.embedding = model.get_input_embeddings()
        self._calls = 0
        self.cache = SlotCache(kv_shape(model), slots, base.context_length)

    @torch.inference_mode()
    def run(self, chunks: Rows[Chunk]) -> Tensor:
        """Compute the chunks, KV into their slots. Returns float32 [R, V]: a row for each chunk that completes."""
        decode = [chunk for chunk in chunks if chunk.sequence.phase == "decode"]
        ordered = decode + [chunk for chunk in chunks if chunk.sequence.phase != "decode"]
        ids: list[int] = []
        slots: list[int] = []
        positions: list[int] = []
        segments: list[Segment] = []
        for chunk in ordered:
            sequence = chunk.sequence
            past = sequence.prefix_length + chunk.start
            if sequence.phase != "decode":
                segments.append(Segment(len(ids), chunk.count, sequence.slot, past, stored=True))
            ids += sequence.token_ids[chunk.start : chunk.start + chunk.count]
            slots += [sequence.slot] * chunk.count
            positions += range(past, past + chunk.count)
        lengths = [chunk.sequence.prefix_length + chunk.start + 1 for chunk in decode]
        ends: dict[int, int] = {}
        begin = 0
        for chunk in ordered:
            begin += chunk.count
            ends[id(chunk)] = begin - 1
        position_tensor = self._indices(positions)
        plan = AttentionPlan(
            cache=self.cache,
            slots=self._indices(slots),
            positions=position_tensor,
            decode_lengths=self._indices(lengths),
            decode_longest=max(lengths, default=0),
            segments=segments,
        )
        keep = self._indices([ends[id(chunk)] for chunk in chunks if chunk.completes])
        return self._forward(self.embedding(self._indices(ids)), position_tensor, plan, keep)

    @torch.inference_mode()
    def score(self, sequence: Sequence, last_logits: Tensor, continuations: Rows[Rows[int]]) -> list[float]:
        """Log-probabilities of continuations after a sequence whose KV is in its slot and whose logits [V] are given.

        All continuations share the sequence's KV and go through one forward pass.
        """
        past = sequence.prefix_length + sequence.computed
        ids: list[int] = []
        positions: list[int] = []
        segments: list[Segment] = []
        for continuation in continuations:
            fed = continuation[:-1]
            if fed:
                segments.append(Segment(len(ids), len(fed), sequence.slot, past, stored=False))
            ids += fed
            positions += range(past, past + len(fed))
        following: list[float] = []
        if ids:
            nothing = self._indices([])
            plan = AttentionPlan(self.cache, nothing, nothing, nothing, 0, segments)
            logits = self._forward(
                self.embedding(self._indices(ids)),
                self._indices(positions),
                plan,
                torch.arange(len(ids), device=self.device),
            )
            targets = self._indices([token for continuation in continuations for token in continuation[1:]])
            following = (logits.gather(1, targets[:, None])[:, 0] - logits.logsumexp(dim=-1)).tolist()
        first = (last_logits - last_logits.logsumexp(dim=-1)).tolist()
        totals, row = [], 0
        for continuation in continuations:
            end = row + len(continuation) - 1
            totals.append(first[continuation[0]] + sum(following[row:end]))
            row = end
        return totals

    @torch.inference_mode()
    def compute_prefix(self, embeddings: Tensor) -> Prefix:
        """The KV of a soft prompt [P, H] standing at positions 0 to P-1."""
        length = embeddings.shape[0]
        nothing = self._indices([])
        plan = AttentionPlan(
            self.cache, nothing, nothing, nothing, 0, [Segment(0, length, 0, 0, stored=False)], captured=[]
        )
        positions = torch.arange(length, device=self.device)
        self._forward(embeddings.to(self.device, self.dtype), positions, plan, self._indices([length - 1]))
        assert plan.captured is not None
        keys, values = zip(*plan.captured, strict=True)
        return Prefix(tuple(keys), tuple(values))

    @torch.inference_mode()
    def probe(self) -> None:
        """Hold a short forward against eager attention's. Raises BaseModelError for what cannot be served exactly."""
        architecture = type(self.model).__name__
        varying = rope_types(self.model) & _VARYING_ROPE
        if varying:
            raise BaseModelError(
                f"{architecture} scales its positions by the longest sequence in the batch (rope type "
                f"'{min(varying)}'), so one request would change another's answer; serve it through vLLM instead"
            )
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(0, self.base.vocabulary_size, (9,), generator=generator).to(self.device)
        try:
            self.model.set_attn_implementation("eager")
            expected = self.model(input_ids=ids[None], use_cache=False).logits[0].float()
        finally:
            self.model.set_attn_implementation(attention.NAME)
        try:
            ours, calls = self._probe_paths(ids.tolist())
        except Exception as error:  # whatever a foreign architecture raises, it cannot be served
            raise BaseModelError(
                f"{architecture} cannot run with a registered attention function ({error}); "
                "serve it through vLLM instead"
            ) from error
        layers = self.cache.shape.layers
        expected = expected[-len(ours) :]
        difference = float((ours - expected).abs().max())
        scale = max(1.0, float(expected.abs().max()))
        if calls != len(ours) * layers or not difference <= _PROBE_TOLERANCE * scale:
            raise BaseModelError(
                f"{architecture} called the registered attention function {calls} times for {len(ours)} passes over "
                f"{layers} layers and its logits differ from eager attention by {difference:.2g}, so it would be "
                "served wrongly; serve it through vLLM instead"
            )

    def _probe_paths(self, ids: list[int]) -> tuple[Tensor, int]:
        """The logits [3, V] of the last three tokens, made by a prefill in two chunks, a decode and a score branch.

        Also returns how often these three passes called the attention function. Leaves slot 0 empty.
        """
        sequence = Sequence("probe", ids[:-2], len(ids) - 2, phase="prefill", slot=0)
        self.run([Chunk(sequence, 0, 4)])
        self._calls = 0
        rows = [self.run([Chunk(sequence, 4, len(ids) - 6)])]
        sequence.token_ids.append(ids[-2])
        sequence.phase = "decode"
        rows.append(self.run([Chunk(sequence, len(ids) - 2, 1)]))
        nothing, at = self._indices([]), len(ids) - 1
        plan = AttentionPlan(self.cache, nothing, nothing, nothing, 0, [Segment(0, 1, 0, at, stored=False)])
        last = self.embedding(self._indices(ids[-1:]))
        rows.append(self._forward(last, self._indices([at]), plan, self._indices([0])))
        self.cache.clear(0)
        return torch.cat(rows), self._calls

    def _forward(self, embeddings: Tensor, positions: Tensor, plan: AttentionPlan, keep: Tensor) -> Tensor:
        output: Any = self.model(
            inputs_embeds=embeddings.unsqueeze(0),
            position_ids=positions.unsqueeze(0),
            use_cache=False,
            logits_to_keep=keep,
            plan=plan,
        )
        self._calls += plan.calls
        logits: Tensor = output.logits[0].float()
        return logits

    def _indices(self, values: list[int]) -> Tensor:
        return torch.tensor(values, dtype=torch.long, device=self.device)


def embedding_matrix(model: PreTrainedModel) -> Tensor:
    """The model's token embeddings [V, H], detached."""
    weight: Tensor = model.get_input_embeddings().weight.detach()  # type: ignore[operator]
    return weight


def rope_types(model: PreTrainedModel) -> set[str]:
    """The kinds of rotary embedding that a model's configuration names, one per kind of layer in some."""
    parameters = getattr(model.config.get_text_config(), "rope_parameters", None) or {}
    each = [parameters, *(value for value in parameters.values() if isinstance(value, dict))]
    return {str(entry["rope_type"]) for entry in each if "rope_type" in entry}


def kv_shape(model: PreTrainedModel) -> KVShape:
    """The sizes of a model's keys and values, from its configuration."""
    config = model.config.get_text_config()
    heads = config.num_attention_heads
    return KVShape(
        layers=config.num_hidden_layers,
        kv_heads=getattr(config, "num_key_value_heads", None) or heads,
        head_dim=getattr(config, "head_dim", None) or config.hidden_size // heads,
        dtype=model.dtype,
        device=model.device,
    )
