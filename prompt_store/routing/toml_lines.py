"""Reading TOML with the line on which each value begins: tomllib gives the values and not their places."""

import re
import tomllib
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from prompt_store.errors import InvalidArtifact, Place, RouteProblem, StoreError
from prompt_store.files import read_bounded

_SYNTAX = re.compile(r"(.*) \(at (?:line (\d+), column \d+|end of document)\)")

_BLANK = re.compile(r"(?:[ \t\r\n]|#[^\n]*)*")
_SPACES = re.compile(r"[ \t]*")
_STRING = re.compile(
    r'"""(?:\\.|[^\\])*?"{3,5}'
    r"|'''.*?'{3,5}"
    r'|"(?:\\.|[^"\\])*"'
    r"|'[^']*'",
    re.DOTALL,
)
_BARE_KEY = re.compile(r"[A-Za-z0-9_-]+")
_OTHER_VALUE = re.compile(r"[^,\]}#\n]*")


def read_toml(path: Path, largest_bytes: int, refusal: type[StoreError]) -> tuple[dict[str, Any], str]:
    """A file's values and its text. Raises `refusal` with file and line."""
    try:
        text = read_bounded(path, largest_bytes).decode()
        return tomllib.loads(text), text
    except InvalidArtifact as error:
        raise refusal(str(error)) from error
    except UnicodeDecodeError as error:
        raise refusal(f"{path}: is not UTF-8; save it so") from error
    except RecursionError as error:
        raise refusal(f"{path}: is nested too deeply; flatten it") from error
    except ValueError as error:  # also a number of more digits than Python reads
        found = _SYNTAX.fullmatch(str(error))
        line = found[2] or text.rstrip().count("\n") + 1 if found else None
        where, what = (f"{path}:{line}", found[1]) if found else (str(path), str(error))
        raise refusal(f"{where}: is not TOML: {what}; correct it there") from error


def located(
    path: Path, problems: Iterable[RouteProblem], lines: Mapping[Place, int], sources: Mapping[Place, Place]
) -> tuple[RouteProblem, ...]:
    """Problems with file and line in their message, by line and each once.

    `sources` say of places in what was made of the file where in it they are.
    """
    found: dict[tuple[int, str], RouteProblem] = {}
    for problem in problems:
        known = next((problem.place[:end] for end in _ends(problem.place) if problem.place[:end] in sources), None)
        place = (*sources[known], *problem.place[len(known) :]) if known is not None else problem.place
        line = next((lines[place[:end]] for end in _ends(place) if place[:end] in lines), 1)
        message = str(RouteProblem(place, problem.message))
        found.setdefault((line, message), RouteProblem((), f"{path}:{line}: {message}"))
    return tuple(found[key] for key in sorted(found))


def _ends(place: Place) -> Iterator[int]:
    """Where a place may be cut off, the longest piece first."""
    return iter(range(len(place), 0, -1))


def lines_of(text: str) -> dict[Place, int]:
    """Line numbers from 1, by keys and indices of lists; of a table, that of its header or first key.

    The text must be what tomllib reads.
    """
    return _Scanner(text).lines


class _Scanner:
    """Walks over a document that is known to be sound."""

    def __init__(self, text: str) -> None:
        self._text = text
        self._at = 0
        # The line at an earlier place: counted on from there, a large document costs one pass.
        self._counted, self._line_there = 0, 1
        self.lines: dict[Place, int] = {}
        # How many tables each [[array]] has so far.
        self._counts: defaultdict[Place, int] = defaultdict(int)
        table: Place = ()
        self._skip(_BLANK)
        while self._at < len(text):
            if self._take("["):
                table = self._header()
            else:
                self._pair(table)
            self._skip(_BLANK)

    def _header(self) -> Place:
        array = self._take("[")
        line = self._line()
        keys = self._keys()
        self._at += 2 if array else 1
        place: Place = ()
        for step, key in enumerate(keys, 1):
            place = (*place, key)
            self.lines.setdefault(place, line)
            if array and step == len(keys):
                self._counts[place] += 1
            if place in self._counts:
                place = (*place, self._counts[place] - 1)
                self.lines.setdefault(place, line)
        return place

    def _pair(self, table: Place) -> None:
        line = self._line()
        place = table
        for key in self._keys():
            place = (*place, key)
            self.lines.setdefault(place, line)
        self._take("=")
        self._skip(_SPACES)
        self._value(place)

    def _keys(self) -> list[str]:
        keys: list[str] = []
        while True:
            self._skip(_SPACES)
            bare = _BARE_KEY.match(self._text, self._at)
            found = self._skip(_BARE_KEY if bare else _STRING)
            keys.append(found if bare else tomllib.loads(f"key = {found}")["key"])
            self._skip(_SPACES)
            if not self._take("."):
                return keys

    def _value(self, place: Place) -> None:
        if self._take("["):
            self._elements(place)
        elif self._take("{"):
            self._skip(_BLANK)
            while not self._take("}"):
                self._pair(place)
                self._skip(_BLANK)
                self._take(",")
                self._skip(_BLANK)
        else:
            self._skip(_STRING if self._text[self._at] in "\"'" else _OTHER_VALUE)

    def _elements(self, place: Place) -> None:
        index = 0
        self._skip(_BLANK)
        while not self._take("]"):
            self.lines[(*place, index)] = self._line()
            self._value((*place, index))
            index += 1
            self._skip(_BLANK)
            self._take(",")
            self._skip(_BLANK)

    def _skip(self, pattern: re.Pattern[str]) -> str:
        found = pattern.match(self._text, self._at)
        assert found is not None, "tomllib has read the text"
        self._at = found.end()
        return found[0]

    def _take(self, mark: str) -> bool:
        there = self._text.startswith(mark, self._at)
        self._at += len(mark) * there
        return there

    def _line(self) -> int:
        self._line_there += self._text.count("\n", self._counted, self._at)
        self._counted = self._at
        return self._line_there
