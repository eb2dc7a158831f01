"""`softcue tune`: the only place that draws progress bars."""

from __future__ import annotations

import shutil
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated

import typer

from prompt_store.commands.options import DEFAULT_STORE, StoreOption, opened, refuse

if TYPE_CHECKING:
    from training.run import Event, Finished, Started

_NAMED_ROWS = 20

app = typer.Typer(help="Tune soft prompts and publish them.", no_args_is_help=True)


@app.callback()
def tune() -> None:
    """Tune soft prompts and publish them."""


@app.command("soft-prompt")
def soft_prompt(
    recipe: Annotated[Path, typer.Argument(help="The recipe, a TOML file.")],
    store: StoreOption = DEFAULT_STORE,
    runs: Annotated[Path, typer.Option(help="Where checkpoints and reports go.", envvar="SOFTCUE_RUNS")] = Path("runs"),
    save_to: Annotated[
        Path | None, typer.Option(help="Also copy prompt.safetensors and report.json here.", show_default=False)
    ] = None,
) -> None:
    """Tune a soft prompt by a recipe, evaluate it, and publish it when it passes the recipe's gate.

    Ctrl-C leaves a checkpoint; the same command resumes from it.
    """
    from prompt_store.access import command_line_principal
    from service.engines.errors import EngineError
    from training.errors import TrainingError
    from training.recipe import load_recipe
    from training.run import tune_soft_prompt

    stopping = _StopOnInterrupt()
    with opened(store, create=True) as registry:
        try:
            events = tune_soft_prompt(
                load_recipe(recipe), registry, runs, command_line_principal(), should_stop=stopping
            )
            with stopping:
                finished = _Display(stopping).follow(events)
        except (TrainingError, EngineError) as error:
            refuse(str(error))
    if finished is None:
        raise typer.Exit(130)
    if save_to is not None:
        save_to.mkdir(parents=True, exist_ok=True)
        for file in (finished.prompt_file, finished.report_file):
            shutil.copyfile(file, save_to / file.name)
    if not finished.verdict.passed:
        raise typer.Exit(2)


class _StopOnInterrupt:
    """The first Ctrl-C asks the run to stop after its step; the second one ends it at once."""

    def __init__(self) -> None:
        self._asked = False

    def __call__(self) -> bool:
        return self._asked

    def __enter__(self) -> None:
        self._before = signal.signal(signal.SIGINT, self._ask)

    def __exit__(self, *_: object) -> None:
        signal.signal(signal.SIGINT, self._before)

    def _ask(self, _: int, __: FrameType | None) -> None:
        if self._asked:
            raise KeyboardInterrupt
        self._asked = True


class _Display:
    """A run on the terminal: one progress bar, then a table."""

    def __init__(self, stopping: _StopOnInterrupt) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        self._stopping = stopping
        self._console = Console()
        self._bar = Progress(
            TextColumn("[bold]{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("loss {task.fields[loss]}  {task.fields[metric]}  {task.fields[rate]} tokens/s  ETA"),
            TimeRemainingColumn(),
            console=self._console,
        )
        self._line = self._bar.add_task("", total=None, loss="-", metric="-", rate="-")
        self._tokens = 0
        self._since_s = 0.0

    def follow(self, events: Iterator[Event]) -> Finished | None:
        """Show a run to its end; returns None when it was interrupted."""
        from training.optimise import Step
        from training.run import Finished, Interrupted, Started, Validated

        with self._bar:
            for event in events:
                match event:
                    case Started():
                        self._start(event)
                    case Step():
                        self._tokens += event.tokens
                        rate = self._tokens / max(1e-9, time.perf_counter() - self._since_s)
                        loss = f"{event.loss:.3f}"
                        self._bar.update(self._line, completed=event.number, loss=loss, rate=f"{rate:,.0f}")
                    case Validated():
                        self._bar.update(self._line, metric=f"validation {event.metric} {event.value:.3f}")
                    case Interrupted():
                        self._bar.stop()
                        self._console.print(
                            f"Stopped after step {event.step}; checkpoint in {event.checkpoint}. "
                            "The same command resumes from it."
                        )
                        return None
                    case Finished():
                        self._bar.stop()
                        self._finish(event)
                        return event
        raise AssertionError("a run ended without saying how")

    def _start(self, event: Started) -> None:
        dataset = event.dataset
        self._console.print(
            f"{event.task.name}: {len(dataset.train)} rows to train on, {len(dataset.validation)} to validate, "
            f"{len(dataset.test)} held out; base '{event.base.name}'; run in {event.folder}"
        )
        for line in dataset.findings.lines(_NAMED_ROWS):
            self._console.print(line, style="yellow", markup=False)
        if event.resumed_at:
            self._console.print(f"Resumed from the checkpoint of step {event.resumed_at}.")
        self._bar.update(self._line, description=event.task.name, total=event.max_steps, completed=event.resumed_at)
        self._since_s = time.perf_counter()

    def _finish(self, event: Finished) -> None:
        from rich.table import Table

        names = list(next(iter(event.evaluations.values())).metrics)
        table = Table("on held-out rows", *names)
        for who, evaluation in event.evaluations.items():
            table.add_row(who, *(f"{evaluation.metrics[name]:.3f}" for name in names))
        self._console.print(table)
        self._console.print(f"The soft prompt {event.verdict.sentence()}.")
        if event.published is not None:
            version = event.published.version
            again = "" if event.published.created else " (the same content was there already)"
            name = f"{version.task}@{version.label}"
            self._console.print(f"Published as {name}, alias {event.alias}{again}.", style="green", soft_wrap=True)
            self._console.print(
                f"Ask for it as model {version.task}@{event.alias}. To make it what {version.task} means:\n"
                f"  softcue prompts alias {version.task} production {version.label}",
                soft_wrap=True,
            )
        else:
            self._console.print(f"Nothing was published. {event.report_file.with_suffix('.md')} shows its mistakes.")
