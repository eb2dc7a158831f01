"""`softcue experiments ...`: what is tried on live traffic, what is known of it, and how it ends."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from prompt_store.access import command_line_principal
from prompt_store.commands.options import DEFAULT_STORE, JsonOption, ReasonOption, StoreOption, opened
from prompt_store.commands.printing import in_words, print_json, print_table
from prompt_store.errors import InvalidExperiment

if TYPE_CHECKING:
    from prompt_store.experiments.experiment import Experiment
    from prompt_store.experiments.records import ExperimentRecord
    from prompt_store.experiments.starting import StartPlan
    from service.experiments.acting import Report
    from service.experiments.figures import ArmEstimate, MetricFigures

app = typer.Typer(
    name="experiments",
    help="Versions and routes compared on live traffic.",
    no_args_is_help=True,
    add_completion=False,
)

NameArgument = Annotated[str, typer.Argument(metavar="NAME", help="Name of an experiment.")]
ExpectOption = Annotated[
    int | None, typer.Option("--expect", metavar="N", min=1, help="Only if it is at this revision.")
]


@app.command("list")
def list_experiments(
    task: Annotated[str | None, typer.Option(help="Those of this task alone.")] = None,
    store: StoreOption = DEFAULT_STORE,
    as_json: JsonOption = False,
) -> None:
    """List experiments, those that started last first."""
    from service.experiments.reporting import record_document

    with opened(store) as registry:
        records = registry.experiments(task)
        if as_json:
            print_json([record_document(record) for record in records])
            return
        if not records:
            typer.echo("no experiment; start one with `softcue experiments start FILE`")
            return
        rows = [
            (
                record.experiment.name,
                record.experiment.task,
                record.state.replace("_", " ") + (f": {record.winner}" if record.winner is not None else ""),
                f"{record.started_at:%Y-%m-%d %H:%M}",
                record.experiment.metric,
                _weights_in_words(record.weights),
            )
            for record in records
        ]
        print_table(("experiment", "task", "state", "started (UTC)", "metric", "arms"), rows)


@app.command()
def start(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="The experiment as TOML.")],
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only check it, and say what it would do.")] = False,
    reason: ReasonOption = "",
    store: StoreOption = DEFAULT_STORE,
    as_json: JsonOption = False,
) -> None:
    """Start an experiment: from now on, units of its task are answered by its arms."""
    from prompt_store.experiments.files import load_experiment

    with opened(store) as registry, _problems_by_line():
        declared = load_experiment(file)
        experiment = declared.experiment
        try:
            if dry_run:
                _print_trial(experiment, registry.check_experiment(experiment), as_json)
            else:
                _print_started(registry.start_experiment(experiment, command_line_principal(), reason=reason), as_json)
        except InvalidExperiment as error:
            raise declared.located(error) from error


@app.command()
def show(
    name: NameArgument,
    html: Annotated[Path | None, typer.Option("--html", metavar="FILE", help="Write the report with plots.")] = None,
    store: StoreOption = DEFAULT_STORE,
    as_json: JsonOption = False,
) -> None:
    """Say what to do about an experiment and how sure that is, then show its arms and metrics."""
    from prompt_store.files import write_whole
    from service.experiments.acting import html_report, report
    from service.experiments.advice import caveats_of, sentence_of
    from service.experiments.reporting import document_of

    with opened(store) as registry:
        found = report(registry, name, _now_ms())
        if html is not None:
            write_whole(html, html_report(registry, found).encode())
        if as_json:
            print_json(document_of(found.figures, found.record))
            return
        typer.echo(sentence_of(found.figures, found.record))
        for caveat in caveats_of(found.figures):
            typer.echo(f"note: {caveat}")
        for metric in found.figures.metrics:
            _print_metric(metric, found)
        if html is not None:
            typer.echo(f"the report is in {html}")


@app.command()
def history(name: NameArgument, store: StoreOption = DEFAULT_STORE, as_json: JsonOption = False) -> None:
    """Show what was done to an experiment, newest first: who, when, why and on which numbers."""
    with opened(store) as registry:
        events = registry.experiment_history(name)
        if as_json:
            print_json(
                [
                    {
                        "action": event.action,
                        "at": event.at.isoformat(),
                        "principal": event.principal,
                        "reason": event.reason,
                        "details": dict(event.details),
                    }
                    for event in events
                ]
            )
            return
        rows = [
            (
                f"{event.at:%Y-%m-%d %H:%M:%S}",
                event.action.removeprefix("experiment.").replace("_", " "),
                event.principal,
                event.reason,
            )
            for event in events
        ]
        print_table(("when (UTC)", "what", "who", "why"), rows)


@app.command()
def stop(
    name: NameArgument,
    reason: ReasonOption = "",
    expect: ExpectOption = None,
    store: StoreOption = DEFAULT_STORE,
    as_json: JsonOption = False,
) -> None:
    """End an experiment without a winner: its task is answered as before."""
    from service.experiments import acting

    with opened(store) as registry:
        record = acting.stop(registry, name, command_line_principal(), _now_ms(), reason=reason, expected=expect)
        _print_ended(record, f"{name} was stopped, and {record.experiment.task} is answered as before", as_json)


@app.command()
def promote(
    name: NameArgument,
    arm: Annotated[str, typer.Argument(metavar="ARM", help="The arm that answers everybody from now on.")],
    despite_mismatch: Annotated[
        bool, typer.Option("--despite-mismatch", help="Though units came otherwise than drawn; needs --reason.")
    ] = False,
    reason: ReasonOption = "",
    expect: ExpectOption = None,
    store: StoreOption = DEFAULT_STORE,
    as_json: JsonOption = False,
) -> None:
    """End an experiment with a winner: the alias moves to that arm's version."""
    from service.experiments import acting

    with opened(store) as registry:
        record = acting.promote(
            registry,
            name,
            arm,
            command_line_principal(),
            _now_ms(),
            reason=reason,
            despite_mismatch=despite_mismatch,
            expected=expect,
        )
        _print_ended(record, f"{arm} of {name} was promoted, and answers {record.experiment.task} now", as_json)


@app.command()
def weights(
    name: NameArgument,
    shares: Annotated[list[str], typer.Argument(metavar="ARM=SHARE...", help="Of every arm; they sum to 1.")],
    reason: ReasonOption = "",
    expect: ExpectOption = None,
    store: StoreOption = DEFAULT_STORE,
    as_json: JsonOption = False,
) -> None:
    """Give the arms other shares; as few units as that takes change their arm."""
    from service.experiments.reporting import record_document

    parsed = _parsed(shares)
    with opened(store) as registry:
        record = registry.reweight_experiment(name, parsed, command_line_principal(), reason=reason, expected=expect)
        if as_json:
            print_json(record_document(record))
            return
        typer.echo(f"the weights of {name} are {_weights_in_words(record.weights)}")


def _now_ms() -> int:
    return time.time_ns() // 1_000_000


@contextmanager
def _problems_by_line() -> Iterator[None]:
    """All that is wrong with an experiment as one red line each, and exit code 1."""
    try:
        yield
    except InvalidExperiment as error:
        for problem in error.problems or (error,):
            typer.secho(" ".join(str(problem).split()), fg=typer.colors.RED, err=True)
        raise typer.Exit(1) from None


def _parsed(shares: Sequence[str]) -> dict[str, float]:
    found: dict[str, float] = {}
    for each in shares:
        arm, separator, share = each.rpartition("=")
        try:
            value = float(share)
        except ValueError:
            separator = ""
        if not separator or arm in found:
            raise typer.BadParameter(f"{each!r} is no ARM=SHARE, or that arm has one already; write candidate=0.2")
        found[arm] = value
    return found


def _print_trial(experiment: Experiment, planned: StartPlan, as_json: bool) -> None:
    if as_json:
        print_json(
            {
                "experiment": experiment.document(),
                "versions": {arm: list(labels) for arm, labels in planned.versions.items()},
                "weights": dict(planned.weights),
                "route": planned.route.document(),
                "warnings": list(planned.warnings),
            }
        )
        return
    _print_arms(planned.weights, planned.versions)
    for warning in planned.warnings:
        typer.echo(f"warning: {warning}")
    typer.echo(f"{experiment.name} would start on {experiment.task}; leave --dry-run out to start it")


def _print_started(record: ExperimentRecord, as_json: bool) -> None:
    from service.experiments.reporting import record_document

    if as_json:
        print_json(record_document(record))
        return
    name = record.experiment.name
    _print_arms(record.weights, record.versions)
    typer.echo(f"{name} runs on {record.experiment.task}; `softcue experiments show {name}` says what is known of it")


def _print_arms(weights: Mapping[str, float], versions: Mapping[str, Sequence[str]]) -> None:
    print_table(
        ("arm", "weight", "versions"),
        [(arm, in_words(weight), ", ".join(versions.get(arm, ()))) for arm, weight in weights.items()],
    )


def _print_ended(record: ExperimentRecord, said: str, as_json: bool) -> None:
    from service.experiments.reporting import record_document

    if as_json:
        print_json(record_document(record))
        return
    typer.echo(said)


def _print_metric(metric: MetricFigures, found: Report) -> None:
    from service.experiments.wording import confidence, scale_of, share

    sequence = f"{confidence(found.figures.alpha)} sequence"
    scale, decides = scale_of(metric), metric.role == "decision"

    def row(arm: ArmEstimate) -> tuple[str, ...]:
        weighted = (share(found.record.weights[arm.arm], 1), f"{arm.units:,}") if decides else ()
        best = (share(arm.best, 1),) if decides else ()
        state = ((metric.states or {}).get(arm.arm, ""),) if metric.states is not None else ()
        means = (scale.mean(arm.mean), scale.bounds(arm.mean))
        lifts = (scale.lift(arm.lift), scale.bounds(arm.lift)) if arm.arm != found.figures.control else ("", "")
        return (arm.arm, *weighted, f"{arm.valued:,}", *means, *lifts, *best, *state)

    headers = (
        metric.metric,
        *(("weight", "units") if decides else ()),
        "with a value",
        "mean",
        sequence,
        "lift",
        sequence,
        *(("is best",) if decides else ()),
        *(("guardrail",) if metric.states is not None else ()),
    )
    print_table(headers, [row(arm) for arm in metric.arms])


def _weights_in_words(weights: Mapping[str, float]) -> str:
    return ", ".join(f"{arm} {100 * weight:.4g}%" for arm, weight in weights.items())
