"""Where tensors lie in safetensors files of any size: their headers alone are read."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from service.engines.errors import BaseModelError

_HEADER_LIMIT_BYTES = 100_000_000


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A tensor's row-major values: the bytes from `begin` up to `end` of its file, whole."""

    file: Path
    name: str
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


def stored_tensors(file: Path) -> list[StoredTensor]:
    """The tensors of a safetensors file, in the order of its header. Raises BaseModelError for a file that is none."""
    size_bytes = file.stat().st_size
    if size_bytes < 8:
        raise BaseModelError(f"{file} is truncated; fetch the base model again")
    with file.open("rb") as handle:
        header_bytes = int.from_bytes(handle.read(8), "little")
        if header_bytes > min(_HEADER_LIMIT_BYTES, size_bytes - 8):
            raise BaseModelError(f"{file} is not a safetensors file; fetch the base model again")
        try:
            header = json.loads(handle.read(header_bytes))
        except ValueError as error:
            raise BaseModelError(f"{file} has a damaged header; fetch the base model again") from error
    header.pop("__metadata__", None)
    start = 8 + header_bytes
    found = []
    for name, entry in header.items():
        begin, end = entry["data_offsets"]
        if start + end > size_bytes:
            raise BaseModelError(f"{file} is truncated at '{name}'; fetch the base model again")
        found.append(StoredTensor(file, name, entry["dtype"], tuple(entry["shape"]), start + begin, start + end))
    return found
