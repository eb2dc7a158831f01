"""`softcue units ...`: what is kept of a unit, by the name that requests gave it."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated

import typer

from prompt_store.access import command_line_principal
from prompt_store.commands.options import DEFAULT_STORE, JsonOption, StoreOption, opened
from prompt_store.commands.printing import print_json

app = typer.Typer(
    name="units", help="The users, sessions or tickets that requests were for.", no_args_is_help=True,
    add_completion=False,
)  # fmt: skip


@app.callback()
def units() -> None:
    """The users, sessions or tickets that requests were for."""


@app.command()
def erase(
    unit: Annotated[str, typer.Argument(metavar="UNIT", help="As requests gave it.")],
    store: StoreOption = DEFAULT_STORE,
    as_json: JsonOption = False,
) -> None:
    """Erase all that a unit left: exposures, answers, outcomes, captures and shadow answers."""
    from service.generation_ids import unit_hash

    with opened(store) as registry:
        key = registry.database.signing_key()
        erased = asdict(registry.erase_unit(unit_hash(unit, key), command_line_principal()))
        if as_json:
            print_json(erased)
            return
        rows = ", ".join(f"{count} {table.replace('_', ' ')}" for table, count in erased.items() if count)
        typer.echo(f"erased {rows or 'nothing: the store has nothing of this unit; give it as requests did'}")
