import tomllib
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as some

from prompt_store.errors import InvalidRoute, Place
from prompt_store.routing.files import RouteFile, load_routes, routes_to_toml
from prompt_store.routing.routes import TaskRoute, leaves, parse_task_route
from prompt_store.routing.toml_lines import lines_of

WHOLE = """\
# Who answers support.
[support_intents]
deadline_s = 8
daily_cost_ceiling = 20.0

[support_intents.route]
kind = "cascade"
measure = "margin"
first = "cheap"                    # a part
second = { backend = "openai" }

[support_intents.parts.cheap]
backend = "local"

[data_questions.route]
kind = "split"
experiment = "size"

[[data_questions.route.arms]]
name = "small"
weight = 0.25
route = "small"

[[data_questions.route.arms]]
name = "large"
weight = 0.75
[data_questions.route.arms.route]
kind = "fallback"
routes = [
    { backend = "openai", version = "v3" },
    "small",
]

[data_questions.parts]
small = { version = "v2" }
"""


def read(folder: Path, text: str) -> RouteFile:
    path = folder / "routes.toml"
    path.write_text(text)
    return load_routes(path)


def refusals(folder: Path, text: str) -> list[str]:
    """What is wrong with a file, without its name."""
    with pytest.raises(InvalidRoute) as caught:
        read(folder, text)
    prefix = f"{folder / 'routes.toml'}:"
    said = [problem.message for problem in caught.value.problems] or [str(caught.value)]
    assert all(message.startswith(prefix) for message in said), said
    return [message.removeprefix(prefix) for message in said]


def test_a_file_declares_routes_of_tasks_with_parts_in_the_place_of_their_names(tmp_path: Path) -> None:
    routes = read(tmp_path, WHOLE).routes
    small = {"kind": "direct", "version": "v2"}
    either = {"kind": "fallback", "routes": [{"kind": "direct", "backend": "openai", "version": "v3"}, small]}
    arms = [{"name": "small", "weight": 0.25, "route": small}, {"name": "large", "weight": 0.75, "route": either}]
    first, second = ({"kind": "direct", "backend": backend} for backend in ("local", "openai"))
    cascade = {"kind": "cascade", "measure": "margin", "first": first, "second": second}
    assert routes == {
        "support_intents": parse_task_route({"route": cascade, "deadline_s": 8, "daily_cost_ceiling": 20}),
        "data_questions": parse_task_route({"kind": "split", "experiment": "size", "arms": arms}),
    }


def test_a_task_may_have_limits_and_no_route(tmp_path: Path) -> None:
    assert read(tmp_path, "[t]\ndeadline_s = 3").routes == {"t": TaskRoute(deadline_s=3)}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[t.route]\nversion = 'v0'\n", ["2: t.route.version: 'v0' is not a version number"]),
        ("[t.route]\nkind = 'directly'\n", ["1: t.route: input tag 'directly'"]),
        ("[t.route]\nbackend = 'a'\n\nbackends = 'b'", ["1: t.route: the kind is missing"]),
        ("[t]\n\ndeadline = 3\n", ["3: t.deadline: there is no such field"]),
        ("[t]\nroute.kind = 'fallback'\nroute.routes = [\n  'cheap',\n  'chep']\nparts.cheap = {}",
         ["5: t.route.routes[1]: there is no part 'chep'; did you mean 'cheap'?"]),
        ("[t.route]\nkind = 'cascade'\nfirst = 'a'\nsecond = 'a'\nmeasure = 'margin'\n[t.parts.a]\nversion = 'v0'\n",
         ["7: t.parts.a.version: 'v0' is not a version number"]),
        ("[t.route]\nkind = 'ensemble'\nmembers = ['a', {}]\n[t.parts]\na = 'b'\n[t.parts.b]\nkind = 'fallback'\n"
         "routes = ['c', {}]\n[t.parts.c]\nkind = 'shadow'\nprimary = {}\nshadow = 'a'\n",
         ["12: t.parts.c.shadow: the parts a -> b -> c -> a are a circle; break it"]),
        ("[t.route]\nkind = 'split'\nexperiment = 'e'\narms = [\n{name = 'a', weight = 0.5, route = {}},\n"
         "{name = 'b', weight = 0.6, route = {version = 'v0'}},\n]", ["6: t.route.arms[1].route.version"]),
        ("[t.route]\nkind = 'split'\nexperiment = 'e'\narms = [\n{name = 'a', weight = 0.5, route = {}},\n"
         "{name = 'b', weight = 0.6, route = {}},\n]", ["1: t.route: the arms' weights sum to 1.1"]),
        ("a = 1\n[t.route]\nversion = 'v0'\n[u]\nparts = 3\n[V.route]\n",
         ["1: a: is no table", "3: t.route.version", "5: u.parts: is no table", "6: V: 'V' is not a task name"]),
        ("[t.route]\nversion = 'v1'\nversion = 'v2'\n", ["3: is not TOML: Cannot overwrite a value"]),
        ("[t]\nroute = 3\n", ["2: t.route: this is no route"]),
        ("[t.route]\nkind = 'fallback'\nroutes = 'ab'\n", ["3: t.route.routes: this is no list"]),
        ("[t]\r\nroute.kind = 'direct'\r\nroute.version = 'v0'\r\n", ["3: t.route.version: 'v0' is not"]),
        ("[t.route]\nversion = '''v1\n\n", ["2: is not TOML: Expected"]),
        ("[t.route]\nversion = 'v1'\n[t.parts.spare]\nversion = 'v0'\n",
         ["3: t.parts.spare: the route does not use this part"]),
        ("[t.parts.a]\n", ["1: t.parts.a: the route does not use this part"]),
        ("[t]\ndeadline_s = '8'\nroute = {}\n", ["2: t.deadline_s: input should be a valid number"]),
    ],
)  # fmt: skip
def test_what_is_wrong_is_told_with_its_line(tmp_path: Path, text: str, said: list[str]) -> None:
    found = refusals(tmp_path, text)
    assert len(found) == len(said), found
    for message, beginning in zip(found, said, strict=True):
        assert message.startswith(beginning), message


def test_parts_cannot_grow_without_bound(tmp_path: Path) -> None:
    grown = "[t]\nroute = 'p0'\n" + "".join(
        f"[t.parts.p{n}]\nkind = 'ensemble'\nmembers = {[f'p{n + 1}'] * 16}\n" for n in range(6)
    )
    found = refusals(tmp_path, grown + "[t.parts.p6]")
    assert found == ["1: t: the route has more than 64 leaves; use fewer"]
    chain = "[t]\nroute = 'p0'\n" + "".join(
        f"[t.parts.p{n}]\nkind = 'fallback'\nroutes = ['p{n + 1}', {{}}]\n" for n in range(500)
    )
    assert "lies 9 routes deep" in refusals(tmp_path, chain + "[t.parts.p500]")[0]
    names = "[t]\nroute = 'p0'\n[t.parts]\n" + "".join(f"p{n} = 'p{n + 1}'\n" for n in range(2000)) + "p2000 = {}\n"
    assert refusals(tmp_path, names) == ["12: t.parts.p8: lies in 9 parts that name each other; use at most 8"]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "declares no route"),
        (b"\xff", "is not UTF-8"),
        (b"#" * (2**20 + 1), "is larger"),
        (b"[t]\ndeadline_s = 1" + b"0" * 5000, "is not TOML: Exceeds the limit"),
    ],
)
def test_a_file_that_holds_no_routes_is_refused(tmp_path: Path, content: bytes, said: str) -> None:
    path = tmp_path / "routes.toml"
    path.write_bytes(content)
    with pytest.raises(InvalidRoute, match=said):
        load_routes(path)
    with pytest.raises(InvalidRoute, match="cannot be read"):
        load_routes(tmp_path / "missing.toml")


NAMES = some.text(min_size=1, max_size=8).filter(
    lambda text: ("\0" not in text and text.isprintable()) or text == "\x7f"
)
BACKENDS = some.sampled_from([None, "local", "openai"])
DIRECT = some.builds(
    lambda backend, version: {"kind": "direct", "version": version} | ({"backend": backend} if backend else {}),
    BACKENDS,
    some.sampled_from(["production", "v7", "a1b2c3d4"]),
)


def compound(inner: some.SearchStrategy[dict[str, Any]]) -> some.SearchStrategy[dict[str, Any]]:
    several = some.lists(inner, min_size=2, max_size=3)

    def split(experiment: str, routes: list[dict[str, Any]], first: float) -> dict[str, Any]:
        rest = (1 - first) / (len(routes) - 1)
        arms = [{"name": f"a{n}", "weight": rest if n else first, "route": route} for n, route in enumerate(routes)]
        return {"kind": "split", "experiment": experiment, "arms": arms}

    ensemble = some.builds(lambda routes: {"kind": "ensemble", "members": routes, "vote": "mean_logprob"}, several)
    return some.one_of(
        some.builds(split, NAMES, several, some.floats(0.01, 0.99)),
        some.builds(lambda routes: {"kind": "fallback", "routes": routes}, several),
        some.builds(
            lambda first, second: {"kind": "cascade", "first": first, "second": second, "measure": "margin"},
            some.one_of(DIRECT, ensemble),
            inner,
        ),
        some.builds(
            lambda primary, shadow, sample: {"kind": "shadow", "primary": primary, "shadow": shadow, "sample": sample},
            inner,
            inner,
            some.floats(1e-9, 1.0),
        ),
        ensemble,
    )


def fits(document: dict[str, Any]) -> bool:
    try:
        parse_task_route(document)
    except InvalidRoute:
        return False
    return True


LIMITS = some.none() | some.floats(1e-3, 1e20)
ROUTES = some.builds(
    lambda document, deadline_s, ceiling: parse_task_route(
        {"route": document, "deadline_s": deadline_s, "daily_cost_ceiling": ceiling}
    ),
    some.recursive(DIRECT, compound, max_leaves=8).filter(fits),
    LIMITS,
    LIMITS,
)


@given(routes=some.dictionaries(some.sampled_from(["t", "support_intents"]), ROUTES, min_size=1))
def test_routes_written_as_toml_read_back_the_same(
    tmp_path_factory: pytest.TempPathFactory, routes: dict[str, TaskRoute]
) -> None:
    text = routes_to_toml(routes)
    assert read(tmp_path_factory.getbasetemp(), text).routes == routes
    # And as documents, as the store keeps them.
    assert {task: parse_task_route(route.document()) for task, route in routes.items()} == routes
    lines = lines_of(text)
    for task, route in routes.items():
        for place, leaf in leaves(route.route):
            line = text.splitlines()[lines[(task, "route", *place, "version")] - 1]
            assert f'version = "{leaf.version}"' in line


def places(value: Any, place: Place = ()) -> set[Place]:
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return {place}.union(*(places(each, (*place, key)) for key, each in inner))


STRANGE = '''\
top.level = 1979-05-27 07:32:00  # not "a string
"quoted # key" = """several
lines with ""quotes"" and a \\""" escape"""""
'literal' = \'\'\'C:\\path = [1]
'\'\'\'
empty = ["", \'\', [], {}]
numbers = [ 1, 0x_F, 1e-3, # a comment ]
  -inf,
]
deep = { a.b = [ { c = "}" }, { c = "]," } ], d = true }

[[fruit."a.b"]]
name = "x"
[fruit."a.b".skin]
colour = 1
[[fruit."a.b"]]
[[fruit."a.b".kinds]]
n = 1
[[fruit."a.b".kinds]]
n = 2
[ spaced . out ]
last = 'no newline follows\''''.replace("0x_F", "0xF")


def test_every_value_of_a_document_has_its_line() -> None:
    document = tomllib.loads(STRANGE)
    lines = lines_of(STRANGE)
    assert lines.keys() == places(document) - {()}
    shown = STRANGE.splitlines()
    for place, beginning in {
        ("top", "level"): "top.level",
        ("quoted # key",): '"quoted',
        ("literal",): "'literal'",
        ("numbers", 3): "  -inf",
        ("deep", "a", "b", 1, "c"): "deep",
        ("fruit", "a.b", 0, "skin", "colour"): "colour",
        ("fruit", "a.b", 1, "kinds", 1, "n"): "n = 2",
        ("spaced", "out", "last"): "last",
    }.items():
        assert shown[lines[place] - 1].startswith(beginning), place
