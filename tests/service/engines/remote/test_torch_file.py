"""The bytes that we write for `torch.load`, against torch itself."""

from __future__ import annotations

import io
import pickletools
import subprocess
import sys
import zipfile

import pytest
import torch

from service.engines.remote.torch_file import torch_file

_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_SHAPES = [(1, 1), (3, 5), (1, 70_000), (300, 192)]


def values(shape: tuple[int, int], dtype: str) -> torch.Tensor:
    torch.manual_seed(shape[0])
    return torch.randn(shape).to(_DTYPES[dtype])


def data_of(tensor: torch.Tensor) -> bytes:
    return tensor.view(torch.uint8).numpy().tobytes()


def ours(tensor: torch.Tensor, dtype: str) -> bytes:
    return torch_file(dtype, tuple(tensor.shape), [data_of(tensor)])


@pytest.mark.parametrize("dtype", _DTYPES)
@pytest.mark.parametrize("shape", _SHAPES)
def test_torch_loads_exactly_the_tensor_with_weights_only(shape: tuple[int, int], dtype: str) -> None:
    tensor = values(shape, dtype)
    loaded = torch.load(io.BytesIO(ours(tensor, dtype)), weights_only=True)
    assert loaded.dtype == tensor.dtype
    assert loaded.shape == tensor.shape
    assert loaded.stride() == tensor.stride()
    assert not loaded.requires_grad
    assert data_of(loaded) == data_of(tensor)


@pytest.mark.parametrize("dtype", _DTYPES)
def test_the_recipe_says_what_torch_save_says(dtype: str) -> None:
    tensor = values((3, 5), dtype)
    theirs = io.BytesIO()
    torch.save(tensor, theirs)
    theirs.seek(0)
    assert recipe(ours(tensor, dtype)) == recipe(theirs.getvalue())


def recipe(file: bytes) -> list[tuple[str, object]]:
    """The pickle's opcodes and what they carry, without how wide integers are and what is kept for later."""
    with zipfile.ZipFile(io.BytesIO(file)) as archive:
        (name,) = [name for name in archive.namelist() if name.endswith("/data.pkl")]
        opcodes = pickletools.genops(archive.read(name))
        return [
            ("INT" if opcode.name.startswith("BININT") else opcode.name, argument)
            for opcode, argument, _ in opcodes
            if opcode.name != "BINPUT"
        ]


def test_parts_are_joined_in_order_and_must_fill_the_shape() -> None:
    tensor = values((4, 6), "F32")
    data = data_of(tensor)
    file = torch_file("F32", (4, 6), [data[:48], data[48:]])
    assert torch.equal(torch.load(io.BytesIO(file), weights_only=True), tensor)
    with pytest.raises(ValueError, match=r"92 bytes are no tensor \[4, 6\] in F32"):
        torch_file("F32", (4, 6), [data[:-4]])


def test_equal_tensors_are_equal_files() -> None:
    tensor = values((4, 6), "BF16")
    assert ours(tensor, "BF16") == ours(tensor.clone(), "BF16")


def test_the_file_is_written_without_torch() -> None:
    code = (
        "import sys; from service.engines.remote.torch_file import torch_file; torch_file('F32', (1, 1), [bytes(4)]);"
        "print(sorted({'torch', 'pickle'} & set(sys.modules)))"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"
