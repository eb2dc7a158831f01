import json
from typing import Any

import pytest
from sqlalchemy import select, update

from prompt_store.errors import Conflict, InvalidRoute, SchemaMismatch, UnknownTask
from prompt_store.prompts.registry import Registry
from prompt_store.routing.routes import DirectRoute, TaskRoute, leaves, parse_task_route, route_selectors
from prompt_store.tables import audit, route_revisions
from tests.prompt_store.building import ANNA, LOCAL, publish

TASK = "support_intents"
DIRECT: dict[str, Any] = {"kind": "direct", "backend": "local", "version": "candidate"}
COMPOUND: list[dict[str, Any]] = [
    {"kind": "split", "experiment": "e", "arms": [{"name": n, "weight": 0.5, "route": DIRECT} for n in "ab"]},
    {"kind": "fallback", "routes": [DIRECT, DIRECT]},
    {"kind": "cascade", "first": DIRECT, "second": DIRECT, "measure": "margin"},
    {"kind": "shadow", "primary": DIRECT, "shadow": {"kind": "fallback", "routes": [DIRECT, DIRECT]}},
    {"kind": "ensemble", "members": [DIRECT, DIRECT]},
]


def direct(version: str, **limits: float) -> TaskRoute:
    return TaskRoute(route=DirectRoute(version=version), **limits)


@pytest.fixture
def routed(registry: Registry) -> Registry:
    """Three versions, and the first of three routes for each of them."""
    for seed in range(3):
        publish(registry, seed)
    for version in ("v1", "v2", "v3"):
        registry.apply_route(TASK, direct(version), ANNA, reason=f"try {version}")
    return registry


def test_a_task_has_a_direct_route_to_production_until_one_is_applied(registry: Registry) -> None:
    assert registry.route(TASK) == TaskRoute(route=DirectRoute(version="production"))
    assert registry.route_revision(TASK) is None
    assert registry.route_history(TASK) == []


def test_applying_a_route_keeps_the_earlier_ones_with_who_and_why(registry: Registry) -> None:
    publish(registry, alias="candidate")
    before = registry.snapshot()
    first, second = direct("candidate"), direct("candidate", deadline_s=8)
    applied = [registry.apply_route(TASK, route, ANNA, reason="faster") for route in (first, second, second)]
    assert [(entry.revision.number, entry.changed) for entry in applied] == [(1, True), (2, True), (2, False)]
    assert registry.route(TASK) == second
    newest, oldest = registry.route_history(TASK)
    assert (newest.route, oldest.route, newest.reason, newest.principal) == (second, first, "faster", "anna")
    assert newest == registry.route_revision(TASK)
    assert registry.snapshot(before).tasks[TASK].route == second
    assert [change.kind for change in registry.changes_since(before.sequence)] == ["route", "route"]


def test_what_earlier_releases_cannot_read_of_a_route_is_stored_beside_what_they_can(registry: Registry) -> None:
    for number in (1, 2):
        publish(registry, number, alias="candidate")
    leaves = [{"kind": "direct", "version": version} for version in ("v1", "candidate")]
    ensemble = {"kind": "ensemble", "members": leaves, "vote": "majority"}
    for document in (leaves[1], {"route": leaves[1], "deadline_s": 2.0}, ensemble):
        registry.apply_route(TASK, parse_task_route(document), ANNA, backends=[LOCAL])
    query = select(route_revisions.c.document, route_revisions.c.whole).order_by(route_revisions.c.number)
    with registry.database.read() as connection:
        stored = [[text and json.loads(text) for text in row] for row in connection.execute(query)]
    assert stored == [
        [leaves[1], None],
        [leaves[1], {"route": leaves[1], "deadline_s": 2.0}],
        [{"kind": "fallback", "routes": leaves}, {"route": ensemble}],
    ]
    assert registry.route(TASK) == parse_task_route(ensemble)


def test_a_route_that_cannot_be_read_is_replaced_by_the_next(routed: Registry) -> None:
    with routed.database.write() as connection:
        connection.execute(
            update(route_revisions).where(route_revisions.c.number == 3).values(document='{"kind":"lottery"}')
        )
    with pytest.raises(SchemaMismatch, match="apply the route again"):
        routed.route(TASK)
    assert routed.apply_route(TASK, direct("v3"), ANNA).revision.number == 4
    assert routed.route(TASK) == direct("v3")


def test_a_route_is_applied_only_to_the_revision_that_is_expected(registry: Registry) -> None:
    publish(registry, alias="candidate")
    with pytest.raises(Conflict, match=r"was never applied, and 1 was expected") as caught:
        registry.apply_route(TASK, direct("v1"), ANNA, expected=1)
    assert caught.value.current == "0"
    registry.apply_route(TASK, direct("v1"), ANNA, expected=0)
    with pytest.raises(Conflict, match="is at revision 1, and none was expected") as caught:
        registry.apply_route(TASK, direct("candidate"), ANNA, expected=0)
    assert caught.value.current == "1"
    registry.apply_route(TASK, direct("candidate"), ANNA, expected=1)
    with pytest.raises(Conflict, match="is at revision 2"):
        registry.rollback_route(TASK, ANNA, expected=1)


def test_a_rollback_returns_to_the_route_before_and_then_to_the_one_before_that(routed: Registry) -> None:
    for number, version in ((4, "v2"), (5, "v1")):
        applied = routed.rollback_route(TASK, ANNA, reason="worse")
        assert (applied.revision.number, applied.revision.route) == (number, direct(version))
        assert applied.revision.restores == int(version[1])
    with pytest.raises(Conflict, match="has no revision before 1 to roll back to"):
        routed.rollback_route(TASK, ANNA)
    routed.apply_route(TASK, direct("v3"), ANNA)
    # What was in force before is itself a rollback's.
    assert routed.rollback_route(TASK, ANNA).revision.route == direct("v1")
    assert [(entry.number, entry.restores) for entry in routed.route_history(TASK)] == [
        (7, 1),
        (6, None),
        (5, 1),
        (4, 2),
        (3, None),
        (2, None),
        (1, None),
    ]
    with routed.database.read() as connection:
        details = connection.execute(
            select(audit.c.reason, audit.c.details).where(audit.c.action == "route.rollback")
        ).all()
    assert tuple(details[0]) == ("worse", '{"kind":"direct","restores":2}')


def test_a_rollback_may_name_the_revision(routed: Registry) -> None:
    assert routed.rollback_route(TASK, ANNA, to=1).revision.route == direct("v1")
    assert not routed.rollback_route(TASK, ANNA, to=1).changed
    with pytest.raises(Conflict, match="has no revision 9 to roll back to"):
        routed.rollback_route(TASK, ANNA, to=9)


def test_a_task_without_a_route_has_nothing_to_roll_back(registry: Registry) -> None:
    with pytest.raises(Conflict, match="has no route to roll back"):
        registry.rollback_route(TASK, ANNA)


def test_a_rollback_to_a_version_that_is_gone_is_refused(routed: Registry) -> None:
    routed.delete_version(TASK, "v2", reason="", principal=ANNA)
    with pytest.raises(InvalidRoute, match="has no version 'v2'; did you mean 'v1'"):
        routed.rollback_route(TASK, ANNA)
    assert routed.route(TASK) == direct("v3")


def test_a_route_needs_a_task(registry: Registry) -> None:
    with pytest.raises(UnknownTask, match="did you mean 'support_intents'"):
        registry.apply_route("support_intent", TaskRoute(), ANNA)
    with pytest.raises(UnknownTask):
        registry.route("support_intent")
    with pytest.raises(UnknownTask):
        registry.rollback_route("support_intent", ANNA)


@pytest.mark.parametrize("document", COMPOUND, ids=lambda document: str(document["kind"]))
def test_every_kind_of_route_reads_back_from_its_document(document: dict[str, Any]) -> None:
    for whole in (document, {"route": document, "deadline_s": 2.5}, {"route": document}):
        route = parse_task_route(whole)
        assert route.route.kind == document["kind"]
        assert parse_task_route(route.document()) == route


@pytest.mark.parametrize(
    ("document", "place", "reason"),
    [
        ({"route": {}}, ("route",), "the kind is missing"),
        ({"kind": "directly"}, (), "'directly'"),
        ({"kind": "direct", "version": "v0"}, ("version",), "not a version number"),
        ({"kind": "direct", "backend": "Not A Name"}, ("backend",), "not a backend name"),
        ({"kind": "direct", "more": 1}, ("more",), "no such field"),
        ({"route": DIRECT, "deadline": 1}, ("deadline",), "no such field"),
        ({"route": DIRECT, "deadline_s": 0}, ("deadline_s",), "greater than 0"),
        ({"kind": "fallback", "routes": [DIRECT]}, ("routes",), "at least 2"),
        ({"kind": "fallback", "routes": [DIRECT, DIRECT | {"version": "v0"}]}, ("routes", 1, "version"), "v0"),
        ({"kind": "cascade", "first": DIRECT, "second": DIRECT, "measure": "luck"}, ("measure",), "quantile_logprob"),
        ({"kind": "cascade", "first": DIRECT, "second": DIRECT}, ("measure",), "missing"),
        (COMPOUND[2] | {"first": COMPOUND[1]}, (), "no threshold is calibrated for"),
        (COMPOUND[3] | {"shadow": {"kind": "shadow"}}, ("shadow", "primary"), "missing"),
        (COMPOUND[0] | {"arms": [COMPOUND[0]["arms"][0]] * 2}, (), "two arms have the same name"),
        (
            COMPOUND[0] | {"arms": [arm | {"weight": 0.3} for arm in COMPOUND[0]["arms"]]},
            (),
            "weights sum to 0.6; they must sum to 1",
        ),
    ],
)
def test_a_contradictory_route_is_refused_at_its_place(
    document: dict[str, Any], place: tuple[str | int, ...], reason: str
) -> None:
    with pytest.raises(InvalidRoute) as caught:
        parse_task_route(document)
    problem = caught.value.problems[0]
    assert (problem.place, reason in problem.message) == (place, True), problem
    assert reason in str(caught.value)


def test_every_problem_of_a_document_is_told_at_once() -> None:
    with pytest.raises(InvalidRoute) as caught:
        parse_task_route({"route": {"kind": "direct", "version": "v0", "backend": "A"}, "deadline_s": -1})
    assert {problem.place for problem in caught.value.problems} == {
        ("route", "version"),
        ("route", "backend"),
        ("deadline_s",),
    }


def nested(depth: int) -> dict[str, Any]:
    return DIRECT if depth == 1 else {"kind": "fallback", "routes": [nested(depth - 1), DIRECT]}


def test_a_route_is_bounded_in_depth_and_leaves() -> None:
    assert len(list(leaves(parse_task_route(nested(8)).route))) == 8
    with pytest.raises(InvalidRoute, match="lies 9 routes deep; nest at most 8"):
        parse_task_route(nested(9))
    with pytest.raises(InvalidRoute):
        parse_task_route(nested(900))
    sixteen = {"kind": "ensemble", "members": [DIRECT] * 16}
    wide = {"kind": "fallback", "routes": [sixteen] * 4}
    assert len(list(leaves(parse_task_route(wide).route))) == 64
    with pytest.raises(InvalidRoute, match="has more than 64 leaves"):
        parse_task_route({"kind": "fallback", "routes": [wide, DIRECT]})


@pytest.mark.parametrize("document", COMPOUND, ids=lambda document: str(document["kind"]))
def test_the_versions_that_a_route_names_are_found_at_any_depth(document: dict[str, Any]) -> None:
    cascade = {"kind": "cascade", "first": DIRECT | {"version": "v7"}, "second": document, "measure": "margin"}
    route = parse_task_route({"kind": "fallback", "routes": [cascade, DIRECT | {"version": "a1b2c3d4"}]})
    assert route_selectors(route.route) == {"candidate", "v7", "a1b2c3d4"}
