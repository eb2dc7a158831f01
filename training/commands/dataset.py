"""`softcue dataset ...`: data to tune on, from what a service captured."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from prompt_store.commands.options import DEFAULT_STORE, JsonOption, StoreOption, opened, refuse
from prompt_store.commands.printing import counted, print_json

if TYPE_CHECKING:
    from prompt_store.ledger.captured import CapturedRow
    from prompt_store.prompts.registry import Registry
    from prompt_store.prompts.task import Task
    from training.traffic import Chosen

_TEST_FRACTION = 0.1
_NAMED_REASONS, _NAMED_GENERATIONS = 20, 5

app = typer.Typer(help="Data to tune on, from captured traffic.", no_args_is_help=True)


@app.callback()
def dataset() -> None:
    """Data to tune on, from captured traffic."""


@app.command()
def export(
    task: Annotated[str, typer.Option(metavar="TASK", help="Name of a task that is captured.")],
    to: Annotated[
        Path, typer.Option(metavar="PATH", help="A folder for train.jsonl and test.jsonl, or one file, *.jsonl.")
    ],
    where: Annotated[
        str | None,
        typer.Option(
            metavar="CONDITION", help="Which answers are right, such as 'outcome.helpful = true and latency_ms < 500'."
        ),
    ] = None,
    demonstrations_only: Annotated[
        bool, typer.Option("--demonstrations-only", help="Only answers that somebody demonstrated.")
    ] = False,
    everything: Annotated[bool, typer.Option("--all", help="Every answer, good or not.")] = False,
    test_fraction: Annotated[
        float | None,
        typer.Option(min=0.001, max=0.5, help=f"Which share of the units is held out. [default: {_TEST_FRACTION}]"),
    ] = None,
    limit: Annotated[
        int | None, typer.Option(metavar="N", min=1, help="Demonstrations first, then the newest.")
    ] = None,
    store: StoreOption = DEFAULT_STORE,
    as_json: JsonOption = False,
) -> None:
    """Write captured answers as `softcue tune` reads them.

    A demonstration is always taken, and is the row's answer. Of other answers it is not known whether they are right:
    --where says which are, by outcome.METRIC, by latency_ms, first_token_ms, cost, prompt_tokens, completion_tokens,
    error, refused, valid_json, cut_off, and by experiment, arm and version. What is missing compares as false.

    No unit has rows in both files, and it stays on its side in later exports. A file holds nothing out.
    """
    from training.errors import TrainingError
    from training.traffic import choose, refuse_empty

    if (where is not None) + demonstrations_only + everything != 1:
        raise typer.BadParameter(
            "nothing is known to be right; give one of --where, --demonstrations-only and --all (answers as they were)"
        )
    one_file = to.suffix == ".jsonl"
    if one_file and test_fraction is not None:
        raise typer.BadParameter(
            f"{to} is one file, which holds nothing out; name a folder or leave --test-fraction out"
        )
    fraction = 0.0 if one_file else test_fraction or _TEST_FRACTION
    with opened(store) as registry:
        revision = registry.task(task).task
        try:
            wanted = _by_condition(where, registry, revision) if where is not None else lambda _: everything
            chosen = choose(registry.captured(task), revision, wanted, test_fraction=fraction, limit=limit)
            refuse_empty(chosen, task, fraction)
        except TrainingError as error:
            refuse(str(error))
        files = _write(chosen, to)
    if as_json:
        print_json(_document(task, chosen, files))
    else:
        _print(task, chosen, files)


def _by_condition(where: str, registry: Registry, task: Task) -> Callable[[CapturedRow], bool]:
    """Raises ConditionError; UnknownVersion and InvalidName of a version that the condition names."""
    from training.conditions import Comparison, check, holds, parse_condition, replaced
    from training.traffic import VERSION, facts_of, known_names

    def by_digest(comparison: Comparison) -> Comparison:
        if comparison.name != VERSION:
            return comparison
        return replace(comparison, value=registry.version(task.name, str(comparison.value)).digest)

    written = parse_condition(where)
    check(written, known_names(task))
    condition = replaced(written, by_digest)
    return lambda row: holds(condition, facts_of(row))


def _write(chosen: Chosen, to: Path) -> dict[str, Path]:
    """The files by what is in them; each is whole, whatever happens."""
    from prompt_store.files import write_whole
    from training.traffic import jsonl

    if to.suffix == ".jsonl":
        files, folder = {"train": to}, to.parent
    else:
        files, folder = {side: to / f"{side}.jsonl" for side in ("train", "test")}, to
    folder.mkdir(parents=True, exist_ok=True)
    for side, file in files.items():
        write_whole(file, jsonl(chosen.train if side == "train" else chosen.test))
    return files


def _document(task: str, chosen: Chosen, files: dict[str, Path]) -> dict[str, object]:
    rows = {"train": chosen.train, "test": chosen.test}
    return {
        "task": task,
        "captured": chosen.captured,
        "files": {
            side: {
                "path": str(file),
                "rows": len(rows[side]),
                "demonstrated": sum(row.demonstrated for row in rows[side]),
                "units": len({row.unit for row in rows[side]}),
            }
            for side, file in files.items()
        },
        "left_out": {reason: list(requests) for reason, requests in chosen.left_out().items()},
    }


def _print(task: str, chosen: Chosen, files: dict[str, Path]) -> None:
    rows = {"train": chosen.train, "test": chosen.test}
    typer.echo(f"{task}: {counted(chosen.captured, 'captured generation')}")
    for side, file in files.items():
        units = counted(len({row.unit for row in rows[side]}), "unit")
        demonstrated = sum(row.demonstrated for row in rows[side])
        typer.echo(f"  {file}: {counted(len(rows[side]), 'row')} of {units}, {demonstrated} demonstrated")
    reasons = sorted(chosen.left_out().items(), key=lambda reason: -len(reason[1]))
    for reason, requests in reasons[:_NAMED_REASONS]:
        more = ", …" if len(requests) > _NAMED_GENERATIONS else ""
        named = ", ".join(requests[:_NAMED_GENERATIONS])
        typer.secho(f"left out: {len(requests)} {reason}: {named}{more}", fg=typer.colors.YELLOW)
    if len(reasons) > _NAMED_REASONS:
        rest = sum(len(requests) for _, requests in reasons[_NAMED_REASONS:])
        typer.secho(f"left out: {rest} for other reasons, which --json names", fg=typer.colors.YELLOW)
    typer.echo("In the recipe:\n\n[data]")
    for side, file in files.items():
        typer.echo(f"{side} = {json.dumps(str(file.resolve()), ensure_ascii=False)}")
