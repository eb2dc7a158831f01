"""A prompt store as the service reads it, filled with the soft prompts of the workload."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from benchmarks.engine.workload import task_name
from prompt_store.access import ANONYMOUS
from prompt_store.database import Database
from prompt_store.prompts.registry import NewVersion, Registry
from prompt_store.prompts.soft_prompt import SoftPrompt
from prompt_store.prompts.task import parse_task
from prompt_store.routing.routes import DEFAULT_ALIAS
from service.engines.base_model import open_base_model


def fill_store(path: Path, base: Path, prompts: Tensor) -> None:
    """Publish soft prompts [N, P, H], each for a task of its own, as what is in production."""
    described = open_base_model(base).describe()
    with Database.open(path) as database:
        registry = Registry(database)
        registry.register_base(described, ANONYMOUS)
        for index, prompt in enumerate(prompts):
            task = {"name": task_name(index), "kind": "generate", "inputs": ["text"]}
            registry.apply_task(parse_task({**task, "messages": [{"role": "user", "content": "{text}"}]}), ANONYMOUS)
            version = NewVersion(task_name(index), SoftPrompt.from_float32(prompt.numpy()), described.fingerprint)
            registry.publish(version, DEFAULT_ALIAS, "benchmark", ANONYMOUS)
