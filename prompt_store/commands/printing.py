"""How the store's commands print: tables by rich, JSON as it is, documents a fact a line."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import typer

from prompt_store.prompts.unreadable import UnreadableVersion

if TYPE_CHECKING:
    from prompt_store.prompts.version import PromptVersion

PIPED_WIDTH = 200
SHOWN_DIGEST = 12

# What is at most this wide is never broken over lines: labels, digests, times and kinds.
_UNBROKEN_WIDTH = 12
_LEAST_LAST_WIDTH = 16
_DIGEST = re.compile(r"[0-9a-f]{64}")


def print_json(value: Any) -> None:
    typer.echo(json.dumps(value, indent=2, ensure_ascii=False))


def print_document(document: dict[str, Any], as_json: bool) -> None:
    """As JSON, or as a table of what is not empty."""
    if as_json:
        print_json(document)
        return
    print_table(("", ""), [(place, in_words(value)) for place, value in _leaves(document)])


def print_table(headers: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Where the terminal is too narrow, the last column goes on in further lines, then wide ones; nothing is cut."""
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console()
    if not console.is_terminal:
        # Nobody's terminal: nothing needs to fit.
        console = Console(width=PIPED_WIDTH)
    table = Table(box=SIMPLE_HEAD, show_header=any(headers), collapse_padding=True, pad_edge=False)
    widths = [
        max([len(header), *(len(line) for row in rows for line in row[place].splitlines())])
        for place, header in enumerate(headers)
    ]
    # A space beside each column and one at the end.
    spare = console.width - sum(widths[:-1]) - len(widths) - 1
    roomy = spare >= min(widths[-1], _LEAST_LAST_WIDTH)
    for place, header in enumerate(headers):
        unbroken = widths[place] <= _UNBROKEN_WIDTH or (roomy and place < len(headers) - 1)
        table.add_column(header, overflow="fold", no_wrap=unbroken)
    for row in rows:
        # As Text: names and notes are not markup.
        table.add_row(*(Text(cell) for cell in row))
    console.print(table)


def version_document(version: PromptVersion | UnreadableVersion, aliases: Sequence[str]) -> dict[str, Any]:
    """A version as JSON values, with its label and aliases; `unreadable` says why where it cannot be read."""
    if isinstance(version, UnreadableVersion):
        known = {**asdict(version), "created_at": version.created_at.isoformat()}
        known["unreadable"] = known.pop("reason")
    else:
        known = version.model_dump(mode="json")
        if version.shutdown_date is not None:
            known["days_left"] = _days_left(version)
    return {"version": version.label, "aliases": list(aliases), **known}


def shutdown_in_words(version: PromptVersion) -> str:
    """When the model behind a version goes away; nothing where that is not known."""
    from prompt_store.prompts.version import SHUTDOWN_WARNING_DAYS

    if version.shutdown_date is None:
        return ""
    days = _days_left(version)
    if days <= 0:
        return f"retired on {version.shutdown_date}"
    warning = "warning: " if days <= SHUTDOWN_WARNING_DAYS else ""
    return f"{warning}shut down on {version.shutdown_date}, in {counted(days, 'day')}"


def _days_left(version: PromptVersion) -> int:
    assert version.shutdown_date is not None, "asked of a version that has a date"
    return (version.shutdown_date - datetime.now(UTC).date()).days


def counted(number: int, what: str) -> str:
    """1 version, 2 versions."""
    return f"{number} {what}" if number == 1 else f"{number} {what}{'es' if what.endswith('s') else 's'}"


def size(count_bytes: int) -> str:
    """Bytes as people read them: 812 B, 12.3 kB, 4.0 MB."""
    value = float(count_bytes)
    for unit in ("B", "kB", "MB", "GB"):
        if value < 1000 or unit == "GB":
            break
        value /= 1000
    return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"


def in_words(value: Any) -> str:
    """A JSON value in a cell: digests by their beginning, which every command takes too; nothing for None."""
    match value:
        case None:
            return ""
        case str():
            return value[:SHOWN_DIGEST] if _DIGEST.fullmatch(value) else value
        case float():
            return f"{value:.6g}"
        case dict():
            return " ".join(f"{key}={in_words(inner)}" for key, inner in value.items())
        case list() | tuple():
            return ("\n" if any(isinstance(inner, dict) for inner in value) else ", ").join(map(in_words, value))
    return json.dumps(value)


def _leaves(document: dict[str, Any], place: str = "") -> Iterator[tuple[str, Any]]:
    """The values that are not empty, by places such as `payload.shape`."""
    for key, value in document.items():
        inner = f"{place}.{key}" if place else key
        if isinstance(value, dict):
            yield from _leaves(value, inner)
        elif value not in (None, "", [], ()):
            yield inner, value
