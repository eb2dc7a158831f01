"""Damaged and invented files: each is a checked prompt or an InvalidArtifact, and nothing else.

SOFTCUE_FUZZ_EXAMPLES=300 makes a run long (see `make check-slow`).
"""

from __future__ import annotations

import io
import json
import os
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from prompt_store.errors import InvalidArtifact
from prompt_store.interchange.imported import Imported
from prompt_store.interchange.importing import decode_import, read_import
from prompt_store.interchange.peft import CONFIG_FILE, TENSORS_FILE, write_peft
from prompt_store.prompts.artifact import Artifact, encode_artifact
from prompt_store.prompts.prefix import Prefix
from prompt_store.prompts.tensor_file import ITEM_BYTES, Tensor, write_tensors
from tests.prompt_store.building import prompt

PREFIX = Prefix("F16", (2, 2, 1, 3, 4), bytes(range(96)))
# A file is tried in a fraction of the time of a request, which the variable counts.
EXAMPLES = 40 * int(os.environ.get("SOFTCUE_FUZZ_EXAMPLES", "5"))
MANY = settings(
    max_examples=EXAMPLES,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)

JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


def zipped(files: dict[str, bytes]) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return file.getvalue()


def numpy_file() -> bytes:
    file = io.BytesIO()
    np.save(file, prompt(1, 2, 3).to_float32())
    return file.getvalue()


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    folder = tmp_path_factory.mktemp("fuzz") / "adapter"
    write_peft(folder, PREFIX, "base")
    return {name: (folder / name).read_bytes() for name in (CONFIG_FILE, TENSORS_FILE)}


@pytest.fixture(scope="module")
def whole_files(adapter: dict[str, bytes]) -> dict[str, bytes]:
    return {
        "prompt.safetensors": encode_artifact(Artifact(prompt(1, 2, 3), "task", notes="n")),
        "prefix.safetensors": encode_artifact(Artifact(PREFIX)),
        "prompt.npy": numpy_file(),
        "adapter.zip": zipped(adapter),
    }


def reason_against(read: Callable[[], Imported]) -> str | None:
    """Why an import is refused; None where it is a prompt, which is checked then."""
    try:
        imported = read()
    except InvalidArtifact as error:
        return str(error)
    imported.prompt.check()
    return None


def is_checked_or_refused(data: bytes, name: str = "file") -> None:
    reason = reason_against(lambda: decode_import(data, name))
    assert reason is None or reason.startswith(f"{name}: ")


@MANY
@given(st.data())
def test_a_damaged_file_of_every_format(whole_files: dict[str, bytes], data: st.DataObject) -> None:
    name = data.draw(st.sampled_from(sorted(whole_files)))
    damaged = bytearray(whole_files[name])
    for _ in range(data.draw(st.integers(1, 5))):
        place = data.draw(st.integers(0, len(damaged) - 1))
        match data.draw(st.sampled_from(("set", "cut", "insert", "copy"))):
            case "set":
                damaged[place] = data.draw(st.integers(0, 255))
            case "cut":
                del damaged[place : place + data.draw(st.integers(1, 4))]
            case "insert":
                damaged[place:place] = data.draw(st.binary(max_size=4))
            case _:
                damaged += damaged[place : place + 64]
        if not damaged:
            break
    is_checked_or_refused(bytes(damaged), name)


@MANY
@given(
    st.sampled_from((b"", b"PK\3\4", b"\x93NUMPY\1\0", b"\x80\4", b"\x10" + bytes(7) + b"{")), st.binary(max_size=300)
)
def test_invented_bytes(start: bytes, rest: bytes) -> None:
    is_checked_or_refused(start + rest)


@MANY
@given(
    st.text("<>|=Ofui0123458", max_size=4),
    st.text("(), 0123456789x", max_size=12),
    st.booleans(),
    st.binary(max_size=64),
)
def test_invented_numpy_headers(descr: str, shape: str, fortran_order: bool, values: bytes) -> None:
    header = f"{{'descr': '{descr}', 'fortran_order': {fortran_order}, 'shape': ({shape}), }}\n".encode()
    is_checked_or_refused(b"\x93NUMPY\1\0" + len(header).to_bytes(2, "little") + header + values)


@MANY
@given(
    st.dictionaries(
        st.sampled_from(("soft_prompt", "prefix", "prompt_embeddings", "x")),
        st.tuples(
            st.sampled_from((*sorted(ITEM_BYTES), "F64", "U8", "?")),
            st.lists(st.integers(0, 4), max_size=6),
            st.binary(max_size=64),
        ),
        max_size=2,
    ),
)
def test_invented_safetensors(tensors: dict[str, tuple[str, list[int], bytes]]) -> None:
    made = {name: Tensor(dtype, tuple(shape), data) for name, (dtype, shape, data) in tensors.items()}
    is_checked_or_refused(write_tensors(made))


@MANY
@given(st.dictionaries(st.text("./\\a:\0é", max_size=8), st.binary(max_size=50), max_size=4))
def test_invented_archives(files: dict[str, bytes]) -> None:
    is_checked_or_refused(zipped({name.replace("\0", "") or "a": data for name, data in files.items()}))


@MANY
@given(st.data())
def test_invented_adapter_configurations(adapter: dict[str, bytes], tmp_path: Path, data: st.DataObject) -> None:
    config = json.loads(adapter[CONFIG_FILE])
    for key in data.draw(st.lists(st.sampled_from(sorted(config)), min_size=1, max_size=3)):
        config[key] = data.draw(
            JSON | st.sampled_from(("CPT", "P_TUNING", "CARTRIDGE", "MULTITASK_PROMPT_TUNING", "LORA"))
        )
    (tmp_path / CONFIG_FILE).write_text(json.dumps(config))
    (tmp_path / TENSORS_FILE).write_bytes(adapter[TENSORS_FILE])
    task_index = data.draw(st.none() | st.integers(-2, 2))
    reason = reason_against(lambda: read_import(tmp_path, task_index=task_index))
    assert reason is None or reason.startswith(str(tmp_path))
