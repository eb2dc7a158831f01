"""Commands that publish and move names.

apply-task, publish, ensemble, remote, shutdown, alias, rollback, delete, load.
"""

from __future__ import annotations

from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from prompt_store.access import command_line_principal
from prompt_store.commands.options import (
    DEFAULT_STORE,
    AliasArgument,
    AliasOption,
    ExpectOption,
    JsonOption,
    NotesOption,
    ReasonOption,
    SelectorArgument,
    ShutdownOption,
    StoreOption,
    TagsOption,
    TaskArgument,
    opened,
    refusals,
)
from prompt_store.commands.printing import print_json, print_table, shutdown_in_words, version_document
from prompt_store.errors import BaseMismatch, InvalidArtifact

if TYPE_CHECKING:
    from prompt_store.prompts.registry import Published, Registry

app = typer.Typer()


@app.command("apply-task")
def apply_task(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="The task as TOML.")],
    store: StoreOption = DEFAULT_STORE,
    as_json: JsonOption = False,
) -> None:
    """Add a task, or a new revision of it."""
    from prompt_store.prompts.task import load_task

    with refusals():
        task = load_task(file)  # before the store, which is made only for a task that can be read
    with opened(store, create=True) as registry:
        revision = registry.apply_task(task, command_line_principal())
        if as_json:
            print_json({"task": revision.task.name, "revision": revision.number, "digest": revision.digest})
        else:
            typer.echo(f"task {revision.task.name} is at revision {revision.number} ({revision.digest[:12]})")


@app.command()
def publish(
    task: TaskArgument,
    file: Annotated[Path, typer.Argument(metavar="FILE", help="A soft prompt or prefix as safetensors.")],
    base: Annotated[
        str | None, typer.Option(metavar="NAME_OR_FINGERPRINT", help="Its base model, if the file does not say.")
    ] = None,
    alias: AliasOption = None,
    notes: NotesOption = None,
    tags: TagsOption = None,
    report: Annotated[Path | None, typer.Option(metavar="FILE", help="Its evaluation report as JSON.")] = None,
    reason: ReasonOption = "",
    store: StoreOption = DEFAULT_STORE,
    as_json: JsonOption = False,
) -> None:
    """Publish a soft prompt or prefix as a new version of a task."""
    from prompt_store.prompts.artifact import read_artifact, read_report
    from prompt_store.prompts.registry import NewVersion

    with opened(store) as registry:
        artifact = read_artifact(file)
        if artifact.task is not None and artifact.task != task:
            raise InvalidArtifact(f"{file}: was made for task {artifact.task!r}, not {task!r}; publish it for its own")
        published = registry.publish(
            NewVersion(
                task=task,
                payload_content=artifact.prompt,
                base_fingerprint=base_of(registry, str(file), artifact.base_fingerprint, base),
                provenance=artifact.provenance,
                report=read_report(report) if report is not None else None,
                notes=notes if notes is not None else artifact.notes,
                tags=tuple(tags or ()),
            ),
            alias,
            reason,
            command_line_principal(),
        )
        print_published(str(file), published, alias, registry, as_json)


@app.command()
def ensemble(
    task: TaskArgument,
    members: Annotated[list[str], typer.Argument(metavar="SELECTOR...", help="Soft-prompt versions of the task.")],
    vote: Annotated[str, typer.Option(metavar="majority|mean_logprob", help="How one answer comes of theirs.")] = (
        "majority"
    ),
    alias: AliasOption = None,
    notes: NotesOption = None,
    tags: TagsOption = None,
    reason: ReasonOption = "",
    store: StoreOption = DEFAULT_STORE,
    as_json: JsonOption = False,
) -> None:
    """Publish versions that answer together as a new version of their task."""
    from prompt_store.prompts.registry import NewVersion
    from prompt_store.prompts.version import parse_ensemble

    with opened(store) as registry:
        versions = [registry.version(task, selector) for selector in members]
        payload = parse_ensemble([version.digest for version in versions], versions[0].base_fingerprint, vote)
        new = NewVersion(task=task, payload_content=payload, notes=notes or "", tags=tuple(tags or ()))
        published = registry.publish(new, alias, reason, command_line_principal())
        print_published("the ensemble", published, alias, registry, as_json)


@app.command()
def remote(
    task: TaskArgument,
    provider: Annotated[str, typer.Argument(metavar="PROVIDER", help="As the backend that answers calls it.")],
    model: Annotated[str, typer.Argument(metavar="MODEL", help="As the provider calls it, such as ft:gpt:acme::1.")],
    shutdown_date: ShutdownOption = None,
    alias: AliasOption = None,
    notes: NotesOption = None,
    tags: TagsOption = None,
    reason: ReasonOption = "",
    store: StoreOption = DEFAULT_STORE,
    as_json: JsonOption = False,
) -> None:
    """Publish a model at a provider as a new version of a task."""
    from prompt_store.prompts.registry import NewVersion
    from prompt_store.prompts.version import parse_remote_model

    with opened(store) as registry:
        new = NewVersion(
            task=task,
            payload_content=parse_remote_model(provider, model),
            notes=notes or "",
            tags=tuple(tags or ()),
            shutdown_date=shutdown_date.date() if shutdown_date is not None else None,
        )
        published = registry.publish(new, alias, reason, command_line_principal())
        print_published(f"{model} at {provider}", published, alias, registry, as_json)
        known = {backend.provider for backend in registry.backends() if backend.provider is not None}
        if provider not in known and not as_json:
            others = f", only of {', '.join(sorted(known))}" if known else ""
            typer.echo(
                f"no service on this store has a backend of provider {provider!r} yet{others}: give one "
                f'`provider = "{provider}"` in [backends]'
            )


@app.command()
def shutdown(
    task: TaskArgument,
    selector: SelectorArgument,
    day: Annotated[
        datetime | None, typer.Argument(metavar="[DATE]", formats=["%Y-%m-%d"], help="The first day without it.")
    ] = None,
    clear: Annotated[bool, typer.Option("--clear", help="Take the date back instead.")] = False,
    store: StoreOption = DEFAULT_STORE,
    as_json: JsonOption = False,
) -> None:
    """Note when the provider shuts the model behind a version down."""
    if (day is None) != clear:
        raise typer.BadParameter("give either a DATE such as 2027-01-31 or --clear")
    with opened(store) as registry:
        noted = registry.note_shutdown(
            task, selector, day.date() if day is not None else None, command_line_principal()
        )
        if as_json:
            print_json(version_document(noted, []))
            return
        said = shutdown_in_words(noted) if noted.shutdown_date is not None else "no shutdown is known"
        typer.echo(f"{task}@{noted.label}: {said}")


@app.command("alias")
def move_alias(
    task: TaskArgument,
    alias: AliasArgument,
    selector: Annotated[
        str | None, typer.Argument(metavar="[SELECTOR]", help="A number like v7, a digest or an alias.")
    ] = None,
    remove: Annotated[bool, typer.Option("--remove", help="Take the alias away instead.")] = False,
    expect: ExpectOption = None,
    reason: ReasonOption = "",
    store: StoreOption = DEFAULT_STORE,
    as_json: JsonOption = False,
) -> None:
    """Point an alias at a version."""
    if (selector is None) != remove:
        raise typer.BadParameter("give either a SELECTOR to point it at or --remove")
    with opened(store) as registry:
        given = {"expected": _expected(expect), "reason": reason, "principal": command_line_principal()}
        if selector is None:
            registry.remove_alias(task, alias, **given)
            if as_json:
                print_json({"task": task, "alias": alias, "version": None, "digest": None})
            else:
                typer.echo(f"{task}@{alias} is gone; `softcue prompts history {task} {alias}` keeps where it pointed")
            return
        moved = registry.move_alias(task, alias, selector, **given)
        if as_json:
            print_json({"task": task, "alias": alias, "version": f"v{moved.number}", "digest": moved.version})
        else:
            typer.echo(f"{task}@{alias} is v{moved.number} ({moved.version[:12]})")


@app.command()
def rollback(
    task: TaskArgument,
    alias: AliasArgument,
    expect: ExpectOption = None,
    reason: ReasonOption = "",
    store: StoreOption = DEFAULT_STORE,
    as_json: JsonOption = False,
) -> None:
    """Point an alias back at what it pointed at before; again, at what was before that."""
    with opened(store) as registry:
        before = registry.version(task, alias)
        moved = registry.rollback_alias(
            task, alias, expected=_expected(expect), reason=reason, principal=command_line_principal()
        )
        if as_json:
            document = {"task": task, "alias": alias, "version": f"v{moved.number}", "digest": moved.version}
            print_json({**document, "previous_version": before.label, "previous": before.digest})
            return
        typer.echo(f"{task}@{alias} is v{moved.number} ({moved.version[:12]}) again, no longer {before.label}")
        typer.echo(f"`softcue prompts alias {task} {alias} {before.label}` moves it forward again")


@app.command()
def delete(
    task: TaskArgument,
    selector: SelectorArgument,
    reason: ReasonOption = "",
    store: StoreOption = DEFAULT_STORE,
    as_json: JsonOption = False,
) -> None:
    """Delete a version that no alias, route or ensemble needs. Its number is not given again."""
    with opened(store) as registry:
        version = registry.delete_version(task, selector, reason=reason, principal=command_line_principal())
        if as_json:
            print_json({"task": task, "version": version.label, "digest": version.digest, "deleted": True})
        else:
            typer.echo(f"{task}@{version.label} ({version.digest[:12]}) is deleted")


@app.command()
def load(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="Its subfolders hold task.toml.")],
    alias: Annotated[str, typer.Option(help="Set where a task has no such alias yet.")] = "production",
    store: StoreOption = DEFAULT_STORE,
    as_json: JsonOption = False,
) -> None:
    """Load a folder of tasks and tuned prompts, leaving alone what the store already has."""
    from dataclasses import asdict

    from prompt_store.bundle import load_bundle

    with opened(store, create=True) as registry:
        loaded = load_bundle(registry, folder, alias, command_line_principal())
        if as_json:
            print_json([asdict(entry) for entry in loaded])
            return
        if not loaded:
            typer.echo(f"{folder} holds no task; its subfolders should hold task.toml")
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
        print_table(("task", "definition", "version", f"alias {alias}", "skipped"), rows)


def base_of(registry: Registry, source: str, found: str | None, named: str | None) -> str:
    """The fingerprint of the base that a file is for, from what it says and from `--base`; both must agree."""
    if named is not None:
        chosen = registry.find_base(named)
        if found is not None and found != chosen.fingerprint:
            raise BaseMismatch(
                f"{source}: was made for base {found[:12]}, not {chosen.name!r} ({chosen.fingerprint[:12]}); "
                "leave --base out, or retrain it on that base"
            )
        return chosen.fingerprint
    if found is None:
        known = ", ".join(base.name for base in registry.bases()) or "none; `softcue register-base FOLDER` adds one"
        raise InvalidArtifact(
            f"{source}: does not say which base model it was made for; name it with --base (the store knows {known})"
        )
    return found


def print_published(what: str, published: Published, alias: str | None, registry: Registry, as_json: bool) -> None:
    version = published.version
    if as_json:
        aliases = [entry.name for entry in registry.aliases(version.task) if entry.version == version.digest]
        print_json({**version_document(version, aliases), "created": published.created})
        return
    fact = "published as" if published.created else "is already"
    typer.echo(f"{what} {fact} {version.task}@{version.label} ({version.digest[:12]})")
    if alias is not None:
        typer.echo(f"{version.task}@{alias} is {version.label}")
    else:
        typer.echo(
            f"ask for it as {version.task}@{version.label}, or point an alias at it: "
            f"`softcue prompts alias {version.task} ALIAS {version.label}`"
        )


def _expected(label: str | None) -> Any:
    from prompt_store.prompts.registry import UNSET

    return UNSET if label is None else label
