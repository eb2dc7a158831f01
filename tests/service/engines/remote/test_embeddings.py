"""Rows of embedding matrices, against what transformers' own models begin with."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from prompt_store.prompts.soft_prompt import SoftPrompt
from service.engines.base_model import BaseModel, open_base_model
from service.engines.errors import BaseModelError
from service.engines.remote.embeddings import EmbeddingMatrix, encode, encode_prompt, rounded
from tests.conftest import BASE_FOLDER, random_prompt
from tests.service.engines.local.tiny_models import NAMED, UNUSUAL, make_model, save_base

IDS = [0, 1, 4095, 17, 17, 300]
_DTYPES: dict[str, Any] = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
_TORCH = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_HEADS = {"num_key_value_heads": 2, "head_dim": 16}
# Architectures that scale embeddings, beside those of tiny_models.
_SCALED: dict[str, dict[str, Any]] = {
    "Gemma": _HEADS,
    "MiniCPM3": {"scale_emb": 12},
    "VaultGemma": {**_HEADS, "query_pre_attn_scalar": 16},
}


def tensor_of(encoded: bytes, wire_type: str, rows: int) -> torch.Tensor:
    return torch.frombuffer(bytearray(encoded), dtype=_TORCH[wire_type]).reshape(rows, -1)


@pytest.mark.parametrize("wire_type", ["F32", "F16", "BF16"])
@pytest.mark.parametrize("architecture", [*NAMED, *UNUSUAL, *_SCALED])
def test_rows_are_what_the_model_begins_with_in_its_dtype(tmp_path: Path, architecture: str, wire_type: Any) -> None:
    options = {**NAMED, **UNUSUAL, **_SCALED}[architecture]
    model = make_model(architecture, options)
    base = save_base(tmp_path / "base", model)
    expected = model.to(_TORCH[wire_type]).get_input_embeddings()(torch.tensor(IDS)).detach()
    matrix = EmbeddingMatrix.open(base, _DTYPES[wire_type])
    assert torch.equal(tensor_of(matrix.encode(IDS), wire_type, len(IDS)), expected)


@pytest.mark.parametrize("stored", ["F32", "F16", "BF16"])
def test_files_of_every_dtype_are_read_exactly(tmp_path: Path, stored: str) -> None:
    model = make_model("Llama", NAMED["Llama"]).to(_TORCH[stored])
    matrix = EmbeddingMatrix.open(save_base(tmp_path / "base", model), "float32")
    expected = model.get_input_embeddings().weight.detach().float()[IDS]
    assert np.array_equal(matrix.rows(IDS), expected.numpy())


def test_the_dtype_is_the_configured_one_unless_told(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base", make_model("Llama", NAMED["Llama"]).to(torch.bfloat16))
    assert EmbeddingMatrix.open(base).wire_type == "BF16"
    assert EmbeddingMatrix.open(base, "float16").wire_type == "F16"
    assert EmbeddingMatrix.open(open_base_model(BASE_FOLDER)).wire_type == "F32"


@pytest.mark.parametrize("wire_type", ["F16", "BF16"])
def test_numbers_are_rounded_as_torch_rounds_them(wire_type: Any) -> None:
    bits = np.random.default_rng(3).integers(0, 2**32, 200_000, dtype=np.uint32)
    ties = np.arange(0x3F800000, 0x3F800000 + 2**18, 2**11, dtype=np.uint32)  # halfway between neighbours
    values = np.concatenate([bits, ties]).view(np.float32)
    values = values[np.isfinite(values)].reshape(-1, 1)
    expected = torch.from_numpy(values).to(_TORCH[wire_type])
    assert torch.equal(tensor_of(encode(values, wire_type), wire_type, len(values)), expected)
    assert np.array_equal(rounded(values, wire_type), expected.float().numpy())


def test_a_soft_prompt_is_rounded_only_where_its_dtype_is_another() -> None:
    prompt = random_prompt(1, 5)
    assert encode_prompt(prompt, "F32") is prompt.data
    halves = encode_prompt(prompt, "BF16")
    expected = torch.from_numpy(prompt.to_float32()).to(torch.bfloat16)
    assert torch.equal(tensor_of(halves, "BF16", 5), expected)
    assert encode_prompt(SoftPrompt("BF16", (5, 192), halves), "F32") == expected.float().numpy().tobytes()


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    return Path(shutil.copytree(BASE_FOLDER, tmp_path / "copy"))


def renamed(folder: Path, names: dict[str, str]) -> BaseModel:
    """The base with some tensors under other names."""
    tensors = load_file(folder / "model.safetensors")
    save_file({names.get(name, name): tensor.clone() for name, tensor in tensors.items()}, folder / "model.safetensors")
    return open_base_model(folder)


@pytest.mark.parametrize(
    "name",
    [
        "model.language_model.embed_tokens.weight",
        "language_model.model.embed_tokens.weight",
        "transformer.wte.weight",
        "wte.weight",
        "gpt_neox.embed_in.weight",
        "transformer.word_embeddings.weight",
    ],
)
def test_the_matrix_is_found_under_the_names_that_checkpoints_use(copy: Path, base: BaseModel, name: str) -> None:
    found = EmbeddingMatrix.open(renamed(copy, {"model.embed_tokens.weight": name}))
    assert np.array_equal(found.rows(IDS), EmbeddingMatrix.open(base).rows(IDS))


def test_the_matrix_is_found_in_the_shard_that_the_index_names(copy: Path, base: BaseModel) -> None:
    tensors = load_file(copy / "model.safetensors")
    (copy / "model.safetensors").rename(copy / "consolidated.safetensors")  # the same in another format, to be left
    names = sorted(tensors)
    shards = {"model-00001-of-00002.safetensors": names[::2], "model-00002-of-00002.safetensors": names[1::2]}
    for file, held in shards.items():
        save_file({name: tensors[name] for name in held}, copy / file)
    index = {"weight_map": {name: file for file, held in shards.items() for name in held}}
    (copy / "model.safetensors.index.json").write_text(json.dumps(index))
    assert np.array_equal(EmbeddingMatrix.open(open_base_model(copy)).rows(IDS), EmbeddingMatrix.open(base).rows(IDS))
    opened = open_base_model(copy)
    (copy / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(BaseModelError, match=r"names model-00002-of-00002\.safetensors, which is not there"):
        EmbeddingMatrix.open(opened)
    (copy / "model.safetensors.index.json").write_text("[]")
    with pytest.raises(BaseModelError, match="cannot be read"):
        EmbeddingMatrix.open(opened)


def test_a_base_without_a_known_matrix_is_refused(copy: Path) -> None:
    base = renamed(copy, {"model.embed_tokens.weight": "model.lookup.weight"})
    with pytest.raises(BaseModelError, match=r"has no embedding matrix under a known name \(\*\.embed_tokens"):
        EmbeddingMatrix.open(base)


def test_a_base_with_two_matrices_is_refused(copy: Path) -> None:
    tensors = load_file(copy / "model.safetensors")
    again = {"speech.embed_tokens.weight": tensors["model.embed_tokens.weight"].clone()}
    save_file({**tensors, **again}, copy / "model.safetensors")
    with pytest.raises(BaseModelError, match="has several embedding matrices"):
        EmbeddingMatrix.open(open_base_model(copy))


def test_a_matrix_of_another_width_or_dtype_is_refused(copy: Path) -> None:
    tensors = load_file(copy / "model.safetensors")
    for changed, said in (
        (
            tensors["model.embed_tokens.weight"][:, :96].contiguous(),
            r"has shape \[4096, 96\]; embeddings \[4096, 192\]",
        ),
        (tensors["model.embed_tokens.weight"].to(torch.float8_e4m3fn), "is stored as F8_E4M3; F32, F16 and BF16"),
    ):
        save_file({**tensors, "model.embed_tokens.weight": changed}, copy / "model.safetensors")
        with pytest.raises(BaseModelError, match=said):
            EmbeddingMatrix.open(open_base_model(copy))


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"model_type": "gemma3n_text"}, "each of its layers embeds the token ids once more"),
        ({"model_type": "gemma4_text", "hidden_size_per_layer_input": 256}, "each of its layers embeds"),
        ({"model_type": "falcon_h1", "embedding_multiplier": 5.65}, "vLLM scales the embeddings that it is given"),
        ({"model_type": "xglm", "scale_embedding": True}, "'scale_embedding' in its configuration speaks"),
        ({"model_type": "novel", "embedding_multiplier": 12.0}, "'embedding_multiplier' in its configuration speaks"),
        ({"model_type": "gemma9"}, "how it scales embeddings is not known"),
    ],
)
def test_architectures_that_do_more_than_is_known_are_refused(copy: Path, config: dict[str, Any], said: str) -> None:
    document = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**document, **config}))
    with pytest.raises(BaseModelError, match=said):
        EmbeddingMatrix.open(open_base_model(copy))


def test_a_multiplier_of_one_is_none(copy: Path, base: BaseModel) -> None:
    document = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**document, "embedding_multiplier": 1.0}))
    found = EmbeddingMatrix.open(open_base_model(copy))
    assert np.array_equal(found.rows(IDS), EmbeddingMatrix.open(base).rows(IDS))
