from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from prompt_store.errors import InvalidExperiment
from prompt_store.experiments.experiment import Experiment, parse_experiment
from prompt_store.experiments.files import load_experiment
from prompt_store.routing.routes import DirectRoute
from tests.prompt_store.experiments.stage import bound, experiment, fallback, leaf

names = st.from_regex(r"[a-z][a-z0-9_-]{0,10}", fullmatch=True)
shares = st.floats(0.01, 0.5)

documents = st.fixed_dictionaries(
    {"name": names, "task": names, "metric": st.just("m"), "control": st.just("a")},
    optional={
        "arms": st.sampled_from(
            [
                [{"name": "a", "weight": 0.5}, {"name": "b", "weight": 0.5, "route": leaf("v2")}],
                [
                    {"name": "a", "weight": 0.25, "route": fallback(leaf("v1"), leaf("v2", "local"))},
                    {"name": "b", "weight": 0.75, "version": "candidate"},
                ],
            ]
        ),
        "guardrails": st.just([{"metric": "cost", "margin": 0.1, "relative": True}]),
        "metrics": st.just(["latency_ms"]),
        "alpha": st.floats(0.01, 0.4),
        "missing": st.sampled_from(["ignore", "zero"]),
        "holdout": shares,
        "targeting": st.just({"plan": ["pro", "team"]}),
        "thompson": st.fixed_dictionaries({}, optional={"floor": shares, "every_minutes": st.floats(1, 60)}),
        "rules": st.fixed_dictionaries(
            {},
            optional={
                "promote": st.booleans(),
                "dry_run": st.booleans(),
                "futile_below": shares,
                "roll_back": st.just({"error_rate_by": 0.1, "minutes": 3}),
            },
        ),
        "judge": st.fixed_dictionaries(
            {"task": names, "metric": st.just("j")}, optional={"sample": shares, "scores": st.just({"good": 1.0})}
        ),
    },
)


@given(documents)
def test_a_document_reads_back_as_the_same_experiment(document: dict[str, Any]) -> None:
    read = parse_experiment(document)
    assert parse_experiment(read.document()) == read
    assert Experiment.model_validate_json(read.model_dump_json()) == read


def refusals(**changes: Any) -> list[str]:
    with pytest.raises(InvalidExperiment) as caught:
        experiment(**changes)
    return [str(problem) for problem in caught.value.problems]


def arms(**new: Any) -> list[dict[str, Any]]:
    return [{"name": "old", "weight": 0.5}, {"name": "new", "weight": 0.5, **new}]


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"metrik": 1}, "metrik: there is no such key; did you mean 'metric'?"),
        ({"arms": arms(wieght=1)}, "arms[1].wieght: there is no such key; did you mean 'weight'?"),
        ({"rules": {"roll_back": {"minuets": 1}}},
         "rules.roll_back.minuets: there is no such key; did you mean 'minutes'?"),
        ({"rules": {"zzz": 1}}, "rules.zzz: there is no such key; the known ones are promote, futile_below, roll_back"),
        ({"thompson": {"floor": 0.7}}, "thompson.floor: input should be less than or equal to 0.5; correct it"),
        ({"judge": 3}, "judge: this is no table; write one"),
        ({"metric": None}, "metric: this field is missing; add it"),
        ({"arms": arms(route={"kind": "direkt"})}, "arms[1].route: input tag 'direkt' found using 'kind'"),
        ({"arms": arms(route=fallback(leaf("v1"), {"kind": "direct", "verson": "v1"}))},
         "arms[1].route.routes[1].verson: there is no such field here; remove it, or correct its name"),
        ({"arms": arms(route=leaf("v1"), version="v1")},
         "arms[1]: arm 'new' has a version and a route; give it one of the two"),
        ({"arms": [{"name": "holdout", "weight": 0.5}, *arms()[1:]]}, "no arm may be called 'holdout'"),
        ({"arms": arms()[:1]}, "an experiment needs two arms; add one, or leave arms out to use the route's split"),
        ({"arms": [arms()[0], arms()[0]]}, "two arms have the same name; name each arm once"),
        ({"control": "odl"}, "the control 'odl' is none of the arms; did you mean 'old'?"),
        ({"arms": arms(weight=0.4)}, "the arms' weights sum to 0.9; they must sum to 1"),
        ({"arms": arms(weight=0.0)}, "arms[1].weight: input should be greater than 0; correct it"),
        ({"rules": {"roll_back": {}}}, "rules.roll_back: roll_back names no limit; give error_rate_by or"),
        ({"guardrails": [{"metric": "accuracy"}]}, "metric 'accuracy' is named twice"),
        ({"targeting": {"plan": []}}, "targeting.plan: "),
        ({"name": "Tone"}, "name: 'Tone' is not a task name"),
    ],
)  # fmt: skip
def test_what_contradicts_itself_is_refused_with_place_and_remedy(changes: dict[str, Any], says: str) -> None:
    (refusal,) = refusals(**changes)
    assert says in refusal


def test_every_problem_of_a_document_is_told_at_once() -> None:
    assert len(refusals(metrik=1, arms=arms(wieght=1, weight="x"), alpha=2.0)) == 4
    (said,) = refusals(control="x", arms=arms(weight=0.1))
    assert "the control 'x' is none of the arms" in said
    assert "the arms' weights sum to 0.6" in said


def test_text_that_a_database_cannot_hold_is_refused() -> None:
    with pytest.raises(InvalidExperiment, match="holds NUL or half a character; remove it"):
        experiment(description="a\0b")


def test_an_experiment_without_arms_needs_none_of_their_rules() -> None:
    assert bound(control="anything").arms == ()


FILE = """
name = "tone"
task = "support_intents"
control = "old"
metric = "accuracy"

[[arms]]
name = "old"
weight = 0.5

[[arms]]
name = "new"
weight = 0.5
route = { kind = "fallback", routes = ["cheap", { version = "v3" }] }

[parts.cheap]
version = "v2"

[rules]
promote = true
"""


def test_a_file_is_read_with_its_parts_in_their_places(tmp_path: Path) -> None:
    file = tmp_path / "tone.toml"
    file.write_text(FILE)
    read = load_experiment(file).experiment
    own = read.arms[1].route
    assert own is not None
    assert own.model_dump(exclude_none=True) == fallback(leaf("v2"), leaf("v3")) | {"routes": (leaf("v2"), leaf("v3"))}
    assert own.routes[0] == DirectRoute(version="v2")  # type: ignore[union-attr]
    assert read.rules.promote


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ('metric = "accuracy"', 'metrics = "accuracy"', ":1: metric: this field is missing; add it"),
        ('metric = "accuracy"', 'metric = "accuracy"\nmetrik = 1', ":6: metrik: there is no such key; did you mean"),
        ("weight = 0.5\nroute", "wieght = 0.5\nroute", ":13: arms[1].wieght: there is no such key"),
        ('version = "v2"', 'version = "V2"', ":17: parts.cheap.version: 'V2' selects no version"),
        ('"cheap"', '"cheep"', ":14: arms[1].route.routes[0]: there is no part 'cheep'; did you mean 'cheap'?"),
        ("[rules]", "[parts.dear]\n[rules]", ":19: parts.dear: no arm uses this part; name it there, or remove it"),
        ("[rules]", "[rules", ":19: is not TOML"),
    ],
)
def test_everything_wrong_with_a_file_has_its_line(tmp_path: Path, old: str, new: str, says: str) -> None:
    file = tmp_path / "tone.toml"
    file.write_text(FILE.replace(old, new, 1))
    with pytest.raises(InvalidExperiment) as caught:
        load_experiment(file)
    assert f"{file}{says}" in str(caught.value)


def test_a_file_that_is_not_there_says_so(tmp_path: Path) -> None:
    with pytest.raises(InvalidExperiment, match=r"none\.toml"):
        load_experiment(tmp_path / "none.toml")
