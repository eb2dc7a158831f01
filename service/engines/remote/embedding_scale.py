"""What architectures do to embeddings before their first layer: transformers 5.23 and vLLM 0.32 side by side.

Most look them up and no more. Learned positions and multipliers behind `inputs_embeds` are the model's own affair: both
add them to soft prompts and tokens alike.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from service.engines.base_model import BaseModel
from service.engines.errors import BaseModelError

_Config = Mapping[str, Any]


def embedding_scale(base: BaseModel) -> float:
    """What the base model multiplies the embeddings of tokens with, and not soft prompts, before its first layer.

    Raises BaseModelError where that is not all it does, where vLLM does otherwise, or where it is not known.
    """
    config = base.text_config
    kind = str(config.get("model_type") or base.config.get("model_type"))
    if reason := _refusal(kind, config):
        raise BaseModelError(
            f"base model '{base.name}' ({kind}) cannot be served through vLLM's prompt_embeds: {reason}; serve it with "
            "the local engine"
        )
    return _SCALES[kind](config) if kind in _SCALES else 1.0


def _by_width(config: _Config) -> float:
    return math.sqrt(config["hidden_size"])


_SCALES: dict[str, Callable[[_Config], float]] = {
    "gemma": _by_width,
    "gemma2": _by_width,
    "gemma3": _by_width,
    "gemma3_text": _by_width,
    "gemma4": _by_width,
    "gemma4_text": _by_width,
    "gemma4_unified": _by_width,
    "gemma4_unified_text": _by_width,
    "vaultgemma": _by_width,
    "minicpm3": lambda config: float(config.get("scale_emb", 12)),
}
# Both libraries scale behind `inputs_embeds`.
_INSIDE = {
    "afmoe", "granite", "granite_swa", "granitemoe", "granitemoe_swa", "granitemoehybrid", "granitemoeshared",
    "hyperclovax",
}  # fmt: skip
_PER_LAYER = "hidden_size_per_layer_input"
# Keys of a configuration that speak of embeddings which are scaled.
_TELLTALES = (
    "embedding_multiplier", "embedding_scale", "embed_scale", "scale_emb", "scale_embedding", "rescale_embeddings",
    "mup_enabled",
)  # fmt: skip


def _refusal(kind: str, config: _Config) -> str | None:
    """Why embeddings of this architecture cannot be sent."""
    if config.get(_PER_LAYER, kind.startswith(("gemma3n", "gemma4"))):
        return "each of its layers embeds the token ids once more, and a soft prompt has none"
    if kind == "falcon_h1" and config.get("embedding_multiplier", 1) != 1:
        return "vLLM scales the embeddings that it is given, and transformers does not"
    if kind in _SCALES or kind in _INSIDE or kind == "falcon_h1":
        return None
    telltale = next((key for key in _TELLTALES if _tells(config.get(key))), None)
    if telltale is not None:
        return f"'{telltale}' in its configuration speaks of scaled embeddings, and how it scales them is not known"
    return "how it scales embeddings is not known" if "gemma" in kind else None


def _tells(value: object) -> bool:
    """Whether a setting scales: a multiplier of 1 does not."""
    return value is True or value not in (None, False, 1)
