"""How a base model is served through vLLM. Frozen values; where they come from is settings'."""

from __future__ import annotations

from dataclasses import dataclass

from service.engines.base import MAX_LOGPROBS
from service.engines.local.options import Precision


@dataclass(frozen=True, slots=True)
class VllmOptions:
    """What this service must know of how vLLM was started; all replicas alike.

    `model` is vLLM's `--served-model-name`, needed only where it serves several. `dtype` is its `--dtype`: embeddings
    are sent in it, and `auto` is what the base model's configuration names. `context_length` is its `--max-model-len`
    where that is less than the base model's own. `max_logprobs` is its `--max-logprobs`: a task with more labels than
    that takes a request for each that is not among the most probable. Encoded soft prompts are kept in
    `prompt_memory_bytes`. How much white space structured answers may have is vLLM's `--structured-outputs-config`.
    """

    model: str | None = None
    dtype: Precision = "auto"
    context_length: int | None = None
    max_logprobs: int = MAX_LOGPROBS
    prompt_memory_bytes: int = 64 * 2**20
