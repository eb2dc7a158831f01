"""Uses a store with whichever `prompt_store` is on the path, so it may ask only for what the oldest release had.

make STORE                    a store with a base, tasks, versions of several kinds, aliases and a route
work STORE FIRST COUNT        publishes and moves aliases; says "open" at first and each version that it published
tell STORE                    everything in it, as JSON
glance STORE                  what a service takes up of it: the kinds of its routes, by task
"""

import hashlib
import json
import sys
from typing import Any

import numpy as np

from prompt_store.access import Principal
from prompt_store.database import Database
from prompt_store.prompts.registry import BaseDescription, NewVersion, Registry
from prompt_store.prompts.soft_prompt import SoftPrompt
from prompt_store.prompts.task import parse_task
from prompt_store.prompts.template import Message
from prompt_store.prompts.version import EnsemblePayload, Provenance, SoftPromptPayload, TextPayload

try:
    from prompt_store.routes import DirectRoute
except ModuleNotFoundError:  # where it stands since
    from prompt_store.routing.routes import DirectRoute

ANNA = Principal("anna")
BASE = BaseDescription("a1" * 32, "demo-base", 16, 2, 64, 512, "LlamaForCausalLM")
TASK: dict[str, Any] = {
    "name": "support_intents",
    "kind": "classify",
    "inputs": ["message"],
    "labels": ["refund", "delivery"],
    "messages": [{"role": "user", "content": "{message}"}],
}


def new(seed: int) -> NewVersion:
    values = np.random.default_rng(seed).standard_normal((4, 16))
    provenance = Provenance(recipe_hash="r", seed=seed, run_as="float32 on cpu")
    return NewVersion(
        "support_intents",
        SoftPrompt.from_float32(values),
        BASE.fingerprint,
        provenance=provenance,
        report={"accuracy": 0.9},
        notes=f"of {seed}",
        tags=("nightly",),
    )


def make(registry: Registry) -> None:
    registry.register_base(BASE, ANNA)
    registry.apply_task(parse_task(TASK), ANNA)
    for seed in range(3):
        registry.publish(new(seed), "candidate", "made", ANNA)
    registry.apply_task(parse_task({**TASK, "description": "edited"}), ANNA)
    text = TextPayload(messages=(Message(role="user", content="Classify: {message}"),))
    registry.publish(NewVersion("support_intents", text), None, "", ANNA)
    members = tuple(registry.version("support_intents", label).digest for label in ("v1", "v2"))
    ensemble = EnsemblePayload(members=members, base_fingerprint=BASE.fingerprint)
    registry.publish(NewVersion("support_intents", ensemble), None, "", ANNA)
    registry.move_alias("support_intents", "production", "v2", expected=None, reason="good", principal=ANNA)
    registry.move_alias("support_intents", "production", "v3", expected="v2", reason="better", principal=ANNA)
    registry.apply_route("support_intents", DirectRoute(version="production"), ANNA)
    registry.database.signing_key()


def work(registry: Registry, first: int, count: int) -> None:
    print("open", flush=True)
    for seed in range(first, first + count):
        version = registry.publish(new(seed), "candidate", f"seed {seed}", ANNA).version
        registry.move_alias("support_intents", "production", version.label, reason=f"seed {seed}", principal=ANNA)
        assert registry.soft_prompt(version.digest) == new(seed).payload_content
        assert registry.version("support_intents", version.digest) == version
        print(version.digest, flush=True)


def tell(registry: Registry) -> dict[str, Any]:
    """What both releases can say of a store."""
    versions = registry.versions("support_intents")
    route = registry.route("support_intents")
    aliases = registry.aliases("support_intents")
    return {
        "signing_key": registry.database.signing_key().hex(),
        "bases": [[base.fingerprint, base.name, base.hidden_size, base.layers] for base in registry.bases()],
        "tasks": {revision.task.name: [revision.number, revision.digest] for revision in registry.tasks()},
        "revisions": sorted({registry.task_revision(version.task_revision).digest for version in versions}),
        "versions": {
            version.digest: [
                version.label,
                version.task_revision,
                version.notes,
                list(version.tags),
                version.provenance.recipe_hash,
                version.provenance.seed,
                version.created_at.isoformat(),
                version.principal,
                version.payload.kind,
                hashlib.sha256(registry.soft_prompt(version.digest).data).hexdigest()
                if isinstance(version.payload, SoftPromptPayload)
                else None,
            ]
            for version in versions
        },
        "aliases": {alias.name: [alias.version, alias.number] for alias in aliases},
        "history": [
            [move.sequence, move.previous, move.target, move.reason, move.principal, move.at.isoformat()]
            for alias in aliases
            for move in registry.alias_history("support_intents", alias.name)
        ],
        # What is in force has limits beside the route since a later release.
        "route": getattr(route, "route", route).model_dump(mode="json"),
        "changes": [[change.sequence, change.kind, change.subject] for change in registry.changes_since(0)],
    }


def glance(registry: Registry) -> dict[str, str]:
    snapshot = registry.snapshot()
    # The oldest release has the routes beside the tasks.
    routes = getattr(snapshot, "routes", None) or {name: task.route for name, task in snapshot.tasks.items()}
    return {name: getattr(route, "route", route).kind for name, route in routes.items()}


def main(what: str, store: str, *numbers: str) -> None:
    with Database.open(store) as database:
        registry = Registry(database)
        if what == "make":
            make(registry)
        elif what == "work":
            work(registry, *map(int, numbers))
        else:
            print(json.dumps(glance(registry) if what == "glance" else tell(registry)))


if __name__ == "__main__":
    main(*sys.argv[1:])
