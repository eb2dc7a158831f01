from __future__ import annotations

import os
from pathlib import Path

import pytest

from prompt_store.errors import InvalidArtifact
from prompt_store.files import read_bounded, write_folder, write_whole


def test_a_file_is_read_up_to_its_limit(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_bytes(b"12345")
    assert read_bounded(path, 5) == b"12345"
    with pytest.raises(InvalidArtifact, match="a: is larger than the limit of 4 bytes"):
        read_bounded(path, 4)


def test_a_pipe_is_refused_and_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", tmp_path):
        with pytest.raises(InvalidArtifact, match="is not a file"):
            read_bounded(path, 4)


def test_a_file_is_replaced_whole_and_its_permissions_are_ordinary(tmp_path: Path) -> None:
    path = tmp_path / "a"
    write_whole(path, b"1")
    write_whole(path, b"2")
    assert path.read_bytes() == b"2"
    (tmp_path / "plain").touch()
    assert path.stat().st_mode == (tmp_path / "plain").stat().st_mode
    (tmp_path / "folder").mkdir()
    with pytest.raises(InvalidArtifact, match="folder: cannot be written"):
        write_whole(tmp_path / "folder", b"3")
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["a", "folder", "plain"]


def test_a_folder_is_written_where_none_or_an_empty_one_was(tmp_path: Path) -> None:
    (tmp_path / "plain").mkdir()
    for folder in (tmp_path / "new", tmp_path / "plain"):
        write_folder(folder, {"a": b"1", "b": b"2"})
        assert {file.name: file.read_bytes() for file in folder.iterdir()} == {"a": b"1", "b": b"2"}
    assert (tmp_path / "new").stat().st_mode & 0o777 == 0o777 & ~_umask()
    (tmp_path / "file").touch()
    for taken in ("new", "file"):
        with pytest.raises(InvalidArtifact, match="is there already; remove it"):
            write_folder(tmp_path / taken, {"c": b"3"})
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["file", "new", "plain"]


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
