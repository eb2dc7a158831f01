"""`softcue prompts ...`: the store on the command line. Arguments and printing only.

The store is imported inside the commands, so that `softcue --help` waits neither for SQLAlchemy nor for pydantic.
"""

import typer

from prompt_store.commands.exchange import app as exchange
from prompt_store.commands.looking import app as looking
from prompt_store.commands.moving import app as moving
from prompt_store.commands.upkeep import app as upkeep

app = typer.Typer(
    name="prompts", help="Tasks, prompt versions and aliases in the store.", no_args_is_help=True, add_completion=False
)
for part in (looking, moving, exchange, upkeep):
    app.add_typer(part)
