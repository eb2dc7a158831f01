"""From a `Register` message to a tensor in the dtype it came in: registered prompts cost what they cost on disk."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from service.engines.local.messages import Register

_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def read_tensor(command: Register) -> Tensor:
    """The prompt's tensor. Raises ValueError for a dtype, shape or size that is none."""
    dtype = _DTYPES.get(command.dtype)
    if dtype is None or len(command.shape) not in (2, 5):
        raise ValueError(
            f"the prompt has dtype {command.dtype} and shape {list(command.shape)}; it must be [P, H] or "
            f"[L, 2, KV heads, P, D] in {', '.join(_DTYPES)}"
        )
    if math.prod(command.shape) * dtype.itemsize != len(command.data):
        raise ValueError(f"the prompt has {len(command.data)} bytes, which do not fill {list(command.shape)}")
    return torch.frombuffer(bytearray(command.data), dtype=dtype).reshape(command.shape)
