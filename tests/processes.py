"""The real command line, and real servers of it, for tests that meet Softcue as its users do."""

from __future__ import annotations

import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TypeVar

import httpx
from openai import OpenAI

T = TypeVar("T")

COMMAND = [sys.executable, "-m", "softcue"]


def softcue(*arguments: str | Path, code: int = 0) -> str:
    """Run a command to its end; returns what it printed."""
    result = subprocess.run([*COMMAND, *map(str, arguments)], capture_output=True, text=True, timeout=120)
    assert result.returncode == code, result.stdout + result.stderr
    return result.stdout + result.stderr


def eventually(ask: Callable[[], T], expected: Callable[[T], bool], within_s: float = 30.0) -> T:
    """Ask until the answer is the expected one. A deadline only: what is slow is not wrong."""
    deadline = time.monotonic() + within_s
    while not expected(answer := ask()):
        assert time.monotonic() < deadline, f"still {answer!r} after {within_s} s"
    return answer


@dataclass
class Server:
    """A running `softcue serve`."""

    process: subprocess.Popen[str]
    url: str
    log: Path

    @property
    def client(self) -> OpenAI:
        return OpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0)

    def metric(self, name: str) -> float:
        """A metric's first value, or that of the labels that are given behind its name."""
        text = httpx.get(f"{self.url}/metrics").text
        found = re.search(rf"^{re.escape(name)}(?:{{[^}}]*}})? (\S+)$", text, re.MULTILINE)
        assert found, name
        return float(found[1])

    def engine_process(self) -> int:
        """The process id of the engine, the server's only child."""
        threads = Path(f"/proc/{self.process.pid}/task").iterdir()
        children = [child for thread in threads for child in (thread / "children").read_text().split()]
        assert len(children) == 1
        return int(children[0])

    def wait_ready(self) -> None:
        def ready() -> int:
            assert self.process.poll() is None, self.log.read_text()
            return httpx.get(f"{self.url}/health/ready").status_code

        eventually(ready, lambda status: status == 200, 60)


@contextmanager
def running(arguments: list[str], log: Path) -> Iterator[Server]:
    """A ready server; whatever is left of it at the end is killed."""
    with log.open("w") as output:
        process = start(arguments, output)
        try:
            found = eventually(
                lambda: re.search(r"starting on (http://\S+)", log.read_text()) or process.poll(),
                lambda answer: answer is not None,
            )
            assert isinstance(found, re.Match), log.read_text()
            server = Server(process, found[1], log)
            eventually(lambda: reachable(server.url), bool)
            server.wait_ready()
            yield server
        finally:
            if process.poll() is None:
                process.kill()
            process.wait()


def start(arguments: list[str], output: IO[str]) -> subprocess.Popen[str]:
    return subprocess.Popen([*COMMAND, *arguments], stdout=output, stderr=output, text=True)


def reachable(url: str) -> bool:
    try:
        return httpx.get(f"{url}/health/live").status_code == 200
    except httpx.TransportError:
        return False
