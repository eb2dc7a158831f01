"""The attention function that transformers models call, reading and writing our KV slots.

One forward pass carries N tokens of many sequences in one row. `AttentionPlan` says which tokens are whose: decoding
sequences come first and attend in one batched call; every other segment attends on its own.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface

from service.engines.local.kv_cache import SlotCache

NAME = "softcue"


@dataclass(frozen=True, slots=True)
class Segment:
    """`count` tokens from `begin` on that belong together and attend causally to each other.

    They also attend to the first `past` positions of `slot`. Where `stored`, their own KV has been written behind
    those; otherwise it lives for this pass alone (branches of a score request, a soft prompt on its own).
    """

    begin: int
    count: int
    slot: int
    past: int
    stored: bool


@dataclass(slots=True)
class AttentionPlan:
    """One forward pass's layout, on the model's device.

    `slots` and `positions` [W] say where the KV of the first W tokens is written; the first `decode_lengths` [B] tokens
    are decoding sequences, each with so many positions in its slot, its own included. With `captured` set, every
    layer's fresh keys and values [KV heads, N, D] are kept there.
    """

    cache: SlotCache
    slots: Tensor
    positions: Tensor
    decode_lengths: Tensor
    decode_longest: int
    segments: list[Segment]
    captured: list[tuple[Tensor, Tensor]] | None = None
    calls: int = 0
    _decode_masks: dict[int | None, Tensor] = field(default_factory=dict)

    def decode_mask(self, window: int | None) -> Tensor:
        """Bool [B, 1, 1, longest]: which positions of its slot each decoding token may see."""
        mask = self._decode_masks.get(window)
        if mask is None:
            positions = torch.arange(self.decode_longest, device=self.decode_lengths.device)
            lengths = self.decode_lengths[:, None]
            mask = positions[None, :] < lengths
            if window is not None:
                mask &= positions[None, :] >= lengths - window
            mask = self._decode_masks[window] = mask[:, None, None, :]
        return mask


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    *,
    plan: AttentionPlan,
    **_: Any,
) -> tuple[Tensor, None]:
    """Attention of transformers' interface: query [1, heads, N, D], key and value [1, KV heads, N, D].

    Returns [1, N, heads, D]. The plan brings masks, so `attention_mask` is not read.
    """
    layer = int(module.layer_idx)  # type: ignore[arg-type]
    plan.calls += 1
    keys, values = plan.cache.keys[layer], plan.cache.values[layer]
    if plan.captured is not None:
        plan.captured.append((key[0].clone(), value[0].clone()))
    written = plan.slots.shape[0]
    if written:
        keys[plan.slots, :, plan.positions] = key[0, :, :written].transpose(0, 1)
        values[plan.slots, :, plan.positions] = value[0, :, :written].transpose(0, 1)
    pieces: list[Tensor] = []
    rows = plan.decode_lengths.shape[0]
    if rows:
        taken = plan.slots[:rows]
        output = _dot_product(
            query[0, :, :rows].transpose(0, 1).unsqueeze(2),
            keys[:, :, : plan.decode_longest].index_select(0, taken),
            values[:, :, : plan.decode_longest].index_select(0, taken),
            plan.decode_mask(sliding_window),
            scaling,
            softcap,
        )
        pieces.append(output.squeeze(2))
    for segment in plan.segments:
        span = slice(segment.begin, segment.begin + segment.count)
        if segment.stored:
            seen = slice(0, segment.past + segment.count)
            seen_keys, seen_values = keys[segment.slot, :, seen], values[segment.slot, :, seen]
        else:
            seen_keys = torch.cat((keys[segment.slot, :, : segment.past], key[0, :, span]), dim=1)
            seen_values = torch.cat((values[segment.slot, :, : segment.past], value[0, :, span]), dim=1)
        mask = _causal_mask(segment.count, segment.past, sliding_window, query.device)
        output = _dot_product(query[:, :, span], seen_keys[None], seen_values[None], mask, scaling, softcap)
        pieces.append(output[0].transpose(0, 1))
    return torch.cat(pieces).unsqueeze(0), None


def _causal_mask(count: int, past: int, window: int | None, device: torch.device) -> Tensor:
    """Bool [count, past + count]: token i sees every position up to past + i, within the window where there is one."""
    own = torch.arange(past, past + count, device=device)[:, None]
    positions = torch.arange(past + count, device=device)[None, :]
    mask = positions <= own
    return mask if window is None else mask & (positions > own - window)


def _dot_product(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scaling: float | None, softcap: float | None
) -> Tensor:
    """Scaled dot-product attention, [B, heads, T, D] in and out, with grouped KV heads and optional soft-capping."""
    if softcap is None:
        grouped = query.shape[1] != key.shape[1]
        return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scaling, enable_gqa=grouped)
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    scores = query @ key.transpose(-1, -2) * (scaling if scaling is not None else query.shape[-1] ** -0.5)
    scores = (torch.tanh(scores / softcap) * softcap).masked_fill(~mask, float("-inf"))
    return scores.softmax(-1, dtype=torch.float32).to(query.dtype) @ value


def register() -> None:
    """Make `NAME` known to transformers as an attention implementation. Doing it twice changes nothing."""
    AttentionInterface.register(NAME, attend)
