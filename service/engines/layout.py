"""Laying a request's prompt out before an engine sees it, and refusing what its base model cannot take."""

from __future__ import annotations

import asyncio

from service.engines.base import Prompt, SoftPromptReference, text_size
from service.engines.base_model import BaseModel
from service.engines.errors import WrongBase

_LONG_TEXT = 20_000


async def lay_out(base: BaseModel, prompt: Prompt, soft_prompt: SoftPromptReference | None) -> list[int]:
    """The prompt's token ids, before which the soft prompt stands.

    Raises InvalidRequest for a prompt that is none, WrongBase and PromptTooLong.
    """
    if text_size(prompt) > _LONG_TEXT:  # the tokenizer lets other threads run meanwhile
        token_ids = await asyncio.to_thread(base.lay_out, prompt)
    else:
        token_ids = base.lay_out(prompt)
    if soft_prompt is not None:
        check_base(base, soft_prompt)
    base.check_length(len(token_ids), soft_prompt.length if soft_prompt else 0)
    return token_ids


def check_base(base: BaseModel, soft_prompt: SoftPromptReference) -> None:
    """Raise WrongBase for a soft prompt that was tuned on another base model."""
    if soft_prompt.base_fingerprint != base.fingerprint:
        raise WrongBase(
            f"soft prompt {soft_prompt.digest[:12]} was tuned on base {soft_prompt.base_fingerprint[:12]} but this "
            f"service runs '{base.name}' ({base.fingerprint[:12]}); retrain it on this base",
            parameter="model",
        )
