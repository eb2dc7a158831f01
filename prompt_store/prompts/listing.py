"""Versions, alias moves and bases as people look through them: page by page, without reports and tensors."""

import base64
import re
from collections import defaultdict
from dataclasses import dataclass

from sqlalchemy import ColumnElement, Connection, String, and_, cast, exists, func, or_, select
from sqlalchemy.dialects.postgresql import JSONB

from prompt_store.errors import InvalidName
from prompt_store.names import check_alias, check_task_name, check_text
from prompt_store.prompts.aliases import AliasMove, no_such_alias
from prompt_store.prompts.bases import find_base, read_bases
from prompt_store.prompts.lookup import read_row, select_versions
from prompt_store.prompts.revisions import require_task
from prompt_store.prompts.unreadable import UnreadableVersion
from prompt_store.prompts.version import PromptVersion
from prompt_store.tables import alias_moves, aliases, versions

DEFAULT_PAGE = 50
LARGEST_PAGE = 200

_VERSION_PLACE = re.compile(r"([a-z0-9_-]+) ([1-9][0-9]{0,8})")
_MOVE_PLACE = re.compile(r"([1-9][0-9]{0,17})")


@dataclass(frozen=True, slots=True)
class ListedVersion:
    """A version and the aliases that point at it, by name."""

    version: PromptVersion | UnreadableVersion
    aliases: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class VersionPage:
    """Some of the versions; `after` asks for those that follow, None where none do."""

    entries: tuple[ListedVersion, ...]
    after: str | None


@dataclass(frozen=True, slots=True)
class MovePage:
    """Some of an alias's moves; `after` asks for older ones, None where there are none."""

    moves: tuple[AliasMove, ...]
    after: str | None


def page_versions(
    connection: Connection,
    *,
    task: str | None = None,
    kind: str | None = None,
    base: str | None = None,
    tag: str | None = None,
    alias: str | None = None,
    after: str | None = None,
    limit: int = DEFAULT_PAGE,
) -> VersionPage:
    """Versions by task and then the newest first, those that every given filter lets through.

    `base` is a name, fingerprint or unique prefix; `after` is what the page before gave. A version that is published
    between two pages is on neither or in its place; none is shown twice.
    Raises UnknownTask, UnknownBase, and InvalidName for a limit, cursor or name that is none.
    """
    _check_limit(limit)
    wanted: list[ColumnElement[bool]] = []
    if task is not None:
        require_task(connection, task)
        wanted.append(versions.c.task == task)
    if kind is not None:
        wanted.append(versions.c.kind == check_text("kind", kind))
    if base is not None:
        wanted.append(versions.c.base_fingerprint == find_base(read_bases(connection), base).fingerprint)
    if tag is not None:
        wanted.append(_has_tag(connection, check_text("tag", tag)))
    if alias is not None:
        pointed_at = select(aliases.c.version).where(aliases.c.name == check_alias(alias))
        wanted.append(versions.c.digest.in_(pointed_at))
    if after is not None:
        last_task, last_number = _place(after, _VERSION_PLACE)
        check_task_name(last_task)
        # Only the first half bounds an index.
        wanted += [
            versions.c.task >= last_task,
            or_(versions.c.task > last_task, versions.c.number < int(last_number)),
        ]
    rows = connection.execute(
        select_versions().where(*wanted).order_by(versions.c.task, versions.c.number.desc()).limit(limit + 1)
    ).all()
    page = [read_row(row) for row in rows[:limit]]
    named = _aliases_of(connection, page)
    more = f"{page[-1].task} {page[-1].number}" if len(rows) > limit else None
    return VersionPage(
        tuple(ListedVersion(version, tuple(named[version.digest])) for version in page),
        after=_cursor(more) if more is not None else None,
    )


def page_moves(
    connection: Connection, task: str, alias: str, *, after: str | None = None, limit: int = DEFAULT_PAGE
) -> MovePage:
    """An alias's moves, newest first, also of one that was removed.

    Raises UnknownTask, UnknownAlias when it never was, and InvalidName for a limit, cursor or alias that is none.
    """
    _check_limit(limit)
    check_alias(alias)
    require_task(connection, task)
    here = and_(alias_moves.c.task == task, alias_moves.c.alias == alias)
    before = [alias_moves.c.sequence < int(_place(after, _MOVE_PLACE)[0])] if after is not None else []
    rows = connection.execute(
        select(alias_moves).where(here, *before).order_by(alias_moves.c.sequence.desc()).limit(limit + 1)
    ).all()
    if not rows and not connection.execute(select(exists().where(here))).scalar_one():
        raise no_such_alias(connection, task, alias)
    moves = tuple(AliasMove(**row._mapping) for row in rows[:limit])
    return MovePage(moves, after=_cursor(str(moves[-1].sequence)) if len(rows) > limit else None)


def count_versions(connection: Connection, task: str) -> dict[str, int]:
    """How many versions of each kind a task has. Raises UnknownTask."""
    require_task(connection, task)
    counts = select(versions.c.kind, func.count()).where(versions.c.task == task).group_by(versions.c.kind)
    return {kind: int(count) for kind, count in connection.execute(counts.order_by(versions.c.kind))}


def _has_tag(connection: Connection, tag: str) -> ColumnElement[bool]:
    if connection.dialect.name == "postgresql":
        return cast(versions.c.tags, JSONB).contains([tag])
    elements = func.json_each(versions.c.tags).table_valued("value")
    return exists(select(1).select_from(elements).where(cast(elements.c.value, String) == tag))


def _aliases_of(connection: Connection, page: list[PromptVersion | UnreadableVersion]) -> defaultdict[str, list[str]]:
    named: defaultdict[str, list[str]] = defaultdict(list)
    rows = connection.execute(
        select(aliases.c.version, aliases.c.name)
        .where(aliases.c.version.in_([version.digest for version in page]))
        .order_by(aliases.c.name)
    )
    for digest, name in rows:
        named[digest].append(name)
    return named


def _check_limit(limit: int) -> None:
    if not 1 <= limit <= LARGEST_PAGE:
        raise InvalidName(f"a page of {limit} cannot be given; ask for 1 to {LARGEST_PAGE} entries at once")


def _cursor(place: str) -> str:
    return base64.urlsafe_b64encode(place.encode()).decode().rstrip("=")


def _place(cursor: str, form: re.Pattern[str]) -> tuple[str, ...]:
    """What the cursor says of where a page ended, by the form's groups. Raises InvalidName."""
    try:
        padded = cursor.encode("ascii") + b"=" * (-len(cursor) % 4)
        found = form.fullmatch(base64.b64decode(padded, altchars=b"-_", validate=True).decode("ascii"))
    except ValueError:
        found = None
    if found is None:
        raise InvalidName("`after` is not what a page of this list gave; leave it out to start from the first page")
    return found.groups()
