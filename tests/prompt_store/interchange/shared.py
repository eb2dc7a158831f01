"""Versions with all that can be known of one, as stores share them."""

import json
from collections.abc import Callable
from pathlib import Path

from prompt_store.interchange.sharing import Directory
from prompt_store.prompts.registry import Registry
from prompt_store.prompts.version import DatasetUse, EnsemblePayload, PromptVersion, Provenance
from tests.prompt_store.building import BASE, publish

NAME = "support_intents"
EVIDENCE = {
    "provenance": Provenance(recipe_hash="ab", datasets=(DatasetUse(name="rows", digest="cd", rows=7),), seed=3),
    "report": {"rows": 7, "test_metrics": {"accuracy": 0.5}},
    "recipe": {"seed": 3, "optimise": {"learning_rate": 0.05}},
    "tags": ("first", "größer"),
    "notes": "tuned | by <hand>\nand twice",
    "author": "carla",
}


def ensemble(registry: Registry) -> PromptVersion:
    members = tuple(publish(registry, seed).version.digest for seed in (11, 12))
    content = EnsemblePayload(members=members, base_fingerprint=BASE.fingerprint, vote="mean_logprob")
    return publish(registry, payload_content=content, base_fingerprint=None).version


def same(here: Registry, there: Registry, digest: str) -> None:
    """Asserts that two stores say the same of a version, all but its number, time and who put it there."""
    one, two = here.version(NAME, digest), there.version(NAME, digest)
    assert (one.payload, one.task_revision, one.provenance) == (two.payload, two.task_revision, two.provenance)
    assert (one.tags, one.notes, one.author or one.principal) == (two.tags, two.notes, two.author)
    assert here.evidence(digest) == there.evidence(digest)
    assert here.task_revision(one.task_revision).task == there.task_revision(one.task_revision).task


def version_json(place: Directory) -> Path:
    (path,) = place.path.glob(f"{NAME}/*/version.json")
    return path


def edit(path: Path, change: Callable[..., object]) -> None:
    document = json.loads(path.read_text())
    change(document)
    path.write_text(json.dumps(document))
