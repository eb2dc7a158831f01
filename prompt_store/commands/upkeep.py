"""Commands that keep the store whole: verify, gc, backup, restore."""

from __future__ import annotations

import re
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from prompt_store.access import command_line_principal
from prompt_store.commands.options import (
    DEFAULT_STORE,
    JsonOption,
    ReasonOption,
    StoreOption,
    opened,
    refusals,
)
from prompt_store.commands.printing import counted, print_json, print_table, size

if TYPE_CHECKING:
    from prompt_store.upkeep.collecting import Collection
    from prompt_store.upkeep.problems import Checked

app = typer.Typer()

_PERIOD = re.compile(r"(\d{1,6})([dhm])")
_UNITS = {"d": "days", "h": "hours", "m": "minutes"}


@app.command()
def verify(store: StoreOption = DEFAULT_STORE, as_json: JsonOption = False) -> None:
    """Hash everything again and follow every reference; name what is damaged. Exit code 1 where anything is."""
    from dataclasses import asdict

    from prompt_store.upkeep.verifying import Checked, verify

    with opened(store) as registry:
        checked = Checked()
        problems = []
        for problem in verify(registry.database, checked):
            problems.append(problem)
            if not as_json:
                typer.secho(f"{problem.kind}: {problem}", fg=typer.colors.RED, err=True)
                if problem.versions:
                    typer.echo(f"  concerns {', '.join(problem.versions)}", err=True)
        if as_json:
            document = {"whole": not problems, "checked": asdict(checked)}
            print_json({**document, "problems": [asdict(problem) for problem in problems]})
        else:
            typer.echo(f"{_in_words(checked)}: {counted(len(problems), 'problem') if problems else 'whole'}")
    if problems:
        raise typer.Exit(1)


@app.command()
def backup(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="A new file; it is a store of its own.")],
    store: StoreOption = DEFAULT_STORE,
    as_json: JsonOption = False,
) -> None:
    """Write the whole store, as of one moment, to one file, and check it."""
    from dataclasses import asdict

    from prompt_store.upkeep.backup import back_up_store

    with opened(store) as registry:
        made = back_up_store(registry.database, file)
        if as_json:
            print_json({"file": str(file), "size_bytes": made.size_bytes, **asdict(made.checked)})
            return
        typer.echo(
            f"{file} holds {_in_words(made.checked)}, checked; it also holds the store's signing key, so keep it safe"
        )
        typer.echo(f"`softcue prompts restore {file} --store NEW` brings it back; `--store {file}` looks into it")


@app.command()
def restore(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="What `backup` wrote.")],
    store: StoreOption = DEFAULT_STORE,
    as_json: JsonOption = False,
) -> None:
    """Fill an empty store from a backup, checked before and after."""
    from dataclasses import asdict

    from prompt_store.upkeep.backup import restore_store

    with refusals():
        restored = restore_store(file, store)
        if as_json:
            print_json({"file": str(file), **asdict(restored)})
            return
        typer.echo(f"restored {_in_words(restored)}, checked; `softcue prompts list` shows them")


@app.command()
def gc(
    grace: Annotated[
        str, typer.Option(metavar="30d|12h|5m", help="Keep what was published or named this recently.")
    ] = "30d",
    delete: Annotated[bool, typer.Option("--delete", help="Do it; without this, only say what would be done.")] = False,
    reason: ReasonOption = "",
    store: StoreOption = DEFAULT_STORE,
    as_json: JsonOption = False,
) -> None:
    """Collect versions and tensors that nothing names: no alias, route or ensemble, nor what a rollback returns to."""
    period = _period(grace)
    with opened(store) as registry:
        if delete:
            found = registry.collect(period, command_line_principal(), reason or f"unnamed for {grace}")
        else:
            found = registry.plan_collection(period)
        if as_json:
            print_json(_collection_document(found, deleted=delete))
            return
        rows = [
            (
                version.label,
                version.digest[:12],
                version.kind,
                size(version.size_bytes),
                f"{version.unnamed_since:%Y-%m-%d %H:%M}",
            )
            for version in found.versions
        ]
        if rows:
            print_table(("version", "digest", "kind", "size", "unnamed since"), rows)
        wait = "waits" if len(found.waiting) == 1 else "wait"
        waiting = f"{counted(len(found.waiting), 'version')} that nothing names {wait} for {grace} to pass"
        if not found.versions and not found.tensors:
            typer.echo(f"nothing to delete; {waiting}" if found.waiting else "nothing to delete: everything is named")
            return
        what = f"{counted(len(found.versions), 'version')} and {counted(len(found.tensors), 'stray tensor')}"
        typer.echo(f"{'deleted' if delete else 'would delete'} {what}, {size(found.size_bytes)} in all")
        if found.waiting:
            typer.echo(waiting)
        if not delete:
            typer.echo("add --delete to do it; `softcue prompts backup FILE` keeps a copy")


def _in_words(checked: Checked) -> str:
    return (
        f"{counted(checked.tasks, 'task')}, {counted(checked.versions, 'version')}, "
        f"{counted(checked.tensors, 'tensor')} ({size(checked.size_bytes)}), {counted(checked.aliases, 'alias')} and "
        f"{counted(checked.changes, 'change')}"
    )


def _collection_document(found: Collection, *, deleted: bool) -> dict[str, Any]:
    def documents(versions: Any) -> list[dict[str, Any]]:
        return [
            {
                "version": version.label,
                "digest": version.digest,
                "kind": version.kind,
                "size_bytes": version.size_bytes,
                "unnamed_since": version.unnamed_since.isoformat(),
            }
            for version in versions
        ]

    return {
        "deleted": deleted,
        "versions": documents(found.versions),
        "tensors": [{"digest": tensor.digest, "size_bytes": tensor.size_bytes} for tensor in found.tensors],
        "calibrations": found.calibrations,
        "answers": found.answers,
        "size_bytes": found.size_bytes,
        "waiting": documents(found.waiting),
    }


def _period(text: str) -> timedelta:
    given = _PERIOD.fullmatch(text)
    if given is None:
        raise typer.BadParameter(f"{text!r} is no period; write days, hours or minutes as 30d, 12h or 5m")
    return timedelta(**{_UNITS[given[2]]: int(given[1])})
