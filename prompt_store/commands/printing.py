"""How the store's commands print: tables by rich, JSON as it is, documents line by line."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import typer

from prompt_store.prompts.unreadable import UnreadableVersion

if TYPE_CHECKING:
    from prompt_store.prompts.version import PromptVersion

LINE_WIDTH = 100
PIPED_WIDTH = 200


def print_json(value: Any) -> None:
    typer.echo(json.dumps(value, indent=2, ensure_ascii=False))


def print_document(document: dict[str, Any], as_json: bool) -> None:
    """As JSON, or as a table of what is not empty."""
    if as_json:
        print_json(document)
        return
    print_table(
        ("", ""), [(key, _in_words(value)) for key, value in document.items() if value not in (None, "", [], {})]
    )


def print_table(headers: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console()
    if not console.is_terminal:
        # Nobody's terminal: nothing needs to fit.
        console = Console(width=PIPED_WIDTH)
    table = Table(box=SIMPLE_HEAD, show_header=any(headers))
    for place, header in enumerate(headers):
        table.add_column(header, overflow="fold", no_wrap=place < len(headers) - 1)
    for row in rows:
        # As Text: names and notes are not markup.
        table.add_row(*(Text(cell) for cell in row))
    console.print(table)


def version_document(version: PromptVersion | UnreadableVersion, aliases: Sequence[str]) -> dict[str, Any]:
    """A version as JSON values, with its label and the aliases that point at it; `reason` where it cannot be read."""
    if isinstance(version, UnreadableVersion):
        known = {**asdict(version), "created_at": version.created_at.isoformat()}
    else:
        known = version.model_dump(mode="json")
    return {"version": version.label, "aliases": list(aliases), **known}


def size(count_bytes: int) -> str:
    """Bytes as people read them: 812 B, 12.3 kB, 4.0 MB."""
    value = float(count_bytes)
    for unit in ("B", "kB", "MB", "GB"):
        if value < 1000 or unit == "GB":
            break
        value /= 1000
    return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"


def _in_words(value: Any) -> str:
    if isinstance(value, str):
        return value
    line = json.dumps(value, ensure_ascii=False)
    return line if len(line) <= LINE_WIDTH else json.dumps(value, indent=2, ensure_ascii=False)
