"""Tiny random models of many architectures, in folders with the demo base's tokenizer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn

from service.engines.base_model import BaseModel, open_base_model
from tests.conftest import BASE_FOLDER

HIDDEN = 48
CONTEXT = 192
WINDOW = 24

_COMMON: dict[str, Any] = {
    "vocab_size": 4096, "hidden_size": HIDDEN, "intermediate_size": 80, "num_hidden_layers": 3,
    "num_attention_heads": 4, "max_position_embeddings": CONTEXT, "bos_token_id": 0, "eos_token_id": 1,
    "pad_token_id": 2, "initializer_range": 0.3, "tie_word_embeddings": False,
}  # fmt: skip
_GROUPED = {"num_key_value_heads": 2}
_WIDE_HEADS = {"head_dim": 16}
_WINDOW = {"sliding_window": WINDOW}
_LOCAL_AND_GLOBAL = {**_WINDOW, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}
_EXPERTS = {
    "num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 40,
    "n_routed_experts": 4, "n_shared_experts": 1, "n_group": 1, "topk_group": 1,
}  # fmt: skip
_LLAMA_4 = {
    **_GROUPED, **_EXPERTS, **_WIDE_HEADS, "intermediate_size_mlp": 64, "no_rope_layers": [1, 0, 1],
    "layer_types": ["chunked_attention", "full_attention", "chunked_attention"],
    "attention_chunk_size": CONTEXT, "floor_scale": CONTEXT,
}  # fmt: skip

# What configurations say beside _COMMON.
NAMED: dict[str, dict[str, Any]] = {
    "Llama": {**_GROUPED, **_WIDE_HEADS},
    "Qwen2": _GROUPED,
    "Qwen3": {**_GROUPED, **_WIDE_HEADS},
    "Mistral": {**_GROUPED, **_WINDOW},
    "Gemma2": {
        **_GROUPED, **_WIDE_HEADS, **_LOCAL_AND_GLOBAL, "query_pre_attn_scalar": 16, "attn_logit_softcapping": 5.0,
        "final_logit_softcapping": 30.0,
    },
    "Gemma3": {**_GROUPED, **_WIDE_HEADS, **_LOCAL_AND_GLOBAL, "query_pre_attn_scalar": 16},
    "GPT2": {},
    "GPTNeoX": {"rotary_pct": 0.5},
    "Phi": {"partial_rotary_factor": 0.5},
    "Mixtral": {**_GROUPED, **_EXPERTS},
}  # fmt: skip
UNUSUAL: dict[str, dict[str, Any]] = {
    "Cohere": {**_GROUPED, "logit_scale": 0.5},  # rotates neighbours; one norm before attention and MLP alike
    "Granite": {
        **_GROUPED, "logits_scaling": 4.0, "residual_multiplier": 0.5, "embedding_multiplier": 3.0,
        "attention_multiplier": 0.2,
    },
    "Llama4": _LLAMA_4,  # rotates complex numbers; layers without positions; experts
    "Nemotron": _GROUPED,  # hands no unknown arguments on to attention
    "Olmo2": _GROUPED,  # norms behind attention and MLP
    "OPT": {"ffn_dim": 64, "word_embed_proj_dim": HIDDEN},  # learned positions with an offset
    "Phi3": _GROUPED,  # queries, keys and values of one layer
    "Qwen3Moe": {**_GROUPED, **_EXPERTS},
    "SmolLM3": {**_GROUPED, "no_rope_layers": [1, 0, 1]},
    "StableLm": {**_GROUPED, "partial_rotary_factor": 0.5, "qk_layernorm": True},
}  # fmt: skip
WITHOUT_PROGRAM = {"Mixtral", "Qwen3Moe", "Llama4"}  # whose experts are chosen by the data

_ROTARY = {"rope_type": "longrope", "rope_theta": 10000.0, "factor": 2.0}
_FACTORS = {"short_factor": [1.0] * 6, "long_factor": [2.0] * 6, "original_max_position_embeddings": 96}
_NOT_CALLED = "does not call a registered attention function"
_SOME_LAYERS = "calls a registered attention function 1 times in 3 layers"
# Architecture, what its configuration says beside _COMMON, and a part of the reason.
REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "alibi": ("Bloom", {"n_layer": 3, "n_head": 4}, _NOT_CALLED),
    "alibi in Falcon": ("Falcon", {"alibi": True}, _NOT_CALLED),
    "old Falcon": ("Falcon", {"new_decoder_architecture": False}, _NOT_CALLED),
    "new Falcon": ("Falcon", {"new_decoder_architecture": True, "num_kv_heads": 2}, _NOT_CALLED),
    "no interface": ("GPTJ", {"rotary_dim": 8}, _NOT_CALLED),
    "no interface in GPT-Neo": (
        "GPTNeo", {"num_layers": 3, "attention_types": [[["global", "local", "global"], 1]]}, _NOT_CALLED,
    ),
    "state space": ("Mamba", {}, _NOT_CALLED),
    "hybrid": (
        "Jamba", {**_GROUPED, "attn_layer_period": 2, "attn_layer_offset": 1, "use_mamba_kernels": False}, _SOME_LAYERS,
    ),
    "convolutions": ("Lfm2", {**_GROUPED, "layer_types": ["conv", "full_attention", "conv"]}, _SOME_LAYERS),
    "recurrent": ("Rwkv", {}, "has no 'max_position_embeddings'"),
    "attention sinks": ("GptOss", {**_GROUPED, **_EXPERTS, **_WINDOW}, "gives attention 's_aux'"),
    "latent attention": ("DeepseekV3", _EXPERTS, "has keys and values of several shapes"),
    "two attentions a layer": ("DiffLlama", _GROUPED, "function 6 times in 3 layers"),
    "chunked attention": ("Llama4", {**_LLAMA_4, "attention_chunk_size": 64}, "masks other positions in layer 0"),
    "scaling by counted positions": (
        "Llama4", {**_LLAMA_4, "floor_scale": 16}, r"does not take the positions that it is given \(at position 189\)",
    ),
    "dynamic rotary embedding": (
        "Llama", {"rope_parameters": {**_ROTARY, "rope_type": "dynamic"}}, "longest sequence in the batch",
    ),
    "long rotary embedding": ("Phi3", {"rope_parameters": {**_ROTARY, **_FACTORS}}, "longest sequence in the batch"),
}  # fmt: skip

_CLASSES = {
    "Gemma3": ("Gemma3TextConfig", "Gemma3ForCausalLM"),
    "GPT2": ("GPT2Config", "GPT2LMHeadModel"),
    "Llama4": ("Llama4TextConfig", "Llama4ForCausalLM"),
}


def save_base(folder: Path, model: nn.Module) -> BaseModel:
    """A base model's folder with the demo base's tokenizer and a model's weights."""
    folder.mkdir()
    for file in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (folder / file).write_bytes((BASE_FOLDER / file).read_bytes())
    model.save_pretrained(folder)
    return open_base_model(folder)


def make_model(architecture: str, options: dict[str, Any]) -> transformers.PreTrainedModel:
    """Random weights, every time the same; biases and norms are random too."""
    config_name, class_name = _CLASSES.get(architecture, (f"{architecture}Config", f"{architecture}ForCausalLM"))
    config = getattr(transformers, config_name)(**{**_COMMON, **options})
    torch.manual_seed(0)
    model: transformers.PreTrainedModel = getattr(transformers, class_name)(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter += torch.randn_like(parameter) * 0.2
    return model.eval()
