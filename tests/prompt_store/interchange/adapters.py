"""Adapters made by PEFT itself on tiny random models, and what PEFT computes with them.

It is computed with gradients on, as PEFT saves: an LSTM's kernel without them rounds otherwise.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import peft
import torch
import transformers

from tests.service.engines.local.tiny_models import HIDDEN, NAMED, make_model

BASE_NAME = "someone/tiny-base"
LENGTH = 6
GROUPED = "Llama"  # 4 heads, 2 KV heads of 16: their width is not the hidden size
PLAIN = "GPT2"
IDS = torch.arange(5, 25).reshape(1, -1)

_COMMON: dict[str, Any] = {"task_type": "CAUSAL_LM"}
_SIZED = {**_COMMON, "num_virtual_tokens": LENGTH}

SOFT: dict[str, Callable[[], peft.PeftConfig]] = {
    "PROMPT_TUNING": lambda: peft.PromptTuningConfig(**_SIZED),
    "P_TUNING": lambda: peft.PromptEncoderConfig(**_SIZED, encoder_hidden_size=20),
    "P_TUNING by LSTM": lambda: peft.PromptEncoderConfig(
        **_SIZED, encoder_reparameterization_type="LSTM", encoder_hidden_size=20
    ),
    "MULTITASK_PROMPT_TUNING": lambda: peft.MultitaskPromptTuningConfig(**_SIZED, num_tasks=3),
    "CPT": lambda: peft.CPTConfig(
        **_COMMON, cpt_token_ids=[9, 8, 7, 6, 5, 4], cpt_mask=[1] * 6, cpt_tokens_type_mask=[1, 2, 3, 4, 1, 2]
    ),
}
PREFIXES: dict[str, Callable[[], peft.PeftConfig]] = {
    "PREFIX_TUNING": lambda: peft.PrefixTuningConfig(**_SIZED),
    "PREFIX_TUNING projected": lambda: peft.PrefixTuningConfig(**_SIZED, prefix_projection=True),
    "CARTRIDGE": lambda: peft.CartridgeConfig(**_SIZED, num_frozen_tokens=2),
}


def base_model(architecture: str = GROUPED) -> transformers.PreTrainedModel:
    model = make_model(architecture, NAMED[architecture])
    model.name_or_path = BASE_NAME
    return model


def make_adapter(config: peft.PeftConfig, architecture: str = GROUPED) -> peft.PeftModel:
    """An adapter whose every parameter is random, as after training."""
    model = peft.get_peft_model(base_model(architecture), config).eval()
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.prompt_encoder["default"].named_parameters():
            # What CPT starts from are the base's own embeddings; the rest is learned.
            if name != "embedding.weight" or config.peft_type != "CPT":
                parameter.normal_(0.0, 0.4)
    return model


def save(model: peft.PeftModel, folder: Path) -> Path:
    # Whether the embeddings were resized, PEFT would look up on the hub.
    model.save_pretrained(folder, save_embedding_layers=False)
    return folder


def load(folder: Path, architecture: str = GROUPED) -> peft.PeftModel:
    return peft.PeftModel.from_pretrained(base_model(architecture), folder).eval()


def saved(config: peft.PeftConfig, folder: Path, architecture: str = GROUPED) -> Path:
    return save(make_adapter(config, architecture), folder)


def soft_prompt(model: peft.PeftModel, task: int | None = None) -> npt.NDArray[np.float32]:
    """[P, H] as PEFT puts it before the text."""
    values: npt.NDArray[np.float32] = model.get_prompt(1, task_ids=_tasks(task))[0].detach().numpy()
    assert values.shape == (LENGTH, HIDDEN)
    return values


def prefix(model: peft.PeftModel) -> npt.NDArray[np.float32]:
    """[L, 2, KV heads, P, D] as PEFT puts it into the cache."""
    layers = model.get_prompt(1).layers
    values: npt.NDArray[np.float32] = (
        torch.stack([torch.cat((layer.keys, layer.values)) for layer in layers]).detach().numpy()
    )
    return values


def logits(model: peft.PeftModel, task: int | None = None) -> torch.Tensor:
    asked = {} if task is None else {"task_ids": _tasks(task)}
    result: torch.Tensor = model(input_ids=IDS, attention_mask=torch.ones_like(IDS), **asked).logits.detach()
    return result[:, -IDS.shape[1] :]


def _tasks(task: int | None) -> torch.Tensor | None:
    return None if task is None else torch.tensor([task])
