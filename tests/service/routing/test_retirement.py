from __future__ import annotations

from datetime import UTC, date, datetime, timedelta

import pytest

from prompt_store.errors import Place
from prompt_store.prompts.unreadable import Unreadable
from prompt_store.routing.routes import (
    Arm,
    CascadeRoute,
    DirectRoute,
    EnsembleRoute,
    FallbackRoute,
    Route,
    ShadowRoute,
    SplitRoute,
    answers_without,
    leaves,
)
from service.routing.errors import ModelRetired
from service.routing.retirement import Loss, Retirements, RetirementWatch, in_words, losses
from tests.service.routing.remote_versions import BACKENDS, TUNED, Clock, snapshot, task, version

TODAY = date(2026, 11, 24)
SOON = date(2026, 12, 1)
LATER = date(2027, 6, 1)
V1, V2 = DirectRoute(version="v1"), DirectRoute(version="v2")


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def dates(clock: Clock) -> Retirements:
    return Retirements({}, clock)


@pytest.mark.parametrize(
    ("entry", "counts"),
    [
        (TUNED, True),
        ("ft:gpt-4o-mini-2024-07-18", True),
        ("gpt-4o-mini-2024-07-18", True),
        ("gpt-4o-mini", True),
        ("gpt-4o", False),
        ("gpt-4o-mini-2024", False),
    ],
)
def test_a_fine_tuned_model_goes_with_its_base(entry: str, counts: bool, clock: Clock) -> None:
    assert Retirements({entry: SOON}, clock).shutdown_of(version(1, TUNED)) == (SOON if counts else None)


def test_the_earliest_of_all_dates_counts(clock: Clock) -> None:
    dates = Retirements({"gpt-4o-mini-2024-07-18": LATER, "gpt-4o-mini": SOON}, clock)
    assert dates.shutdown_of(version(1, TUNED)) == SOON
    assert dates.shutdown_of(version(1, TUNED, LATER)) == SOON
    assert dates.shutdown_of(version(1, TUNED, TODAY)) == TODAY


def test_nobody_shuts_a_prompt_of_our_own_down(clock: Clock) -> None:
    assert Retirements({"gpt-4o-mini": SOON}, clock).shutdown_of(version(1, None)) is None


def test_a_model_ends_in_its_last_sixty_days_and_is_gone_on_its_day(dates: Retirements) -> None:
    states = [dates.state(TODAY + timedelta(days=days)) for days in (61, 60, 1, 0, -1)]
    assert states == ["served", "ending", "ending", "retired", "retired"]
    assert dates.state(None) == "served"
    assert (dates.days_left(SOON), dates.days_left(TODAY)) == (7, 0)


def test_a_day_begins_at_midnight_utc(dates: Retirements, clock: Clock) -> None:
    clock.now = datetime(2026, 11, 30, 23, 59, 59, tzinfo=UTC)
    assert dates.state(SOON) == "ending"
    clock.now += timedelta(seconds=1)
    assert dates.state(SOON) == "retired"


def test_a_model_that_is_gone_is_refused_with_the_remedy(dates: Retirements) -> None:
    dates.check(version(1, TUNED, SOON))
    dates.check(version(1, None))
    with pytest.raises(ModelRetired, match=r"support@v1 is answered by 'ft:gpt.* shut down on 2026-11-24; ask for"):
        dates.check(version(1, TUNED, TODAY))


def split(*routes: Route) -> SplitRoute:
    share = 1 / len(routes)
    return SplitRoute(
        experiment="x", arms=tuple(Arm(name=f"a{i}", weight=share, route=each) for i, each in enumerate(routes))
    )


@pytest.mark.parametrize(
    ("route", "answers"),
    [
        (V1, False),
        (V2, True),
        (FallbackRoute(routes=(V1, V2)), True),
        (FallbackRoute(routes=(V2, V1)), True),
        (FallbackRoute(routes=(V1, V1)), False),
        (split(V1, V2), False),
        (split(FallbackRoute(routes=(V1, V2)), V2), True),
        (CascadeRoute(first=V1, second=V2, measure="mean_logprob"), True),
        (CascadeRoute(first=V2, second=V1, measure="mean_logprob"), True),
        (CascadeRoute(first=V1, second=V1, measure="mean_logprob"), False),
        (ShadowRoute(primary=V1, shadow=V2), False),
        (ShadowRoute(primary=V2, shadow=V1), True),
        (EnsembleRoute(members=(V1, V2)), False),
        (FallbackRoute(routes=(EnsembleRoute(members=(V1, V2)), V2)), True),
    ],
)
def test_which_routes_answer_without_one_of_their_leaves(route: Route, answers: bool) -> None:
    gone: frozenset[Place] = frozenset(place for place, leaf in leaves(route) if leaf == V1)
    assert answers_without(route, gone) is answers


def test_a_route_loses_each_version_on_each_backend_once(dates: Retirements) -> None:
    named = DirectRoute(backend="azure", version="production")
    route = split(FallbackRoute(routes=(V1, V2)), V1, named)
    found = losses(task(route, version(1, TUNED, SOON), version(2, None), aliases={"production": 1}), BACKENDS, dates)
    assert found == [
        Loss("support", "v1", "openai", TUNED, SOON, False),
        Loss("support", "v1", "azure", TUNED, SOON, False),
    ]


def test_what_goes_before_is_no_replacement(dates: Retirements) -> None:
    route = FallbackRoute(routes=(V1, V2))
    first, second = version(1, "a-model", LATER), version(2, "another", SOON)
    assert [(loss.version, loss.replaced) for loss in losses(task(route, first, second), BACKENDS, dates)] == [
        ("v1", False),
        ("v2", True),
    ]


def test_a_leaf_that_names_nothing_loses_nothing(dates: Retirements) -> None:
    found = losses(task(DirectRoute(version="candidate"), version(1, TUNED, SOON)), BACKENDS, dates)
    assert found == []
    assert losses(task(Unreadable("of another release"), version(1, TUNED, SOON)), BACKENDS, dates) == []


def test_a_model_of_a_provider_that_no_backend_knows_is_named_by_it(dates: Retirements) -> None:
    (loss,) = losses(task(V1, version(1, "a-model", SOON, provider="elsewhere")), BACKENDS, dates)
    assert loss.backend == "elsewhere"


def test_a_warning_is_given_once_a_day_and_when_something_changes(
    dates: Retirements, clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    watch = RetirementWatch(dates, BACKENDS)
    state = snapshot(task(V1, version(1, TUNED, SOON)))
    for _ in range(3):
        watch.look(state)
    assert len(caplog.messages) == 1
    assert "loses v1 ('ft:gpt-4o-mini-2024-07-18:acme::x' on backend 'openai') on 2026-12-01, in 7 days" in caplog.text
    clock.now += timedelta(days=1)
    watch.look(state)
    watch.look(state)
    assert len(caplog.messages) == 2
    moved = snapshot(task(V1, version(1, TUNED, SOON + timedelta(days=3))))
    watch.look(moved)
    watch.look(moved)
    assert len(caplog.messages) == 3
    assert "on 2026-12-04, in 9 days" in caplog.messages[-1]
    watch.look(snapshot(task(FallbackRoute(routes=(V1, V2)), version(1, TUNED, SOON), version(2, None))))
    assert len(caplog.messages) == 4
    assert "what the route has beside it answers then" in caplog.messages[-1]


def test_a_model_far_from_its_end_is_watched_and_not_warned_of(
    dates: Retirements, clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    watch = RetirementWatch(dates, BACKENDS)
    state = snapshot(task(V1, version(1, TUNED, LATER)))
    watch.look(state)
    assert not caplog.messages
    seconds = datetime(2027, 6, 1, tzinfo=UTC).timestamp()
    assert watch.timestamps() == {("support", "v1", "openai"): seconds}
    clock.now = datetime(2027, 6, 1, tzinfo=UTC)
    watch.look(state)
    assert "has lost v1" in caplog.text
    assert "nothing answers in its place; publish a version that stays" in caplog.text


def test_only_tasks_that_changed_are_looked_through_again(dates: Retirements, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    shutdown_of = dates.shutdown_of
    monkeypatch.setattr(dates, "shutdown_of", lambda version: asked.append(version.label) or shutdown_of(version))
    watch, state = RetirementWatch(dates, BACKENDS), snapshot(task(V1, version(1, TUNED, SOON)))
    watch.look(state)
    watch.look(state)
    assert (asked, len(watch.losses)) == (["v1"], 1)


def test_what_is_mended_is_watched_no_more(dates: Retirements) -> None:
    watch = RetirementWatch(dates, BACKENDS)
    watch.look(snapshot(task(V1, version(1, TUNED, SOON))))
    watch.look(snapshot(task(V2, version(1, TUNED, SOON), version(2, None))))
    assert watch.losses == ()
    assert watch.timestamps() == {}


def test_words_for_each_case() -> None:
    alone, covered = (Loss("support", "v1", "openai", "m", SOON, replaced) for replaced in (False, True))
    assert "in 1 day; nothing answers then; publish" in in_words(alone, 1)
    assert "in 7 days; what the route has beside it answers then" in in_words(covered, 7)
    assert "shut down on 2026-12-01; what the route has beside it answers" in in_words(covered, 0)
    assert "shut down on 2026-12-01; nothing answers in its place" in in_words(alone, -3)
