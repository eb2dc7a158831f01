"""`softcue routes ...`: what answers each task. Routes are declared in TOML, checked whole and kept with their history.

The backends that routes are checked against are those that services made known to the store. Whoever mounts these
commands may make a BackendsReader the context's object: it reads the settings that `--config` names.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from prompt_store.access import command_line_principal
from prompt_store.commands.options import (
    DEFAULT_STORE,
    JsonOption,
    ReasonOption,
    StoreOption,
    TaskArgument,
    opened,
    refusals,
)
from prompt_store.commands.printing import in_words, print_document, print_json, print_table
from prompt_store.errors import InvalidName, InvalidRoute, SchemaMismatch, UnknownTask

if TYPE_CHECKING:
    from prompt_store.prompts.registry import Registry
    from prompt_store.routing.backends import BackendDescription
    from prompt_store.routing.revisions import AppliedRoute, RouteRevision
    from prompt_store.routing.routes import Route, TaskRoute

app = typer.Typer(
    name="routes",
    help="What answers each task: backends, fallbacks, cascades, splits.",
    no_args_is_help=True,
    add_completion=False,
)

BackendsReader = Callable[[Path], "Sequence[BackendDescription]"]

ConfigOption = Annotated[
    Path | None,
    typer.Option("--config", metavar="SETTINGS", help="Check against these settings' backends, not the store's."),
]
ExpectOption = Annotated[
    int | None, typer.Option("--expect", metavar="N", min=0, help="Only if this revision is in force; 0 for none.")
]


@app.command()
def apply(
    context: typer.Context,
    file: Annotated[Path, typer.Argument(metavar="FILE", help="Routes as TOML.")],
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would change.")] = False,
    config: ConfigOption = None,
    reason: ReasonOption = "",
    expect: ExpectOption = None,
    store: StoreOption = DEFAULT_STORE,
    as_json: JsonOption = False,
) -> None:
    """Put a file's routes in force: all of them, or none where anything is wrong with one."""
    from prompt_store.routing.files import load_routes

    with opened(store) as registry, _problems_by_line():
        declared = load_routes(file)
        if expect is not None and len(declared.routes) > 1:
            raise typer.BadParameter("--expect is of one task's route; apply a file with that task alone")
        expected = dict.fromkeys(declared.routes, expect) if expect is not None else {}
        backends = _backends_of(context, config)
        try:
            before = {task: _in_force(registry, task) for task in declared.routes}
            if dry_run:
                warnings = registry.check_routes(declared.routes, expected=expected, backends=backends)
                applied: Mapping[str, AppliedRoute] = {}
            else:
                applied = registry.apply_routes(
                    declared.routes,
                    command_line_principal(),
                    expected=expected,
                    reason=reason,
                    backends=backends,
                )
                warnings = {task: entry.warnings for task, entry in applied.items()}
        except InvalidRoute as error:
            raise declared.located(error) from error
        changes = [
            _Change(task, before[task], route, applied.get(task), warnings[task])
            for task, route in declared.routes.items()
        ]
        if as_json:
            print_json([change.document() for change in changes])
            return
        for change in changes:
            change.print()


@app.command("list")
def list_routes(store: StoreOption = DEFAULT_STORE, as_json: JsonOption = False) -> None:
    """List the route of every task."""
    from prompt_store.prompts.unreadable import Unreadable

    with opened(store) as registry:
        snapshot = registry.snapshot()
        if as_json:
            print_json(
                {
                    name: {"unreadable": task.route.reason}
                    if isinstance(task.route, Unreadable)
                    else task.route.document()
                    for name, task in sorted(snapshot.tasks.items())
                }
            )
            return
        rows = [
            (name, "", "", "", task.route.reason)
            if isinstance(task.route, Unreadable)
            else (
                name,
                task.route.route.kind,
                in_words(task.route.deadline_s),
                in_words(task.route.daily_cost_ceiling),
                _in_short(task.route.route),
            )
            for name, task in sorted(snapshot.tasks.items())
        ]
        if not rows:
            typer.echo("no task; add one with `softcue prompts apply-task FILE`")
            return
        print_table(("task", "kind", "deadline (s)", "daily ceiling", "route"), rows)


@app.command()
def show(
    task: TaskArgument,
    revision: Annotated[int | None, typer.Option("--revision", metavar="N", help="An earlier one.")] = None,
    as_toml: Annotated[bool, typer.Option("--toml", help="Print what `apply` takes.")] = False,
    store: StoreOption = DEFAULT_STORE,
    as_json: JsonOption = False,
) -> None:
    """Show a task's route, as it is in force or as it was."""
    from prompt_store.routing.routes import TaskRoute

    with opened(store) as registry:
        found = _revision(registry, task, revision)
        route = found.route if found is not None else TaskRoute()
        if as_toml and not as_json:
            typer.echo(_toml(task, route), nl=False)
            return
        print_document({"task": task, **_revision_document(found), "document": route.document()}, as_json)


@app.command()
def history(task: TaskArgument, store: StoreOption = DEFAULT_STORE, as_json: JsonOption = False) -> None:
    """Show every route that a task had: who, when, why."""
    with opened(store) as registry:
        revisions = registry.route_history(task)
        if as_json:
            print_json(
                [{**_revision_document(revision), "document": revision.route.document()} for revision in revisions]
            )
            return
        if not revisions:
            typer.echo(f"no route was applied to {task}; it answers with its alias production")
            return
        rows = [
            (
                str(revision.number),
                f"{revision.created_at:%Y-%m-%d %H:%M:%S}",
                revision.principal,
                " ".join(
                    filter(None, (f"(back to {revision.restores})" if revision.restores else "", revision.reason))
                ),
                _in_short(revision.route.route),
            )
            for revision in revisions
        ]
        print_table(("revision", "when (UTC)", "who", "why", "route"), rows)


@app.command()
def rollback(
    context: typer.Context,
    task: TaskArgument,
    to: Annotated[int | None, typer.Option("--to", metavar="N", help="This revision; else the one before.")] = None,
    config: ConfigOption = None,
    reason: ReasonOption = "",
    expect: ExpectOption = None,
    store: StoreOption = DEFAULT_STORE,
    as_json: JsonOption = False,
) -> None:
    """Put an earlier route in force again; once more, the one before that."""
    with opened(store) as registry, _problems_by_line():
        before = _in_force(registry, task)
        applied = registry.rollback_route(
            task,
            command_line_principal(),
            to=to,
            expected=expect,
            reason=reason,
            backends=_backends_of(context, config),
        )
        change = _Change(task, before, applied.revision.route, applied, applied.warnings)
        if as_json:
            print_json(change.document())
            return
        change.print()


@app.command()
def shadows(
    task: TaskArgument,
    limit: Annotated[int, typer.Option(min=1, help="How many of the newest to show.")] = 10,
    store: StoreOption = DEFAULT_STORE,
    as_json: JsonOption = False,
) -> None:
    """Show how far recorded shadow answers agree with those that were given, and the newest of them."""
    from dataclasses import asdict

    with opened(store) as registry:
        summaries, answers = registry.shadow_summary(task), registry.shadow_answers(task, limit=limit)
        if as_json:
            newest = [{**asdict(answer), "at": answer.at.isoformat()} for answer in answers]
            print_json({"summaries": [asdict(summary) for summary in summaries], "newest": newest})
            return
        if not summaries:
            typer.echo(f"no shadow answer of {task} is recorded; apply a route of kind shadow")
            return
        print_table(
            ("shadow", "backend", "answers", "failed", "agreement", "ms", "ms of the shadow"),
            [
                (
                    summary.shadow_label or "none was asked",
                    summary.shadow_backend,
                    str(summary.count),
                    str(summary.failed),
                    in_words(summary.agreement),
                    f"{summary.primary_ms:.1f}",
                    f"{summary.shadow_ms:.1f}",
                )
                for summary in summaries
            ],
        )
        print_table(
            ("when (UTC)", "agreement", "answer", "shadow's answer"),
            [
                (
                    f"{answer.at:%Y-%m-%d %H:%M:%S}",
                    in_words(answer.agreement),
                    f"{answer.primary_label}: {answer.primary_text}",
                    ": ".join(filter(None, (answer.shadow_label, answer.shadow_text or answer.shadow_error))),
                )
                for answer in answers
            ],
        )


@app.command()
def backends(
    context: typer.Context,
    config: ConfigOption = None,
    store: StoreOption = DEFAULT_STORE,
    as_json: JsonOption = False,
) -> None:
    """List the backends that routes may name, and what each serves."""
    with refusals(), _problems_by_line():
        found = _backends_of(context, config)
    if found is None:
        with opened(store) as registry:
            found = registry.backends()
    if as_json:
        print_json([backend.document() for backend in found])
        return
    if not found:
        typer.echo("no backend is known; start `softcue serve` once on this store")
        return
    rows = [
        (
            backend.name,
            backend.kind,
            in_words(backend.provider),
            ", ".join(sorted(backend.payload_kinds)),
            in_words(backend.default_model),
            ", ".join(sorted(backend.features)),
        )
        for backend in found
    ]
    print_table(("backend", "kind", "provider", "serves", "default model", "features"), rows)


@dataclass(frozen=True, slots=True)
class _Change:
    """What applying a route does, or would do where nothing was `applied`."""

    task: str
    before: TaskRoute | None
    after: TaskRoute
    applied: AppliedRoute | None
    warnings: Sequence[str]

    def document(self) -> dict[str, Any]:
        return {
            "task": self.task,
            "changed": self._changed(),
            "revision": self.applied.revision.number if self.applied is not None else None,
            "document": self.after.document(),
            "diff": self._diff(),
            "warnings": list(self.warnings),
        }

    def print(self) -> None:
        for line in self._diff():
            typer.echo(line)
        if not self._changed():
            typer.echo(f"the route of {self.task} is in force already")
        elif self.applied is None:
            typer.echo(f"the route of {self.task} would change; leave --dry-run out to apply it")
        else:
            typer.echo(f"the route of {self.task} is at revision {self.applied.revision.number}")
        for warning in self.warnings:
            typer.echo(f"warning: {warning}")

    def _changed(self) -> bool:
        return self.applied.changed if self.applied is not None else self.before != self.after

    def _diff(self) -> list[str]:
        before = _toml(self.task, self.before).splitlines() if self.before is not None else []
        after = _toml(self.task, self.after).splitlines()
        return list(difflib.unified_diff(before, after, "in force", "new", lineterm=""))


@contextmanager
def _problems_by_line() -> Iterator[None]:
    """All that is wrong with routes as one red line each, and exit code 1."""
    try:
        yield
    except InvalidRoute as error:
        for problem in error.problems or (error,):
            typer.secho(" ".join(str(problem).split()), fg=typer.colors.RED, err=True)
        raise typer.Exit(1) from None


def _backends_of(context: typer.Context, config: Path | None) -> Sequence[BackendDescription] | None:
    """Those of a service's settings, None for the store's."""
    if config is None:
        return None
    reader: BackendsReader | None = context.obj
    if reader is None:
        raise typer.BadParameter("nothing here reads a service's settings; leave --config out")
    return reader(config)


def _in_force(registry: Registry, task: str) -> TaskRoute | None:
    """None where there is none that could be compared; applying says so of an unknown task."""
    try:
        return registry.route(task)
    except (SchemaMismatch, UnknownTask):
        return None


def _revision(registry: Registry, task: str, number: int | None) -> RouteRevision | None:
    """A revision by number, or the one in force, None where none was applied."""
    if number is None:
        return registry.route_revision(task)
    for revision in registry.route_history(task):
        if revision.number == number:
            return revision
    raise InvalidName(
        f"the route of task {task!r} has no revision {number}; `softcue routes history {task}` lists them"
    )


def _revision_document(revision: RouteRevision | None) -> dict[str, Any]:
    if revision is None:
        return {"revision": 0}
    return {
        "revision": revision.number,
        "created_at": revision.created_at.isoformat(),
        "principal": revision.principal,
        "reason": revision.reason,
        "restores": revision.restores,
    }


def _toml(task: str, route: TaskRoute) -> str:
    from prompt_store.routing.files import routes_to_toml

    return routes_to_toml({task: route})


def _in_short(route: Route) -> str:
    """A route in one line: cascade(v2 at local, production at openai)."""
    from prompt_store.routing.routes import DirectRoute, inner_routes

    if isinstance(route, DirectRoute):
        return route.version + (f" at {route.backend}" if route.backend is not None else "")
    return f"{route.kind}({', '.join(_in_short(inner) for _, inner in inner_routes(route))})"
