from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, date, datetime
from typing import Any

import pytest

from prompt_store.database import Database
from prompt_store.errors import InvalidRoute
from prompt_store.prompts.registry import Registry
from prompt_store.prompts.version import EnsemblePayload, RemoteModelPayload, TextPayload
from prompt_store.routing.backends import BackendDescription
from prompt_store.routing.routes import TaskRoute, parse_task_route
from tests.prompt_store.building import ANNA, BASE, LOCAL, OPENAI, calibration, publish, task

TASK = "support_intents"
TODAY = datetime(2030, 1, 31, 12, tzinfo=UTC)
# Neither scores nor logprobs.
PLAIN = BackendDescription("plain", "openai", "plain", frozenset({"soft_prompt", "remote_model"}))

Leaf = dict[str, Any]


@pytest.fixture
def registry(database: Database) -> Registry:
    """v1 and v2: soft prompts, v1 with calibrations. v3: their ensemble. v4: a model at openai. v5: a text."""
    made = Registry(database, now=lambda: TODAY)
    made.register_base(BASE, ANNA)
    made.apply_task(task(), ANNA)
    fill(made, TASK)
    return made


def fill(registry: Registry, name: str) -> None:
    members = tuple(publish(registry, seed, task=name).version.digest for seed in (1, 2))
    ensemble = EnsemblePayload(members=members, base_fingerprint=BASE.fingerprint, vote="mean_logprob")
    publish(registry, task=name, payload_content=ensemble, base_fingerprint=None)
    remote = RemoteModelPayload(provider="openai", model="ft:gpt:acme::1")
    publish(registry, task=name, payload_content=remote, base_fingerprint=None, alias="production")
    text = TextPayload.model_validate({"messages": [{"role": "user", "content": "{message}"}]})
    publish(registry, task=name, payload_content=text, base_fingerprint=None)
    for measure in ("margin", "mean_logprob", "quantile_logprob:0.1"):
        registry.calibrate(calibration(members[0], measure), ANNA)


def leaf(version: str, backend: str | None = None) -> Leaf:
    return {"kind": "direct", "version": version} | ({"backend": backend} if backend is not None else {})


def cascade(first: Leaf, measure: str) -> TaskRoute:
    return parse_task_route({"kind": "cascade", "first": first, "second": leaf("v4"), "measure": measure})


def refusals(registry: Registry, route: TaskRoute | Leaf, *backends: BackendDescription, name: str = TASK) -> list[str]:
    whole = route if isinstance(route, TaskRoute) else parse_task_route(route)
    with pytest.raises(InvalidRoute) as caught:
        registry.apply_route(name, whole, ANNA, backends=backends or (LOCAL, OPENAI, PLAIN))
    assert registry.route_history(name) == []
    assert str(caught.value) == "; ".join(map(str, caught.value.problems))
    return [str(problem) for problem in caught.value.problems]


@pytest.mark.parametrize(
    ("route", "beginning", "says"),
    [
        (leaf("v9"), "version: task 'support_intents' has no version 'v9'", "did you mean 'v5'? Otherwise list them"),
        (leaf("producton"), "version: task 'support_intents' has no alias 'producton'", "did you mean 'production'?"),
        (leaf("0" * 64), "version: task 'support_intents' has no version '000", "`softcue prompts list"),
        (leaf("v1", "lokal"), "backend: no backend 'lokal'; did you mean 'local'?", "There are local, openai, plain"),
        (leaf("v4", "local"), "backend: backend 'local' does not serve v4, a model at provider 'openai'", "use openai"),
        (leaf("v1", "openai"), "backend: backend 'openai' does not serve v1, which is of kind 'soft_prompt'",
         "use local or plain"),
        (leaf("v4", "plain"), "backend: backend 'plain' does not serve v4, a model at provider 'openai'", "use openai"),
        (leaf("v1", "plain"), "backend: a task that classifies needs scores, which backend 'plain' does not give",
         "local or openai has them"),
        ({"kind": "ensemble", "vote": "mean_logprob", "members": [leaf("v1"), leaf("v4")]},
         "members[1]: an ensemble that votes by mean_logprob needs logprobs, which backend 'openai' does not give",
         "local has them"),
    ],
)  # fmt: skip
def test_what_a_leaf_names_must_be_there_and_able(registry: Registry, route: Leaf, beginning: str, says: str) -> None:
    (refusal,) = refusals(registry, route)
    assert refusal.startswith(f"{TASK}.route.{beginning}"), refusal
    assert says in refusal


def test_every_problem_of_every_task_is_told_at_once_and_nothing_is_applied(registry: Registry) -> None:
    registry.apply_task(task("other"), ANNA)
    good, bad = parse_task_route(leaf("v4")), parse_task_route({"kind": "fallback", "routes": [leaf("v8"), leaf("x")]})
    with pytest.raises(InvalidRoute) as caught:
        registry.apply_routes({TASK: good, "other": bad, "nobody": bad}, ANNA, backends=[OPENAI])
    places = [problem.place for problem in caught.value.problems]
    assert places == [
        ("other", "route", "routes", 0, "version"),
        ("other", "route", "routes", 1, "version"),
        ("nobody",),
    ]
    assert registry.route_history(TASK) == []
    with pytest.raises(InvalidRoute):
        registry.check_routes({TASK: bad}, backends=[OPENAI])


def test_a_leaf_without_a_backend_is_served_by_the_first_that_can(registry: Registry) -> None:
    for version in ("v1", "v3", "v4", "v5"):
        assert registry.apply_route(TASK, parse_task_route(leaf(version)), ANNA, backends=[LOCAL, OPENAI]).changed
    alone = Registry(registry.database, now=lambda: TODAY)
    with pytest.raises(InvalidRoute, match="no backend serves v1, which is of kind 'soft_prompt'"):
        alone.apply_route(TASK, parse_task_route(leaf("v1")), ANNA, backends=[OPENAI])
    with pytest.raises(InvalidRoute, match="needs scores, which backend 'plain' does not give"):
        alone.apply_route(TASK, parse_task_route(leaf("v1")), ANNA, backends=[PLAIN, LOCAL])


def test_a_text_needs_a_model_at_a_remote_backend(registry: Registry) -> None:
    without = replace(OPENAI, default_model=None)
    (refusal,) = refusals(registry, leaf("v5", "openai"), LOCAL, without)
    assert "backend 'openai' has no default model to answer v5" in refusal


def test_an_ensemble_that_votes_by_log_probabilities_needs_them(registry: Registry) -> None:
    (refusal,) = refusals(registry, leaf("v3"), replace(LOCAL, features=frozenset({"scores"})))
    assert "v3, an ensemble that votes by mean_logprob, needs logprobs, which backend 'local' does not give" in refusal


@pytest.mark.parametrize("measure", ["margin", "mean_logprob"])
def test_a_cascade_needs_a_calibration_of_its_first_version(registry: Registry, measure: str) -> None:
    (refusal,) = refusals(registry, cascade(leaf("v2"), measure))
    measured = f"calibrate {TASK} --version v2 --measure {measure} --data ROWS --target 0.95"
    assert refusal.startswith(f"{TASK}.route.first.version: {TASK}@v2 has no calibration for {measure}, so")
    assert refusal.endswith(f"`softcue routes {measured}` measures one")
    assert registry.apply_route(TASK, cascade(leaf("v1"), measure), ANNA, backends=[LOCAL, OPENAI]).changed


def test_a_cascade_that_measures_log_probabilities_needs_them_of_its_first_route_alone(registry: Registry) -> None:
    scores = replace(LOCAL, features=frozenset({"scores"}))
    (refusal,) = refusals(registry, cascade(leaf("v1"), "mean_logprob"), scores, OPENAI)
    assert refusal.startswith(f"{TASK}.route.first: a cascade that measures mean_logprob needs logprobs")
    assert registry.apply_route(TASK, cascade(leaf("v1"), "margin"), ANNA, backends=[scores, OPENAI]).changed


def test_a_quantile_is_not_for_tasks_with_labels(registry: Registry) -> None:
    (refusal,) = refusals(registry, cascade(leaf("v1"), "quantile_logprob:0.1"))
    assert refusal.startswith(f"{TASK}.route.measure: quantile_logprob:0.1 is of an answer's tokens")
    registry.apply_task(task("letters", kind="generate", labels=[]), ANNA)
    fill(registry, "letters")
    by_quantile = cascade(leaf("v1"), "quantile_logprob:0.1")
    assert registry.apply_route("letters", by_quantile, ANNA, backends=[LOCAL, OPENAI]).changed


def test_a_task_that_extracts_needs_answers_of_a_form(registry: Registry) -> None:
    registry.apply_task(task("queries", kind="extract", labels=[], json_schema={"type": "object"}), ANNA)
    fill(registry, "queries")
    (refusal,) = refusals(registry, leaf("v1", "local"), LOCAL, name="queries")
    assert "a task that extracts needs structured_output, which backend 'local' does not give" in refusal
    able = replace(LOCAL, features=LOCAL.features | {"structured_output"})
    assert registry.apply_route("queries", parse_task_route(leaf("v1")), ANNA, backends=[able]).changed


def test_margin_is_for_tasks_with_labels(registry: Registry) -> None:
    registry.apply_task(task("letters", kind="generate", labels=[]), ANNA)
    fill(registry, "letters")
    (refusal,) = refusals(registry, cascade(leaf("v1"), "margin"), name="letters")
    assert refusal.startswith("letters.route.measure: margin lies between labels, and task 'letters' has none")
    # Nor does anything need scores there.
    plain = replace(PLAIN, provider="openai")
    route = parse_task_route({"kind": "fallback", "routes": [leaf("v1", "plain"), leaf("v4", "plain")]})
    assert registry.apply_route("letters", route, ANNA, backends=[plain]).changed


def test_agreement_is_an_ensembles(registry: Registry) -> None:
    both = refusals(registry, cascade(leaf("v1"), "agreement"))
    assert "agreement is among the members of an ensemble, and v1 is of kind 'soft_prompt'" in both[0]
    assert "has no calibration for agreement" in both[1]
    by_number = {version.label: version.digest for version in registry.versions(TASK)}
    for version in ("v1", "v2", "v3"):
        registry.calibrate(calibration(by_number[version], "agreement", threshold=0.8), ANNA)
    members: Leaf = {"kind": "ensemble", "members": [leaf("v1"), leaf("v2")]}
    for first in (leaf("v3"), members):
        assert registry.apply_route(TASK, cascade(first, "agreement"), ANNA, backends=[LOCAL, OPENAI]).changed


def test_without_any_known_backend_only_a_route_that_names_none_is_applied(registry: Registry) -> None:
    fallback: Leaf = {"kind": "fallback", "routes": [leaf("v1"), leaf("v2")]}
    for route in (leaf("v1", "local"), fallback):
        with pytest.raises(InvalidRoute, match="start `softcue serve` once on this store, or name its settings"):
            registry.apply_route(TASK, parse_task_route(route), ANNA)
    assert registry.apply_route(TASK, parse_task_route(leaf("v1")), ANNA).changed
    with pytest.raises(InvalidRoute, match="has no version 'v9'"):
        registry.apply_route(TASK, parse_task_route(leaf("v9")), ANNA)
    registry.register_backends([LOCAL], ANNA)
    assert registry.apply_route(TASK, parse_task_route(fallback), ANNA).changed


@pytest.mark.parametrize(
    ("day", "said"),
    [
        (date(2030, 4, 2), None),
        (date(2030, 4, 1), "is shut down on 2030-04-01, in 60 days"),
        (date(2030, 2, 1), "is shut down on 2030-02-01, in 1 day"),
        (date(2030, 1, 31), "was shut down on 2030-01-31"),
        (date(2029, 12, 1), "was shut down on 2029-12-01"),
    ],
)
def test_a_model_that_goes_away_is_warned_of_from_sixty_days_before(
    registry: Registry, day: date, said: str | None
) -> None:
    registry.note_shutdown(TASK, "v4", day, ANNA)
    behind: Callable[..., Leaf] = lambda *routes: {"kind": "fallback", "routes": list(routes)}  # noqa: E731
    beside = "what the route has beside it answers then"
    for route, place, instead in (
        (leaf("v4"), "route", "nothing stands behind it, so put it in a fallback"),
        (behind(leaf("v4"), leaf("v1")), "route.routes[0]", beside),
        (behind(leaf("v1"), leaf("v4")), "route.routes[1]", beside),
        ({"kind": "shadow", "primary": leaf("v1"), "shadow": leaf("v4")}, "route.shadow", beside),
    ):
        applied = registry.apply_route(TASK, parse_task_route(route), ANNA, backends=[LOCAL, OPENAI])
        expected = f"{TASK}.{place}: the model ft:gpt:acme::1 of {TASK}@v4 {said}; {instead}"
        assert applied.warnings == (() if said is None else (expected,))
        assert registry.check_routes({TASK: parse_task_route(route)}, backends=[LOCAL, OPENAI]) == {
            TASK: applied.warnings
        }
