"""A base model's token embeddings, read by rows from its weight files: no model is loaded, and no torch.

A row is what the model itself begins with for a token: where an architecture scales its embeddings before the first
layer sees them, so is the row. How vLLM wants rows sent is `torch_file`'s subject.
"""

from __future__ import annotations

import json
import mmap
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from prompt_store.prompts.soft_prompt import SoftPrompt
from prompt_store.prompts.tensor_file import widened
from service.engines.base_model import BaseModel
from service.engines.errors import BaseModelError
from service.engines.local.options import Precision
from service.engines.remote.embedding_scale import embedding_scale
from service.engines.weights_file import StoredTensor, stored_tensors

WireType = Literal["F32", "F16", "BF16"]

# How checkpoints end the name of the embedding matrix, those of transformers first.
_ENDINGS = (
    "embed_tokens.weight",  # Llama and most that came after it; OPT; language models within larger ones
    "wte.weight",  # GPT-2 and its like
    "embed_in.weight",  # GPT-NeoX
    "word_embeddings.weight",  # Falcon, BLOOM
    "tok_embeddings.weight",  # Mistral's own format
)
_NUMPY_TYPES = {"F32": "<f4", "F16": "<f2", "BF16": "<u2"}
_WIRE_TYPES: dict[str, WireType] = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}


class EmbeddingMatrix:
    """The embedding matrix [V, H] of a base model whose weights run in `wire_type`.

    The file is mapped: rows that are read cost memory only as the system's file cache, which it can take back.
    """

    def __init__(self, stored: StoredTensor, wire_type: WireType, scale: float = 1.0) -> None:
        with stored.file.open("rb") as handle:
            content = mmap.mmap(handle.fileno(), 0, access=mmap.ACCESS_READ)
        content.madvise(mmap.MADV_RANDOM)  # neighbours of a token are as likely as any others to be asked for
        rows, columns = stored.shape
        values = np.frombuffer(content, _NUMPY_TYPES[stored.dtype], rows * columns, stored.begin)
        self._values = values.reshape(rows, columns)
        self._stored_as = stored.dtype
        self._scale = np.float32(scale)
        self.wire_type = wire_type

    @classmethod
    def open(cls, base: BaseModel, dtype: Precision = "auto") -> EmbeddingMatrix:
        """Find the matrix in the base model's files. `dtype` is what vLLM runs the model in.

        `auto` takes the one that the base model's configuration names, as vLLM does, and float32 where it names none.
        Raises BaseModelError when there is no such matrix, or when the architecture does more to embeddings than scale
        them.
        """
        return cls(_find(base), _WIRE_TYPES.get(dtype) or configured_type(base), embedding_scale(base))

    @property
    def hidden_size(self) -> int:
        return int(self._values.shape[1])

    def rows(self, token_ids: Sequence[int]) -> NDArray[np.float32]:
        """What the model begins with for these tokens: float32 [T, H], rounded as it rounds them."""
        values = self._values[np.asarray(token_ids, np.intp)]
        found = widened(values) if self._stored_as == "BF16" else values.astype(np.float32)
        if self._scale == 1.0:
            return found
        # The product of two rounded values is exact in float32, so that rounding once more is all that is left to do.
        scale = rounded(self._scale.reshape(1), self.wire_type)
        return rounded(rounded(found, self.wire_type) * scale, self.wire_type)

    def encode(self, token_ids: Sequence[int]) -> bytes:
        """The rows as they are sent: row by row, little-endian, in `wire_type`."""
        return encode(self.rows(token_ids), self.wire_type)


def encode(values: NDArray[np.float32], wire_type: WireType) -> bytes:
    """Numbers in a dtype, rounded to the nearest, ties to even; what is too large for F16 becomes infinite."""
    if wire_type == "F32":
        return values.astype("<f4", copy=False).tobytes()
    if wire_type == "F16":
        with np.errstate(over="ignore"):
            return values.astype("<f2").tobytes()
    bits = np.ascontiguousarray(values, "<f4").view("<u4")
    halfway = np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))
    halves: NDArray[np.uint16] = ((bits + halfway) >> np.uint32(16)).astype("<u2")
    return halves.tobytes()


def encode_prompt(prompt: SoftPrompt, wire_type: WireType) -> bytes:
    """A soft prompt's rows in a dtype, as the local engine rounds them to its own."""
    return prompt.data if prompt.dtype == wire_type else encode(prompt.to_float32(), wire_type)


def rounded(values: NDArray[np.float32], wire_type: WireType) -> NDArray[np.float32]:
    """Numbers as they are after `encode`, float32 again."""
    if wire_type == "F32":
        return values
    halves = np.frombuffer(encode(values, wire_type), _NUMPY_TYPES[wire_type]).reshape(values.shape)
    return widened(halves) if wire_type == "BF16" else halves.astype(np.float32)


def configured_type(base: BaseModel) -> WireType:
    """The dtype that the base model's configuration names; F32 where it names none."""
    return next((_WIRE_TYPES[name] for name in base.dtypes if name in _WIRE_TYPES), "F32")


def _find(base: BaseModel) -> StoredTensor:
    """Where the matrix lies. Raises BaseModelError where none or several fit, or its dtype is none that can be read."""
    stored = [tensor for file in _weight_files(base.folder) for tensor in stored_tensors(file)]
    for ending in _ENDINGS:
        named = [tensor for tensor in stored if tensor.name == ending or tensor.name.endswith(f".{ending}")]
        fitting = [
            tensor
            for tensor in named
            if len(tensor.shape) == 2
            and tensor.shape[0] >= base.vocabulary_size
            and tensor.shape[1] == base.hidden_size
        ]
        if len(fitting) > 1:
            names = ", ".join(sorted(f"'{tensor.name}'" for tensor in fitting))
            raise BaseModelError(
                f"base model '{base.name}' has several embedding matrices ({names}), and which of them reads text "
                "cannot be told; serve it with the local engine"
            )
        if fitting:
            return _readable(fitting[0], base)
        if named:
            raise BaseModelError(
                f"'{named[0].name}' of base model '{base.name}' has shape {list(named[0].shape)}; embeddings "
                f"[{base.vocabulary_size}, {base.hidden_size}] were expected, so the model does more to them than look "
                "them up. Serve it with the local engine"
            )
    raise BaseModelError(
        f"base model '{base.name}' has no embedding matrix under a known name (*.{', *.'.join(_ENDINGS)}) in its "
        "safetensors files; save it again with transformers' save_pretrained"
    )


def _readable(tensor: StoredTensor, base: BaseModel) -> StoredTensor:
    if tensor.dtype not in _NUMPY_TYPES:
        raise BaseModelError(
            f"'{tensor.name}' of base model '{base.name}' is stored as {tensor.dtype}; F32, F16 and BF16 can be read. "
            "Give vLLM the quantized weights and this service a folder with the original ones"
        )
    rows, columns = tensor.shape
    expected = rows * columns * np.dtype(_NUMPY_TYPES[tensor.dtype]).itemsize
    if tensor.end - tensor.begin != expected:
        raise BaseModelError(
            f"'{tensor.name}' in {tensor.file} has {tensor.end - tensor.begin} bytes and should have {expected}; fetch "
            "the base model again"
        )
    return tensor


def _weight_files(folder: Path) -> list[Path]:
    """The files that the index names, or all there are: folders may hold the same weights in two formats."""
    index = folder / "model.safetensors.index.json"
    if not index.is_file():
        single = folder / "model.safetensors"
        return [single] if single.is_file() else sorted(folder.glob("*.safetensors"))
    try:
        named = {str(name) for name in json.loads(index.read_text("utf-8"))["weight_map"].values()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise BaseModelError(f"{index} cannot be read ({error}); fetch the base model again") from error
    missing = sorted(name for name in named if not (folder / name).is_file())
    if missing:
        raise BaseModelError(f"{index} names {missing[0]}, which is not there; fetch the base model again")
    return sorted(folder / name for name in named)
