"""What every test may use: the shipped demo base, and soft prompts that fit it."""

from __future__ import annotations

import os

# Before torch is imported, here and in child processes: OpenMP threads spin where tests and their servers share cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")

from pathlib import Path

import numpy as np
import pytest

from prompt_store.prompts.soft_prompt import SoftPrompt
from service.engines.base_model import BaseModel, open_base_model

ROOT = Path(__file__).parent.parent
BASE_FOLDER = ROOT / "examples" / "base"


@pytest.fixture(autouse=True, scope="session")
def _private_cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Fingerprints are cached in a folder of this run's own, child processes included."""
    os.environ["XDG_CACHE_HOME"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="session")
def base(_private_cache: None) -> BaseModel:
    return open_base_model(BASE_FOLDER, name="demo-base")


def shared_file(*parts: str) -> Path:
    """A file that lies beside the repository. Without it the test is skipped; CI turns that into a failure."""
    file = ROOT.parent.joinpath("shared", *parts)
    if not file.exists():
        message = f"../shared/{'/'.join(parts)} is missing: this test needs it"
        if os.environ.get("SOFTCUE_NO_SKIPS"):
            pytest.fail(message)
        pytest.skip(message)
    return file


def random_prompt(seed: int, length: int, hidden_size: int = 192, scale: float = 0.3) -> SoftPrompt:
    """A soft prompt [length, hidden_size] of normal numbers, large enough to change what the demo base says."""
    values = np.random.default_rng(seed).normal(0.0, scale, (length, hidden_size)).astype(np.float32)
    return SoftPrompt("F32", values.shape, values.tobytes())
