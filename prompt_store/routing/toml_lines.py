"""On which line of a TOML document each value begins: tomllib gives the values and not their places."""

import re
import tomllib
from collections import defaultdict

from prompt_store.errors import Place

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
