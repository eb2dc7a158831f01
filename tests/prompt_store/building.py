"""Small real values for the store's tests."""

from pathlib import Path
from typing import Any

import numpy as np

from prompt_store.access import Principal
from prompt_store.prompts.prefix import Prefix
from prompt_store.prompts.registry import BaseDescription, NewVersion, Published, Registry
from prompt_store.prompts.soft_prompt import SoftPrompt
from prompt_store.prompts.task import Task, parse_task
from prompt_store.routing.backends import BackendDescription
from prompt_store.routing.calibrations import Calibration

ANNA = Principal("anna")
BORIS = Principal("boris")

BASE = BaseDescription("a1" * 32, "demo-base", 16, 2, 64, 512, "LlamaForCausalLM", kv_heads=2, head_size=8)
OTHER_BASE = BaseDescription("b2" * 32, "other-base", 16, 2, 64, 512, "LlamaForCausalLM", kv_heads=2, head_size=8)

LOCAL = BackendDescription(
    "local", "local", None, frozenset({"soft_prompt", "prefix", "text"}), frozenset({"scores", "logprobs"})
)
OPENAI = BackendDescription(
    "openai", "openai", "openai", frozenset({"remote_model", "text"}), frozenset({"scores"}), "m"
)

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


def calibration(version: str, measure: str = "mean_logprob", **changes: Any) -> Calibration:
    facts = {"threshold": -0.3, "target": 0.95, "accuracy": 0.96, "accepted_share": 0.7, "rows": 400, "dataset": "held"}
    return Calibration.model_validate({"version": version, "measure": measure, **facts, **changes})


def bundle(folder: Path) -> Path:
    """A bundle with one task and no prompt yet; returns the task's folder."""
    inner = folder / "support_intents"
    inner.mkdir(parents=True)
    (inner / "task.toml").write_text(TASK_TOML)
    return inner
