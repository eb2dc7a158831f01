"""A store with versions to compare, and experiments over them."""

from typing import Any

import pytest

from prompt_store.errors import Conflict, InvalidExperiment
from prompt_store.experiments.experiment import Experiment, parse_experiment
from prompt_store.prompts.registry import Registry
from prompt_store.prompts.version import RemoteModelPayload
from prompt_store.routing.routes import Route, TaskRoute, parse_task_route
from tests.prompt_store.building import ANNA, LOCAL, OPENAI, publish, task

TASK = "support_intents"

METRICS = [
    {"name": "accuracy", "direction": "maximise"},
    {"name": "helpful", "direction": "maximise", "type": "boolean"},
    {"name": "remark", "direction": "maximise", "type": "text"},
]


def fill(registry: Registry) -> Registry:
    """v1 under production, v2 under candidate, v3 a model at openai; a judge that labels; two backends."""
    registry.apply_task(task(metrics=METRICS), ANNA)
    publish(registry, 1, alias="production")
    publish(registry, 2, alias="candidate")
    publish(
        registry, payload_content=RemoteModelPayload(provider="openai", model="ft:gpt:acme::1"), base_fingerprint=None
    )
    messages = [{"role": "user", "content": "{message} {answer}"}]
    registry.apply_task(task("judge", inputs=["message", "answer"], messages=messages, labels=["good", "bad"]), ANNA)
    registry.register_backends([LOCAL, OPENAI], ANNA)
    return registry


def experiment(**changes: Any) -> Experiment:
    """`tone`: the task's route as it is against v2; None takes a key away."""
    document: dict[str, Any] = {
        "name": "tone",
        "task": TASK,
        "control": "old",
        "metric": "accuracy",
        "arms": [{"name": "old", "weight": 0.5}, {"name": "new", "weight": 0.5, "version": "v2"}],
        **changes,
    }
    return parse_experiment({key: value for key, value in document.items() if value is not None})


def bound(**changes: Any) -> Experiment:
    return experiment(**{"arms": None, **changes})


def leaf(version: str, backend: str | None = None) -> dict[str, Any]:
    return {"kind": "direct", "version": version} | ({"backend": backend} if backend is not None else {})


def split(name: str = "tone", old: Any = None, new: Any = None, share: float = 0.5) -> dict[str, Any]:
    """Of `old` and `new`, by default by alias."""
    return {
        "kind": "split",
        "experiment": name,
        "arms": [
            {"name": "old", "weight": share, "route": old or leaf("production")},
            {"name": "new", "weight": 1.0 - share, "route": new or leaf("candidate")},
        ],
    }


def fallback(*routes: dict[str, Any]) -> dict[str, Any]:
    return {"kind": "fallback", "routes": list(routes)}


def apply(registry: Registry, route: dict[str, Any], **changes: Any) -> TaskRoute:
    return registry.apply_route(TASK, parse_task_route(route), ANNA, **changes).revision.route


def route(document: dict[str, Any]) -> Route:
    return parse_task_route(document).route


def refusal(registry: Registry, wanted: Experiment) -> str:
    """Why it does not start; nothing was written."""
    before = registry.snapshot()
    with pytest.raises((InvalidExperiment, Conflict)) as caught:
        registry.start_experiment(wanted, ANNA)
    assert registry.snapshot(before).sequence == before.sequence
    return str(caught.value)
