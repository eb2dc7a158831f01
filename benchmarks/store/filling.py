"""A store as teams fill it: many tasks, many versions each, with reports, recipes and provenance of the usual size."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import Any

import numpy as np

from prompt_store.access import Principal
from prompt_store.database import Database
from prompt_store.prompts.registry import NewVersion, Registry
from prompt_store.prompts.soft_prompt import SoftPrompt
from prompt_store.prompts.task import parse_task
from prompt_store.prompts.version import BaseDescription, DatasetUse, Provenance
from prompt_store.routing.routes import DEFAULT_ALIAS

TASKS = 200
VERSIONS = 10_000
PROMPT_LENGTH = 20
LARGE_SHAPE = (100, 4096)
SOMEBODY = Principal("benchmark")
LARGE_BASE = BaseDescription("4096" * 16, "large", LARGE_SHAPE[1], 32, 8192, 128_000, "LlamaForCausalLM", 8, 128)

_SAMPLES = 16


def task_name(index: int) -> str:
    return f"task-{index:03d}"


def fill(database: Database, base: BaseDescription, versions: int = VERSIONS, tasks: int = TASKS) -> None:
    """Publishes the versions one by one, each task's in turn; the last of each task is in production."""
    registry = Registry(database)
    for described in (base, LARGE_BASE):
        registry.register_base(described, SOMEBODY)
    for index in range(tasks):
        document = {"name": task_name(index), "kind": "generate", "inputs": ["text"]}
        registry.apply_task(parse_task({**document, "messages": [{"role": "user", "content": "{text}"}]}), SOMEBODY)
    for seed, prompt in enumerate(_prompts(versions, (PROMPT_LENGTH, base.hidden_size))):
        new = NewVersion(
            task_name(seed % tasks),
            prompt,
            base.fingerprint,
            provenance=_provenance(seed, base),
            report=_report(seed),
            recipe={"optimise": {"learning_rate": 0.05, "max_steps": 600, "seed": seed}, "prompt": {"length": 20}},
            notes=f"run {seed} of the benchmark",
            tags=("benchmark", f"week-{seed % 52}"),
        )
        registry.publish(new, DEFAULT_ALIAS if seed >= versions - tasks else None, "benchmark", SOMEBODY)


def large_prompts(count: int) -> Iterator[SoftPrompt]:
    """Soft prompts [100, 4096] in float32, 1.6 MB each, of which no two are equal."""
    return _prompts(count, LARGE_SHAPE, first_seed=1_000_000)


def _prompts(count: int, shape: tuple[int, int], first_seed: int = 0) -> Iterator[SoftPrompt]:
    for seed in range(first_seed, first_seed + count):
        yield SoftPrompt.from_float32(np.random.default_rng(seed).normal(0.0, 0.1, shape))


def _provenance(seed: int, base: BaseDescription) -> Provenance:
    digest = hashlib.sha256(str(seed).encode()).hexdigest()
    return Provenance(
        recipe_hash=digest,
        datasets=(DatasetUse(name="train.jsonl", digest=digest, rows=2_000 + seed),),
        base_fingerprint=base.fingerprint,
        code_version="0.1.0",
        seed=seed,
        run_as="float32 on cpu",
    )


def _report(seed: int) -> dict[str, Any]:
    """Of the size that training writes for a small task: some 3 kB."""
    sample = {"inputs": {"text": "a question of a usual length, as users ask it"}, "answered": "yes", "expected": "yes"}
    return {
        "rows": {"train": 1_600, "validation": 200, "test": 200},
        "test_metrics": {"soft prompt": {"accuracy": 0.5 + seed % 500 / 1000}, "text prompt": {"accuracy": 0.5}},
        "samples": [sample] * _SAMPLES,
    }
