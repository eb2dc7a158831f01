from __future__ import annotations

import gzip
import io
import pickle
import stat
import struct
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from prompt_store.errors import InvalidArtifact
from prompt_store.interchange import archive
from prompt_store.interchange.exporting import write_export
from prompt_store.interchange.importing import read_import
from prompt_store.interchange.peft import CONFIG_FILE, TENSORS_FILE, read_peft, write_peft
from prompt_store.prompts.artifact import Artifact, write_artifact
from prompt_store.prompts.prefix import Prefix
from prompt_store.prompts.soft_prompt import SoftPrompt
from prompt_store.prompts.version import Provenance
from tests.prompt_store.building import BASE, prompt
from tests.prompt_store.interchange.adapters import SOFT, saved

PREFIX = Prefix("BF16", (2, 2, 1, 3, 4), bytes(range(96)))


def zip_of(path: Path, *entries: tuple[str | zipfile.ZipInfo, bytes], compression: int = zipfile.ZIP_DEFLATED) -> Path:
    with zipfile.ZipFile(path, "w", compression) as zipped:
        for name, data in entries:
            zipped.writestr(name, data)
    return path


def adapter_entries(folder: Path, inside: str = "") -> list[tuple[str | zipfile.ZipInfo, bytes]]:
    write_peft(folder, prompt(), "base")
    return [(f"{inside}{name}", (folder / name).read_bytes()) for name in (CONFIG_FILE, TENSORS_FILE)]


@pytest.mark.parametrize("original", [prompt(), PREFIX])
def test_our_own_files_bring_all_that_they_say(original: SoftPrompt | Prefix, tmp_path: Path) -> None:
    provenance = Provenance(recipe_hash="r", seed=3)
    path = tmp_path / "prompt.safetensors"
    write_artifact(path, Artifact(original, "support_intents", BASE.fingerprint, provenance, "first try"))
    imported = read_import(path)
    assert imported.prompt == original
    assert (imported.format, imported.task, imported.base_fingerprint) == (
        "safetensors", "support_intents", BASE.fingerprint,
    )  # fmt: skip
    assert (imported.provenance, imported.notes, imported.note) == (provenance, "first try", "")


@pytest.mark.parametrize(
    ("original", "format", "name"),
    [
        (prompt(), "safetensors", "prompt.safetensors"),
        (prompt(), "peft", "adapter"),
        (prompt(), "npy", "prompt.npy"),
        (PREFIX, "safetensors", "prompt.safetensors"),
        (PREFIX, "peft", "adapter"),
        (PREFIX, "cartridge", "adapter"),
    ],
)
def test_what_is_exported_is_imported_as_it_was(
    original: SoftPrompt | Prefix, format: str, name: str, tmp_path: Path
) -> None:
    write_export(tmp_path / name, original, format, base_name="base")
    assert read_import(tmp_path / name).prompt == original
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_an_export_carries_what_its_format_has_room_for(tmp_path: Path) -> None:
    write_export(
        tmp_path / "a",
        prompt(),
        "safetensors",
        task="t",
        base_fingerprint="f",
        provenance=Provenance(seed=1),
        notes="n",
    )
    imported = read_import(tmp_path / "a")
    assert (imported.task, imported.base_fingerprint, imported.provenance.seed, imported.notes) == ("t", "f", 1, "n")
    write_export(tmp_path / "b", prompt(), "peft", base_name="someone/base")
    assert read_import(tmp_path / "b").base_name == "someone/base"
    write_export(tmp_path / "c", PREFIX, "cartridge")
    assert read_import(tmp_path / "c").format == "PEFT CARTRIDGE"


def test_an_unknown_export_format_is_refused_with_the_nearest(tmp_path: Path) -> None:
    with pytest.raises(InvalidArtifact, match="no export format 'safetensor'; did you mean 'safetensors'"):
        write_export(tmp_path / "x", prompt(), "safetensor")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("inside", ["", "adapter/", "runs/7/adapter/"])
def test_a_zip_of_an_adapter_s_folder_is_read_like_the_folder(inside: str, tmp_path: Path) -> None:
    path = zip_of(
        tmp_path / "adapter.zip", *adapter_entries(tmp_path / "adapter", inside), (f"{inside}README.md", b"x")
    )
    assert read_import(path) == read_peft(tmp_path / "adapter")


def test_the_task_of_a_zipped_multitask_prompt_is_chosen(tmp_path: Path) -> None:
    folder = saved(SOFT["MULTITASK_PROMPT_TUNING"](), tmp_path / "in")
    path = zip_of(tmp_path / "a.zip", *((file.name, file.read_bytes()) for file in folder.iterdir()))
    assert read_import(path, task_index=1) == read_peft(folder, task_index=1)
    write_export(tmp_path / "a.npy", prompt(), "npy")
    with pytest.raises(InvalidArtifact, match="leave the index out"):
        read_import(tmp_path / "a.npy", task_index=1)


def link(name: str) -> zipfile.ZipInfo:
    entry = zipfile.ZipInfo(name)
    entry.external_attr = (stat.S_IFLNK | 0o777) << 16
    return entry


@pytest.mark.parametrize(
    ("entries", "reason"),
    [
        ([("../evil.json", b"x")], "leads out of the folder"),
        ([("a/../../evil.json", b"x")], "leads out of the folder"),
        ([("/etc/evil", b"x")], "leads out of the folder"),
        ([("..\\evil.json", b"x")], "leads out of the folder"),
        ([("C:evil.json", b"x")], "leads out of the folder"),
        ([(link(TENSORS_FILE), b"/etc/passwd")], "is a link"),
        ([("zeros", bytes(2**20))], "unpacks to more than 100 times its size"),
        ([(f"{index}", b"x") for index in range(101)], "lists 101 entries"),
        ([("a", b"x"), ("a/b", b"x")], "cannot be unpacked"),
        ([("archive/data.pkl", pickle.dumps(1))], "holds a pickle, 'archive/data.pkl', as torch.save writes"),
        ([(CONFIG_FILE, b"{}"), ("optimizer.pt", b"x")], "holds a pickle, 'optimizer.pt'.*without what training left"),
        ([("arr_0.npy", b"\x93NUMPY")], "a numpy .npz"),
        ([("README.md", b"x")], "holds 0 PEFT adapters"),
        ([(f"a/{CONFIG_FILE}", b"{}"), (f"b/{CONFIG_FILE}", b"{}")], "holds 2 PEFT adapters"),
        ([(CONFIG_FILE, b"{}")], f"a.zip: {CONFIG_FILE}: does not say its peft_type"),
    ],
)
def test_a_zip_that_is_not_plainly_an_adapter_is_refused_and_leaves_nothing(
    entries: list[tuple[str | zipfile.ZipInfo, bytes]], reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(scratch))
    path = zip_of(tmp_path / "a.zip", *entries)
    with pytest.raises(InvalidArtifact, match=reason) as caught:
        read_import(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert {file.name for file in tmp_path.iterdir()} == {"scratch", "a.zip"}
    assert not list(scratch.iterdir())


def changed(path: Path, change: Callable[[bytes], bytes]) -> Path:
    path.write_bytes(change(path.read_bytes()))
    return path


def test_zips_whose_directory_lies_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    entries = adapter_entries(tmp_path / "adapter")

    def refused(change: Callable[[bytes], bytes], reason: str) -> None:
        with pytest.raises(InvalidArtifact, match=reason):
            read_import(changed(zip_of(tmp_path / "a.zip", *entries), change))

    refused(lambda data: data[:-1], "cut or unusual")
    refused(lambda data: data[: len(data) // 2], "cut or unusual")
    refused(lambda data: data + data, "cut or unusual")
    refused(lambda data: data[:-22] + b"PK\6\7" + bytes(16) + data[-22:], "cut or unusual")
    refused(lambda data: data[:-10] + struct.pack("<I", 2**31) + data[-6:], "lists 2 entries in 2147483648 bytes")
    # The second copy of each name, in the directory, is the one that counts: a name twice, then encryption.
    refused(lambda data: data.replace(TENSORS_FILE.encode(), b"adapter_model.safetensorZ"), "cannot be read")
    refused(lambda data: data.replace(b"PK\1\2\x14\x03\x14\0\0\0", b"PK\1\2\x14\x03\x14\0\1\0"), "is encrypted")
    refused(lambda data: data.replace(b"\x14\0\0\0\x08\0", b"\x14\0\0\0\x0c\0"), "compressed in an unusual way")
    with pytest.warns(UserWarning, match="Duplicate name"):
        zip_of(tmp_path / "a.zip", *entries, *entries)
    with pytest.raises(InvalidArtifact, match="one name twice"):
        read_import(tmp_path / "a.zip")
    monkeypatch.setattr(archive, "MAX_UNPACKED_BYTES", 100)
    refused(lambda data: data, "unpacks to .* bytes, more than 100")


class Bomb:
    """Running it would be seen: unpickling creates the file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[[str, str], object], tuple[str, str]]:
        return open, (str(self.path), "w")


@pytest.mark.parametrize(
    "name",
    [
        "a.pt", "a.pth", "a.bin", "a.pkl", "a.ckpt", "a.joblib", "a.safetensors", "a.npy", "a.zip", "adapter_model.bin",
        TENSORS_FILE,
    ],
)  # fmt: skip
def test_a_pickle_is_refused_under_every_name_and_never_run(name: str, tmp_path: Path) -> None:
    path, trace = tmp_path / name, tmp_path / "trace"
    torch_zip = io.BytesIO()
    torch.save({"prompt_embeddings": torch.ones(2, 2)}, torch_zip)
    array = io.BytesIO()
    np.save(array, np.array([Bomb(trace)], dtype=object), allow_pickle=True)
    disguises = [pickle.dumps(Bomb(trace), protocol) for protocol in range(6)]
    disguises += [torch_zip.getvalue(), array.getvalue(), gzip.compress(disguises[4])]
    for data in disguises:
        path.write_bytes(data)
        with pytest.raises(InvalidArtifact, match=rf"^{path}: (is|holds) "):
            read_import(path)
    assert not trace.exists()


def test_what_a_pickle_is_called_is_said(tmp_path: Path) -> None:
    torch_saved = io.BytesIO()
    torch.save({"prompt_embeddings": torch.ones(2, 2)}, torch_saved)
    for name, data, reason in (
        ("a.safetensors", pickle.dumps(1), "is a Python pickle"),
        ("a.pt", pickle.dumps(1, 0), "is a Python pickle by its name"),
        ("b.pt", torch_saved.getvalue(), "holds a pickle, 'data.pkl', as torch.save writes"),
        ("a.tar.gz", gzip.compress(b"x"), "is a tar or gzip archive"),
        ("a.unknown", b"hello", "is of an unknown kind; give a .safetensors of Softcue"),
        ("empty", b"", "is of an unknown kind"),
        (TENSORS_FILE, (b"\x10" + bytes(7) + b"{}"), "is half of a PEFT adapter; give its folder"),
    ):
        (tmp_path / name).write_bytes(data)
        with pytest.raises(InvalidArtifact, match=reason):
            read_import(tmp_path / name)


def test_a_tar_is_refused(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "a.tar", "w") as file:
        file.addfile(tarfile.TarInfo("../evil"))
    with pytest.raises(InvalidArtifact, match=r"is a tar or gzip archive; give .* a zip of it"):
        read_import(tmp_path / "a.tar")


def test_a_path_that_is_no_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidArtifact, match="cannot be read"):
        read_import(tmp_path / "missing")
    (tmp_path / "folder").mkdir()
    with pytest.raises(InvalidArtifact, match=f"folder: is no PEFT adapter, for it holds no {CONFIG_FILE}; give"):
        read_import(tmp_path / "folder")
    with pytest.raises(InvalidArtifact, match="is not a file"):
        read_import(Path("/dev/null"))
