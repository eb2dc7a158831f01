"""How a local engine runs. Its own module because the service sets options without importing torch."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class EngineOptions:
    """How a local engine runs; none of it changes what it answers.

    `threads = 0` takes every core but one: OpenMP's threads wait for each other by spinning, and where another process
    takes a core from one of them, all of them stand still (measured here: ten times slower).
    """

    device: str = "cpu"
    threads: int = 0
    max_sequences: int = 32
    max_batch_tokens: int = 512
    kv_memory_bytes: int = 2 * 1024**3
    prefix_memory_bytes: int = 512 * 1024**2
