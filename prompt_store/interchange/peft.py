"""PEFT's adapter folders, in and out: `adapter_config.json` and `adapter_model.safetensors`, as PEFT 0.21 writes them.

PEFT saves prompts evaluated: `prompt_embeddings` [P, H] are what P_TUNING's encoder made of them and what CPT added to
its context, and for PREFIX_TUNING and CARTRIDGE they are a row a virtual token, layer by layer the keys of all heads
and then the values. Only MULTITASK_PROMPT_TUNING is saved in parts. Where heads are grouped, PEFT calls the KV heads
`num_attention_heads`, and all of their dimensions together `token_dim`.
"""

import json
import os
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from prompt_store.errors import InvalidArtifact
from prompt_store.files import read_bounded, write_folder
from prompt_store.interchange.imported import Imported
from prompt_store.prompts.prefix import MAX_PREFIX_BYTES, Prefix
from prompt_store.prompts.soft_prompt import SoftPrompt
from prompt_store.prompts.tensor_file import (
    MAX_FILE_BYTES,
    MAX_HEADER_BYTES,
    Tensor,
    check_tensor,
    read_names,
    read_tensors,
    without_repeats,
    write_tensors,
)

CONFIG_FILE = "adapter_config.json"
TENSORS_FILE = "adapter_model.safetensors"
PICKLE_FILE = "adapter_model.bin"
MAX_CONFIG_BYTES = 2**20

_EMBEDDINGS, _COLUMNS, _ROWS = "prompt_embeddings", "prefix_task_cols", "prefix_task_rows"
_MULTITASK = "MULTITASK_PROMPT_TUNING"
_PREFIXES = ("PREFIX_TUNING", "CARTRIDGE")
_SERVED = ("PROMPT_TUNING", "P_TUNING", "CPT", _MULTITASK, *_PREFIXES)
_REMEDY = "save the adapter again with PEFT's save_pretrained"
_EVALUATED = {
    "P_TUNING": "the prompt encoder was evaluated by PEFT when it saved the adapter",
    "CPT": "the context's embeddings and what was learned on them were added up by PEFT when it saved the adapter",
}
_EVALUATED_PREFIX = "the projection was evaluated by PEFT when it saved the adapter"

Size = Annotated[int, Field(ge=1, lt=2**31)]


class _Config(BaseModel):
    """What is read of an adapter_config.json; other keys say how it was trained."""

    model_config = ConfigDict(frozen=True, extra="ignore", strict=True, hide_input_in_errors=True)

    peft_type: str
    task_type: str | None = None
    base_model_name_or_path: str | None = None
    num_virtual_tokens: Size
    token_dim: Size | None = None
    num_transformer_submodules: Size | None = None
    num_attention_heads: Size | None = None
    num_layers: Size | None = None
    num_tasks: Size = 1
    num_ranks: Size = 1
    prefix_projection: bool = False


def read_peft(folder: Path, *, task_index: int | None = None) -> Imported:
    """The prompt of an adapter folder, bit by bit as it lies there, in its dtype.

    A multitask prompt is folded for the task of that index, in float32. Raises InvalidArtifact naming the file.
    """
    config = _read_config(folder)
    kind = config.peft_type
    if task_index is not None and kind != _MULTITASK:
        raise InvalidArtifact(
            f"{folder / CONFIG_FILE}: is of {kind}, one prompt for no task by index; leave the index out"
        )
    tensors = _read_tensors(folder, {_EMBEDDINGS, _COLUMNS, _ROWS} if kind == _MULTITASK else {_EMBEDDINGS})
    prompt: SoftPrompt | Prefix
    note = _EVALUATED.get(kind, "")
    try:
        if kind in _PREFIXES:
            prompt = _to_prefix(tensors[_EMBEDDINGS], config)
            note = _EVALUATED_PREFIX if config.prefix_projection else ""
        elif kind == _MULTITASK:
            prompt, note = _fold(tensors, config, task_index)
        else:
            prompt = _to_soft_prompt(tensors[_EMBEDDINGS], config)
        prompt.check()
    except InvalidArtifact as error:
        raise InvalidArtifact(f"{folder / TENSORS_FILE}: {error}") from error
    return Imported(prompt, f"PEFT {kind}", note, base_name=config.base_model_name_or_path or None)


def write_peft(
    folder: Path, prompt: SoftPrompt | Prefix, base_model_name: str | None, *, cartridge: bool = False
) -> None:
    """An adapter folder that `PeftModel.from_pretrained` takes: PROMPT_TUNING, or PREFIX_TUNING or CARTRIDGE.

    Reading it gives the same prompt, to the bit; PEFT itself holds it in float32 whatever is stored. Raises
    InvalidArtifact when the folder is there already and not empty, and for a soft prompt as a cartridge.
    """
    prompt.check()
    config: dict[str, Any] = {
        "base_model_name_or_path": base_model_name,
        "inference_mode": True,
        "num_transformer_submodules": 1,
        "num_virtual_tokens": prompt.length,
        "revision": None,
        "task_type": "CAUSAL_LM",
    }
    if isinstance(prompt, Prefix):
        layers, _, heads, length, size = prompt.shape
        config |= {"num_attention_heads": heads, "num_layers": layers, "token_dim": heads * size}
        config |= (
            {"peft_type": "CARTRIDGE", "num_frozen_tokens": 1}  # as PEFT's default; it matters to training alone
            if cartridge
            else {"peft_type": "PREFIX_TUNING", "prefix_projection": False}
        )
        rows = prompt.bits().transpose(3, 0, 1, 2, 4).tobytes()
        embeddings = Tensor(prompt.dtype, (length, 2 * layers * heads * size), rows)
    elif cartridge:
        raise InvalidArtifact(f"{folder}: a cartridge holds a prefix, not a soft prompt; export it as peft")
    else:
        config |= {"peft_type": "PROMPT_TUNING", "prompt_tuning_init": "RANDOM", "token_dim": prompt.hidden_size}
        embeddings = prompt
    write_folder(
        folder,
        {
            CONFIG_FILE: json.dumps(config, indent=2, sort_keys=True).encode(),
            TENSORS_FILE: write_tensors({_EMBEDDINGS: embeddings}, {"format": "pt"}),
        },
    )


def _to_soft_prompt(embeddings: Tensor, config: _Config) -> SoftPrompt:
    _expect(_EMBEDDINGS, embeddings, num_virtual_tokens=config.num_virtual_tokens, token_dim=config.token_dim)
    length, width = embeddings.shape
    return SoftPrompt(embeddings.dtype, (length, width), embeddings.data)


def _to_prefix(embeddings: Tensor, config: _Config) -> Prefix:
    length, layers = config.num_virtual_tokens, config.num_layers
    heads, width = config.num_attention_heads, config.token_dim
    if layers is None or heads is None or width is None or width % heads:
        raise InvalidArtifact(
            f"{CONFIG_FILE} says num_layers={layers}, num_attention_heads={heads}, token_dim={width}; a prefix needs "
            f"all three, and heads that divide token_dim; {_REMEDY}"
        )
    columns = {"2 * num_layers * token_dim": 2 * layers * width}
    _expect(_EMBEDDINGS, embeddings, num_virtual_tokens=length, **columns)
    check_tensor(embeddings, _EMBEDDINGS, "P, 2 * L * KV heads * D", "row", MAX_PREFIX_BYTES)
    rows = embeddings.bits().reshape(length, layers, 2, heads, width // heads)
    shape = (layers, 2, heads, length, width // heads)
    return Prefix(embeddings.dtype, shape, rows.transpose(1, 2, 3, 0, 4).tobytes())


def _fold(tensors: dict[str, Tensor], config: _Config, task_index: int | None) -> tuple[SoftPrompt, str]:
    """The float32 soft prompt of one task, as PEFT's forward computes it, and a note that says so.

    The shared embeddings are multiplied by the task's columns [P, R] times rows [R, H]. That product is summed in
    float64 and rounded once to float32: for R = 1 it is PEFT's to the bit, for more PEFT's own sum rounds on the way.
    """
    length, tasks, ranks = config.num_virtual_tokens, config.num_tasks, config.num_ranks
    shared, columns, rows = tensors[_EMBEDDINGS], tensors[_COLUMNS], tensors[_ROWS]
    _expect(_EMBEDDINGS, shared, num_virtual_tokens=length, token_dim=config.token_dim)
    _expect(_COLUMNS, columns, num_tasks=tasks, num_virtual_tokens=length, num_ranks=ranks)
    _expect(_ROWS, rows, num_tasks=tasks, num_ranks=ranks, token_dim=shared.shape[1])
    if task_index is None and tasks > 1:
        raise InvalidArtifact(
            f"the adapter holds prompts of {tasks} tasks; say which by --task-index, 0 to {tasks - 1}"
        )
    index = task_index or 0
    if not 0 <= index < tasks:
        raise InvalidArtifact(f"the adapter holds prompts of {tasks} tasks, none of index {index}; 0 is the first")
    check_tensor(shared, _EMBEDDINGS, "P, H", "row", MAX_FILE_BYTES)
    check_tensor(columns, _COLUMNS, "tasks, P, R", "task", MAX_FILE_BYTES)
    check_tensor(rows, _ROWS, "tasks, R, H", "task", MAX_FILE_BYTES)
    product = columns.to_float32()[index].astype(np.float64) @ rows.to_float32()[index].astype(np.float64)
    with np.errstate(over="ignore"):  # what no float32 holds becomes infinite, and that is refused by the check
        folded = shared.to_float32() * product.astype(np.float32)
    note = f"folded in float32 for task {index} of {tasks}: {_EMBEDDINGS} * ({_COLUMNS} @ {_ROWS})"
    return SoftPrompt.from_float32(folded), note


def _expect(name: str, tensor: Tensor, **sizes: int | None) -> None:
    """Raises InvalidArtifact unless the tensor's shape is that of the configuration's values; None fits any size."""
    if len(tensor.shape) != len(sizes) or any(
        size not in (None, found) for size, found in zip(sizes.values(), tensor.shape, strict=True)
    ):
        said = ", ".join(f"{key}={size}" for key, size in sizes.items())
        raise InvalidArtifact(f"{name} has shape {list(tensor.shape)[:8]}, but {CONFIG_FILE} says {said}; {_REMEDY}")


def _read_config(folder: Path) -> _Config:
    path = folder / CONFIG_FILE
    if not os.path.lexists(path):
        raise InvalidArtifact(f"{folder}: is no PEFT adapter, for it holds no {CONFIG_FILE}; give the adapter's folder")
    try:
        document = json.loads(_read_inside(folder, CONFIG_FILE, MAX_CONFIG_BYTES), object_pairs_hook=without_repeats)
    except (ValueError, RecursionError) as error:
        raise InvalidArtifact(f"{path}: is not JSON ({error}); {_REMEDY}") from error
    if not isinstance(document, dict):
        raise InvalidArtifact(f"{path}: holds no JSON object; {_REMEDY}")
    kind = document.get("peft_type")
    if not isinstance(kind, str):
        raise InvalidArtifact(f"{path}: does not say its peft_type; {_REMEDY}")
    if kind not in _SERVED:
        raise InvalidArtifact(
            f"{path}: is a {kind[:40]!r} adapter, which changes the base model's layers; prompts come as "
            f"{', '.join(_SERVED)}. Merge it into the base with PEFT's merge_and_unload and serve that as a base, or "
            "tune a prompt instead"
        )
    try:
        config = _Config.model_validate(document)
    except ValidationError as error:
        problem = error.errors(include_url=False, include_input=False)[0]
        name = ".".join(map(str, problem["loc"]))
        raise InvalidArtifact(f"{path}: {name}: {problem['msg']}; {_REMEDY}") from error
    if config.task_type not in (None, "CAUSAL_LM") or config.num_transformer_submodules not in (None, 1):
        raise InvalidArtifact(
            f"{path}: is for {str(config.task_type)[:40]!r} with num_transformer_submodules="
            f"{config.num_transformer_submodules}; only causal language models are served, so train it as CAUSAL_LM"
        )
    return config


def _read_tensors(folder: Path, expected: set[str]) -> dict[str, Tensor]:
    path = folder / TENSORS_FILE
    if not os.path.lexists(path) and os.path.lexists(folder / PICKLE_FILE):
        raise InvalidArtifact(
            f"{folder / PICKLE_FILE}: is a Python pickle (which could run code and is never opened); save the adapter "
            "again with safe_serialization=True"
        )
    data = _read_inside(folder, TENSORS_FILE, MAX_FILE_BYTES + MAX_HEADER_BYTES)
    try:
        names, _ = read_names(data, _REMEDY)
        if names != expected:
            found = ", ".join(sorted(repr(name[:80]) for name in names)[:5]) or "none"
            raise InvalidArtifact(
                f"must hold the tensors {', '.join(sorted(expected))} and no others, but holds {found}; save it again "
                "with save_embedding_layers=False and without modules_to_save"
            )
        return read_tensors(data, _REMEDY)
    except InvalidArtifact as error:
        raise InvalidArtifact(f"{path}: {error}") from error


def _read_inside(folder: Path, name: str, limit_bytes: int) -> bytes:
    """A file of the folder; a link that leads out of it is refused."""
    path = folder / name
    if not Path(os.path.realpath(path)).is_relative_to(os.path.realpath(folder)):
        raise InvalidArtifact(f"{path}: is a link to outside its folder; copy the folder with `cp -rL` and import that")
    return read_bounded(path, limit_bytes)
