"""Starting, pausing and ending the servers that are measured, each with the processes it starts itself."""

from __future__ import annotations

import http.client
import os
import socket
import subprocess
import sys
import time
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

import psutil

from benchmarks.engine.shapes import BUILD_FOLDER, CONTEXT_LENGTH

ROOT = Path(__file__).parents[2]
PEERS_PYTHON = ROOT / "build" / "peers" / "bin" / "python"
_START_TIMEOUT_S, _STOP_TIMEOUT_S, _POLL_S = 300.0, 15.0, 0.25


class ServerFailed(Exception):
    """The server ended before it was ready; the message holds the end of its log."""


class Processes:
    """A process and all that it started."""

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        self.process = process

    def processes(self) -> list[psutil.Process]:
        """Those that live, the first one first."""
        try:
            first = psutil.Process(self.process.pid)
            return [first, *first.children(recursive=True)]
        except psutil.NoSuchProcess:
            return []

    def pause(self) -> None:
        """Stop them where they stand, so that an idle side takes nothing from the one that is measured."""
        for process in self.processes():
            process.suspend()

    def resume(self) -> None:
        for process in self.processes():
            process.resume()

    def end(self) -> None:
        """End them; those that do not end within seconds are killed."""
        everyone = self.processes()
        self.resume()
        self.process.terminate()
        _, alive = psutil.wait_procs(everyone, _STOP_TIMEOUT_S)
        for process in alive:
            process.kill()
        self.process.wait()


class Server(Processes):
    """A server that answers on `port` of the loopback interface once `ready_path` is answered with 200."""

    def __init__(
        self, name: str, command: Sequence[str], environment: Mapping[str, str], port: int, ready_path: str, cwd: Path
    ) -> None:
        self.port = port
        self.log = BUILD_FOLDER / f"{name}.log"
        with self.log.open("wb") as output:
            process = subprocess.Popen(
                command, env=environment, cwd=cwd, stdin=subprocess.DEVNULL, stdout=output, stderr=output
            )
        super().__init__(process)
        try:
            self._wait_ready(ready_path)
        except BaseException:
            self.end()
            raise

    def get(self, path: str) -> tuple[int, str]:
        """Status and text of a GET."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)
        try:
            connection.request("GET", path)
            answer = connection.getresponse()
            return answer.status, answer.read().decode("utf-8")
        finally:
            connection.close()

    def _wait_ready(self, path: str) -> None:
        deadline = time.monotonic() + _START_TIMEOUT_S
        while not self._answers(path):
            if self.process.poll() is not None or time.monotonic() > deadline:
                last = self.log.read_text("utf-8", "replace").strip().splitlines()[-5:]
                raise ServerFailed(f"{self.log.stem} did not become ready: " + " / ".join(last))
            time.sleep(_POLL_S)

    def _answers(self, path: str) -> bool:
        try:
            return self.get(path)[0] == 200
        except OSError:
            return False  # it does not listen yet


def start_softcue(name: str, base: Path, store: Path, environment: Mapping[str, str] | None = None) -> Server:
    """`softcue serve` over a store. Raises ServerFailed when it does not start."""
    port = _free_port()
    command = [sys.executable, "-m", "softcue", "serve", "--host", "127.0.0.1", "--port", str(port)]
    command += ["--store", str(store), "--base", str(base)]
    return Server(name, command, {**os.environ, **(environment or {})}, port, "/health/ready", ROOT)


def start_vllm(
    name: str, python: Path, base: Path, options: Sequence[str] = (), cores: Collection[int] | None = None
) -> Server:
    """vLLM's CPU server as it is fastest: blocks of 32 share P=100, both libraries preloaded, a thread a core.

    `cores` are all that there are unless told. Raises ServerFailed when it does not start.
    """
    port = _free_port()
    command = [str(python), "-P", "-m", "vllm.entrypoints.openai.api_server", "--model", str(base)]
    command += ["--host", "127.0.0.1", "--port", str(port), "--enable-prompt-embeds", "--dtype", "float32"]
    command += ["--block-size", "32", "--max-model-len", str(CONTEXT_LENGTH), *options]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment |= {
        "HF_HUB_OFFLINE": "1",
        "VLLM_CPU_KVCACHE_SPACE": "2",
        # Left to itself it keeps one core free, which was measured a third slower on two cores.
        "VLLM_CPU_OMP_THREADS_BIND": ",".join(map(str, sorted(cores or os.sched_getaffinity(0)))),
        "LD_PRELOAD": ":".join(_preloaded(python)),
    }
    return Server(name, command, environment, port, "/health", BUILD_FOLDER)


def vllm_python() -> Path | None:
    """The interpreter of the environment that holds vLLM, if there is one."""
    python = Path(os.environ.get("SOFTCUE_BENCH_VLLM_PYTHON", PEERS_PYTHON))
    return python if python.is_file() else None


def _preloaded(python: Path) -> list[str]:
    """tcmalloc and Intel's OpenMP. Raises ServerFailed where one is missing: without them vLLM is slower."""
    found = []
    for folder, pattern in ((Path("/usr"), "lib*/**/libtcmalloc_minimal.so.4"), (python.parents[1], "lib/libiomp5.so")):
        path = next(folder.glob(pattern), None)
        if path is None:
            raise ServerFailed(f"{folder / pattern} is missing, and vLLM is slow without it; `make bench-engine-peers`")
        found.append(str(path))
    return found


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])
