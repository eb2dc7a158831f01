"""A tensor as dtype, shape and bytes, and safetensors files read and written within bounds.

Only dtype, shape and bytes are handled here, because numpy knows no bfloat16 and this package knows no torch. What the
axes mean is `soft_prompt`'s and `prefix`'s subject. Nothing is ever unpickled.
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

MAX_FILE_BYTES = 256 * 2**20  # of tensors in one file; a kind of prompt may allow itself less
MAX_HEADER_BYTES = 2**18
ITEM_BYTES: dict[str, int] = {"F32": 4, "BF16": 2, "F16": 2}

# The exponent bits of each dtype: a value is NaN or infinite exactly when all of them are set.
_EXPONENT: dict[str, tuple[str, int]] = {"F32": ("<u4", 0x7F800000), "BF16": ("<u2", 0x7F80), "F16": ("<u2", 0x7C00)}
_ALIGNMENT = 8


@dataclass(frozen=True)
class Tensor:
    """`data` are the values in row-major order, little-endian, in `dtype` (F32, BF16 or F16)."""

    dtype: str
    shape: tuple[int, ...]
    data: bytes

    @property
    def size_bytes(self) -> int:
        return len(self.data)

    @cached_property
    def digest(self) -> str:
        return tensor_digest(self.dtype, self.shape, self.data)

    def bits(self) -> npt.NDArray[np.unsignedinteger[Any]]:
        """The values as unsigned integers of their width, in the tensor's shape; a view, nothing is copied."""
        return np.frombuffer(self.data, dtype=_EXPONENT[self.dtype][0]).reshape(self.shape)

    def to_float32(self) -> npt.NDArray[np.float32]:
        """The values as float32 in the tensor's shape, exact for every dtype."""
        if self.dtype == "BF16":
            return widened(self.bits())
        values = np.frombuffer(self.data, dtype="<f4" if self.dtype == "F32" else "<f2")
        return values.astype(np.float32).reshape(self.shape)


def widened(bits: npt.NDArray[np.unsignedinteger[Any]]) -> npt.NDArray[np.float32]:
    """BF16's bits as float32, in their shape."""
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)


def tensor_digest(dtype: str, shape: tuple[int, ...], data: bytes | memoryview) -> str:
    """SHA-256 over the canonical JSON of {dtype, shape}, directly followed by the raw bytes.

    The header ends in a brace and has a fixed form, so no two tensors share an input to the hash.
    """
    digest = hashlib.sha256(canonical_json({"dtype": dtype, "shape": list(shape)}))
    digest.update(data)
    return digest.hexdigest()


def check_tensor(tensor: Tensor, what: str, axes: str, first_axis: str, limit_bytes: int) -> None:
    """Raises InvalidArtifact for an unknown dtype, a wrong shape or size, or a value that is NaN or infinite.

    `what` the tensor is called in the message, `axes` are their letters ("P, H"), a number for an axis of fixed size,
    and `first_axis` is one entry of the first.
    """
    if tensor.dtype not in ITEM_BYTES:
        raise InvalidArtifact(f"{what} has dtype {tensor.dtype!r}; convert it to F32, BF16 or F16")
    names = axes.split(", ")
    if len(tensor.shape) != len(names) or not all(map(_fits, tensor.shape, names)):
        raise InvalidArtifact(f"{what} has shape {list(tensor.shape)}; it must be [{axes}], each at least 1")
    expected = math.prod(tensor.shape) * ITEM_BYTES[tensor.dtype]
    if len(tensor.data) != expected:
        raise InvalidArtifact(
            f"{what} {list(tensor.shape)} in {tensor.dtype} needs {expected} bytes but has {len(tensor.data)}; "
            "it was cut or mislabelled, save it again"
        )
    if expected > limit_bytes:
        raise InvalidArtifact(
            f"{what} is {expected} bytes, more than the limit of {limit_bytes}; use fewer virtual tokens"
        )
    position = _first_non_finite(tensor)
    if position is not None:
        raise InvalidArtifact(
            f"{what} has NaN or infinite values, first in {first_axis} {position}; train it again with a lower "
            "learning rate"
        )


def _fits(size: object, axis: str) -> bool:
    return type(size) is int and (size == int(axis) if axis.isdigit() else size >= 1)


def _first_non_finite(tensor: Tensor) -> int | None:
    """The first position on the first axis with a NaN or infinity, judged on the bits; None when all are finite."""
    exponent = _EXPONENT[tensor.dtype][1]
    wrong = ((tensor.bits() & exponent) == exponent).reshape(tensor.shape[0], -1).any(axis=1)
    return int(wrong.argmax()) if wrong.any() else None


def write_tensors(tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> bytes:
    """A safetensors file; equal arguments give equal bytes, in the order of names.

    The header is written here because the library spells metadata in random order, which would make every artefact
    committed to a repository differ each time it is made. Raises InvalidArtifact for metadata that is not text or
    takes more than MAX_HEADER_BYTES.
    """
    header: dict[str, Any] = {}
    end = 0
    for name, tensor in sorted(tensors.items()):
        start, end = end, end + tensor.size_bytes
        header[name] = {"dtype": tensor.dtype, "shape": list(tensor.shape), "data_offsets": [start, end]}
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
    return b"".join((struct.pack("<Q", len(text)), text, *(tensor.data for _, tensor in sorted(tensors.items()))))


def read_names(data: bytes, remedy: str) -> tuple[frozenset[str], dict[str, str]]:
    """The names of a safetensors file's tensors, and its metadata; no tensor is touched.

    Raises InvalidArtifact for whatever else the bytes are: cut, damaged, too large, a pickle. Bounds are checked before
    anything of that size is allocated. `remedy` ends the messages.
    """
    if len(data) > MAX_FILE_BYTES + MAX_HEADER_BYTES:
        raise InvalidArtifact(f"the file is {len(data)} bytes, more than the limit of {MAX_FILE_BYTES}; {remedy}")
    header = _read_header(data, remedy)
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise InvalidArtifact(f"the file's metadata is not a table of text; {remedy}")
    return frozenset(header), metadata


def read_tensors(data: bytes, remedy: str) -> dict[str, Tensor]:
    """The tensors by name, of a file that `read_names` has taken; nobody has judged dtypes. Raises InvalidArtifact."""
    try:
        # The library checks offsets, sizes and dtypes against the bytes, strictly.
        found = deserialize(data)  # type: ignore[no-untyped-call]
        return {
            str(name): Tensor(str(entry["dtype"]), tuple(entry["shape"]), bytes(entry["data"])) for name, entry in found
        }
    except (SafetensorError, ValueError, TypeError, KeyError, OverflowError) as error:
        raise InvalidArtifact(f"the file is not whole safetensors: {error}; {remedy}") from error


def _read_header(data: bytes, remedy: str) -> dict[str, Any]:
    if len(data) < 8:
        raise InvalidArtifact(f"the file has {len(data)} bytes, too few for safetensors; {remedy}")
    (size,) = struct.unpack_from("<Q", data)
    if not data[8:9] == b"{":
        raise InvalidArtifact(f"the file is {guess_format(data)}, not safetensors; {remedy}")
    if size > MAX_HEADER_BYTES:
        raise InvalidArtifact(f"the file's header claims {size} bytes, more than {MAX_HEADER_BYTES}; {remedy}")
    if size > len(data) - 8:
        raise InvalidArtifact(f"the file is cut: its header claims {size} bytes of {len(data) - 8}; {remedy}")
    try:
        header = json.loads(data[8 : 8 + size].decode("utf-8"), object_pairs_hook=without_repeats)
    except (ValueError, RecursionError) as error:
        raise InvalidArtifact(f"the file's header is not JSON ({type(error).__name__}); {remedy}") from error
    if not isinstance(header, dict):
        raise InvalidArtifact(f"the file's header is not a JSON object; {remedy}")
    return header


def without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """For `json.loads`: an object whose keys appear once. Raises ValueError."""
    result = dict(pairs)
    if len(result) < len(pairs):
        raise ValueError("a key appears twice")
    return result


def guess_format(data: bytes) -> str:
    """What a file that begins with `data` seems to be, as a phrase; it is not opened to find out."""
    if data[:1] == b"\x80" and data[1:2] in (b"\x02", b"\x03", b"\x04", b"\x05"):
        return "a Python pickle (which could run code and is never opened)"
    if data[:4] == b"PK\x03\x04":
        return "a zip archive, as torch.save writes (it holds a pickle and is never opened)"
    if data[:6] == b"\x93NUMPY":
        return "a numpy file"
    if data[:2] == b"\x1f\x8b" or data[257:262] == b"ustar":
        return "a tar or gzip archive"
    return "of an unknown kind"
