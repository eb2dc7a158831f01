"""An engine in a thread of this process, for training and tests; the same messages, the same socket."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable

from service.engines.local.engine import EngineCore
from service.engines.local.loop import serve


class ThreadHost:
    """Runs what `load` returns in a thread; a Host like `process.ProcessHost`."""

    def __init__(self, load: Callable[[], EngineCore]) -> None:
        self._load = load
        self._thread: threading.Thread | None = None

    def start(self) -> socket.socket:
        ours, theirs = socket.socketpair()
        self._thread = threading.Thread(target=serve, args=(theirs, self._load), name="softcue-engine", daemon=True)
        self._thread.start()
        return ours

    def stop(self) -> None:
        thread, self._thread = self._thread, None
        if thread is not None:
            thread.join()
