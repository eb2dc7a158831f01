"""Routes as TOML: read with the line of everything that is wrong, and written as `softcue routes apply` takes them.

[support_intents]                  # a task
deadline_s = 8
daily_cost_ceiling = 20.0

[support_intents.route]
kind = "cascade"
measure = "margin"
first = "cheap"                    # a part, by its name, or a table
second = { backend = "openai" }    # a direct route needs no kind

[support_intents.parts.cheap]
backend = "local"
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from prompt_store.errors import InvalidName, InvalidRoute, Place, RouteProblem, dotted, nearest_name
from prompt_store.names import check_task_name
from prompt_store.routing.routes import LIST_FIELDS, MAX_DEPTH, MAX_LEAVES, SINGLE_FIELDS, TaskRoute, problems_of
from prompt_store.routing.toml_lines import lines_of, located, read_toml

LARGEST_FILE_BYTES = 2**20
_MOST_ROUTES = MAX_LEAVES * MAX_DEPTH
_INLINE_WIDTH = 90

_DIRECT_FIELDS = frozenset({"backend", "version"})


@dataclass(frozen=True)
class RouteFile:
    """The routes that a file declares, by task, and where in it they are declared."""

    path: Path
    routes: Mapping[str, TaskRoute]
    _lines: Mapping[Place, int]
    _sources: Mapping[Place, Place]

    def located(self, error: InvalidRoute) -> InvalidRoute:
        """What is wrong with the routes, as `check_route` says it, with the file's lines; by line, each once."""
        return InvalidRoute.of(located(self.path, error.problems, self._lines, self._sources))


def load_routes(path: Path) -> RouteFile:
    """Raises InvalidRoute with every problem, each with file and line."""
    document, text = read_toml(path, LARGEST_FILE_BYTES, InvalidRoute)
    reading = _Reading()
    routes: dict[str, TaskRoute] = {}
    for task, declared in document.items():
        route = reading.read_task(task, declared)
        if route is not None:
            routes[task] = route
    lines = lines_of(text)
    if reading.problems:
        raise InvalidRoute.of(located(path, reading.problems, lines, reading.sources))
    if not routes:
        raise InvalidRoute(f"{path}: declares no route; begin with a table named after a task, such as [my_task.route]")
    return RouteFile(path, routes, lines, reading.sources)


def routes_to_toml(routes: Mapping[str, TaskRoute]) -> str:
    """What `load_routes` reads as these routes, the same text for the same routes."""
    blocks: list[str] = []
    for task, route in routes.items():
        blocks += _table((task,), route.model_dump(mode="json", exclude_none=True))
    return "\n".join(blocks)


class _Reading:
    """One file's tasks. `sources` say for each route of the result where in the file it is."""

    def __init__(self) -> None:
        self.problems: list[RouteProblem] = []
        self.sources: dict[Place, Place] = {}

    def read_task(self, task: str, declared: Any) -> TaskRoute | None:
        """The route that is declared for a task, None where something is wrong with it."""
        try:
            check_task_name(task)
        except InvalidName as error:
            self.problems.append(RouteProblem((task,), str(error)))
            return None
        if not isinstance(declared, dict):
            self.problems.append(RouteProblem((task,), f"is no table; write [{task}.route] and the route under it"))
            return None
        whole = dict(declared)
        parts = whole.pop("parts", {})
        before = len(self.problems)
        if not isinstance(parts, dict):
            self.problems.append(RouteProblem((task, "parts"), f"is no table; write [{task}.parts.NAME] for each part"))
            parts = {}
        expansion = Expansion((task, "parts"), parts, self.problems, self.sources)
        if "route" in whole:
            whole["route"] = expansion.expand(whole["route"], (task, "route"), (task, "route"))
        try:
            route = TaskRoute.model_validate(whole)
        except ValidationError as error:
            self.problems += [RouteProblem((task, *problem.place), problem.message) for problem in problems_of(error)]
        if len(self.problems) == before:
            self.problems += [
                RouteProblem((task, "parts", name), "the route does not use this part; name it there, or remove it")
                for name in parts
                if name not in expansion.used
            ]
        return route if len(self.problems) == before else None


@dataclass
class Expansion:
    """Puts the parts at a place of the file in the place of their names, and lets direct routes do without a kind.

    What is wrong with one is noted, and it left out.
    """

    at: Place
    parts: Mapping[str, Any]
    problems: list[RouteProblem]
    sources: dict[Place, Place]
    used: set[str] = field(default_factory=set)
    count: int = 0

    def expand(self, value: Any, place: Place, source: Place, within: tuple[str, ...] = (), depth: int = 1) -> Any:
        """The route that `value` stands for, at `place` of the result and `source` of the file.

        `within` are the parts that it is in.
        """
        self.sources[place] = source
        if isinstance(value, str):
            fault = self._fault(value, within)
            if fault is not None:
                return self._leave_out(source, fault)
            self.used.add(value)
            return self.expand(self.parts[value], place, (*self.at, value), (*within, value), depth)
        if not isinstance(value, dict):
            return value
        self.count += 1
        if depth > MAX_DEPTH:
            return self._leave_out(source, f"lies {depth} routes deep; nest at most {MAX_DEPTH} in each other")
        if self.count > _MOST_ROUTES:
            return {"kind": "direct"}  # so many routes have too many leaves, which the whole is refused for
        whole = dict(value)
        if "kind" not in whole and whole.keys() <= _DIRECT_FIELDS:
            whole["kind"] = "direct"

        def inner(found: Any, *way: str | int) -> Any:
            return self.expand(found, (*place, *way), (*source, *way), within, depth + 1)

        for key in SINGLE_FIELDS:
            if key in whole:
                whole[key] = inner(whole[key], key)
        for key in LIST_FIELDS:
            if isinstance(whole.get(key), list):
                whole[key] = [inner(each, key, index) for index, each in enumerate(whole[key])]
        if isinstance(whole.get("arms"), list):
            whole["arms"] = [
                {**arm, "route": inner(arm["route"], "arms", index, "route")}
                if isinstance(arm, dict) and "route" in arm
                else arm
                for index, arm in enumerate(whole["arms"])
            ]
        return whole

    def _fault(self, name: str, within: tuple[str, ...]) -> str | None:
        """What is wrong with a part being named here."""
        if name in within:
            circle = " -> ".join((*within[within.index(name) :], name))
            return f"the parts {circle} are a circle; break it"
        if len(within) > MAX_DEPTH:
            return f"lies in {len(within)} parts that name each other; use at most {MAX_DEPTH}"
        if name in self.parts:
            return None
        nearest = nearest_name(name, self.parts)
        hint = f"did you mean {nearest!r}?" if nearest is not None else f"declare it as [{dotted((*self.at, name))}]"
        return f"there is no part {name!r}; {hint}"

    def _leave_out(self, source: Place, fault: str) -> Any:
        problem = RouteProblem(source, fault)
        if problem not in self.problems:
            self.problems.append(problem)
        return {"kind": "direct"}


def _table(place: tuple[str, ...], document: Mapping[str, Any], *, array: bool = False) -> Iterator[str]:
    """A table and those in it, each as a block of lines. Entries of a list have a line each, for readable diffs."""
    name = ".".join(place)
    lines = [f"[[{name}]]" if array else f"[{name}]"]
    blocks: list[str] = []
    for key, value in document.items():
        if isinstance(value, dict) and len(_inline(value)) > _INLINE_WIDTH:
            blocks += _table((*place, key), value)
        elif not isinstance(value, list):
            lines.append(f"{key} = {_inline(value)}")
        elif all(len(_inline(each)) <= _INLINE_WIDTH for each in value):
            lines += [f"{key} = [", *(f"    {_inline(each)}," for each in value), "]"]
        else:
            for each in value:
                blocks += _table((*place, key), each, array=True)
    # A table of tables alone needs no header.
    yield from ([] if len(lines) == 1 and blocks and not array else ["".join(f"{line}\n" for line in lines)])
    yield from blocks


def _inline(value: Any) -> str:
    match value:
        case dict():
            pairs = [f"{key} = {_inline(inner)}" for key, inner in value.items() if (key, inner) != ("kind", "direct")]
            return f"{{ {', '.join(pairs)} }}"
        case list():
            return f"[{', '.join(map(_inline, value))}]"
        case str():
            # JSON's escapes are TOML's, but for DEL, which JSON lets stand.
            return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    return json.dumps(value)
