"""Compiles `kernels.c` for this processor and calls it: what torch does on a CPU in many small steps, or slower.

The library is kept in the user's cache under the digest of its source, compiler and processor, so only the first start
compiles (a second or two). Without a compiler `load` returns None and everything runs through torch instead, slower.
"""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import platform
import re
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

log = logging.getLogger(__name__)

_SOURCE = Path(__file__).with_name("kernels.c")
_FLAGS = ("-O3", "-march=native", "-fno-math-errno", "-fPIC", "-shared", "-std=gnu11")
_COMPILE_TIMEOUT_S = 120
MOST_HEAD_DIM = 512
PANEL = 32

_pointer, _size, _float = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float


class StepArguments(ctypes.Structure):
    """What all layers of one forward pass share; `struct step` of the source."""

    _fields_ = (
        ("tokens", _size),
        ("items", _size),
        ("kv_heads", _size),
        ("dim", _size),
        ("padded_dim", _size),
        ("table_stride", _size),
        ("item", _pointer),
        ("row", _pointer),
        ("position", _pointer),
        ("table", _pointer),
    )


class Kernels:
    """The compiled functions. All tensors are float32 on the CPU with a contiguous last dimension."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self.library = library
        for name, types in {
            "softcue_attend": [
                *[_pointer, *[_pointer, _size, _size] * 3],
                *[_pointer, _size, _pointer, _pointer, _float, _float, _size],
            ],
            "softcue_rms_norm": [_pointer, _pointer, _float, _pointer, _size, _size],
            "softcue_silu_multiply": [_pointer, _size, _pointer, _size, _pointer, _size, _size],
            "softcue_rotate": [_pointer, _size, _size, _pointer, _pointer, _pointer, _size, _size, _size],
            "softcue_linear": [_pointer] * 5 + [_size] * 3,
            "softcue_linear_int8": [*[_pointer] * 7, *[_size] * 4, _pointer, _pointer],
            "softcue_highest": [_pointer, _size, _size, _size, _pointer],
        }.items():
            function = getattr(self.library, name)
            function.argtypes, function.restype = types, None
        library.softcue_has_wide_registers.restype = _size
        self.has_wide_registers = bool(library.softcue_has_wide_registers())

    def attend(
        self,
        step: StepArguments,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_cache: Tensor,
        value_cache: Tensor,
        scaling: float,
        softcap: float,
        window: int,
    ) -> Tensor:
        """Store key and value [KV heads, N, D], attend with query [heads, N, D]; returns [N, heads, D].

        `softcap` and `window` are 0 where there is none.
        """
        heads, tokens, dim = query.shape
        out = query.new_empty(tokens, heads, dim)
        self.library.softcue_attend(
            ctypes.byref(step),
            query.data_ptr(),
            query.stride(1),
            query.stride(0),
            key.data_ptr(),
            key.stride(1),
            key.stride(0),
            value.data_ptr(),
            value.stride(1),
            value.stride(0),
            out.data_ptr(),
            heads,
            key_cache.data_ptr(),
            value_cache.data_ptr(),
            scaling,
            softcap,
            window,
        )
        return out

    def rms_norm(self, x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
        """x / sqrt(mean(x^2) + epsilon) * weight over the last dimension of a contiguous x."""
        out = torch.empty_like(x)
        size = x.shape[-1]
        self.library.softcue_rms_norm(x.data_ptr(), weight.data_ptr(), epsilon, out.data_ptr(), x.numel() // size, size)
        return out

    def silu_multiply(self, gate: Tensor, up: Tensor) -> Tensor:
        """silu(gate) * up for [N, size], whose rows may lie apart."""
        rows, size = gate.shape
        out = gate.new_empty(rows, size)
        self.library.softcue_silu_multiply(
            gate.data_ptr(), gate.stride(0), up.data_ptr(), up.stride(0), out.data_ptr(), rows, size
        )
        return out

    def rotate(self, x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
        """x * cosine + rotate_half(x) * sine for x [heads, N, D] and contiguous [N, D]; a view [heads, N, D]."""
        heads, tokens, dim = x.shape
        out = x.new_empty(tokens, heads, dim)
        self.library.softcue_rotate(
            x.data_ptr(),
            x.stride(1),
            x.stride(0),
            cosine.data_ptr(),
            sine.data_ptr(),
            out.data_ptr(),
            tokens,
            heads,
            dim,
        )
        return out.transpose(0, 1)

    def linear(
        self, x: Tensor, panels: Tensor, bias: Tensor | None, outputs: int, added: Tensor | None = None
    ) -> Tensor:
        """x W^T + bias + added, [..., outputs], for a contiguous x [..., inputs] and W in panels (`panels_of`)."""
        inputs = x.shape[-1]
        out = x.new_empty(*x.shape[:-1], outputs)
        self.library.softcue_linear(
            x.data_ptr(),
            panels.data_ptr(),
            bias.data_ptr() if bias is not None else None,
            added.data_ptr() if added is not None else None,
            out.data_ptr(),
            x.numel() // inputs,
            inputs,
            outputs,
        )
        return out

    def linear_int8(
        self, x: Tensor, panels: Tensor, scales: Tensor, bias: Tensor | None, outputs: int, added: Tensor | None = None
    ) -> Tensor:
        """As `linear` for weights in 8 bits (`int8_panels_of`), x rounded to 8 bits too, each row by its own scale."""
        inputs = x.shape[-1]
        rows, padded = x.numel() // inputs, panels.shape[1] * 4
        out = x.new_empty(*x.shape[:-1], outputs)
        bytes_and_scales = torch.empty(rows * padded + 4 * rows, dtype=torch.uint8)
        self.library.softcue_linear_int8(
            x.data_ptr(),
            panels.data_ptr(),
            scales.data_ptr(),
            scales.data_ptr() + 4 * outputs,
            bias.data_ptr() if bias is not None else None,
            added.data_ptr() if added is not None else None,
            out.data_ptr(),
            rows,
            inputs,
            padded,
            outputs,
            bytes_and_scales.data_ptr(),
            bytes_and_scales.data_ptr() + rows * padded,
        )
        return out

    def highest(self, values: Tensor) -> Tensor:
        """The place of each row's highest value, int64 [R]; -1 where a row of [R, V] is not finite."""
        rows, size = values.shape
        place = torch.empty(rows, dtype=torch.int64)
        self.library.softcue_highest(values.data_ptr(), values.stride(0), rows, size, place.data_ptr())
        return place


def panels_of(weight: Tensor) -> Tensor:
    """A weight [outputs, inputs] as the linear kernel reads it: [outputs / 32, inputs, 32], padded with zeros."""
    outputs, inputs = weight.shape
    panels = weight.new_zeros(-(-outputs // PANEL) * PANEL, inputs)
    panels[:outputs] = weight
    return panels.view(-1, PANEL, inputs).transpose(1, 2).contiguous()


def int8_panels_of(weight: Tensor) -> tuple[Tensor, Tensor]:
    """A weight [outputs, inputs] in 8 bits: panels [outputs / 32, inputs / 4, 32, 4], and [2, outputs] float32.

    The second holds each output's scale, and 128 times the sum of its rounded weights.
    """
    outputs, inputs = weight.shape
    scales = weight.abs().amax(dim=1).clamp_min(1e-30) / 127
    rounded = torch.zeros(-(-outputs // PANEL) * PANEL, -(-inputs // 4) * 4, dtype=torch.int8)
    rounded[:outputs, :inputs] = (weight / scales[:, None]).round().to(torch.int8)
    sums = rounded[:outputs].sum(dim=1, dtype=torch.int32).float() * 128
    panels = rounded.view(-1, PANEL, rounded.shape[1] // 4, 4).transpose(1, 2).contiguous()
    return panels, torch.stack((scales, sums))


@cache
def load() -> Kernels | None:
    """The kernels for this processor, compiled where that was not done before; None where they cannot be."""
    compiler = next((found for name in ("cc", "gcc", "clang") if (found := shutil.which(name))), None)
    if compiler is None:
        log.warning("no C compiler was found, so the engine runs slower; install gcc (Debian: apt install gcc)")
        return None
    try:
        return Kernels(_library(compiler))
    except (OSError, subprocess.SubprocessError) as error:
        detail = getattr(error, "stderr", b"") or b""
        log.warning(
            "the kernels could not be compiled, so the engine runs slower: %s %s", error, detail.decode()[-400:]
        )
        return None


def _library(compiler: str) -> ctypes.CDLL:
    version = subprocess.run([compiler, "--version"], capture_output=True, check=True, timeout=10).stdout
    threads = _openmp_library()
    parts = (_SOURCE.read_bytes(), version, " ".join(_FLAGS).encode(), _processor().encode(), str(threads).encode())
    digest = hashlib.sha256(b"\0".join(parts)).hexdigest()[:32]
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "softcue"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:  # a read-only home: compile anew at each start
        folder = Path(tempfile.mkdtemp(prefix="softcue-"))
    target = folder / f"kernels-{digest}.so"
    if not target.exists():
        partial = target.with_suffix(f".{os.getpid()}.o")
        # Compiled with OpenMP but not linked to it: the threads must be torch's own, or two pools fight for cores.
        parallel = ["-fopenmp"] if threads is not None else []
        command = [compiler, *_FLAGS, *parallel, "-nodefaultlibs", str(_SOURCE), "-o", str(partial), "-lm", "-lc"]
        subprocess.run(command, capture_output=True, check=True, timeout=_COMPILE_TIMEOUT_S)
        partial.replace(target)
    if threads is not None:
        ctypes.CDLL(threads, mode=ctypes.RTLD_GLOBAL)
    return ctypes.CDLL(str(target))


def _openmp_library() -> str | None:
    """The OpenMP library that torch has loaded into this process, where it speaks GNU's interface."""
    try:
        maps = Path("/proc/self/maps").read_text()
    except OSError:
        return None
    found = re.findall(r"(/\S*lib(?:gomp|iomp5)[^/\s]*\.so\S*)", maps)
    return found[0] if found else None


def _processor() -> str:
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return platform.processor()
    lines = {line for line in text.splitlines() if line.startswith(("flags", "Features", "model name", "CPU part"))}
    return "\n".join(sorted(lines))
