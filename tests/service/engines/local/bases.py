"""A model of random weights, for what the demo base does not have and for weights that a test breaks."""

from __future__ import annotations

import torch
from transformers import LlamaConfig, LlamaForCausalLM


def grouped_model() -> LlamaForCausalLM:
    """Random weights; grouped KV heads, heads wider than H / heads, untied embeddings."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=4096, hidden_size=48, intermediate_size=64, num_hidden_layers=3, num_attention_heads=6,
        num_key_value_heads=2, head_dim=16, max_position_embeddings=256, bos_token_id=0, eos_token_id=1,
        pad_token_id=2, initializer_range=0.4,
    )  # fmt: skip
    return LlamaForCausalLM(config)
