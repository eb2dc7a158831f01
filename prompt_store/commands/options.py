"""What the store's commands share: options, and the store they open."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NoReturn

import typer

from prompt_store.errors import StoreError

if TYPE_CHECKING:
    from prompt_store.prompts.registry import Registry

DEFAULT_STORE = ".softcue/softcue.db"
BACKUPS_VARIABLE = "SOFTCUE_STORE_BACKUPS"

StoreOption = Annotated[
    str,
    typer.Option("--store", envvar="SOFTCUE_STORE_URL", show_envvar=True, help="Path or URL of the prompt store."),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]
TaskArgument = Annotated[str, typer.Argument(metavar="TASK", help="Name of a task.")]
SelectorArgument = Annotated[str, typer.Argument(metavar="SELECTOR", help="A number like v7, a digest or an alias.")]
AliasArgument = Annotated[str, typer.Argument(metavar="ALIAS", help="Such as production or candidate.")]
AliasOption = Annotated[str | None, typer.Option(help="Point this alias at it.")]
ExpectOption = Annotated[str | None, typer.Option(metavar="vN", help="Only if the alias points at this version now.")]
ReasonOption = Annotated[str, typer.Option(help="Why, for the history.")]
ShutdownOption = Annotated[
    datetime | None,
    typer.Option(metavar="DATE", formats=["%Y-%m-%d"], help="The first day without the model, where it is announced."),
]
NotesOption = Annotated[str | None, typer.Option(help="Notes kept with the version.")]
TagsOption = Annotated[list[str] | None, typer.Option("--tag", metavar="TAG", help="A tag kept with it; repeatable.")]


@contextmanager
def opened(store: str, *, create: bool = False) -> Iterator[Registry]:
    """A registry, within `refusals`."""
    from prompt_store.database import Database
    from prompt_store.prompts.registry import Registry

    with refusals():
        backups = os.environ.get(BACKUPS_VARIABLE)
        with Database.open(store, create=create, backups=Path(backups) if backups else None) as database:
            yield Registry(database)


@contextmanager
def refusals() -> Iterator[None]:
    """Whatever the store or the operating system refuses becomes one red line and exit code 1."""
    try:
        yield
    except BrokenPipeError:
        raise  # the reader of the output left, which is typer's to end quietly
    except OSError as error:
        where = f"{error.filename} cannot be used" if error.filename is not None else "the system refuses this"
        refuse(f"{where} ({error.strerror or error}); check the path, its permissions and free disk space")
    except StoreError as error:
        refuse(str(error))


def refuse(message: str) -> NoReturn:
    """One red line, and exit code 1."""
    typer.secho(" ".join(message.split()), fg=typer.colors.RED, err=True)
    raise typer.Exit(1) from None
