"""What is compared: sides that answer the same questions, one at work while the others stand still."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

from benchmarks.engine.client import Measured, Refused, closed_loop
from benchmarks.engine.figures import CONCURRENCIES
from benchmarks.engine.servers import ROOT, Processes, Server, ServerFailed
from benchmarks.engine.shapes import BUILD_FOLDER
from benchmarks.engine.workload import Question


class Side(Protocol):
    """Answers questions, and is paused between its turns."""

    name: str
    concurrencies: tuple[int, ...]

    def measure(self, questions: Sequence[Question], concurrency: int) -> Measured: ...

    def pause(self) -> None: ...

    def resume(self) -> None: ...

    def end(self) -> None: ...


class ServedSide:
    """A side behind HTTP; `encode` writes a question as its server takes it."""

    concurrencies = CONCURRENCIES

    def __init__(self, name: str, server: Server, encode: Callable[[Question], bytes]) -> None:
        self.name = name
        self.server = server
        self.pause, self.resume, self.end = server.pause, server.resume, server.end
        self._encode = encode

    def measure(self, questions: Sequence[Question], concurrency: int) -> Measured:
        """Raises ServerFailed when an answer is none."""
        requests = [self._encode(question) for question in questions]
        try:
            return asyncio.run(closed_loop(self.server.port, requests, concurrency))
        except Refused as refused:
            raise ServerFailed(f"{self.name} answered {refused}") from refused


class WorkerSide:
    """A library in a process of its own (`workers`), with threads for every core."""

    def __init__(self, name: str, base: Path, *concurrencies: int) -> None:
        self.name = name
        self.concurrencies = concurrencies
        self._log = BUILD_FOLDER / f"{name}.log"
        with self._log.open("wb") as output:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "benchmarks.engine.workers", name, str(base)],
                cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=output,
            )  # fmt: skip
        processes = Processes(self._process)
        self.pause, self.resume, self.end = processes.pause, processes.resume, processes.end
        self.attention = self._read()["attention"]

    def measure(self, questions: Sequence[Question], concurrency: int) -> Measured:
        """Raises ServerFailed when the worker ended."""
        assert self._process.stdin is not None
        asked = [[question.text, question.prompt] for question in questions]
        self._process.stdin.write(json.dumps(asked).encode("ascii") + b"\n")
        self._process.stdin.flush()
        return Measured(**self._read())

    def _read(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            self.end()
            last = self._log.read_text("utf-8", "replace").strip().splitlines()[-3:]
            raise ServerFailed(f"{self.name} ended: " + " / ".join(last))
        return json.loads(line)


@contextmanager
def at_work(side: Side) -> Iterator[None]:
    """Let a paused side run for as long as it is measured."""
    side.resume()
    try:
        yield
    finally:
        side.pause()
