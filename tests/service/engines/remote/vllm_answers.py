"""A scripted vLLM: what its completions look like, and what the embeddings that it was sent say."""

from __future__ import annotations

import base64
import io
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any

import torch

from service.engines.base import GenerationRequest, RawText
from service.engines.base_model import BaseModel
from service.engines.build import build_vllm
from service.engines.remote.options import TransportOptions
from service.engines.remote.vllm import VllmEngine
from service.engines.remote.vllm_options import VllmOptions
from tests.providers import Answer, Asked, ScriptedProvider, event_stream, json_answer


def choice(text: str, ids: Sequence[int], reason: str | None = "length", index: int = 0, **more: Any) -> dict[str, Any]:
    return {"index": index, "text": text, "token_ids": list(ids), "finish_reason": reason, "logprobs": None, **more}


def completion(*choices: dict[str, Any]) -> dict[str, Any]:
    usage = {"prompt_tokens": 999, "completion_tokens": 999, "total_tokens": 1998}
    return {"id": "cmpl-1", "object": "text_completion", "choices": list(choices), "usage": usage}


def answered(*choices: dict[str, Any]) -> Answer:
    return json_answer(completion(*choices))


def streamed(*choices: dict[str, Any]) -> Answer:
    """A stream with a chunk for each of these."""
    return event_stream({"id": "cmpl-1", "choices": [one]} for one in choices)


def next_tokens(tables: Sequence[dict[int, float]]) -> dict[str, Any]:
    """The answer to a batch of prompts for one token each, and the log-probabilities shown for it."""
    return completion(
        *(
            choice("?", [0], index=index, logprobs=shown({token: table[token] for token in table}))
            for index, table in enumerate(tables)
        )
    )


def shown(table: dict[int, float]) -> dict[str, Any]:
    named = {f"token_id:{token}": value for token, value in table.items()}
    chosen, value = next(iter(named.items()))
    return {"tokens": [chosen], "token_logprobs": [value], "top_logprobs": [named], "text_offset": [0]}


def embedded(document: dict[str, Any]) -> list[torch.Tensor]:
    """The tensors that a body holds, as vLLM reads them."""
    return [torch.load(io.BytesIO(base64.b64decode(one)), weights_only=True) for one in document["prompt_embeds"]]


@asynccontextmanager
async def served(
    base: BaseModel, script: Sequence[Answer] | Callable[[Asked], Answer], **options: Any
) -> AsyncIterator[tuple[VllmEngine, ScriptedProvider]]:
    """An engine over a vLLM that plays a script."""
    async with ScriptedProvider(script) as provider:
        engine = build_vllm(base, TransportOptions((provider.url,)), VllmOptions(**options))
        await engine.start()
        try:
            yield engine, provider
        finally:
            await engine.close()


def request(text: str = "The house stood", **options: Any) -> GenerationRequest:
    return GenerationRequest("a", RawText(text), **{"stream": False, **options})
