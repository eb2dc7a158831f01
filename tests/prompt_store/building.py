"""Small real values for the store's tests."""

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
from sqlalchemy import insert, update

from prompt_store import tables
from prompt_store.access import Principal
from prompt_store.prompts.prefix import Prefix
from prompt_store.prompts.registry import BaseDescription, NewVersion, Published, Registry
from prompt_store.prompts.soft_prompt import SoftPrompt
from prompt_store.prompts.task import Task, parse_task
from prompt_store.prompts.version import Provenance, SoftPromptPayload, version_digest

ANNA = Principal("anna")
BORIS = Principal("boris")

BASE = BaseDescription("a1" * 32, "demo-base", 16, 2, 64, 512, "LlamaForCausalLM", kv_heads=2, head_size=8)
OTHER_BASE = BaseDescription("b2" * 32, "other-base", 16, 2, 64, 512, "LlamaForCausalLM", kv_heads=2, head_size=8)

TASK_TOML = """
name = "support_intents"
kind = "classify"
description = "Which intent a message has"
inputs = ["message"]
labels = ["refund", "delivery"]

[[messages]]
role = "user"
content = "{message}"

[sampling]
max_tokens = 8

[[metrics]]
name = "accuracy"
direction = "maximise"
"""


def task(name: str = "support_intents", **changes: Any) -> Task:
    document: dict[str, Any] = {
        "name": name,
        "kind": "classify",
        "inputs": ["message"],
        "labels": ["refund", "delivery"],
        "messages": [{"role": "user", "content": "{message}"}],
        "metrics": [{"name": "accuracy", "direction": "maximise"}],
    }
    return parse_task({**document, **changes})


def prompt(seed: int = 0, length: int = 4, hidden_size: int = 16) -> SoftPrompt:
    values = np.random.default_rng(seed).standard_normal((length, hidden_size))
    return SoftPrompt.from_float32(values)


def prefix(seed: int = 0, *, layers: int = 2, kv_heads: int = 2, length: int = 3, head_size: int = 8) -> Prefix:
    shape = (layers, 2, kv_heads, length, head_size)
    return Prefix("F32", shape, np.random.default_rng(seed).standard_normal(shape).astype("<f4").tobytes())


def publish(registry: Registry, seed: int = 0, alias: str | None = None, **changes: Any) -> Published:
    fields: dict[str, Any] = {
        "task": "support_intents",
        "payload_content": prompt(seed),
        "base_fingerprint": BASE.fingerprint,
    }
    return registry.publish(NewVersion(**{**fields, **changes}), alias, "because", ANNA)


def bundle(folder: Path) -> Path:
    """A bundle with one task and no prompt yet; returns the task's folder."""
    inner = folder / "support_intents"
    inner.mkdir(parents=True)
    (inner / "task.toml").write_text(TASK_TOML)
    return inner


def fill(registry: Registry, *, tasks: int, versions: int) -> None:
    """So many versions over so many tasks, the newest of each in production, written in one go and without tensors."""
    registry.register_base(BASE, ANNA)
    revisions = [registry.apply_task(task(f"task-{number}"), ANNA) for number in range(tasks)]
    rows: list[dict[str, Any]] = []
    for place in range(versions):
        revision = revisions[place % tasks]
        tensor = hashlib.sha256(str(place).encode()).hexdigest()
        payload = SoftPromptPayload(tensor_digest=tensor, dtype="F32", shape=(4, 16), base_fingerprint=BASE.fingerprint)
        rows.append(
            {
                "digest": version_digest(revision.digest, payload),
                "task": revision.task.name,
                "number": place // tasks + 1,
                "task_revision": revision.digest,
                "kind": "soft_prompt",
                "base_fingerprint": BASE.fingerprint,
                "payload": payload.model_dump_json(),
                "provenance": Provenance(seed=place, code_version="0.1.0").model_dump_json(),
                "report": '{"samples": [' + ", ".join(['{"inputs": {}}'] * 100) + "]}",
                "notes": "",
                "tags": "[]",
                "created_at": revision.created_at,
                "principal": ANNA.name,
            }
        )
    newest = [
        {**row, "name": "production", "version": row["digest"], "moved_at": row["created_at"]} for row in rows[-tasks:]
    ]
    with registry.database.write() as connection:
        connection.execute(insert(tables.versions), rows)
        connection.execute(update(tables.tasks).values(last_version=versions // tasks))
        connection.execute(
            insert(tables.aliases),
            [{column.name: row[column.name] for column in tables.aliases.c} for row in newest],
        )
