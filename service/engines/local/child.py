"""The engine process: `python -m service.engines.local.child FD ARGUMENTS`, started by `process.ProcessHost` alone."""

from __future__ import annotations

import json
import logging
import signal
import socket
import sys

from service.engines.base_model import open_base_model
from service.engines.errors import BaseModelError
from service.engines.local.engine import EngineCore
from service.engines.local.loop import serve
from service.engines.local.options import EngineOptions


def main() -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # a supervisor may send it to all; the service drains, then ends us
    logging.basicConfig(level=logging.WARNING, format="engine: %(levelname)s %(name)s: %(message)s", stream=sys.stderr)
    connection = socket.socket(fileno=int(sys.argv[1]))
    arguments = json.loads(sys.argv[2])

    def load() -> EngineCore:
        base = open_base_model(arguments["folder"], name=arguments["name"])
        if base.fingerprint != arguments["fingerprint"]:
            raise BaseModelError(f"the files in {base.folder} changed while the service ran; restart the service")
        return EngineCore.load(base, EngineOptions(**arguments["options"]))

    serve(connection, load)


if __name__ == "__main__":
    main()
