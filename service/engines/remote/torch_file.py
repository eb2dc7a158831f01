"""The file that `torch.save` writes of one tensor, written without torch. It is only ever written, never read.

vLLM takes embeddings in this form alone. Its zip holds, stored as they are: the tensor's values, and a pickle that says
how to make the tensor of them. That pickle is put together here opcode by opcode, in the words of `torch.save` (torch
2.13, format version 3), which `torch.load` accepts with `weights_only=True`.
"""

from __future__ import annotations

import io
import struct
import zipfile
from collections.abc import Sequence

_STORAGES = {"F32": "FloatStorage", "F16": "HalfStorage", "BF16": "BFloat16Storage"}
ITEM_BYTES = {"F32": 4, "F16": 2, "BF16": 2}
_LONGEST = 2**31 - 1  # of a pickled integer of 4 bytes


def torch_file(dtype: str, shape: tuple[int, int], parts: Sequence[bytes]) -> bytes:
    """A tensor of `shape` in `dtype` (F32, F16 or BF16), whose values are `parts` one after the other, row by row.

    Values are little-endian. Raises ValueError where they do not fill the shape.
    """
    rows, columns = shape
    count = rows * columns
    if sum(map(len, parts)) != count * ITEM_BYTES[dtype] or count > _LONGEST:
        raise ValueError(f"{sum(map(len, parts))} bytes are no tensor {list(shape)} in {dtype}")
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
        archive.writestr(_entry("data.pkl"), _recipe(_STORAGES[dtype], rows, columns))
        archive.writestr(_entry("byteorder"), "little")
        with archive.open(_entry("data/0"), "w") as values:
            for part in parts:
                values.write(part)
        archive.writestr(_entry("version"), "3\n")
    return file.getvalue()


def _entry(name: str) -> zipfile.ZipInfo:
    """A file in the archive, of a time that makes equal tensors equal files."""
    return zipfile.ZipInfo(f"archive/{name}")


def _recipe(storage: str, rows: int, columns: int) -> bytes:
    """`_rebuild_tensor_v2(storage "0" on the CPU, offset 0, (rows, columns), strides, False, OrderedDict())`."""
    return b"".join(
        (
            b"\x80\x02",  # PROTO 2
            _global("torch._utils", "_rebuild_tensor_v2"),
            b"((",  # MARK, MARK: the function's arguments, and first of them what names the storage
            _text("storage"),
            _global("torch", storage),
            _text("0"),
            _text("cpu"),
            _integer(rows * columns),
            b"tQ",  # TUPLE, BINPERSID: the storage of that name
            _integer(0),
            _integer(rows) + _integer(columns) + b"\x86",  # TUPLE2: the shape
            _integer(columns) + _integer(1) + b"\x86",  # TUPLE2: the strides
            b"\x89",  # NEWFALSE: it needs no gradient
            _global("collections", "OrderedDict") + b")R",  # EMPTY_TUPLE, REDUCE: no hooks
            b"tR.",  # TUPLE, REDUCE, STOP
        )
    )


def _global(module: str, name: str) -> bytes:
    return f"c{module}\n{name}\n".encode("ascii")


def _text(text: str) -> bytes:
    return b"X" + struct.pack("<I", len(text)) + text.encode("ascii")


def _integer(value: int) -> bytes:
    return b"J" + struct.pack("<i", value)
