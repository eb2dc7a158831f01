"""Soft prompts as numpy files, as Google's prompt-tuning saves them: one array [P, H] or [1, P, H].

The header is read by a pattern of its own and not by numpy, whose reader evaluates it as a Python literal. Arrays of
objects, which are pickles, are refused unopened.
"""

import io
import math
import re
import struct
from pathlib import Path

import numpy as np

from prompt_store.errors import InvalidArtifact
from prompt_store.files import write_whole
from prompt_store.interchange.imported import Imported
from prompt_store.prompts.prefix import Prefix
from prompt_store.prompts.soft_prompt import SoftPrompt
from prompt_store.prompts.tensor_file import MAX_FILE_BYTES

MAGIC = b"\x93NUMPY"
MAX_HEADER_BYTES = 2**12

_REMEDY = "save the array with numpy.save as float32 [P, H]"
_HEADER = re.compile(
    r"\{\s*'descr':\s*'([^']{1,16})',\s*'fortran_order':\s*(True|False),\s*'shape':\s*\(([0-9, ]{0,64})\),?\s*\}\s*"
)
_DTYPES = {"f2": "F16", "f4": "F32", "f8": "F32"}


def read_npy(data: bytes, source: str) -> Imported:
    """The soft prompt of a numpy file, F16 as F16 and the rest as F32; float64 is rounded to float32 and said so.

    Raises InvalidArtifact, naming `source`, for every other dtype or shape and for files that are cut or too long.
    """
    descr, fortran_order, shape, values = _split(data, source)
    order, kind = descr[0], descr[1:]
    if kind not in _DTYPES or order not in "<>":
        what = "Python objects (a pickle, which could run code and is never opened)" if "O" in descr else repr(descr)
        raise InvalidArtifact(f"{source}: holds {what}, not floats; {_REMEDY}")
    if len(shape) == 3 and shape[0] == 1:
        shape = shape[1:]
    if len(shape) != 2 or min(shape) < 1:
        raise InvalidArtifact(f"{source}: holds an array of shape {list(shape)}, not [P, H]; {_REMEDY}")
    expected = math.prod(shape) * int(kind[1])
    if len(values) != expected:
        raise InvalidArtifact(f"{source}: has {len(values)} bytes of values where {expected} belong; {_REMEDY}")
    array = np.frombuffer(values, dtype=order + kind).reshape(shape, order="F" if fortran_order else "C")
    dtype = _DTYPES[kind]
    with np.errstate(over="ignore"):  # what no float32 holds becomes infinite, and that is refused below
        data = array.astype("<f2" if dtype == "F16" else "<f4").tobytes()
    prompt = SoftPrompt(dtype, (shape[0], shape[1]), data)
    try:
        prompt.check()
    except InvalidArtifact as error:
        raise InvalidArtifact(f"{source}: {error}") from error
    return Imported(prompt, "numpy", note="rounded from float64 to float32" if kind == "f8" else "")


def write_npy(path: Path, prompt: SoftPrompt | Prefix) -> None:
    """A numpy file [P, H]: float16 for F16, else float32, to which BF16 widens exactly. Raises InvalidArtifact."""
    if isinstance(prompt, Prefix):
        raise InvalidArtifact(f"{path}: a numpy file holds a soft prompt, not a prefix; export it as peft")
    prompt.check()
    file = io.BytesIO()
    np.save(file, prompt.to_float32().astype("<f2" if prompt.dtype == "F16" else "<f4"), allow_pickle=False)
    write_whole(path, file.getvalue())


def _split(data: bytes, source: str) -> tuple[str, bool, tuple[int, ...], bytes]:
    """Dtype, whether columns come first, shape and the values' bytes, as the header tells them."""
    if len(data) > MAX_FILE_BYTES:
        raise InvalidArtifact(f"{source}: is {len(data)} bytes, more than the limit of {MAX_FILE_BYTES}; {_REMEDY}")
    version = data[len(MAGIC) : len(MAGIC) + 2]
    if not data.startswith(MAGIC) or version not in (b"\1\0", b"\2\0"):
        raise InvalidArtifact(f"{source}: is no numpy file of version 1 or 2; {_REMEDY}")
    form = "<H" if version == b"\1\0" else "<I"
    start = len(MAGIC) + 2 + struct.calcsize(form)
    if len(data) < start:
        raise InvalidArtifact(f"{source}: is cut in its header; {_REMEDY}")
    (size,) = struct.unpack_from(form, data, len(MAGIC) + 2)
    if size > MAX_HEADER_BYTES:
        raise InvalidArtifact(f"{source}: its header claims {size} bytes, more than {MAX_HEADER_BYTES}; {_REMEDY}")
    match = _HEADER.fullmatch(data[start : start + size].decode("latin-1"))
    if match is None:
        raise InvalidArtifact(f"{source}: its header is not one of a plain array; {_REMEDY}")
    descr, fortran_order, sizes = match.groups()
    try:
        shape = tuple(int(size) for size in sizes.removesuffix(",").split(","))
    except ValueError as error:
        raise InvalidArtifact(f"{source}: its header gives no shape; {_REMEDY}") from error
    return descr, fortran_order == "True", shape, data[start + size :]
