"""Commands that bring prompts in and out: import, export, push, pull."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from prompt_store.access import command_line_principal
from prompt_store.commands.moving import base_of, print_published
from prompt_store.commands.options import (
    DEFAULT_STORE,
    AliasOption,
    JsonOption,
    NotesOption,
    ReasonOption,
    StoreOption,
    TagsOption,
    TaskArgument,
    opened,
)
from prompt_store.commands.printing import print_json, print_table
from prompt_store.errors import InvalidArtifact
from prompt_store.names import TaskModel, parse_model_name

if TYPE_CHECKING:
    from prompt_store.interchange.imported import Imported

app = typer.Typer()


@app.command("import")
def import_prompt(
    task: TaskArgument,
    path: Annotated[
        Path, typer.Argument(metavar="PATH", help="A PEFT adapter (folder or zip), a .npy, or our own safetensors.")
    ],
    base: Annotated[
        str | None, typer.Option(metavar="NAME_OR_FINGERPRINT", help="The base model it was tuned on.")
    ] = None,
    task_index: Annotated[
        int | None, typer.Option(min=0, help="Which task of a MULTITASK_PROMPT_TUNING adapter.")
    ] = None,
    alias: AliasOption = None,
    notes: NotesOption = None,
    tags: TagsOption = None,
    reason: ReasonOption = "",
    store: StoreOption = DEFAULT_STORE,
    as_json: JsonOption = False,
) -> None:
    """Publish a prompt that other software tuned, as a new version of a task."""
    from prompt_store.interchange.importing import read_import
    from prompt_store.prompts.registry import NewVersion

    with opened(store) as registry:
        found = read_import(path, task_index=task_index)
        if found.task is not None and found.task != task:
            raise InvalidArtifact(f"{path}: was made for task {found.task!r}, not {task!r}; import it for its own")
        fingerprint = base_of(registry, str(path), found.base_fingerprint, base)
        remarks = tuple(filter(None, (found.note, _other_name(found, registry.find_base(fingerprint).name))))
        new = NewVersion(
            task=task,
            payload_content=found.prompt,
            base_fingerprint=fingerprint,
            provenance=found.provenance,
            notes="; ".join(filter(None, (notes if notes is not None else found.notes, _origin(found), *remarks))),
            tags=tuple(tags or ()),
        )
        published = registry.publish(new, alias, reason or f"imported from {path}", command_line_principal())
        print_published(f"{path} ({found.format})", published, alias, registry, as_json)
        if not as_json:
            for remark in remarks:
                typer.echo(f"note: {remark}")


def _origin(found: Imported) -> str:
    return f"imported from {found.format}" + (f" of {found.base_name}" if found.base_name else "")


def _other_name(found: Imported, chosen: str) -> str:
    """What there is to say where a file names another base than the chosen one; sizes are all that could be checked."""
    if found.base_name is None or Path(found.base_name).name.lower() == Path(chosen).name.lower():
        return ""
    return f"it names {found.base_name!r} as its base, and was imported for {chosen!r}, whose sizes it fits"


@app.command()
def export(
    name: Annotated[str, typer.Argument(metavar="TASK@SELECTOR", help="The version to write.")],
    path: Annotated[Path, typer.Argument(metavar="PATH", help="The file, or for PEFT the folder, to write.")],
    format: Annotated[
        str, typer.Option(metavar="safetensors|peft|cartridge|npy", help="What to write it as.")
    ] = "safetensors",
    base_path: Annotated[
        str | None,
        typer.Option("--base-path", help="What a PEFT adapter shall call its base; else the base's name here."),
    ] = None,
    store: StoreOption = DEFAULT_STORE,
    as_json: JsonOption = False,
) -> None:
    """Write a version's soft prompt or prefix for other software."""
    from prompt_store.interchange.exporting import write_export
    from prompt_store.prompts.version import payload_tensors

    model = parse_model_name(name)
    if not isinstance(model, TaskModel) or model.selector is None:
        raise typer.BadParameter("give a version as TASK@SELECTOR, such as support_intents@production")
    with opened(store) as registry:
        version = registry.version(model.task, model.selector)
        if not payload_tensors(version.payload):
            raise InvalidArtifact(
                f"{version.task}@{version.label} is of kind {version.payload.kind!r} and has no tensor to write; "
                "`softcue prompts push` takes every kind"
            )
        base = registry.find_base(version.base_fingerprint or "")
        write_export(
            path,
            registry.prompt(version.digest),
            format,
            base_name=base_path or base.name,
            task=version.task,
            base_fingerprint=base.fingerprint,
            provenance=version.provenance,
            notes=version.notes,
        )
        if as_json:
            print_json({"task": version.task, "version": version.label, "path": str(path), "format": format})
            return
        typer.echo(f"{version.task}@{version.label} is written to {path} as {format}")
        if format in ("peft", "cartridge"):
            typer.echo(f"`PeftModel.from_pretrained(model, {str(path)!r})` loads it onto {base_path or base.name}")


@app.command()
def push(
    name: Annotated[str, typer.Argument(metavar="TASK[@SELECTOR]", help="A task's versions, or one of them.")],
    place: Annotated[str, typer.Argument(metavar="PLACE", help="A folder, or hf://OWNER/REPOSITORY.")],
    public: Annotated[bool, typer.Option("--public", help="Make a new repository public.")] = False,
    store: StoreOption = DEFAULT_STORE,
    as_json: JsonOption = False,
) -> None:
    """Write versions with all that belongs to them to a folder or a Hugging Face repository."""
    from prompt_store.interchange.sharing import parse_place, push

    _draw_bars_on_terminals_alone(as_json)
    task, selector = _task_and_selector(name)
    with opened(store) as registry:
        pushed = push(registry, task, selector, parse_place(place), public=public)
        if as_json:
            print_json(
                {
                    "place": pushed.place,
                    "task": task,
                    "written": [version.digest for version in pushed.written],
                    "present": [version.digest for version in pushed.present],
                    "commit": pushed.commit,
                }
            )
            return
        for what, versions in (("pushed to", pushed.written), ("lies already in", pushed.present)):
            if versions:
                typer.echo(f"{task}@{', '.join(version.label for version in versions)} {what} {place}")
        typer.echo(f"`softcue prompts pull {place} {task}` brings it to another store")


@app.command()
def pull(
    place: Annotated[str, typer.Argument(metavar="PLACE", help="A folder, or hf://OWNER/REPOSITORY[@REVISION].")],
    name: Annotated[
        str | None, typer.Argument(metavar="[TASK[@SELECTOR]]", help="Only this task's versions, or one of them.")
    ] = None,
    alias: AliasOption = None,
    reason: ReasonOption = "",
    store: StoreOption = DEFAULT_STORE,
    as_json: JsonOption = False,
) -> None:
    """Publish what somebody pushed to a folder or a Hugging Face repository, checked against its digests."""
    from prompt_store.interchange.sharing import parse_place, pull

    _draw_bars_on_terminals_alone(as_json)
    task, selector = _task_and_selector(name) if name is not None else (None, None)
    if alias is not None and selector is None:
        raise typer.BadParameter("--alias needs one version: name it as TASK@SELECTOR")
    with opened(store, create=True) as registry:
        pulled = pull(
            registry,
            parse_place(place),
            task,
            selector,
            alias=alias,
            principal=command_line_principal(),
            reason=reason or f"pulled from {place}",
        )
        if as_json:
            print_json(
                [
                    {
                        "task": entry.version.task,
                        "version": entry.version.label,
                        "digest": entry.version.digest,
                        "version_there": entry.label_there,
                        "created": entry.created,
                        "alias": entry.alias,
                    }
                    for entry in pulled
                ]
            )
            return
        rows = [
            (
                entry.version.task,
                entry.version.label,
                entry.label_there,
                entry.version.payload.kind,
                "new" if entry.created else "was here",
                entry.alias or "",
            )
            for entry in pulled
        ]
        print_table(("task", "version", "there", "kind", "", "alias"), rows)
        if alias is None and any(entry.created for entry in pulled):
            last = pulled[-1].version
            typer.echo(
                f"point an alias at one to use it: `softcue prompts alias {last.task} ALIAS {last.label}`; "
                "`--alias` does it at once for a single version"
            )


def _draw_bars_on_terminals_alone(as_json: bool) -> None:
    """huggingface_hub draws its progress on stderr, where nobody looks for it beside JSON or in a log."""
    from huggingface_hub.utils.tqdm import disable_progress_bars

    if as_json or not sys.stderr.isatty():
        disable_progress_bars()


def _task_and_selector(name: str) -> tuple[str, str | None]:
    model = parse_model_name(name)
    if not isinstance(model, TaskModel):
        raise typer.BadParameter(f"{name!r} lives at a provider, not in a store; give TASK or TASK@SELECTOR")
    return model.task, model.selector
