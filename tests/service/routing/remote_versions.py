"""Tasks with versions behind providers, as a snapshot has them, for tests of what depends on dates."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, date, datetime

from prompt_store.prompts.snapshot import StoreSnapshot, TaskSnapshot
from prompt_store.prompts.task import Message
from prompt_store.prompts.unreadable import Unreadable
from prompt_store.prompts.version import Payload, PromptVersion, Provenance, RemoteModelPayload, TextPayload
from prompt_store.routing.backends import BackendDescription
from prompt_store.routing.routes import Route, TaskRoute

TUNED = "ft:gpt-4o-mini-2024-07-18:acme::x"
OPENAI = BackendDescription("openai", "openai_compatible", "openai", frozenset({"remote_model"}))
TOGETHER = BackendDescription("together", "openai_compatible", "together", frozenset({"remote_model"}))
LOCAL = BackendDescription("local", "local", None, frozenset({"soft_prompt", "text"}))
BACKENDS = (LOCAL, OPENAI, TOGETHER)


class Clock:
    """Tells the time that it is set to."""

    def __init__(self) -> None:
        self.now = datetime(2026, 11, 24, 12, tzinfo=UTC)

    def __call__(self) -> datetime:
        return self.now


def version(
    number: int, model: str | None, day: date | None = None, *, task: str = "support", provider: str = "openai"
) -> PromptVersion:
    """A remote model; with None a text prompt, which nobody shuts down."""
    payload: Payload = TextPayload(messages=(Message(role="user", content="{message}"),))
    if model is not None:
        payload = RemoteModelPayload(provider=provider, model=model)
    return PromptVersion(
        task=task,
        number=number,
        digest=f"{number:064x}",
        task_revision="0" * 64,
        payload=payload,
        provenance=Provenance(),
        notes="",
        tags=(),
        created_at=datetime(2026, 1, 1, tzinfo=UTC),
        principal="test",
        shutdown_date=day,
    )


def task(route: Route | Unreadable, *versions: PromptVersion, aliases: Mapping[str, int] | None = None) -> TaskSnapshot:
    by_number = {each.number: each.digest for each in versions}
    return TaskSnapshot(
        name=versions[0].task,
        revision=Unreadable("not looked at"),
        revisions={},
        versions={each.digest: each for each in versions},
        numbers=by_number,
        aliases={name: by_number[number] for name, number in (aliases or {}).items()},
        route=route if isinstance(route, Unreadable) else TaskRoute(route=route),
        calibrations={},
    )


def snapshot(*tasks: TaskSnapshot) -> StoreSnapshot:
    return StoreSnapshot(1, {each.name: each for each in tasks}, {})
