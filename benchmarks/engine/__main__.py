"""`python -m benchmarks.engine`: the whole run, or parts of it, a table and one JSON object as the last line."""

from __future__ import annotations

import asyncio
import importlib.util
import json
import os
import platform
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console

from benchmarks.engine.figures import json_line, rate_name, target_table, throughput_table, with_ratios
from benchmarks.engine.latency import time_to_first_token, worst_gap_ratio
from benchmarks.engine.servers import (
    ROOT,
    Server,
    ServerFailed,
    start_softcue,
    start_vllm,
    vllm_python,
)
from benchmarks.engine.shapes import BUILD_FOLDER, SHAPES, Shape, make_base
from benchmarks.engine.sides import ServedSide, Side, WorkerSide, at_work
from benchmarks.engine.store import fill_store
from benchmarks.engine.throughput import MANY_PROMPTS, compare, many_against_one
from benchmarks.engine.workload import PROMPTS, PromptEmbeds, soft_prompts, softcue_request

COMPARED = ("ours", "vllm", "int8", "peft", "transformers")
LATENCY = ("ttft", "gaps")
PARTS = (*COMPARED, *LATENCY, "prompts", "decode")
_INSTALL = "`make bench-engine-peers` installs it"


class Run:
    """One run: what is measured, what came of it, and what could not be measured and why."""

    def __init__(self, parts: frozenset[str], rounds: int, folder: Path) -> None:
        self.figures: dict[str, float | None] = {}
        self.missing: list[str] = []
        self._parts = parts
        self._rounds = rounds
        self._folder = folder

    def measure(self, shape: Shape) -> None:
        """Everything that is measured on this shape."""
        base = make_base(shape)
        if self._parts & {*COMPARED, *LATENCY}:
            self._measure_sides(shape, base)
        if shape.name == "8m" and "prompts" in self._parts:
            _say(f"{shape.name}: {MANY_PROMPTS} prompts")
            with ExitStack() as stack:
                many = self._softcue("softcue-many", shape, base, MANY_PROMPTS, stack)
                different, same = many_against_one(many, shape.vocabulary_size, self._rounds)
            self.figures |= {"prompts_1000_tokens_per_s": different, "prompts_1_tokens_per_s": same}
            self.figures["prompts_1000_vs_1"] = different / same
        if shape.name == "115m" and "decode" in self._parts:
            _say(f"{shape.name}: decoding against matmuls")
            self.figures |= self._decode_peak(shape)

    def _measure_sides(self, shape: Shape, base: Path) -> None:
        _say(f"{shape.name}: starting servers")
        with ExitStack() as stack:
            ours = self._softcue("softcue", shape, base, PROMPTS, stack)
            sides = [ours, *self._peers(shape, base, stack)]
            if self._parts & {*COMPARED}:
                _say(f"{shape.name}: comparing {', '.join(side.name for side in sides)}")
                rates = compare(sides, shape.vocabulary_size, self._rounds)
                for (side, concurrency), rate in rates.items():
                    self.figures[rate_name(side, concurrency, shape.name)] = rate
            _say(f"{shape.name}: latency")
            with at_work(ours):
                self._latency(ours.server, shape, base)

    def _softcue(
        self, name: str, shape: Shape, base: Path, prompts: int, stack: ExitStack, **environment: str
    ) -> ServedSide:
        store = self._folder / f"{name}-{shape.name}.db"
        fill_store(store, base, soft_prompts(prompts, shape.hidden_size))
        server = start_softcue(f"{name}-{shape.name}", base, store, environment)
        stack.callback(server.end)
        return ServedSide(name, server, partial(softcue_request, base.name))

    def _peers(self, shape: Shape, base: Path, stack: ExitStack) -> list[Side]:
        python = vllm_python()
        starts: dict[str, Callable[[], Side]] = {}
        if "vllm" in self._parts and python is None:
            self.missing.append(f"vLLM is not installed; {_INSTALL}")
        elif "vllm" in self._parts and python is not None:
            encode = PromptEmbeds(base, soft_prompts(PROMPTS, shape.hidden_size)).request
            starts["vLLM"] = lambda: ServedSide("vllm", start_vllm(f"vllm-{shape.name}", python, base), encode)
        if "peft" in self._parts and shape.name == "8m":
            if importlib.util.find_spec("peft") is None:
                self.missing.append(f"PEFT is not installed; {_INSTALL}")
            else:
                starts["PEFT"] = lambda: WorkerSide("peft", base, 1)
        if "transformers" in self._parts and shape.name == "8m":
            starts["transformers"] = lambda: WorkerSide("transformers", base, 32)
        if "int8" in self._parts and shape.name == "115m":
            starts["int8"] = lambda: self._softcue("int8", shape, base, PROMPTS, stack, SOFTCUE_ENGINE_QUANTIZE="int8")
        sides = []
        for title, start in starts.items():
            try:
                side = start()
            except ServerFailed as failed:
                self.missing.append(f"{title} on {shape.name}: {failed}")
                continue
            stack.callback(side.end)
            side.pause()
            sides.append(side)
        return sides

    def _latency(self, server: Server, shape: Shape, base: Path) -> None:
        where = server.port, base.name, shape.vocabulary_size
        if "ttft" in self._parts:
            prompted, bare = asyncio.run(time_to_first_token(*where))
            self.figures[f"ttft_p100_ms_{shape.name}"] = prompted * 1000
            self.figures[f"ttft_none_ms_{shape.name}"] = bare * 1000
            self._worst("ttft_p100_vs_none", prompted / bare)
        if "gaps" in self._parts:
            self._worst("gap_p99_vs_median", asyncio.run(worst_gap_ratio(*where)))

    def _worst(self, figure: str, value: float) -> None:
        self.figures[figure] = max(value, self.figures.get(figure) or 0.0)

    def _decode_peak(self, shape: Shape) -> dict[str, float]:
        command = [sys.executable, "-m", "benchmarks.engine.decode_peak", shape.name, str(self._rounds)]
        finished = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, check=True)
        return json.loads(finished.stdout)


def main(
    only: Annotated[str, typer.Option(help=f"Parts to run, of {', '.join(PARTS)}.")] = ",".join(PARTS),
    shapes: Annotated[str, typer.Option(help="Shapes to run.")] = ",".join(SHAPES),
    rounds: Annotated[int, typer.Option(min=1, help="Rounds after the warm-up; the median counts.")] = 5,
) -> None:
    """Measure the engine and its peers on this machine."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that the servers are ended
    parts = frozenset(filter(None, only.split(",")))
    if unknown := parts - set(PARTS):
        raise typer.BadParameter(f"there is no part {min(unknown)}; there are {', '.join(PARTS)}")
    names = shapes.split(",")
    if wrong := set(names) - set(SHAPES):
        raise typer.BadParameter(f"there is no shape {min(wrong)}; there are {', '.join(SHAPES)}")
    BUILD_FOLDER.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=BUILD_FOLDER) as folder:
        run = Run(parts, rounds, Path(folder))
        for name in names:
            run.measure(SHAPES[name])
    figures = with_ratios(run.figures)
    console = Console()
    for name in names:
        console.print(throughput_table(name, figures))
    console.print(target_table(figures))
    for reason in run.missing:
        console.print(f"null: {reason}")
    print(json_line(figures, {**_machine(), "rounds": rounds}))


def _say(progress: str) -> None:
    print(progress, file=sys.stderr, flush=True)


def _machine() -> dict[str, object]:
    lines = Path("/proc/cpuinfo").read_text("utf-8").splitlines() if Path("/proc/cpuinfo").is_file() else []
    model = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())
    return {"processor": model, "cores": len(os.sched_getaffinity(0)), "torch": torch.__version__}


if __name__ == "__main__":
    typer.run(main)
