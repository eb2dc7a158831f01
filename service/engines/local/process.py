"""An engine in a process of its own, and the socket that speaks to it.

The child imports torch, the parent never does. The child dies with its parent because its socket closes.
"""

from __future__ import annotations

import dataclasses
import json
import os
import socket
import subprocess
import sys
from typing import Protocol

from service.engines.base_model import BaseModel
from service.engines.local.options import EngineOptions

_STOP_TIMEOUT_S = 5.0
# OpenMP's threads wait for each other by spinning. Where another process takes a core from one of them, all others spin
# for nothing, so they soon go to sleep instead: measured on two cores beside a busy process, a third more tokens/s with
# 1,000 turns than by default, and no fewer alone.
_ENVIRONMENT = {"GOMP_SPINCOUNT": "1000"}


class Host(Protocol):
    """Starts engines, one at a time."""

    def start(self) -> socket.socket:
        """Start an engine; returns the socket that speaks `messages` with it."""
        ...

    def stop(self) -> None:
        """End the engine that was started last, if one was; blocks until it has ended."""
        ...


class ProcessHost:
    """An engine in a process of its own, killed where it does not end by itself within seconds."""

    def __init__(self, base: BaseModel, options: EngineOptions) -> None:
        self._arguments = {
            "folder": str(base.folder.resolve()),
            "name": base.name,
            "fingerprint": base.fingerprint,
            "options": dataclasses.asdict(options),
        }
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def process_id(self) -> int | None:
        """The engine's process id while it lives."""
        process = self._process
        return process.pid if process is not None and process.poll() is None else None

    def start(self) -> socket.socket:
        ours, theirs = socket.socketpair()
        with theirs:
            # -P: the installed packages, not what happens to lie in the working directory.
            self._process = subprocess.Popen(
                [
                    sys.executable,
                    "-P",
                    "-m",
                    "service.engines.local.child",
                    str(theirs.fileno()),
                    json.dumps(self._arguments),
                ],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                env={**_ENVIRONMENT, **os.environ},
                start_new_session=True,  # a terminal's Ctrl-C is for the service, which drains the engine
            )
        return ours

    def stop(self) -> None:
        process, self._process = self._process, None
        if process is None:
            return
        try:
            process.wait(_STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
