from typing import Any

import pytest

from prompt_store.errors import InvalidRoute, NotYetSupported, UnknownTask, UnknownVersion
from prompt_store.prompts.registry import Registry
from prompt_store.routes import DirectRoute, parse_route, route_selectors
from tests.prompt_store.building import ANNA, publish

DIRECT = {"kind": "direct", "backend": "local", "version": "candidate"}
RESERVED: list[dict[str, Any]] = [
    {"kind": "split", "experiment": "e", "arms": [{"name": n, "weight": 1, "route": DIRECT} for n in "ab"]},
    {"kind": "fallback", "routes": [DIRECT, DIRECT]},
    {"kind": "cascade", "first": DIRECT, "second": DIRECT, "threshold": 0.5},
    {"kind": "shadow", "primary": DIRECT, "shadow": {"kind": "fallback", "routes": [DIRECT, DIRECT]}},
    {"kind": "ensemble", "members": [DIRECT, DIRECT]},
]


def test_a_task_has_a_direct_route_to_production_until_one_is_applied(registry: Registry) -> None:
    assert registry.route("support_intents") == DirectRoute(backend="local", version="production")
    assert registry.route_history("support_intents") == []


def test_applying_a_route_keeps_the_earlier_ones(registry: Registry) -> None:
    first, second = DirectRoute(version="candidate"), DirectRoute(backend="other", version="candidate")
    assert [registry.apply_route("support_intents", route, ANNA).number for route in (first, second, second)] == [
        1,
        2,
        2,
    ]
    assert registry.route("support_intents") == second
    assert [revision.route for revision in registry.route_history("support_intents")] == [second, first]
    assert registry.snapshot().tasks["support_intents"].route == second
    assert [change.kind for change in registry.changes_since(2)] == ["route", "route"]


@pytest.mark.parametrize("document", RESERVED, ids=lambda document: str(document["kind"]))
def test_a_reserved_route_is_understood_and_refused(registry: Registry, document: dict[str, Any]) -> None:
    route = parse_route(document)
    assert route.kind == document["kind"]
    with pytest.raises(NotYetSupported, match=f"a {route.kind} route is not served yet"):
        registry.apply_route("support_intents", route, ANNA)
    assert registry.changes_since(2) == []


def test_a_route_may_name_an_alias_that_comes_later_but_no_version_that_does(registry: Registry) -> None:
    with pytest.raises(UnknownVersion):
        registry.apply_route("support_intents", DirectRoute(version="v1"), ANNA)
    publish(registry)
    registry.apply_route("support_intents", DirectRoute(version="v1"), ANNA)
    registry.apply_route("support_intents", DirectRoute(version="later"), ANNA)


def test_a_route_needs_a_task(registry: Registry) -> None:
    with pytest.raises(UnknownTask, match="did you mean 'support_intents'"):
        registry.apply_route("support_intent", DirectRoute(), ANNA)
    with pytest.raises(UnknownTask):
        registry.route("support_intent")


@pytest.mark.parametrize(
    ("document", "reason"),
    [
        ({}, "kind"),
        ({"kind": "directly"}, "directly"),
        ({"kind": "direct", "version": "v0"}, "not a version number"),
        ({"kind": "direct", "backend": "Not A Name"}, "not a backend name"),
        ({"kind": "direct", "more": 1}, "more"),
        ({"kind": "fallback", "routes": [DIRECT]}, "at least 2"),
        ({"kind": "cascade", "first": DIRECT, "second": DIRECT, "threshold": 2}, "threshold"),
    ],
)
def test_a_contradictory_route_is_refused(document: dict[str, Any], reason: str) -> None:
    with pytest.raises(InvalidRoute, match=reason):
        parse_route(document)


@pytest.mark.parametrize("document", RESERVED, ids=lambda document: str(document["kind"]))
def test_the_versions_that_a_route_names_are_found_at_any_depth(document: dict[str, Any]) -> None:
    nested = {"kind": "cascade", "first": document, "second": DIRECT | {"version": "v7"}, "threshold": 0.5}
    assert route_selectors(parse_route({"kind": "fallback", "routes": [nested, DIRECT | {"version": "a1b2c3d4"}]})) == {
        "candidate",
        "v7",
        "a1b2c3d4",
    }
