"""`softcue prompts ...`: the store on the command line. Arguments and printing only.

The store is imported inside the commands, so that `softcue --help` waits neither for SQLAlchemy nor for pydantic.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from prompt_store.access import command_line_principal
from prompt_store.errors import BaseMismatch, InvalidArtifact, StoreError, UnknownTask
from prompt_store.names import RemoteModel, parse_model_name
from prompt_store.prompts.unreadable import Unreadable, UnreadableVersion

if TYPE_CHECKING:
    from prompt_store.prompts.registry import Published, Registry, StoreSnapshot, TaskSnapshot
    from prompt_store.prompts.version import PromptVersion

DEFAULT_STORE = ".softcue/softcue.db"
LINE_WIDTH = 100
PIPED_WIDTH = 200

app = typer.Typer(
    name="prompts", help="Tasks, prompt versions and aliases in the store.", no_args_is_help=True, add_completion=False
)

_BRIEF_REPORT = ("rows", "test_metrics", "gate")

StoreOption = Annotated[
    str, typer.Option("--store", envvar="SOFTCUE_STORE_URL", help="Path or URL of the prompt store.")
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]
TaskArgument = Annotated[str, typer.Argument(metavar="TASK", help="Name of a task.")]


@app.command("list")
def list_versions(
    task: Annotated[str | None, typer.Argument(metavar="[TASK]", help="Only this task's versions.")] = None,
    store: StoreOption = DEFAULT_STORE,
    as_json: JsonOption = False,
) -> None:
    """List versions, newest first, with the aliases that point at them."""
    with _opened(store) as registry:
        snapshot = registry.snapshot()
        if task is not None and task not in snapshot.tasks:
            raise UnknownTask(task, snapshot.tasks)
        names = [task] if task is not None else sorted(snapshot.tasks)
        found = [version for name in names for version in reversed([*snapshot.tasks[name].versions.values()])]
        if as_json:
            _print_json([_version_document(version, snapshot) for version in found])
            return
        rows = [
            (
                version.task,
                version.label,
                ", ".join(snapshot.tasks[version.task].aliases_of(version.digest)),
                version.kind if isinstance(version, UnreadableVersion) else version.payload.kind,
                "" if isinstance(version, Unreadable) else _base_name(version, snapshot),
                version.digest[:8],
                f"{version.created_at:%Y-%m-%d %H:%M}",
                "unreadable: another release wrote it, or it is damaged"
                if isinstance(version, Unreadable)
                else version.notes,
            )
            for version in found
        ]
        _print_table(("task", "version", "aliases", "kind", "base", "digest", "created", "notes"), rows)


@app.command()
def show(
    name: Annotated[str, typer.Argument(metavar="TASK[@SELECTOR]", help="A task, or one version of it.")],
    store: StoreOption = DEFAULT_STORE,
    as_json: JsonOption = False,
) -> None:
    """Show a task, or a version named by alias, number or digest."""
    with _opened(store) as registry:
        model = parse_model_name(name)
        if isinstance(model, RemoteModel):
            raise StoreError(f"{name!r} lives at a provider, not in this store; give TASK or TASK@SELECTOR")
        if model.selector is None:
            revision = registry.task(model.task)
            document = {
                **revision.task.document(),
                "revision": revision.number,
                "digest": revision.digest,
                "created_at": revision.created_at.isoformat(),
                "principal": revision.principal,
                "aliases": {alias.name: f"v{alias.number}" for alias in registry.aliases(model.task)},
                "route": registry.route(model.task).model_dump(mode="json"),
                "versions": len(registry.versions(model.task)),
            }
        else:
            version = registry.version(model.task, model.selector)
            evidence = registry.evidence(version.digest)
            document = {**_version_document(version, registry.snapshot()), **asdict(evidence)}
            if not as_json and document["report"]:
                # What decides; --json has the rest: samples, mistakes, the history of the training.
                brief = {key: document["report"][key] for key in _BRIEF_REPORT if key in document["report"]}
                document["report"] = brief or document["report"]
        _print_document(document, as_json)


@app.command()
def tasks(store: StoreOption = DEFAULT_STORE, as_json: JsonOption = False) -> None:
    """List tasks."""
    with _opened(store) as registry:
        known = [task for _, task in sorted(registry.snapshot().tasks.items())]
        if as_json:
            _print_json([_task_document(task) for task in known])
            return
        rows = [
            (
                task.name,
                "unreadable" if isinstance(task.revision, Unreadable) else task.revision.task.kind,
                "" if isinstance(task.revision, Unreadable) else f"r{task.revision.number}",
                str(len(task.versions)),
                ", ".join(f"{alias}={label}" for alias, label in _alias_labels(task).items()),
                task.revision.reason if isinstance(task.revision, Unreadable) else task.revision.task.description,
            )
            for task in known
        ]
        _print_table(("task", "kind", "revision", "versions", "aliases", "description"), rows)


@app.command("apply-task")
def apply_task(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="The task as TOML.")],
    store: StoreOption = DEFAULT_STORE,
    as_json: JsonOption = False,
) -> None:
    """Add a task, or a new revision of it."""
    from prompt_store.prompts.task import load_task

    with _opened(store, create=True) as registry:
        revision = registry.apply_task(load_task(file), command_line_principal())
        if as_json:
            _print_json({"task": revision.task.name, "revision": revision.number, "digest": revision.digest})
        else:
            typer.echo(f"task {revision.task.name} is at revision {revision.number} ({revision.digest[:12]})")


@app.command()
def publish(
    task: TaskArgument,
    file: Annotated[Path, typer.Argument(metavar="FILE", help="A soft prompt as safetensors.")],
    base: Annotated[
        str | None, typer.Option(metavar="NAME_OR_FINGERPRINT", help="Its base model, if the file does not say.")
    ] = None,
    alias: Annotated[str | None, typer.Option(help="Point this alias at it.")] = None,
    notes: Annotated[str | None, typer.Option(help="Notes kept with the version.")] = None,
    report: Annotated[Path | None, typer.Option(metavar="FILE", help="Its evaluation report as JSON.")] = None,
    reason: Annotated[str, typer.Option(help="Why, for the history.")] = "",
    store: StoreOption = DEFAULT_STORE,
    as_json: JsonOption = False,
) -> None:
    """Publish a soft prompt as a new version of a task."""
    from prompt_store.prompts.artifact import read_artifact, read_report
    from prompt_store.prompts.registry import NewVersion

    with _opened(store) as registry:
        artifact = read_artifact(file)
        if artifact.task is not None and artifact.task != task:
            raise InvalidArtifact(f"{file}: was made for task {artifact.task!r}, not {task!r}; publish it for its own")
        fingerprint = artifact.base_fingerprint
        if base is not None:
            chosen = registry.find_base(base)
            if fingerprint is not None and fingerprint != chosen.fingerprint:
                raise BaseMismatch(
                    f"{file}: was made for base {fingerprint[:12]}, not {chosen.name!r} ({chosen.fingerprint[:12]}); "
                    "leave --base out, or retrain it on that base"
                )
            fingerprint = chosen.fingerprint
        if fingerprint is None:
            raise InvalidArtifact(f"{file}: does not say which base model it was made for; name it with --base")
        published = registry.publish(
            NewVersion(
                task=task,
                payload_content=artifact.prompt,
                base_fingerprint=fingerprint,
                provenance=artifact.provenance,
                report=read_report(report) if report is not None else None,
                notes=notes if notes is not None else artifact.notes,
            ),
            alias,
            reason,
            command_line_principal(),
        )
        _print_published(str(file), published, alias, registry, as_json)


@app.command()
def ensemble(
    task: TaskArgument,
    members: Annotated[list[str], typer.Argument(metavar="SELECTOR...", help="Soft-prompt versions of the task.")],
    vote: Annotated[str, typer.Option(metavar="majority|mean_logprob", help="How one answer comes of theirs.")] = (
        "majority"
    ),
    alias: Annotated[str | None, typer.Option(help="Point this alias at it.")] = None,
    notes: Annotated[str, typer.Option(help="Notes kept with the version.")] = "",
    reason: Annotated[str, typer.Option(help="Why, for the history.")] = "",
    store: StoreOption = DEFAULT_STORE,
    as_json: JsonOption = False,
) -> None:
    """Publish versions that answer together as a new version of their task."""
    from prompt_store.prompts.registry import NewVersion
    from prompt_store.prompts.version import parse_ensemble

    with _opened(store) as registry:
        versions = [registry.version(task, selector) for selector in members]
        payload = parse_ensemble([version.digest for version in versions], versions[0].base_fingerprint, vote)
        published = registry.publish(
            NewVersion(task=task, payload_content=payload, notes=notes), alias, reason, command_line_principal()
        )
        _print_published("the ensemble", published, alias, registry, as_json)


@app.command("alias")
def move_alias(
    task: TaskArgument,
    alias: Annotated[str, typer.Argument(metavar="ALIAS", help="Such as production or candidate.")],
    selector: Annotated[str, typer.Argument(metavar="SELECTOR", help="A number like v7, a digest or an alias.")],
    expect: Annotated[
        str | None, typer.Option(metavar="vN", help="Only if the alias points at this version now.")
    ] = None,
    reason: Annotated[str, typer.Option(help="Why, for the history.")] = "",
    store: StoreOption = DEFAULT_STORE,
    as_json: JsonOption = False,
) -> None:
    """Point an alias at a version."""
    from prompt_store.prompts.registry import UNSET

    with _opened(store) as registry:
        moved = registry.move_alias(
            task,
            alias,
            selector,
            expected=UNSET if expect is None else expect,
            reason=reason,
            principal=command_line_principal(),
        )
        if as_json:
            _print_json({"task": task, "alias": alias, "version": f"v{moved.number}", "digest": moved.version})
        else:
            typer.echo(f"{task}@{alias} is v{moved.number} ({moved.version[:12]})")


@app.command()
def history(
    task: TaskArgument,
    alias: Annotated[str, typer.Argument(metavar="ALIAS", help="Such as production or candidate.")],
    store: StoreOption = DEFAULT_STORE,
    as_json: JsonOption = False,
) -> None:
    """Show every move of an alias: who, when, why."""
    with _opened(store) as registry:
        moves = registry.alias_history(task, alias)
        labels = {version.digest: version.label for version in registry.versions(task)}

        def label(digest: str | None) -> str:
            return "" if digest is None else labels.get(digest, digest[:12])

        if as_json:
            _print_json(
                [
                    {
                        "sequence": move.sequence,
                        "at": move.at.isoformat(),
                        "principal": move.principal,
                        "previous": move.previous,
                        "previous_version": label(move.previous) or None,
                        "target": move.target,
                        "target_version": label(move.target) or None,
                        "reason": move.reason,
                    }
                    for move in moves
                ]
            )
            return
        rows = [
            (f"{move.at:%Y-%m-%d %H:%M:%S}", move.principal, label(move.previous), label(move.target), move.reason)
            for move in moves
        ]
        _print_table(("when (UTC)", "who", "from", "to", "why"), rows)


@app.command()
def load(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="Its subfolders hold task.toml.")],
    alias: Annotated[str, typer.Option(help="Set where a task has no such alias yet.")] = "production",
    store: StoreOption = DEFAULT_STORE,
    as_json: JsonOption = False,
) -> None:
    """Load a folder of tasks and tuned prompts, leaving alone what the store already has."""
    from prompt_store.bundle import load_bundle

    with _opened(store, create=True) as registry:
        loaded = load_bundle(registry, folder, alias, command_line_principal())
        if as_json:
            _print_json([asdict(entry) for entry in loaded])
            return
        rows = [
            (
                entry.task,
                "added" if entry.task_applied else "kept",
                f"{entry.version or ''}{' (new)' if entry.version_created else ''}",
                "set" if entry.alias_set else "kept",
                entry.skipped or "",
            )
            for entry in loaded
        ]
        _print_table(("task", "definition", "version", f"alias {alias}", "skipped"), rows)


@contextmanager
def _opened(store: str, *, create: bool = False) -> Iterator[Registry]:
    """A registry; whatever the store refuses becomes one red line and exit code 1."""
    from prompt_store.database import Database
    from prompt_store.prompts.registry import Registry

    try:
        with Database.open(store, create=create) as database:
            yield Registry(database)
    except StoreError as error:
        typer.secho(" ".join(str(error).split()), fg=typer.colors.RED, err=True)
        raise typer.Exit(1) from None


def _print_published(what: str, published: Published, alias: str | None, registry: Registry, as_json: bool) -> None:
    version = published.version
    if as_json:
        evidence = registry.evidence(version.digest)
        document = {**_version_document(version, registry.snapshot()), **asdict(evidence)}
        _print_json({**document, "created": published.created})
        return
    fact = "published as" if published.created else "is already"
    typer.echo(f"{what} {fact} {version.task}@{version.label} ({version.digest[:12]})")
    if alias is not None:
        typer.echo(f"{version.task}@{alias} is {version.label}")


def _alias_labels(task: TaskSnapshot) -> dict[str, str]:
    return {alias: task.versions[digest].label for alias, digest in sorted(task.aliases.items())}


def _task_document(task: TaskSnapshot) -> dict[str, Any]:
    revision = task.revision
    document: dict[str, Any] = {"name": task.name}
    if isinstance(revision, Unreadable):
        document["unreadable"] = revision.reason
    else:
        document |= {
            "kind": revision.task.kind,
            "revision": revision.number,
            "digest": revision.digest,
            "description": revision.task.description,
        }
    return {**document, "versions": len(task.versions), "aliases": _alias_labels(task)}


def _base_name(version: PromptVersion, snapshot: StoreSnapshot) -> str:
    base = snapshot.bases.get(version.base_fingerprint or "")
    return base.name if base is not None else ""


def _version_document(version: PromptVersion | UnreadableVersion, snapshot: StoreSnapshot) -> dict[str, Any]:
    aliases = snapshot.tasks[version.task].aliases_of(version.digest)
    document = (
        {**asdict(version), "created_at": version.created_at.isoformat()}
        if isinstance(version, Unreadable)
        else version.model_dump(mode="json")
    )
    return {"version": version.label, "aliases": aliases, **document}


def _print_json(value: Any) -> None:
    typer.echo(json.dumps(value, indent=2, ensure_ascii=False))


def _print_document(document: dict[str, Any], as_json: bool) -> None:
    if as_json:
        _print_json(document)
        return
    rows = [(key, _in_words(value)) for key, value in document.items() if value not in (None, "", [], {})]
    _print_table(("", ""), rows)


def _in_words(value: Any) -> str:
    if isinstance(value, str):
        return value
    line = json.dumps(value, ensure_ascii=False)
    return line if len(line) <= LINE_WIDTH else json.dumps(value, indent=2, ensure_ascii=False)


def _print_table(headers: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console()
    if not console.is_terminal:
        # Nobody's terminal: nothing needs to fit.
        console = Console(width=PIPED_WIDTH)
    table = Table(box=SIMPLE_HEAD, show_header=any(headers))
    for place, header in enumerate(headers):
        table.add_column(header, overflow="fold", no_wrap=place < len(headers) - 1)
    for row in rows:
        # As Text: names and notes are not markup.
        table.add_row(*(Text(cell) for cell in row))
    console.print(table)
