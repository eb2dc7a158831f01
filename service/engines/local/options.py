"""How a local engine runs. Its own module because the service sets options without importing torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Quantization = Literal["none", "int8"]
Precision = Literal["auto", "float32", "bfloat16", "float16"]


@dataclass(frozen=True, slots=True)
class EngineOptions:
    """How a local engine runs; only `dtype` and `quantize` change what it answers.

    `dtype` is that of weights and KV: `auto` is float32 on a CPU, elsewhere float16 or bfloat16 if the base model's
    configuration names it, bfloat16 if not. `threads = 0` takes every core. `kv_memory_bytes` bounds all KV, that of
    running sequences and that of soft prompts. `quantize = "int8"` rounds the weights of linear layers to 8 bits (CPU).
    `kernels = False` compiles nothing.
    """

    device: str = "cpu"
    dtype: Precision = "auto"
    threads: int = 0
    max_sequences: int = 64
    max_batch_tokens: int = 512
    kv_memory_bytes: int = 2 * 1024**3
    quantize: Quantization = "none"
    kernels: bool = True
