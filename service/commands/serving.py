"""`softcue serve` and `softcue register-base`."""

from __future__ import annotations

import asyncio
import gc
import json
import logging
import shlex
import signal
import socket
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from prompt_store.commands.options import DEFAULT_STORE, JsonOption, StoreOption, opened, refusals, refuse
from prompt_store.commands.printing import print_json

if TYPE_CHECKING:
    from prompt_store.prompts.task import Task
    from prompt_store.routing.backends import BackendDescription
    from service.catalog import Catalog
    from service.routing.plan import Target

Option = typer.Option

# Requests that read or write the store at once; fewer than it lends connections.
_STORE_THREADS = 12

# Between the end of the grace and cutting connections: time to write the last event.
_LAST_WORDS_S = 5


def serve(
    config: Annotated[Path | None, Option(help="TOML file with settings.", show_default=False)] = None,
    host: Annotated[str | None, Option(help="Address to listen on.", show_default="127.0.0.1")] = None,
    port: Annotated[int | None, Option(help="Port to listen on; 0 takes a free one.", show_default="8000")] = None,
    store: Annotated[str | None, Option(help="The prompt store.", show_default=DEFAULT_STORE)] = None,
    base: Annotated[Path | None, Option(help="Folder of the base model.", show_default="examples/base")] = None,
    seed: Annotated[
        Path | None, Option(help="Folder of tasks to put into the store where they are missing.", show_default=False)
    ] = None,
) -> None:
    """Serve the tasks of a prompt store over HTTP."""
    import uvicorn
    from litestar.concurrency import set_asyncio_executor

    from prompt_store.errors import StoreError
    from service.app import create_app
    from service.engines.errors import EngineError
    from service.ledger.journal import JournalUnavailable
    from service.settings import SettingsError, load_settings

    class Server(uvicorn.Server):
        async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
            """Ask the engine to finish first: at the end of the grace, streams get their error before they are cut."""
            print(f"softcue: stopping, running requests have {settings.server.drain_s:g} s to end", file=sys.stderr)
            draining = asyncio.create_task(app.state.drain())
            await super().shutdown(sockets)
            await draining

    given: dict[str, dict[str, Any]] = {
        "server": {"host": host, "port": port},
        "store": {"url": store, "seed": seed},
        "base": {"path": base},
    }
    overrides = {
        section: {key: value for key, value in values.items() if value is not None} for section, values in given.items()
    }
    _log_to_stderr()
    fatal: list[Exception] = []
    try:
        settings = load_settings(config, overrides=overrides)
        listener = _listen(settings.server.host, settings.server.port)
        address = listener.getsockname()

        def failed(error: Exception) -> None:
            fatal.append(error)
            server.should_exit = True

        def ready(catalog: Catalog) -> None:
            # What the start made is there to stay. A collection that walks it holds every request up for 50 ms.
            gc.collect()
            gc.freeze()
            _welcome(catalog, address[0], address[1])

        app = create_app(settings, on_ready=ready, on_fatal=failed)
        server = Server(
            uvicorn.Config(
                app,
                lifespan="on",
                log_config=None,
                access_log=False,
                proxy_headers=False,  # nothing here reads the address of a client
                timeout_graceful_shutdown=round(settings.server.drain_s) + _LAST_WORDS_S,
            )
        )
        signal.signal(signal.SIGTERM, lambda *_: None)  # uvicorn handles it, then raises it again for whoever was there
        # Threads of their own: requests that wait for a busy store leave those of all other requests alone.
        set_asyncio_executor(ThreadPoolExecutor(_STORE_THREADS, thread_name_prefix="softcue-store"))
        print(f"softcue: starting on http://{address[0]}:{address[1]}", file=sys.stderr, flush=True)
        server.run(sockets=[listener])
    except (SettingsError, StoreError, EngineError, JournalUnavailable, OSError) as error:
        fatal.append(error)
    except KeyboardInterrupt:
        pass  # uvicorn raises it again once it has drained; the service has stopped cleanly
    if fatal:
        print(f"softcue: {fatal[0]}", file=sys.stderr)
        raise typer.Exit(1)
    print("softcue: stopped", file=sys.stderr)


def _listen(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # The protocol is named so that asyncio switches off Nagle's delay on what is accepted: 40 ms an answer.
    listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
    except OSError as error:
        listener.close()
        raise OSError(f"cannot listen on {host}:{port}: {error.strerror}; see --port and --host") from error
    return listener


def _log_to_stderr() -> None:
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(levelname)s %(name)s: %(message)s"))
    logging.basicConfig(level=logging.WARNING, handlers=[handler])
    requests = logging.getLogger("softcue.requests")
    lines = logging.StreamHandler(sys.stderr)
    lines.setFormatter(logging.Formatter("%(message)s"))
    requests.addHandler(lines)
    requests.setLevel(logging.INFO)
    requests.propagate = False


def _welcome(catalog: Catalog, host: str, port: int) -> None:
    """Print what is served, and how to ask for it with curl and with the openai client."""
    from prompt_store.errors import StoreError
    from prompt_store.prompts.unreadable import Unreadable

    url = f"http://{'127.0.0.1' if host in ('0.0.0.0', '::') else host}:{port}"
    base = f"base model '{catalog.base_name}', " if catalog.base_name else ""
    print(f"\nSoftcue serves on {url}, {base}backends {', '.join(catalog.backends)}:")
    examples: list[tuple[Task, Target | None]] = []
    lines: list[tuple[str, str, str]] = []
    for name, known in catalog.snapshot.tasks.items():
        labels = {alias: known.versions[digest].label for alias, digest in sorted(known.aliases.items())}
        served = ", ".join(f"{alias} = {label}" for alias, label in labels.items()) or "no version yet"
        if isinstance(known.revision, Unreadable):
            lines.append(("unreadable", name, f"{served:18} {known.revision.reason}"))
            continue
        task = known.revision.task
        lines.append((task.kind, name, f"{served:18} {task.description}"))
        with suppress(StoreError):  # nobody answers it yet
            target = catalog.resolve_task(name, None).target
            if target is None or target.backend:
                examples.append((task, target))
    for kind, name, text in sorted(lines):
        print(f"  {name:20} {kind:9} {text}")
    if not examples:
        print(
            "No task has a version with the alias production yet. Publish one with `softcue tune soft-prompt RECIPE`, "
            "`softcue prompts publish` or `softcue prompts remote`; "
            "`softcue prompts alias TASK production VERSION` names it so.\n",
            flush=True,
        )
        return
    task, target = min(examples, key=lambda example: (example[0].kind, example[0].name))
    name, inputs = task.name, _sample_inputs(catalog, task, target)
    verb = "classify" if task.kind == "classify" else "generate"
    body = shlex.quote(json.dumps({"inputs": inputs}))
    messages = [message.model_dump() for message in task.render(inputs)]
    print(f"""
Ask with curl:
  curl -s {url}/v1/tasks/{name}/{verb} -H 'content-type: application/json' -d {body}

Ask with the openai client:
  from openai import OpenAI
  client = OpenAI(base_url="{url}/v1", api_key="none")
  answer = client.chat.completions.create(model="{name}", messages={messages!r})
  print(answer.choices[0].message.content)

Health {url}/health/ready, metrics {url}/metrics, API description {url}/schema. Ctrl-C stops.
""", flush=True)  # fmt: skip


def _sample_inputs(catalog: Catalog, task: Task, target: Target | None) -> dict[str, str]:
    """Inputs to show: a held-out row of the version's own report, or the fields' names where there is none."""
    from prompt_store.errors import StoreError

    try:
        version = target.version if target is not None else None
        report = catalog.evidence(version.digest).report if version is not None else None
        samples = (report or {}).get("samples", [])
    except StoreError:
        samples = []  # it is only an example
    good = [sample for sample in samples if sample["answered"] == sample["expected"]]
    for sample in [*good, *samples]:
        if set(sample["inputs"]) == set(task.inputs):
            return dict(sample["inputs"])
    return {field: field for field in task.inputs}


def register_base(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="Folder of the base model.")],
    name: Annotated[str | None, Option(help="Name to know it by.", show_default="the folder's")] = None,
    store: StoreOption = DEFAULT_STORE,
    as_json: JsonOption = False,
) -> None:
    """Make a base model known to a store, so that prompts for it can be published before it is served."""
    from dataclasses import asdict

    from prompt_store.access import command_line_principal
    from service.engines.base_model import open_base_model
    from service.engines.errors import EngineError

    with refusals():
        try:
            base = open_base_model(folder, name=name).describe()
        except EngineError as error:
            refuse(str(error))
    with opened(store, create=True) as registry:
        registry.register_base(base, command_line_principal())
        # The first name stays, whatever a later registration calls it.
        known = registry.find_base(base.fingerprint)
        if as_json:
            print_json(asdict(known))
            return
        print(f"the store knows base {known.name!r} by its fingerprint {known.fingerprint[:12]}")
        if name not in (None, known.name):
            print(f"it had that name before, which stays; ask for it as {known.name!r}")
        print(f"`softcue prompts import TASK PATH --base {known.name}` takes a prompt for it")


def backends_of(config: Path) -> list[BackendDescription]:
    """The backends of a settings file, for checking routes against them before any service has them.

    Raises InvalidRoute where the file cannot be used.
    """
    from prompt_store.errors import InvalidRoute
    from service.app import describe_backends
    from service.engines.errors import EngineError
    from service.settings import SettingsError, load_settings

    try:
        return describe_backends(load_settings(config))
    except (SettingsError, EngineError) as error:
        raise InvalidRoute(str(error)) from error
