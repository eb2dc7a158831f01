"""What a model asks of its attention: the KV's shape, and what a short comparison of logits would not see.

Two passes of a few tokens go through an attention function that only takes notes. Masks are compared where they
matter, anywhere in the context, because transformers builds them of functions of two positions. Positions at the end
of the context must mean the same as numbers, which is how the engine gives them, and behind a cache of that length,
which is how transformers does.
"""

from __future__ import annotations

from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache, PreTrainedModel

from service.engines.errors import BaseModelError
from service.engines.local.kv_cache import KVShape

_NAME = "softcue_survey"
_TOKENS, _WANTED = 3, 2  # tokens of a pass, and how many's logits are asked for
_MOST_POSITIONS = 1 << 17
_NOT_CALLED = "does not call a registered attention function"
_HARMLESS = {"position_ids", "cache_position"}


@dataclass(frozen=True, slots=True)
class _Call:
    """One call of the attention function: query [heads, N, D], key and value [KV heads, N, D], and the rest."""

    layer: int
    query: Tensor
    key: Tensor
    value: Tensor
    mask: Tensor | None
    window: int
    more: tuple[str, ...]


_notes: ContextVar[list[_Call]] = ContextVar("notes")


@torch.inference_mode()
def survey(model: PreTrainedModel, context_length: int) -> KVShape:
    """The sizes of a model's keys and values. Raises BaseModelError with the reason where it cannot be served exactly.

    Changes the model's attention implementation, which the caller sets to what comes next.
    """
    architecture = type(model).__name__
    AttentionInterface.register(_NAME, _note)
    AttentionMaskInterface.register(_NAME, _sampled_mask)
    far = max(context_length - _TOKENS, 0)
    positions = torch.arange(far, far + _TOKENS, device=model.device)[None]
    calls, logits = _pass(model, position_ids=positions, use_cache=False)
    if logits.shape[:2] != (1, _WANTED):
        raise _refusal(architecture, "gives logits of other tokens than it was asked for")
    shape = _shape(architecture, calls, model)
    _check_masks(architecture, calls, model)
    behind, expected = _pass(model, past_key_values=_FarCache(far), use_cache=True)
    pairs = [(logits, expected)]
    for one, other in zip(calls, behind, strict=True):
        pairs += [(one.query, other.query), (one.key, other.key), (one.value, other.value)]
    if not all(torch.allclose(ours, theirs, rtol=1e-4, atol=1e-4) for ours, theirs in pairs):
        raise _refusal(architecture, f"does not take the positions that it is given (at position {far})")
    return shape


def _pass(model: PreTrainedModel, **given: Any) -> tuple[list[_Call], Tensor]:
    """What attention was called with in a forward pass, and its logits [1, R, V]."""
    calls: list[_Call] = []
    token = _notes.set(calls)
    try:
        model.set_attn_implementation(_NAME)
        embeddings = model.get_input_embeddings()(torch.arange(_TOKENS, device=model.device)[None])
        wanted = torch.arange(_WANTED, device=model.device)
        logits: Tensor = model(inputs_embeds=embeddings, logits_to_keep=wanted, **given).logits
    except Exception as error:  # whatever a foreign architecture raises, it cannot be served
        reason = f"cannot run with a registered attention function ({error})"
        raise _refusal(type(model).__name__, reason if calls else _NOT_CALLED) from error
    finally:
        _notes.reset(token)
    return calls, logits


def _refusal(architecture: str, reason: str) -> BaseModelError:
    return BaseModelError(f"{architecture} {reason}, so it would be served wrongly; serve it through vLLM instead")


def _shape(architecture: str, calls: list[_Call], model: PreTrainedModel) -> KVShape:
    layers = int(getattr(model.config.get_text_config(), "num_hidden_layers", 0))
    if not calls:
        raise _refusal(architecture, _NOT_CALLED)
    if [call.layer for call in calls] != list(range(layers)):
        raise _refusal(architecture, f"calls a registered attention function {len(calls)} times in {layers} layers")
    kv_heads, _, head_dim = calls[0].key.shape
    for call in calls:
        if call.key.shape != call.value.shape or call.key.shape != calls[0].key.shape:
            raise _refusal(architecture, "has keys and values of several shapes")
        if call.query.shape[0] % kv_heads or call.query.shape[2] != head_dim:
            raise _refusal(architecture, f"has queries {list(call.query.shape)} that do not fit {kv_heads} KV heads")
        if call.more:
            raise _refusal(architecture, f"gives attention '{call.more[0]}', which the engine does not know")
    return KVShape(layers, kv_heads, head_dim, model.dtype, model.device)


def _check_masks(architecture: str, calls: list[_Call], model: PreTrainedModel) -> None:
    own, others = _sampled_positions(model.config.get_text_config(), model.device)
    for call in calls:
        if call.mask is None:  # whether that means causal, the logits say
            continue
        expected = others <= own
        if call.window:
            expected &= others > own - call.window
        if call.mask.shape[2:] != expected.shape or not torch.equal(call.mask[0, 0], expected):
            kind = f"a window of {call.window}" if call.window else "no window"
            raise _refusal(architecture, f"masks other positions in layer {call.layer} than attention is told ({kind})")


def _note(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **more: Any,
) -> tuple[Tensor, None]:
    """Attention of transformers' interface where each token sees itself alone."""
    unknown = tuple(name for name, given in more.items() if isinstance(given, Tensor) and name not in _HARMLESS)
    layer = int(module.layer_idx)  # type: ignore[arg-type]
    _notes.get().append(_Call(layer, query[0], key[0], value[0], attention_mask, sliding_window or 0, unknown))
    return value.repeat_interleave(query.shape[1] // key.shape[1], dim=1).transpose(1, 2).contiguous(), None


def _sampled_mask(mask_function: Any, config: Any, device: torch.device, **_: Any) -> Tensor:
    """Bool [1, 1, few, C]: which positions of the whole context some few positions see, by transformers' own mask."""
    own, others = _sampled_positions(config, device)
    zero = torch.zeros(1, 1, dtype=torch.long, device=device)
    visible: Tensor = mask_function(zero, zero, own, others)
    return visible.expand(own.shape[0], others.shape[1])[None, None]


def _sampled_positions(config: Any, device: torch.device) -> tuple[Tensor, Tensor]:
    """Some positions [few, 1] of the context, and all of them [1, C]."""
    length = min(int(getattr(config, "max_position_embeddings", None) or _MOST_POSITIONS), _MOST_POSITIONS)
    some = sorted({0, length // 3, length // 2, length - 1})
    return torch.tensor(some, device=device)[:, None], torch.arange(length, device=device)[None]


class _FarCache(DynamicCache):
    """A cache that says it holds `length` tokens and gives back what it is given."""

    def __init__(self, length: int) -> None:
        super().__init__()
        self._length = length

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self._length

    def get_query_offset(self, layer_idx: int = 0) -> int:
        return self._length

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        return self._length + query_length, 0

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        return key_states, value_states
