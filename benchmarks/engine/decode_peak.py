"""How near decoding comes to the machine's matmul rate: `python -m benchmarks.engine.decode_peak SHAPE ROUNDS`.

Drives the engine in this process with every core, 32 rows in pure decode, in turns with the matmuls of one such step
alone: packed oneDNN linears of all layers' shapes. Counts 2 FLOPs per weight and token. Prints one JSON object.
"""

from __future__ import annotations

import json
import os
import sys
import time

import torch

from benchmarks.engine.figures import median
from benchmarks.engine.shapes import SHAPES, Shape, make_base
from benchmarks.engine.workload import NEW_TOKENS, PROMPTS, questions, soft_prompts
from service.engines.base_model import open_base_model
from service.engines.local.engine import EngineCore
from service.engines.local.messages import Choosing, Register, Submit
from service.engines.local.options import EngineOptions

_ROWS, _MATMUL_S = 32, 1.0


def main() -> None:
    shape, rounds = SHAPES[sys.argv[1]], int(sys.argv[2])
    threads = len(os.sched_getaffinity(0))
    core = EngineCore.load(open_base_model(make_base(shape)), EngineOptions(threads=threads, max_sequences=_ROWS))
    for index, prompt in enumerate(soft_prompts(PROMPTS, shape.hidden_size)):
        core.register(Register(str(index), "F32", tuple(prompt.shape), prompt.numpy().tobytes(), pinned=True))
    torch.set_num_threads(threads)
    matmuls = Matmuls(shape)
    decode, alone = [], []
    for turn in range(rounds + 1):
        decode.append(decode_tokens_per_s(core, shape, turn))
        alone.append(matmuls.tokens_per_s())
    flops = 2 * sum(out * inner for out, inner in shape.linears)
    decoded, peak = median(decode[1:]), median(alone[1:])
    print(
        json.dumps(
            {
                "decode_peak_fraction": decoded / peak,
                "decode_tokens_per_s": decoded,
                "decode_gflops": decoded * flops / 1e9,
                "matmul_gflops": peak * flops / 1e9,
            }
        )
    )


class Matmuls:
    """The linears of one decode step, each layer with weights of its own, as a model has them."""

    def __init__(self, shape: Shape) -> None:
        generator = torch.Generator().manual_seed(0)
        self._inputs = {inner: torch.randn(_ROWS, inner, generator=generator) for _, inner in shape.linears}
        self._packed = [
            (inner, torch.ops.mkldnn._reorder_linear_weight(torch.randn(out, inner, generator=generator), _ROWS))
            for out, inner in shape.linears
        ]

    @torch.inference_mode()
    def tokens_per_s(self) -> float:
        """Rows per second that pass through all of them."""
        passes, started = 0, time.perf_counter()
        while (elapsed := time.perf_counter() - started) < _MATMUL_S:
            for inner, weight in self._packed:
                torch.ops.mkldnn._linear_pointwise(self._inputs[inner], weight, None, "none", [], "")
            passes += 1
        return _ROWS * passes / elapsed


def decode_tokens_per_s(core: EngineCore, shape: Shape, turn: int) -> float:
    """Tokens per second from the step where every row decodes to the one before the first row ends."""
    asked = questions([row % PROMPTS for row in range(_ROWS)], shape.vocabulary_size, seed=turn)
    for row, question in enumerate(asked):
        core.submit(
            Submit(str(row), question.text, str(question.prompt), NEW_TOKENS, choosing=Choosing(ignore_eos=True))
        )
    begun: set[str] = set()
    while len(begun) < _ROWS:
        begun |= {output.id for output in core.step().outputs}
    made, ended, started = 0, False, time.perf_counter()
    measured_s = 0.0
    while core.has_work:
        outputs = core.step().outputs
        ended = ended or any(output.finish_reason is not None for output in outputs)
        if not ended:
            made += sum(len(output.token_ids) for output in outputs)
            measured_s = time.perf_counter() - started
    return made / measured_s


if __name__ == "__main__":
    main()
