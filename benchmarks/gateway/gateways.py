"""The provider and the gateways before it, each a whole process, and how each is asked.

Peers are taken from build/peers-gateway, or from the folder that SOFTCUE_BENCH_GATEWAYS names.
"""

from __future__ import annotations

import json
import os
import secrets
import socket
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.engine.servers import ROOT, Server
from benchmarks.gateway.load import Request
from benchmarks.gateway.provider import FIRST_WORD
from prompt_store.access import ANONYMOUS
from prompt_store.database import Database
from prompt_store.prompts.registry import NewVersion, Registry
from prompt_store.prompts.task import parse_task
from prompt_store.prompts.version import RemoteModelPayload
from prompt_store.routing.routes import DEFAULT_ALIAS

PEERS = Path(os.environ.get("SOFTCUE_BENCH_GATEWAYS", ROOT / "build" / "peers-gateway"))
BASE_FOLDER = ROOT / "examples" / "base"
MODEL = "m"  # as the provider knows it, and both peers
TASK = "remote"
_KEY = "benchmark"  # which the provider does not look at
_QUESTION = "Which planet is nearest to the sun, and has it a moon?"


class Missing(Exception):
    """A peer is not installed."""


@dataclass(frozen=True)
class Side:
    """A server that answers chat completions: under which name it knows the model, and what it wants in the headers."""

    name: str
    server: Server
    model: str
    headers: Mapping[str, str]

    def request(self, *, stream: bool) -> Request:
        body: dict[str, Any] = {"model": self.model, "messages": [{"role": "user", "content": _QUESTION}]}
        if stream:
            body |= {"stream": True, "stream_options": {"include_usage": True}}
        return Request(post("/v1/chat/completions", {**body, "max_tokens": 32}, self.headers), FIRST_WORD.encode())


def post(path: str, body: Mapping[str, Any], headers: Mapping[str, str]) -> bytes:
    """A POST of JSON as bytes."""
    data = json.dumps(body).encode()
    fields = {"host": "127.0.0.1", "content-type": "application/json", "content-length": str(len(data)), **headers}
    lines = [f"POST {path} HTTP/1.1", *(f"{name}: {value}" for name, value in fields.items())]
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + data


@contextmanager
def on_cores(cores: set[int]) -> Iterator[None]:
    """What is started inside stays on these cores."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, cores)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def start_provider() -> Side:
    """The provider itself, asked directly. Raises ServerFailed."""
    port = free_port()
    command = [sys.executable, "-m", "benchmarks.gateway.provider", str(port)]
    server = Server("gateway-provider", command, os.environ, port, "/", ROOT)
    return Side("direct", server, MODEL, {"authorization": f"Bearer {_KEY}"})


def start_softcue(provider_port: int, folder: Path, *, local_engine: bool = False) -> Side:
    """`softcue serve` with the provider as a backend and a task that its model answers; logs and metrics as always.

    With `local_engine` it serves the examples' base model beside it. Raises ServerFailed.
    """
    folder.mkdir()
    with Database.open(folder / "store.db") as database:
        registry = Registry(database)
        task = {"name": TASK, "kind": "generate", "inputs": ["text"]}
        registry.apply_task(parse_task({**task, "messages": [{"role": "user", "content": "{text}"}]}), ANONYMOUS)
        version = NewVersion(TASK, RemoteModelPayload(provider="provider", model=MODEL))
        registry.publish(version, DEFAULT_ALIAS, "benchmark", ANONYMOUS)
    settings = folder / "softcue.toml"
    settings.write_text(
        f"""
[store]
url = "store.db"

[base]
path = {json.dumps(str(BASE_FOLDER))}

[engine]
enabled = {json.dumps(local_engine)}

[backends.provider]
kind = "openai_compatible"
flavour = "other"
url = "http://127.0.0.1:{provider_port}/v1"
key_env = "PROVIDER_KEY"
""",
        "utf-8",
    )
    port = free_port()
    command = [sys.executable, "-m", "softcue", "serve", "--config", str(settings), "--port", str(port)]
    environment = {**os.environ, "PROVIDER_KEY": _KEY}
    name = "softcue-local" if local_engine else "softcue"
    return Side(name, Server(f"gateway-{name}", command, environment, port, "/health/ready", ROOT), TASK, {})


def start_litellm(provider_port: int, folder: Path) -> Side:
    """LiteLLM's proxy, one worker, as its documentation has it for production, without a database and callbacks.

    Raises ServerFailed, or Missing where it is not installed.
    """
    program = PEERS / "litellm" / "bin" / "litellm"
    if not program.is_file():
        raise Missing(f"LiteLLM is not in {PEERS}; `make bench-gateway-peers` installs it")
    model = {"model": f"openai/{MODEL}", "api_base": f"http://127.0.0.1:{provider_port}/v1", "api_key": _KEY}
    settings = {
        "model_list": [{"model_name": MODEL, "litellm_params": model}],
        "litellm_settings": {"set_verbose": False, "json_logs": True, "request_timeout": 600},
    }
    config = folder / "litellm.yaml"
    config.write_text(json.dumps(settings), "utf-8")  # which is YAML too
    master_key = f"sk-{secrets.token_hex(32)}"  # without one it does not start
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | {
        "LITELLM_MASTER_KEY": master_key,
        "LITELLM_MODE": "PRODUCTION",
        "LITELLM_LOG": "ERROR",
        "LITELLM_LOCAL_MODEL_COST_MAP": "True",
    }
    port = free_port()
    command = [str(program), "--config", str(config), "--host", "127.0.0.1", "--port", str(port), "--num_workers", "1"]
    server = Server("gateway-litellm", command, environment, port, "/health/liveliness", folder)
    return Side("litellm", server, MODEL, {"authorization": f"Bearer {master_key}"})


def start_portkey(provider_port: int, folder: Path) -> Side:
    """Portkey's gateway, which is told of the provider by headers. Raises ServerFailed, or Missing."""
    program = PEERS / "portkey" / "node_modules" / "@portkey-ai" / "gateway" / "build" / "start-server.js"
    if not program.is_file():
        raise Missing(f"Portkey is not in {PEERS}; `make bench-gateway-peers` installs it")
    port = free_port()
    command = ["node", str(program), f"--port={port}", "--headless"]
    server = Server("gateway-portkey", command, {**os.environ, "NODE_ENV": "production"}, port, "/", folder)
    headers = {"x-portkey-provider": "openai", "x-portkey-custom-host": f"http://127.0.0.1:{provider_port}/v1"}
    return Side("portkey", server, MODEL, {**headers, "authorization": f"Bearer {_KEY}"})


PEER_STARTS = {"litellm": start_litellm, "portkey": start_portkey}


def free_port() -> int:
    """A port of the loopback interface that nobody listens on now."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])
