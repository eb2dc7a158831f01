"""A SoftPrompt, and the file that holds one, or a Prefix in its place.

The file format is safetensors with exactly one tensor: `soft_prompt` [P, H] or `prefix` [L, 2, KV heads, P, D]. How
safetensors are read within bounds is `tensor_file`'s subject.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from prompt_store.errors import InvalidArtifact
from prompt_store.prompts.prefix import PREFIX_TENSOR_NAME, Prefix
from prompt_store.prompts.tensor_file import (
    ITEM_BYTES,
    MAX_FILE_BYTES,
    MAX_HEADER_BYTES,
    Tensor,
    check_tensor,
    read_names,
    read_tensors,
    tensor_digest,
    write_tensors,
)

__all__ = [
    "ITEM_BYTES", "MAX_FILE_BYTES", "MAX_HEADER_BYTES", "MAX_SOFT_PROMPT_BYTES", "METADATA_BASE_FINGERPRINT",
    "METADATA_NOTES", "METADATA_PROVENANCE", "METADATA_TASK", "TENSOR_NAME", "SoftPrompt", "decode", "encode",
    "tensor_digest",
]  # fmt: skip

TENSOR_NAME = "soft_prompt"
MAX_SOFT_PROMPT_BYTES = 64 * 2**20

METADATA_TASK = "softcue.task"
METADATA_BASE_FINGERPRINT = "softcue.base_fingerprint"
METADATA_PROVENANCE = "softcue.provenance"  # JSON of version.Provenance
METADATA_NOTES = "softcue.notes"

_REMEDY = "save the prompt as safetensors with one tensor named 'soft_prompt' of shape [P, H]"


@dataclass(frozen=True)
class SoftPrompt(Tensor):
    """A soft prompt [P, H]: `data` are its values row by row, little-endian, in `dtype` (F32, BF16 or F16)."""

    shape: tuple[int, int]

    @property
    def length(self) -> int:
        """P, the number of virtual tokens."""
        return self.shape[0]

    @property
    def hidden_size(self) -> int:
        """H, the width of the base model."""
        return self.shape[1]

    def check(self) -> None:
        """Raises InvalidArtifact for an unknown dtype, a wrong shape or size, or a value that is NaN or infinite."""
        check_tensor(self, "soft prompt", "P, H", "row", MAX_SOFT_PROMPT_BYTES)

    @classmethod
    def from_float32(cls, values: npt.ArrayLike) -> "SoftPrompt":
        """A float32 soft prompt from anything that numpy takes for a [P, H] array. Raises InvalidArtifact."""
        array = np.ascontiguousarray(values, dtype="<f4")
        if array.ndim != 2:
            raise InvalidArtifact(f"soft prompt has shape {list(array.shape)}; it must be [P, H]")
        return cls("F32", (array.shape[0], array.shape[1]), array.tobytes())


def encode(prompt: SoftPrompt | Prefix, metadata: Mapping[str, str] | None = None) -> bytes:
    """The prompt as a safetensors file; equal arguments give equal bytes. Raises InvalidArtifact as its `check`."""
    prompt.check()
    name = TENSOR_NAME if isinstance(prompt, SoftPrompt) else PREFIX_TENSOR_NAME
    return write_tensors({name: prompt}, metadata)


def decode(data: bytes) -> tuple[SoftPrompt | Prefix, dict[str, str]]:
    """Reads a safetensors file that holds one soft prompt or one prefix, and its metadata.

    Raises InvalidArtifact for whatever else the bytes are: cut, damaged, too large, another dtype or shape, more
    tensors, NaN, a pickle. Bounds are checked before anything of that size is allocated.
    """
    names, metadata = read_names(data, _REMEDY)
    if names not in ({TENSOR_NAME}, {PREFIX_TENSOR_NAME}):
        found = ", ".join(sorted(repr(name[:80]) for name in names)[:5]) or "none"
        raise InvalidArtifact(
            f"the file must hold exactly one tensor, 'soft_prompt' or 'prefix', but holds {found}; {_REMEDY}"
        )
    ((name, tensor),) = read_tensors(data, _REMEDY).items()
    kind = SoftPrompt if name == TENSOR_NAME else Prefix
    prompt = kind(tensor.dtype, tensor.shape, tensor.data)  # type: ignore[arg-type]  # `check` judges the shape
    prompt.check()
    return prompt, metadata
