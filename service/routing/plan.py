"""What a model name stands for: one target, or a route whose leaves are targets."""

from __future__ import annotations

from dataclasses import dataclass

from prompt_store.prompts.registry import TaskRevision, TaskSnapshot
from prompt_store.prompts.version import PromptVersion
from prompt_store.routing.routes import DirectRoute, Route, SplitRoute, inner_routes
from service.engines.errors import InvalidRequest

ARM_HEADER = "x-softcue-arm"

_DIRECT = DirectRoute()


@dataclass(frozen=True, slots=True)
class Target:
    """Who answers: a version of a task on a backend, the bare base model (`task` is None), or a provider's model."""

    backend: str
    task: TaskRevision | None = None
    version: PromptVersion | None = None
    remote_model: str | None = None

    @property
    def label(self) -> str:
        """`task@v7`, the provider's model, or empty for the bare base."""
        if self.version is not None:
            return f"{self.version.task}@{self.version.label}"
        return self.remote_model or ""


@dataclass(frozen=True, slots=True)
class Plan:
    """How a request is answered: by `target`, or by the leaf that `route` comes to, which is found on the way.

    `task` is the task as it was when the request came: what changes meanwhile is for later requests. `deadline_s` and
    `daily_cost_ceiling` are the task's own.
    """

    target: Target | None = None
    task: TaskSnapshot | None = None
    route: Route = _DIRECT
    deadline_s: float | None = None
    daily_cost_ceiling: float | None = None

    @property
    def name(self) -> str:
        """The task's name; empty for the bare base and for a provider's model."""
        return self.task.name if self.task is not None else ""


def require_arm(plan: Plan, arm: str) -> None:
    """Raises InvalidRequest where no split that the plan may come to has such an arm."""
    pending = [plan.route] if plan.target is None else []
    arms: list[str] = []
    while pending:
        route = pending.pop()
        if isinstance(route, SplitRoute):
            arms += [each.name for each in route.arms]
        pending += [inner for _, inner in inner_routes(route)]
    if arm not in arms:
        known = f"it has {', '.join(sorted(set(arms)))}" if arms else "it comes to no split"
        raise InvalidRequest(f"there is no arm {arm!r} on the way of this request: {known}; leave {ARM_HEADER} out")
