"""Runners over pages on a CPU: everything that a CUDA machine runs but its kernels and its graphs."""

from __future__ import annotations

from dataclasses import replace

from service.engines.base_model import BaseModel
from service.engines.local.kv_cache import PagedCache
from service.engines.local.model_runner import ModelRunner, eager_logits, probe_ids
from service.engines.local.packing import pack
from service.engines.local.survey import survey
from service.engines.local.varlen import VarlenAttention
from service.engines.local.weights import load_weights


def paged_runner(
    base: BaseModel, varlen: VarlenAttention | None, *, blocks: int = 120, page: int = 16, packed: bool = False
) -> ModelRunner:
    """A probed runner over pages. Without `varlen`, torch gathers from them.

    `packed` linear layers make a row's result independent of how many rows there are.
    """
    model = load_weights(base, attention_implementation="eager")
    shape = replace(survey(model, base.context_length), layout="pages", block_tokens=page)
    expected = eager_logits(model, probe_ids(base.vocabulary_size))
    if packed:
        pack(model, None)
    runner = ModelRunner(base, model, PagedCache(shape, blocks), varlen=varlen)
    runner.hold_against(expected)
    return runner
