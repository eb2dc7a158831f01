"""The command line: `softcue serve | prompts | experiments | tune | ...`. Each package brings its own commands."""

from __future__ import annotations

import importlib.metadata
from typing import Annotated

import typer

from prompt_store.commands import app as prompts
from prompt_store.commands.routes import app as routes
from service.commands.experiments import app as experiments
from service.commands.serving import backends_of, register_base, serve
from service.commands.units import app as units
from training.commands.dataset import app as dataset
from training.commands.tuning import app as tune
from training.commands.tuning import calibrating

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
app.add_typer(experiments, name="experiments")
app.add_typer(units, name="units")
app.add_typer(tune, name="tune")
app.add_typer(dataset, name="dataset")


def main() -> None:
    """Console script."""
    app()


if __name__ == "__main__":
    main()
