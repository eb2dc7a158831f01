"""The engine on one CUDA device: `make bench-engine-cuda`, or `python -m benchmarks.engine.cuda`.

A Llama of 7B parameters with random weights in bfloat16, the engine driven in this process, against transformers'
continuous batching with the best attention that works on this machine, in a process of its own on the same device. Both
answer so many questions at a time, and the next ones when all of them have ended. Needs about 45 GiB on the device and
14 GB of disk. A table, and one JSON object as the last line.
"""

from __future__ import annotations

import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.table import Table

from benchmarks.engine.client import Measured
from benchmarks.engine.figures import CONCURRENCIES, json_line, rate_name
from benchmarks.engine.servers import ServerFailed
from benchmarks.engine.shapes import BUILD_FOLDER, Shape, make_base
from benchmarks.engine.sides import Side, WorkerSide
from benchmarks.engine.throughput import compare
from benchmarks.engine.workload import PROMPTS, Question, soft_prompts
from service.engines.base_model import open_base_model
from service.engines.local.engine import EngineCore
from service.engines.local.messages import Choosing, Register, Submit
from service.engines.local.model_runner import ModelRunner
from service.engines.local.options import EngineOptions

_GIBIBYTE = 1024**3
_SIDES = {"softcue": "softcue, engine alone", "transformers_cuda": "transformers generate_batch"}


class CoreSide:
    """The engine in this process."""

    name = "softcue"
    concurrencies = CONCURRENCIES

    def __init__(self, core: EngineCore, prompts: torch.Tensor) -> None:
        self._core = core
        self._asked = 0
        for index, prompt in enumerate(prompts):
            core.register(Register(str(index), "F32", tuple(prompt.shape), prompt.numpy().tobytes(), pinned=True))
        self._run()

    def measure(self, questions: Sequence[Question], concurrency: int) -> Measured:
        """Ask all questions, `concurrency` at a time."""
        made, started = 0, time.perf_counter()
        for begin in range(0, len(questions), concurrency):
            for question in questions[begin : begin + concurrency]:
                self._asked += 1
                prompt = None if question.prompt is None else str(question.prompt)
                choosing = Choosing(ignore_eos=True)
                name, limit = f"question {self._asked}", question.new_tokens
                self._core.submit(Submit(name, question.text, prompt, limit, choosing=choosing, stream=False))
            made += self._run()
        return Measured(made, time.perf_counter() - started)

    def pause(self) -> None:
        """It takes nothing while it is not asked."""

    def resume(self) -> None:
        """There is nothing to resume."""

    def end(self) -> None:
        """It ends with this process."""

    def _run(self) -> int:
        made = 0
        while self._core.has_work:
            news = self._core.step()
            if news.failures:
                raise ServerFailed(f"the engine failed a request: {news.failures[0].message}")
            made += sum(len(output.token_ids) for output in news.outputs)
        return made


class GroupedWorker(WorkerSide):
    """A worker that is asked so many questions at a time."""

    def measure(self, questions: Sequence[Question], concurrency: int) -> Measured:
        groups = [questions[begin : begin + concurrency] for begin in range(0, len(questions), concurrency)]
        measured = [super(GroupedWorker, self).measure(group, concurrency) for group in groups]
        return Measured(sum(one.tokens for one in measured), sum(one.seconds for one in measured))


def shape_7b(kv_heads: int) -> Shape:
    """Llama 2's 7B, or with fewer KV heads than 32."""
    return Shape(f"7b-{kv_heads}kv", 4096, 32, 32, kv_heads, 11008, 32000, dtype="bfloat16", tied=False)


def main(
    kv_heads: Annotated[int, typer.Option(help="KV heads of 32 heads; 8 is what newer models have.")] = 32,
    rounds: Annotated[int, typer.Option(min=1, help="Rounds after the warm-up; the median counts.")] = 5,
    kv_memory_gib: Annotated[float, typer.Option(min=1, help="The engine's budget for KV, in GiB.")] = 12,
) -> None:
    """Measure the engine and transformers on this machine's CUDA device."""
    if not torch.cuda.is_available():
        raise SystemExit(
            f"this benchmark needs a CUDA device and torch {torch.__version__} finds none; run it where "
            "`python -c 'import torch; print(torch.cuda.is_available())'` says True"
        )
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that the worker is ended
    BUILD_FOLDER.mkdir(parents=True, exist_ok=True)
    shape = shape_7b(kv_heads)
    print(f"{shape.name}: making weights and loading them", file=sys.stderr)
    base = make_base(shape, "cuda")
    torch.cuda.empty_cache()
    budget = int(kv_memory_gib * _GIBIBYTE)
    options = EngineOptions("cuda", "bfloat16", max_sequences=max(CONCURRENCIES), kv_memory_bytes=budget)
    runner = ModelRunner.load(open_base_model(base), options)
    sides: list[Side] = [CoreSide(EngineCore(runner, options), soft_prompts(PROMPTS, shape.hidden_size))]
    attention, missing = _add_transformers(sides, base)
    try:
        print(f"{shape.name}: comparing {', '.join(side.name for side in sides)}", file=sys.stderr)
        rates = compare(sides, shape.vocabulary_size, rounds)
    finally:
        for side in sides:
            side.end()
    if missing:
        print(f"null: {missing}")
    _show(shape, rates, attention)
    figures: dict[str, float | None] = {}
    for concurrency in CONCURRENCIES:
        ours, theirs = (rates.get((side, concurrency)) for side in _SIDES)
        figures |= {rate_name(side, concurrency, shape.name): rates.get((side, concurrency)) for side in _SIDES}
        figures[f"vs_transformers_cb_c{concurrency}_{shape.name}"] = ours / theirs if ours and theirs else None
    about = {
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "attention": attention,
        "captured": runner.captured,
        "recorded": runner.recorded,
        "rounds": rounds,
    }
    print(json_line(figures, about))


def _add_transformers(sides: list[Side], base: Path) -> tuple[str | None, str | None]:
    """Add transformers to the sides. Returns the attention that it runs with, or why it does not run."""
    try:
        worker = GroupedWorker("transformers_cuda", base, *CONCURRENCIES)
    except ServerFailed as failed:
        return None, str(failed)
    sides.append(worker)
    return worker.attention, None


def _show(shape: Shape, rates: dict[tuple[str, int], float], attention: str | None) -> None:
    table = Table(f"{shape.name}, tokens/s at concurrency", *map(str, CONCURRENCIES))
    for side, title in _SIDES.items():
        found = [rates.get((side, concurrency)) for concurrency in CONCURRENCIES]
        shown = ("–" if rate is None else f"{rate:,.0f}" for rate in found)
        table.add_row(f"{title}, {attention}" if side == "transformers_cuda" else title, *shown)
    Console().print(table)


if __name__ == "__main__":
    typer.run(main)
