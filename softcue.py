"""The command line: `softcue serve | register-base | prompts | routes | tune`. Each package brings its own commands."""

from __future__ import annotations

import importlib.metadata
from typing import Annotated

import typer

from prompt_store.commands import app as prompts
from prompt_store.commands.routes import app as routes
from service.commands import backends_of, register_base, serve
from training.commands import app as tune
from training.commands import calibrating

app = typer.Typer(
    name="softcue", help="Serve tuned prompts: one frozen base model, a soft prompt for every task.",
    no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False,
)  # fmt: skip
app.command()(serve)
app.command("register-base")(register_base)


@app.callback(invoke_without_command=True)
def softcue(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version and end.")] = False,
) -> None:
    """Serve tuned prompts: one frozen base model, a soft prompt for every task."""
    if version:
        typer.echo(importlib.metadata.version("softcue"))
        raise typer.Exit
    context.obj = backends_of  # by which `softcue routes` reads the settings of --config


routes.add_typer(calibrating)
app.add_typer(prompts, name="prompts")
app.add_typer(routes, name="routes")
app.add_typer(tune, name="tune")


def main() -> None:
    """Console script."""
    app()


if __name__ == "__main__":
    main()
