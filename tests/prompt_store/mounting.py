"""Small file systems of their own, to fill up."""

import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest


@contextmanager
def small_disk(size_mib: int, owner: str | None = None) -> Iterator[Path]:
    """The folder of a file system of that size. Skips the test where mounting is not allowed; CI fails there."""
    folder = Path(tempfile.mkdtemp(prefix="softcue-disk-"))
    try:
        command = ["mount", "-t", "tmpfs", "-o", f"size={size_mib}m", "tmpfs", str(folder)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            message = f"a small file system cannot be mounted ({done.stderr.strip()}): this test needs root's rights"
            if os.environ.get("SOFTCUE_NO_SKIPS"):
                pytest.fail(message)
            pytest.skip(message)
        try:
            if owner is not None:
                shutil.chown(folder, owner)
            yield folder
        finally:
            subprocess.run(["umount", "--lazy", str(folder)], check=True)
    finally:
        folder.rmdir()


def fill(file: Path) -> None:
    """Takes every byte that is left on the file's disk."""
    with open(file, "wb", buffering=0) as filler:
        for size in (65536, 4096, 1):
            try:
                while True:
                    filler.write(bytes(size))
            except OSError:
                continue
