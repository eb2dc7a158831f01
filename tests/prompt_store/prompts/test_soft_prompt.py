import io
import json
import pickle
import struct
import zipfile
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load, save

from prompt_store.errors import InvalidArtifact
from prompt_store.prompts.soft_prompt import (
    ITEM_BYTES,
    MAX_FILE_BYTES,
    MAX_HEADER_BYTES,
    SoftPrompt,
    decode,
    encode,
    tensor_digest,
)
from tests.prompt_store.building import prompt

NON_FINITE_BITS = {
    "F32": (0x7F800000, 0xFF800000, 0x7FC00001),
    "BF16": (0x7F80, 0xFF80, 0x7FC1),
    "F16": (0x7C00, 0xFC00, 0x7E01),
}
LARGEST_BITS = {"F32": 0x7F7FFFFF, "BF16": 0x7F7F, "F16": 0x7BFF}
INTEGER = {"F32": "<u4", "BF16": "<u2", "F16": "<u2"}


def from_bits(dtype: str, rows: list[list[int]]) -> SoftPrompt:
    bits = np.array(rows, dtype=INTEGER[dtype])
    return SoftPrompt(dtype, (bits.shape[0], bits.shape[1]), bits.tobytes())


def file_of(header: Any, data: bytes) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def entry(dtype: str = "F32", shape: tuple[int, ...] = (1, 2), end: int = 8) -> dict[str, Any]:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [0, end]}


@given(
    st.sampled_from(sorted(ITEM_BYTES)),
    st.integers(1, 5),
    st.integers(1, 5),
    st.integers(0, 2**32),
    st.dictionaries(
        st.text(max_size=8).filter(lambda key: key.isprintable()), st.text('aä"\\\n', max_size=8), max_size=4
    ),
)
def test_encode_and_decode_are_inverse(
    dtype: str, length: int, width: int, seed: int, metadata: dict[str, str]
) -> None:
    bits = np.random.default_rng(seed).integers(0, LARGEST_BITS[dtype], (length, width), dtype=np.int64)
    original = from_bits(dtype, bits.tolist())
    data = encode(original, metadata)
    copy, read = decode(data)
    assert copy == original
    assert copy.digest == original.digest
    assert read == metadata
    assert encode(copy, dict(reversed(read.items()))) == data


@settings(max_examples=300)
@given(st.binary(max_size=200))
def test_random_bytes_are_refused_and_never_crash(data: bytes) -> None:
    with pytest.raises(InvalidArtifact):
        decode(data)


@settings(max_examples=300)
@given(st.data())
def test_a_damaged_file_decodes_to_a_checked_prompt_or_is_refused(data: st.DataObject) -> None:
    damaged = bytearray(encode(prompt(1, 2, 3), {"softcue.task": "x"}))
    for _ in range(data.draw(st.integers(1, 4))):
        damaged[data.draw(st.integers(0, len(damaged) - 1))] = data.draw(st.integers(0, 255))
    try:
        read, _ = decode(bytes(damaged[: data.draw(st.integers(0, len(damaged)))]))
    except InvalidArtifact:
        return
    read.check()


def test_every_truncation_is_refused() -> None:
    whole = encode(prompt(1, 2, 3), {"a": "b"})
    for size in range(len(whole)):
        with pytest.raises(InvalidArtifact):
            decode(whole[:size])
    with pytest.raises(InvalidArtifact, match="not whole safetensors"):
        decode(whole + b"\0")


def test_the_safetensors_library_reads_what_is_written() -> None:
    original = prompt(1, 3, 5)
    values = load(encode(original, {"b": "1", "a": "2"}))["soft_prompt"]
    np.testing.assert_array_equal(values, original.to_float32())


def test_what_the_safetensors_library_writes_is_read() -> None:
    values = np.arange(6, dtype=np.float16).reshape(2, 3)
    read, metadata = decode(save({"soft_prompt": values}, {"a": "b"}))
    assert (read.dtype, read.shape, metadata) == ("F16", (2, 3), {"a": "b"})
    np.testing.assert_array_equal(read.to_float32(), values.astype(np.float32))


def test_bfloat16_widens_exactly() -> None:
    np.testing.assert_array_equal(from_bits("BF16", [[0x3F80, 0xC040, 0x0000]]).to_float32(), [[1.0, -3.0, 0.0]])


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (file_of({"soft_prompt": entry(), "more": entry()}, bytes(8)), "exactly one tensor"),
        (file_of({"weights": entry()}, bytes(8)), "holds 'weights'"),
        (file_of({}, b""), "holds none"),
        (file_of({"soft_prompt": entry("F64", (1, 1))}, bytes(8)), "dtype 'F64'"),
        (file_of({"soft_prompt": entry("I32")}, bytes(8)), "dtype 'I32'"),
        (file_of({"soft_prompt": entry(shape=(2,))}, bytes(8)), r"shape \[2\]"),
        (file_of({"soft_prompt": entry(shape=(1, 1, 2))}, bytes(8)), r"shape \[1, 1, 2\]"),
        (file_of({"soft_prompt": entry(shape=(0, 2), end=0)}, b""), r"shape \[0, 2\]"),
        (file_of({"soft_prompt": entry(shape=(2, 2))}, bytes(8)), "not whole safetensors"),
        (file_of({"soft_prompt": entry(shape=(2**40, 2**40))}, bytes(8)), "not whole safetensors"),
        (file_of({"soft_prompt": entry()}, bytes(7)), "not whole safetensors"),
        (file_of({"soft_prompt": entry(), "__metadata__": {"a": 1}}, bytes(8)), "not a table of text"),
        (file_of({"soft_prompt": entry(), "__metadata__": []}, bytes(8)), "not a table of text"),
        (file_of(b'{"soft_prompt":1,"soft_prompt":2}', b""), "header is not JSON"),
        (file_of(b"{" * 100_000, b""), "header is not JSON"),
        (file_of(b"{\xff}", b""), "header is not JSON"),
        (struct.pack("<Q", 2**63) + b"{}", "claims 9223372036854775808 bytes"),
        (struct.pack("<Q", MAX_HEADER_BYTES + 1) + b"{}", "header claims"),
        (struct.pack("<Q", 1000) + b"{}", "is cut"),
        (b"", "0 bytes, too few"),
        (pickle.dumps({"soft_prompt": [1.0]}), "a Python pickle"),
        (b"\x93NUMPY\x01\x00" + bytes(100), "a numpy file"),
        (b"\0" * (MAX_FILE_BYTES + MAX_HEADER_BYTES + 1), "more than the limit"),
    ],
)
def test_other_files_are_refused_with_the_reason(data: bytes, reason: str) -> None:
    with pytest.raises(InvalidArtifact, match=reason):
        decode(data)


def test_a_torch_checkpoint_is_refused_unopened() -> None:
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as zipped:
        zipped.writestr("archive/data.pkl", pickle.dumps([1.0]))
    with pytest.raises(InvalidArtifact, match=r"torch\.save"):
        decode(archive.getvalue())


@pytest.mark.parametrize("dtype", sorted(ITEM_BYTES))
def test_nan_and_infinity_are_found_by_their_bits(dtype: str) -> None:
    largest = LARGEST_BITS[dtype]
    from_bits(dtype, [[0, largest], [largest, 1]]).check()
    for bits in NON_FINITE_BITS[dtype]:
        with pytest.raises(InvalidArtifact, match="NaN or infinite values, first in row 1"):
            from_bits(dtype, [[0, largest], [largest, bits]]).check()


@pytest.mark.parametrize(
    ("broken", "reason"),
    [
        (SoftPrompt("F32", (2, 2), bytes(15)), "needs 16 bytes but has 15"),
        (SoftPrompt("F32", (0, 2), b""), "each at least 1"),
        (SoftPrompt("F32", (2,), bytes(8)), r"must be \[P, H\]"),
        (SoftPrompt("float32", (1, 1), bytes(4)), "dtype 'float32'"),
        (SoftPrompt("F32", (True, 1), bytes(4)), "each at least 1"),
    ],
)
def test_a_prompt_that_contradicts_itself_is_refused(broken: SoftPrompt, reason: str) -> None:
    with pytest.raises(InvalidArtifact, match=reason):
        broken.check()
    with pytest.raises(InvalidArtifact, match=reason):
        encode(broken)


def test_the_digest_covers_dtype_shape_and_bytes() -> None:
    data = bytes(range(16))
    prompts = [SoftPrompt("F32", (2, 2), data), SoftPrompt("F32", (1, 4), data), SoftPrompt("F16", (2, 4), data)]
    prompts.append(SoftPrompt("F32", (2, 2), bytes(16)))
    assert len({each.digest for each in prompts}) == 4
    assert prompts[0].digest == "8c538d60beda4659ad0b231dc2c9a9fef767022b3c1b7945837ea5a108c1e167"
    assert tensor_digest("F32", (2, 2), data) == prompts[0].digest


def test_metadata_that_is_not_text_or_too_long_is_refused() -> None:
    with pytest.raises(InvalidArtifact, match="only text"):
        encode(prompt(), {"a": 1})
    with pytest.raises(InvalidArtifact, match="shorten"):
        encode(prompt(), {"a": "x" * MAX_HEADER_BYTES})
