"""Commands that only look: list, show, tasks, diff, history, bases."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any

import typer

from prompt_store.commands.options import DEFAULT_STORE, AliasArgument, JsonOption, StoreOption, TaskArgument, opened
from prompt_store.commands.printing import (
    counted,
    in_words,
    print_document,
    print_json,
    print_table,
    shutdown_in_words,
    version_document,
)
from prompt_store.errors import InvalidName, StoreError, nearest_name
from prompt_store.names import RemoteModel, parse_model_name
from prompt_store.prompts.unreadable import UnreadableVersion

if TYPE_CHECKING:
    from prompt_store.prompts.registry import ListedVersion, Registry

app = typer.Typer()

PAGE = 100
_BRIEF_REPORT = ("rows", "test_metrics", "gate")
_SHOWN_DIGEST = 8


@app.command("list")
def list_versions(
    task: Annotated[str | None, typer.Argument(metavar="[TASK]", help="Only this task's versions.")] = None,
    kind: Annotated[str | None, typer.Option(help="Only this kind: soft_prompt, prefix, text, ...")] = None,
    base: Annotated[str | None, typer.Option(metavar="NAME_OR_FINGERPRINT", help="Only for this base.")] = None,
    tag: Annotated[str | None, typer.Option(help="Only with this tag.")] = None,
    alias: Annotated[str | None, typer.Option(help="Only what this alias points at.")] = None,
    limit: Annotated[int, typer.Option(min=1, help="How many at most.")] = 1000,
    store: StoreOption = DEFAULT_STORE,
    as_json: JsonOption = False,
) -> None:
    """List versions, newest first, with the aliases that point at them."""
    with opened(store) as registry:
        _check_kind(kind)
        names = {entry.fingerprint: entry.name for entry in registry.bases()}
        found: list[ListedVersion] = []
        after = None
        while len(found) < limit:
            page = registry.page(
                task=task,
                kind=kind,
                base=base,
                tag=tag,
                alias=alias,
                after=after,
                limit=min(PAGE, limit - len(found)),
            )
            found += page.entries
            after = page.after
            if after is None:
                break
        if as_json:
            print_json([version_document(entry.version, entry.aliases) for entry in found])
            return
        if found:
            columns = ("version", "kind", "base", "digest", "created", "aliases, tags, notes")
            print_table(columns, [_listed_row(entry, names) for entry in found])
        if after is not None:
            typer.echo(f"the first {limit}; name a task, filter, or raise --limit to see more")
        elif not found and any((kind, base, tag, alias)):
            typer.echo("no version fits; leave a filter out to see more")
        elif not found:
            typer.echo("no version; publish one with `softcue tune soft-prompt RECIPE` or `softcue prompts publish`")


def _check_kind(kind: str | None) -> None:
    from prompt_store.prompts.version import PAYLOAD_KINDS

    if kind is not None and kind not in PAYLOAD_KINDS:
        nearest = nearest_name(kind, PAYLOAD_KINDS)
        hint = f"did you mean {nearest!r}? " if nearest is not None else ""
        raise InvalidName(f"no kind {kind!r}; {hint}There are {', '.join(PAYLOAD_KINDS)}")


def _listed_row(entry: ListedVersion, names: Mapping[str, str]) -> tuple[str, ...]:
    """As the columns of the list; `names` are those of the bases, by fingerprint."""
    version = entry.version
    if isinstance(version, UnreadableVersion):
        kind, base, said = version.kind, "", [f"unreadable: {version.reason}"]
    else:
        kind, base = version.payload.kind, names.get(version.base_fingerprint or "", "")
        said = [shutdown_in_words(version), *(f"#{tag}" for tag in version.tags), version.notes]
    marks = " ".join(filter(None, [*(f"@{alias}" for alias in entry.aliases), *said]))
    name, created = f"{version.task}@{version.label}", f"{version.created_at:%Y-%m-%d}"
    return name, kind, base, version.digest[:_SHOWN_DIGEST], created, marks


@app.command()
def show(
    name: Annotated[str, typer.Argument(metavar="TASK[@SELECTOR]", help="A task, or one version of it.")],
    store: StoreOption = DEFAULT_STORE,
    as_json: JsonOption = False,
) -> None:
    """Show a task, or a version named by alias, number or digest."""
    with opened(store) as registry:
        model = parse_model_name(name)
        if isinstance(model, RemoteModel):
            raise StoreError(f"{name!r} lives at a provider, not in this store; give TASK or TASK@SELECTOR")
        if model.selector is None:
            document = _task_document(registry, model.task)
        else:
            document = _whole_version(registry, model.task, model.selector, brief=not as_json)
        print_document(document, as_json)


def _task_document(registry: Registry, task: str) -> dict[str, Any]:
    revision = registry.task(task)
    return {
        **revision.task.document(),
        "revision": revision.number,
        "digest": revision.digest,
        "created_at": revision.created_at.isoformat(),
        "principal": revision.principal,
        "aliases": {alias.name: f"v{alias.number}" for alias in registry.aliases(task)},
        "route": registry.route(task).document(),
        "versions": len(registry.versions(task)),
    }


def _whole_version(registry: Registry, task: str, selector: str, *, brief: bool) -> dict[str, Any]:
    version = registry.version(task, selector)
    aliases = [alias.name for alias in registry.aliases(task) if alias.version == version.digest]
    evidence = registry.evidence(version.digest)
    report = evidence.report
    if brief and report:
        # What decides; --json has the rest: samples, mistakes, the history of the training.
        report = {key: report[key] for key in _BRIEF_REPORT if key in report} or report
    document = version_document(version, aliases)
    if brief and version.shutdown_date is not None:
        document["shutdown_date"] = shutdown_in_words(version)
    return {**document, "recipe": evidence.recipe, "report": report}


@app.command()
def tasks(store: StoreOption = DEFAULT_STORE, as_json: JsonOption = False) -> None:
    """List tasks."""
    with opened(store) as registry:
        found: list[dict[str, Any]] = [
            {
                "name": revision.task.name,
                "kind": revision.task.kind,
                "revision": revision.number,
                "digest": revision.digest,
                "versions": len(registry.versions(revision.task.name)),
                "aliases": {alias.name: f"v{alias.number}" for alias in registry.aliases(revision.task.name)},
                "description": revision.task.description,
            }
            for revision in registry.tasks()
        ]
        if as_json:
            print_json(found)
            return
        if not found:
            typer.echo("no task; add one with `softcue prompts apply-task FILE`, or `softcue prompts load FOLDER`")
            return
        rows = [
            (
                task["name"],
                task["kind"],
                f"r{task['revision']}",
                str(task["versions"]),
                ", ".join(f"{alias}={label}" for alias, label in task["aliases"].items()),
                task["description"],
            )
            for task in found
        ]
        print_table(("task", "kind", "revision", "versions", "aliases", "description"), rows)


@app.command()
def diff(
    task: TaskArgument,
    first: Annotated[str, typer.Argument(metavar="FIRST", help="A version: v7, a digest or an alias.")],
    second: Annotated[str, typer.Argument(metavar="SECOND", help="What it is compared with.")],
    store: StoreOption = DEFAULT_STORE,
    as_json: JsonOption = False,
) -> None:
    """Show what changed between two versions: facts, metrics side by side, and how far apart their tensors are."""
    from prompt_store.prompts.differing import compare

    with opened(store) as registry:
        sides = [registry.version(task, selector) for selector in (first, second)]
        found = compare(
            *((version, registry.evidence(version.digest), _tensor(registry, version)) for version in sides)
        )
        if as_json:
            print_json({"task": task, "first": sides[0].label, "second": sides[1].label, **found.document()})
            return
        headers = ("fact", sides[0].label, sides[1].label)
        if found.same:
            typer.echo(f"{task}@{sides[0].label} and {task}@{sides[1].label} are the same version")
            return
        if found.facts:
            print_table(headers, [(fact.name, in_words(fact.first), in_words(fact.second)) for fact in found.facts])
        if found.metrics:
            rows = [
                (metric.name, _figure(metric.first), _figure(metric.second), _change(metric.change))
                for metric in found.metrics
            ]
            print_table(("metric", *headers[1:], "change"), rows)
        if found.distance is not None:
            distance = found.distance
            lines = [
                ("relative distance |a-b|/|a|", f"{distance.relative:.4f}"),
                ("largest difference", f"{distance.largest:.4g}"),
                ("cosine of rows, mean and lowest", f"{distance.mean_cosine:.4f}, {distance.lowest_cosine:.4f}"),
            ]
            print_table(("tensors", ""), lines)
        elif found.no_distance:
            typer.echo(f"no distance: {found.no_distance}")


def _tensor(registry: Registry, version: Any) -> Any:
    from prompt_store.prompts.version import payload_tensors

    return registry.prompt(version.digest) if payload_tensors(version.payload) else None


def _figure(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"


def _change(value: float | None) -> str:
    return "" if value is None else f"{value:+.4g}"


@app.command()
def history(
    task: TaskArgument,
    alias: AliasArgument,
    store: StoreOption = DEFAULT_STORE,
    as_json: JsonOption = False,
) -> None:
    """Show every move of an alias: who, when, why."""
    with opened(store) as registry:
        moves = registry.alias_history(task, alias)
        labels = {version.digest: version.label for version in registry.versions(task)}

        def label(digest: str | None) -> str:
            return "" if digest is None else labels.get(digest, digest[:12])

        if as_json:
            print_json(
                [
                    {
                        "sequence": move.sequence,
                        "at": move.at.isoformat(),
                        "principal": move.principal,
                        "previous": move.previous,
                        "previous_version": label(move.previous) or None,
                        "target": move.target,
                        "target_version": label(move.target) or None,
                        "reason": move.reason,
                        "undoes": move.undoes,
                    }
                    for move in moves
                ]
            )
            return
        rows = [
            (
                f"{move.at:%Y-%m-%d %H:%M:%S}",
                move.principal,
                label(move.previous),
                label(move.target) or "(removed)",
                " ".join(filter(None, ("(rollback)" if move.undoes is not None else "", move.reason))),
            )
            for move in moves
        ]
        print_table(("when (UTC)", "who", "from", "to", "why"), rows)


@app.command()
def bases(
    name: Annotated[str | None, typer.Argument(metavar="[NAME_OR_FINGERPRINT]", help="One base, task by task.")] = None,
    store: StoreOption = DEFAULT_STORE,
    as_json: JsonOption = False,
) -> None:
    """List base models, what each carries, and the tasks without a version for it."""
    from dataclasses import asdict

    with opened(store) as registry:
        chosen = registry.find_base(name).fingerprint if name is not None else None
        found = [entry for entry in registry.carried_by_bases() if chosen in (None, entry.base.fingerprint)]
        if as_json:
            print_json([asdict(entry) for entry in found])
            return
        if chosen is not None:
            (entry,) = found
            carried = [(task, ", ".join(labels)) for task, labels in entry.versions.items()]
            print_table(("task", f"versions on {entry.base.name}"), carried + [(task, "-") for task in entry.missing])
            if entry.missing:
                typer.echo(
                    f"a move to {entry.base.name} still needs {counted(len(entry.missing), 'task')}: name this base in "
                    "their recipes and `softcue tune soft-prompt RECIPE`"
                )
            return
        if not found:
            typer.echo("no base; `softcue register-base FOLDER` adds one, and so does serving it")
            return
        rows = [
            (
                entry.base.name,
                entry.base.fingerprint[:12],
                entry.base.architecture,
                f"H={entry.base.hidden_size} L={entry.base.layers}",
                f"{entry.count} for {counted(len(entry.versions), 'task')}",
                ", ".join(entry.missing) or "nothing",
            )
            for entry in found
        ]
        print_table(("base", "fingerprint", "architecture", "size", "versions", "a move to it still needs"), rows)
