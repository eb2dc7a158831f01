"""Tokens per second of the local engine against `PeftModel.generate` one request at a time: `make bench-engine`.

Workload: the demo base, 16 soft prompts of P=100, 24 text tokens, 64 new tokens, greedy. Both sides alternate in one
run and the median of five rounds counts. Tokens are counted as made; a text that ends early counts for what it has.
Prints a table, and one JSON object as its last line.
"""

from __future__ import annotations

import json
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from peft import PromptTuningConfig, get_peft_model
from rich.console import Console
from rich.table import Table

from service.engines.base_model import open_base_model
from service.engines.local.engine import EngineCore
from service.engines.local.messages import Register, Submit
from service.engines.local.model_runner import load_weights
from service.engines.local.options import EngineOptions

ROUNDS, PROMPTS, LENGTH, TEXT_TOKENS, NEW_TOKENS, REQUESTS = 5, 16, 100, 24, 64, 32


def main() -> None:
    """Run the benchmark."""
    threads = len(os.sched_getaffinity(0))
    base = open_base_model(Path(__file__).parent.parent / "examples" / "base", name="demo-base")
    core = EngineCore.load(base, EngineOptions(threads=threads))
    generator = torch.Generator().manual_seed(0)
    tensors = [torch.randn(LENGTH, base.hidden_size, generator=generator) * 0.3 for _ in range(PROMPTS)]
    texts = torch.randint(10, base.vocabulary_size, (REQUESTS, TEXT_TOKENS), generator=generator).tolist()
    for index, tensor in enumerate(tensors):
        data = tensor.numpy().tobytes()
        core.register(Register(str(index), "F32", (LENGTH, base.hidden_size), data, pinned=True))
    peft = get_peft_model(load_weights(base), config(), adapter_name="0")
    for index, tensor in enumerate(tensors):
        if index:
            peft.add_adapter(str(index), config())
        peft.prompt_encoder[str(index)].embedding.weight.data = tensor

    def ours(concurrency: int) -> float:
        made, waiting = 0, list(range(REQUESTS if concurrency > 1 else 8))
        running: set[str] = set()
        started = time.perf_counter()
        while waiting or running:
            while waiting and len(running) < concurrency:
                request = waiting.pop()
                running.add(str(request))
                prompt = str(request % PROMPTS)
                core.submit(Submit(str(request), texts[request], prompt, NEW_TOKENS))
            for output in core.step().outputs:
                made += len(output.token_ids)
                if output.finish_reason is not None:
                    running.discard(output.id)
        return made / (time.perf_counter() - started)

    def peft_alone() -> float:
        made, started = 0, time.perf_counter()
        for request in range(8):
            peft.set_adapter(str(request % PROMPTS))
            ids = torch.tensor([texts[request]])
            output = peft.generate(
                input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW_TOKENS, do_sample=False
            )
            made += output.shape[1] - TEXT_TOKENS
        return made / (time.perf_counter() - started)

    sides: dict[str, Callable[[], float]] = {
        "tokens_per_s_c1": lambda: ours(1),
        "tokens_per_s_c8": lambda: ours(8),
        "tokens_per_s_c32": lambda: ours(32),
        "peft_tokens_per_s": peft_alone,
    }
    rates: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(ROUNDS + 1):
        for name, run in sides.items():
            rates[name].append(run())
    medians = {name: statistics.median(values[1:]) for name, values in rates.items()}  # the first round warms up
    table = Table("demo base, float32", "tokens/s")
    for name, value in medians.items():
        table.add_row(name, f"{value:,.0f}")
    Console().print(table)
    rounded = {name: round(value, 1) for name, value in medians.items()}
    ratio = medians["tokens_per_s_c32"] / medians["peft_tokens_per_s"]
    print(json.dumps({**rounded, "vs_peft": round(ratio, 2), "threads": threads}))


def config() -> PromptTuningConfig:
    """PEFT's description of a soft prompt of this length."""
    return PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=LENGTH)


if __name__ == "__main__":
    main()
