"""A run's checkpoint: safetensors with the tensors, its metadata with the rest. Written whole or not at all."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass, field
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from training.errors import CheckpointError


@dataclass
class Progress:
    """How far a run has come.

    `history` holds (step, validation metric, mean training loss since the last), `losses` those since the last of it.
    """

    step: int = 0
    best_step: int = 0
    best_metric: float | None = None
    stale: int = 0
    elapsed_s: float = 0.0
    losses: list[float] = field(default_factory=list)
    history: list[tuple[int, float, float]] = field(default_factory=list)


def save(file: Path, key: str, progress: Progress, tensors: dict[str, Tensor]) -> None:
    """Replace the checkpoint. `key` names what the run was made of; only the same run may resume it."""
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_suffix(".partial")
    contiguous = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    save_file(contiguous, partial, metadata={"key": key, "progress": json.dumps(asdict(progress))})
    with partial.open("rb") as written:
        os.fsync(written.fileno())
    partial.replace(file)


def load(file: Path, key: str) -> tuple[Progress, dict[str, Tensor]] | None:
    """The checkpoint of this run, or None when there is none. Raises CheckpointError when it is damaged or foreign."""
    if not file.is_file():
        return None
    try:
        with safe_open(file, framework="pt") as content:
            metadata = content.metadata() or {}
            tensors = {name: content.get_tensor(name) for name in content.keys()}  # noqa: SIM118
        found = metadata["key"]
        progress = Progress(**json.loads(metadata["progress"]))
    except (SafetensorError, OSError, KeyError, ValueError, TypeError) as error:
        raise CheckpointError(f"checkpoint {file} is damaged ({error}); delete it to start again") from error
    if found != key:
        raise CheckpointError(f"checkpoint {file} belongs to another recipe, data or base; delete it to start again")
    progress.history = [(step, metric, loss) for step, metric, loss in progress.history]
    return progress, tensors
