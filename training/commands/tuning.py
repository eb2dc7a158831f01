"""`softcue tune` and `softcue routes calibrate`."""

from __future__ import annotations

import shutil
import signal
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated

import typer

from prompt_store.commands.options import DEFAULT_STORE, StoreOption, TaskArgument, opened, refuse

if TYPE_CHECKING:
    from training.asking import Question
    from training.calibrating import Judged, Share, Threshold
    from training.dataset import Example
    from training.run import Event, Finished, Started

_NAMED_ROWS = 20

app = typer.Typer(help="Tune soft prompts and publish them.", no_args_is_help=True)
calibrating = typer.Typer()


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


@calibrating.command()
def calibrate(
    task: TaskArgument,
    version: Annotated[str, typer.Option(metavar="SELECTOR", help="The version: v7, a digest or an alias.")],
    measure: Annotated[
        str, typer.Option(help="What confidence means: mean_logprob, quantile_logprob:0.1, margin or agreement.")
    ],
    data: Annotated[Path, typer.Option(help="Rows that the version was not tuned on, JSONL as for tuning.")],
    target: Annotated[float, typer.Option(min=0.0, max=1.0, help="How good accepted answers shall be on average.")],
    url: Annotated[str, typer.Option(help="Where the service answers.")] = "http://127.0.0.1:8000",
    concurrency: Annotated[int, typer.Option(min=1, max=256, help="How many rows are asked at once.")] = 8,
    reason: Annotated[str, typer.Option(help="Why, for the history.")] = "",
    store: StoreOption = DEFAULT_STORE,
) -> None:
    """Find from which confidence on a version's answers are good enough for a cascade, and keep it with the version.

    A running service is asked every row. An answer is worth what the task's first metric that tuning computes says.
    """
    from prompt_store.access import command_line_principal
    from prompt_store.routing.calibrations import Calibration
    from prompt_store.routing.routes import check_measure
    from training.asking import Question
    from training.calibrating import find_threshold
    from training.dataset import Findings, dataset_use, read_examples
    from training.errors import TrainingError
    from training.scorers import SCORERS, metric_names

    with opened(store) as registry:
        try:
            check_measure(measure)
            found = registry.version(task, version)
            revision = registry.task_revision(found.task_revision).task
            findings = Findings()
            examples = read_examples(data, revision, findings)
            for line in findings.lines(_NAMED_ROWS):
                typer.secho(line, fg=typer.colors.YELLOW, err=True)
            label = f"{task}@{found.label}"
            metric = metric_names(revision)[0]
            question = Question(revision, found.digest, label, measure, SCORERS[metric])
            threshold = find_threshold(_ask(url, question, examples, concurrency), target)
        except (TrainingError, ValueError) as error:
            refuse(str(error))
        calibration = Calibration(
            version=found.digest,
            measure=measure,
            threshold=threshold.value,
            target=target,
            accuracy=threshold.accepted.mean,
            accepted_share=threshold.accepted_share,
            rows=threshold.all_rows.rows,
            dataset=dataset_use(data, len(examples)).digest,
        )
        registry.calibrate(calibration, command_line_principal(), reason=reason)
    for line in _calibrated(label, measure, metric, threshold):
        typer.echo(line)


def _ask(url: str, question: Question, examples: Sequence[Example], concurrency: int) -> list[Judged]:
    """Every answer, judged, with a bar while they come."""
    import asyncio
    from contextlib import aclosing

    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from training.asking import ask_each

    columns = (TextColumn("[bold]{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())

    async def ask() -> list[Judged]:
        judged = []
        with Progress(*columns, console=Console(stderr=True)) as bar:
            line = bar.add_task(question.label, total=len(examples))
            async with aclosing(ask_each(url, question, examples, concurrency)) as answers:
                async for answer in answers:
                    judged.append(answer)
                    bar.advance(line)
        return judged

    return asyncio.run(ask())


def _calibrated(label: str, measure: str, metric: str, threshold: Threshold) -> Iterator[str]:
    def shown(share: Share) -> str:
        low, high = share.interval
        return f"{share.mean:.1%} (95% interval {low:.1%} to {high:.1%})"

    accepted, rows = threshold.accepted, threshold.all_rows.rows
    yield (
        f"{label} by {measure}: from {threshold.value:.6g} on, {accepted.rows} of {rows} answers are accepted "
        f"({threshold.accepted_share:.1%}), with {metric} {shown(accepted)}."
    )
    yield f"As many accepted at random, for the same cost: {shown(threshold.all_rows)}."
    if threshold.unknown:
        yield f"{threshold.unknown} of {rows} answers had no confidence; such are never accepted."
    yield "It is stored: a cascade may answer with this version first."


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
        from training.scorers import reported_names

        dataset = event.dataset
        self._console.print(
            f"{event.task.name}: {len(dataset.train)} rows to train on, {len(dataset.validation)} to validate, "
            f"{len(dataset.test)} held out; base '{event.base.name}'; run in {event.folder}"
        )
        for line in dataset.findings.lines(_NAMED_ROWS):
            self._console.print(line, style="yellow", markup=False)
        if left_out := reported_names(event.task):
            self._console.print(
                f"Not evaluated here, as only reported outcomes say it: {', '.join(left_out)}",
                style="yellow",
                markup=False,
            )
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
