from __future__ import annotations

import io
import struct
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from prompt_store.errors import InvalidArtifact
from prompt_store.interchange.npy import read_npy, write_npy
from prompt_store.prompts.prefix import Prefix
from prompt_store.prompts.soft_prompt import SoftPrompt
from tests.prompt_store.building import prompt

VALUES = np.random.default_rng(3).standard_normal((3, 5)).astype(np.float32)


def file_of(array: npt.NDArray[Any], **options: Any) -> bytes:
    file = io.BytesIO()
    np.save(file, array, **options)
    return file.getvalue()


def header_of(text: str, version: bytes = b"\1\0", values: bytes = b"") -> bytes:
    return (
        b"\x93NUMPY" + version + struct.pack("<H" if version == b"\1\0" else "<I", len(text)) + text.encode() + values
    )


@pytest.mark.parametrize(
    "array",
    [VALUES, VALUES[None], np.asfortranarray(VALUES), np.asfortranarray(VALUES[None]), VALUES.astype(">f4")],
    ids=["[P, H]", "[1, P, H]", "columns first", "[1, P, H] columns first", "big-endian"],
)
def test_an_array_is_read_exactly_however_it_lies(array: npt.NDArray[Any]) -> None:
    imported = read_npy(file_of(array), "prompt.npy")
    assert imported.prompt == SoftPrompt.from_float32(VALUES)
    assert (imported.format, imported.note, imported.base_name) == ("numpy", "", None)


def test_half_precision_stays_and_double_precision_is_rounded_and_said_so() -> None:
    half = read_npy(file_of(VALUES.astype(">f2")), "x")
    assert (half.prompt.dtype, half.note) == ("F16", "")
    np.testing.assert_array_equal(half.prompt.to_float32(), VALUES.astype(np.float16).astype(np.float32))
    double = VALUES.astype(np.float64) * (1.0 + 2.0**-40)
    imported = read_npy(file_of(double), "x")
    assert (imported.prompt.dtype, imported.note) == ("F32", "rounded from float64 to float32")
    np.testing.assert_array_equal(imported.prompt.to_float32(), double.astype(np.float32))


def test_what_is_written_numpy_reads_and_so_do_we(tmp_path: Path) -> None:
    path = tmp_path / "prompt.npy"
    half = SoftPrompt("F16", (3, 5), VALUES.astype("<f2").tobytes())
    for original in (prompt(1), half):
        write_npy(path, original)
        np.testing.assert_array_equal(np.load(path).astype(np.float32), original.to_float32())
        assert read_npy(path.read_bytes(), "x").prompt == original
    narrow = SoftPrompt("BF16", (1, 2), bytes.fromhex("803f40c0"))
    write_npy(path, narrow)
    np.testing.assert_array_equal(np.load(path), np.array([[1.0, -3.0]], np.float32))
    assert [file.name for file in tmp_path.iterdir()] == ["prompt.npy"]


def test_a_prefix_is_not_written(tmp_path: Path) -> None:
    with pytest.raises(InvalidArtifact, match="not a prefix"):
        write_npy(tmp_path / "prompt.npy", Prefix("F32", (1, 2, 1, 1, 1), bytes(8)))
    assert not list(tmp_path.iterdir())


PLAIN = "{'descr': '<f4', 'fortran_order': False, 'shape': (3, 5), }"


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (file_of(np.array([{"a": 1}, None], dtype=object), allow_pickle=True), "Python objects"),
        (file_of(VALUES.astype(np.int32)), "holds '<i4', not floats"),
        (file_of(VALUES.astype(np.complex64)), "holds '<c8', not floats"),
        (file_of(VALUES.astype(np.longdouble)), "not floats"),
        (file_of(np.zeros(3, dtype=[("a", "<f4")])), "not one of a plain array"),
        (file_of(VALUES[0]), r"shape \[5\], not \[P, H\]"),
        (file_of(VALUES[:, None]), r"shape \[3, 1, 5\]"),
        (file_of(np.zeros((0, 5), np.float32)), r"shape \[0, 5\]"),
        (file_of(np.float32(1.0)), "gives no shape"),
        (file_of(VALUES)[:-1], "has 59 bytes of values where 60 belong"),
        (file_of(VALUES) + b"\0", "has 61 bytes of values where 60 belong"),
        (file_of(np.full_like(VALUES, np.inf)), "NaN or infinite values"),
        (file_of(np.full((2, 2), 1e300)), "NaN or infinite values"),
        (header_of(PLAIN.replace("3, 5", f"{2**63}, {2**63}")), "bytes of values where"),
        (header_of(PLAIN.replace("(3, 5)", "(__import__('os').getpid(), 5)"), values=bytes(60)), "plain array"),
        (header_of(PLAIN.replace("<f4", "=f4"), values=bytes(60)), "holds '=f4'"),
        (header_of(PLAIN.replace("<f4", "<V2"), values=bytes(30)), "holds '<V2'"),
        (header_of("(" * 4000), "plain array"),
        (header_of(PLAIN + " " * 5000), "header claims"),
        (header_of(PLAIN, version=b"\3\0"), "version 1 or 2"),
        (b"\x93NUMPY\2\0\xff\xff\xff\xff", "header claims 4294967295 bytes"),
        (b"\x93NUMPY\1\0\x10", "cut in its header"),
        (b"\x93NUMPY\1\0\x10\0{'descr'", "plain array"),
    ],
)
def test_other_arrays_are_refused_with_the_reason(data: bytes, reason: str) -> None:
    with pytest.raises(InvalidArtifact, match=f"^prompt.npy: .*{reason}"):
        read_npy(data, "prompt.npy")


def test_a_header_of_version_2_is_read() -> None:
    assert read_npy(header_of(PLAIN, b"\2\0", VALUES.tobytes()), "x").prompt == SoftPrompt.from_float32(VALUES)
