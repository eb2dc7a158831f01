"""A SoftPrompt: the learned tensor as dtype, shape and bytes, its digest, its checks and its file format.

The file format is safetensors with exactly one tensor, `soft_prompt` [P, H]. Only dtype, shape and bytes are handled
here, because numpy knows no bfloat16 and this package knows no torch. Nothing is ever unpickled.
"""

import hashlib
import json
import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError, deserialize

from prompt_store.canonical import canonical_json
from prompt_store.errors import InvalidArtifact

TENSOR_NAME = "soft_prompt"
MAX_FILE_BYTES = 64 * 2**20
MAX_HEADER_BYTES = 2**18
ITEM_BYTES: dict[str, int] = {"F32": 4, "BF16": 2, "F16": 2}

METADATA_TASK = "softcue.task"
METADATA_BASE_FINGERPRINT = "softcue.base_fingerprint"
METADATA_PROVENANCE = "softcue.provenance"  # JSON of version.Provenance
METADATA_NOTES = "softcue.notes"

# The exponent bits of each dtype: a value is NaN or infinite exactly when all of them are set.
_EXPONENT: dict[str, tuple[str, int]] = {"F32": ("<u4", 0x7F800000), "BF16": ("<u2", 0x7F80), "F16": ("<u2", 0x7C00)}
_ALIGNMENT = 8
_REMEDY = "save the prompt as safetensors with one tensor named 'soft_prompt' of shape [P, H]"


@dataclass(frozen=True)
class SoftPrompt:
    """A soft prompt [P, H]: `data` are its values row by row, little-endian, in `dtype` (F32, BF16 or F16)."""

    dtype: str
    shape: tuple[int, int]
    data: bytes

    @property
    def length(self) -> int:
        """P, the number of virtual tokens."""
        return self.shape[0]

    @property
    def hidden_size(self) -> int:
        """H, the width of the base model."""
        return self.shape[1]

    @property
    def size_bytes(self) -> int:
        return len(self.data)

    @cached_property
    def digest(self) -> str:
        return tensor_digest(self.dtype, self.shape, self.data)

    def check(self) -> None:
        """Raises InvalidArtifact for an unknown dtype, a wrong shape or size, or a value that is NaN or infinite."""
        if self.dtype not in ITEM_BYTES:
            raise InvalidArtifact(f"soft prompt has dtype {self.dtype!r}; convert it to F32, BF16 or F16")
        if len(self.shape) != 2 or any(type(size) is not int or size < 1 for size in self.shape):
            raise InvalidArtifact(f"soft prompt has shape {list(self.shape)}; it must be [P, H], each at least 1")
        expected = math.prod(self.shape) * ITEM_BYTES[self.dtype]
        if len(self.data) != expected:
            raise InvalidArtifact(
                f"soft prompt {list(self.shape)} in {self.dtype} needs {expected} bytes but has {len(self.data)}; "
                "it was cut or mislabelled, save it again"
            )
        if expected > MAX_FILE_BYTES:
            raise InvalidArtifact(
                f"soft prompt is {expected} bytes, more than the limit of {MAX_FILE_BYTES}; use fewer virtual tokens"
            )
        row = first_non_finite_row(self)
        if row is not None:
            raise InvalidArtifact(
                f"soft prompt has NaN or infinite values, first in row {row}; train it again with a lower learning rate"
            )

    def to_float32(self) -> npt.NDArray[np.float32]:
        """The values as float32 [P, H], exact for every dtype."""
        if self.dtype == "BF16":
            bits = np.frombuffer(self.data, dtype="<u2").astype(np.uint32) << np.uint32(16)
            values = bits.view(np.float32)
        else:
            values = np.frombuffer(self.data, dtype="<f4" if self.dtype == "F32" else "<f2").astype(np.float32)
        return values.reshape(self.shape)

    @classmethod
    def from_float32(cls, values: npt.ArrayLike) -> "SoftPrompt":
        """A float32 soft prompt from anything that numpy takes for a [P, H] array. Raises InvalidArtifact."""
        array = np.ascontiguousarray(values, dtype="<f4")
        if array.ndim != 2:
            raise InvalidArtifact(f"soft prompt has shape {list(array.shape)}; it must be [P, H]")
        return cls("F32", (array.shape[0], array.shape[1]), array.tobytes())


def tensor_digest(dtype: str, shape: tuple[int, ...], data: bytes) -> str:
    """SHA-256 over the canonical JSON of {dtype, shape}, directly followed by the raw bytes.

    The header ends in a brace and has a fixed form, so no two tensors share an input to the hash.
    """
    digest = hashlib.sha256(canonical_json({"dtype": dtype, "shape": list(shape)}))
    digest.update(data)
    return digest.hexdigest()


def first_non_finite_row(prompt: SoftPrompt) -> int | None:
    """The first row of [P, H] with a NaN or infinity, judged on the bits; None when all values are finite."""
    integer, exponent = _EXPONENT[prompt.dtype]
    bits = np.frombuffer(prompt.data, dtype=integer).reshape(prompt.shape)
    rows = np.flatnonzero(((bits & exponent) == exponent).any(axis=1))
    return int(rows[0]) if rows.size else None


def encode(prompt: SoftPrompt, metadata: Mapping[str, str] | None = None) -> bytes:
    """The prompt as a safetensors file; equal arguments give equal bytes.

    The header is written here because the library spells metadata in random order, which would make every artefact
    committed to a repository differ each time it is made. Raises InvalidArtifact as `SoftPrompt.check`.
    """
    prompt.check()
    header: dict[str, Any] = {
        TENSOR_NAME: {"dtype": prompt.dtype, "shape": list(prompt.shape), "data_offsets": [0, len(prompt.data)]}
    }
    if metadata:
        if not all(isinstance(key, str) and isinstance(value, str) for key, value in metadata.items()):
            raise InvalidArtifact("safetensors metadata holds only text; encode other values as JSON text")
        header["__metadata__"] = dict(metadata)
    try:
        text = canonical_json(header)
    except ValueError as error:
        raise InvalidArtifact(f"the metadata cannot be written: {error}; use plain text") from error
    text += b" " * (-len(text) % _ALIGNMENT)
    if len(text) > MAX_HEADER_BYTES:
        raise InvalidArtifact(f"the metadata takes {len(text)} bytes, more than {MAX_HEADER_BYTES}; shorten it")
    return struct.pack("<Q", len(text)) + text + prompt.data


def decode(data: bytes) -> tuple[SoftPrompt, dict[str, str]]:
    """Reads a safetensors file that holds one soft prompt, and its metadata.

    Raises InvalidArtifact for whatever else the bytes are: cut, damaged, too large, another dtype or shape, more
    tensors, NaN, a pickle. Bounds are checked before anything of that size is allocated.
    """
    if len(data) > MAX_FILE_BYTES + MAX_HEADER_BYTES:
        raise InvalidArtifact(f"the file is {len(data)} bytes, more than the limit of {MAX_FILE_BYTES}; {_REMEDY}")
    header = _read_header(data)
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise InvalidArtifact(f"the file's metadata is not a table of text; {_REMEDY}")
    if set(header) != {TENSOR_NAME}:
        found = ", ".join(sorted(repr(name[:80]) for name in header)[:5]) or "none"
        raise InvalidArtifact(f"the file must hold exactly one tensor, 'soft_prompt', but holds {found}; {_REMEDY}")
    try:
        # The library checks offsets, sizes and dtypes against the bytes, strictly.
        ((_, tensor),) = deserialize(data)  # type: ignore[no-untyped-call]
        dtype, shape, values = str(tensor["dtype"]), tuple(tensor["shape"]), bytes(tensor["data"])
    except (SafetensorError, ValueError, TypeError, KeyError, OverflowError) as error:
        raise InvalidArtifact(f"the file is not whole safetensors: {error}; {_REMEDY}") from error
    prompt = SoftPrompt(dtype, shape, values)
    prompt.check()
    return prompt, dict(metadata)


def _read_header(data: bytes) -> dict[str, Any]:
    if len(data) < 8:
        raise InvalidArtifact(f"the file has {len(data)} bytes, too few for safetensors; {_REMEDY}")
    (size,) = struct.unpack_from("<Q", data)
    if not data[8:9] == b"{":
        raise InvalidArtifact(f"the file is {_guess_format(data)}, not safetensors; {_REMEDY}")
    if size > MAX_HEADER_BYTES:
        raise InvalidArtifact(f"the file's header claims {size} bytes, more than {MAX_HEADER_BYTES}; {_REMEDY}")
    if size > len(data) - 8:
        raise InvalidArtifact(f"the file is cut: its header claims {size} bytes of {len(data) - 8}; {_REMEDY}")
    try:
        header = json.loads(data[8 : 8 + size].decode("utf-8"), object_pairs_hook=_without_repeats)
    except (ValueError, RecursionError) as error:
        raise InvalidArtifact(f"the file's header is not JSON ({type(error).__name__}); {_REMEDY}") from error
    if not isinstance(header, dict):
        raise InvalidArtifact(f"the file's header is not a JSON object; {_REMEDY}")
    return header


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) < len(pairs):
        raise ValueError("a key appears twice")
    return result


def _guess_format(data: bytes) -> str:
    if data[:1] == b"\x80" and data[1:2] in (b"\x02", b"\x03", b"\x04", b"\x05"):
        return "a Python pickle (which could run code and is never opened)"
    if data[:4] == b"PK\x03\x04":
        return "a zip archive, as torch.save writes (it holds a pickle and is never opened)"
    if data[:6] == b"\x93NUMPY":
        return "a numpy file"
    return "of an unknown kind"
