"""Which remote models an entry of a table stands for: a price, or a date of retirement. Pure."""

from __future__ import annotations

import re

_FINE_TUNED = "ft:"

# What may follow an entry: the date or number of a snapshot, then nothing or what a provider sets apart.
_REST = re.compile(r"(?:-\d{4}-\d{2}-\d{2}|-\d{3,})?(?:[:@/].*)?", re.DOTALL)


def stands_for(entry: str, model: str) -> bool:
    """Whether `entry` names `model`, or the family that it is a snapshot or a tuned copy of.

    `gpt-4o` stands for `gpt-4o`, `gpt-4o-2024-08-06` and `gpt-4o:acme`, and not for `gpt-4o-mini`, which is another
    model. A fine-tuned id is its own family: `ft:gpt-4o-mini-2024-07-18` stands for that of every owner, `gpt-4o` for
    none.
    """
    return bool(entry) and model.startswith(entry) and _REST.fullmatch(model, len(entry)) is not None


def fine_tuned_base(model: str) -> str | None:
    """The base inside a fine-tuned id: `gpt-4o-mini-2024-07-18` of `ft:gpt-4o-mini-2024-07-18:acme::x`, else None."""
    return model.removeprefix(_FINE_TUNED).partition(":")[0] or None if model.startswith(_FINE_TUNED) else None
