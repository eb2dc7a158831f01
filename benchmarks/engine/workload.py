"""What every side is asked: soft prompts, texts, and the requests of both servers' APIs that carry them."""

from __future__ import annotations

import base64
import io
import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from benchmarks.engine.shapes import SPECIAL_TOKENS

PROMPTS, PROMPT_LENGTH, TEXT_TOKENS, NEW_TOKENS = 16, 100, 24, 64


@dataclass(frozen=True)
class Question:
    """Token ids behind one of the soft prompts; `prompt` None asks the bare base model."""

    text: list[int]
    prompt: int | None
    new_tokens: int = NEW_TOKENS


def soft_prompts(count: int, hidden_size: int) -> Tensor:
    """Soft prompts, float32 [count, P, H], as large as embeddings are."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(count, PROMPT_LENGTH, hidden_size, generator=generator) * 0.02


def questions(
    prompts: Sequence[int | None], vocabulary_size: int, seed: int, *, text: int = TEXT_TOKENS, new: int = NEW_TOKENS
) -> list[Question]:
    """A question to each of these prompts, with so many tokens of text and new tokens.

    Texts differ from question to question and from seed to seed.
    """
    draw = random.Random(seed)
    tokens = range(len(SPECIAL_TOKENS), vocabulary_size)
    return [Question(draw.choices(tokens, k=text), prompt, new) for prompt in prompts]


def task_name(prompt: int) -> str:
    """The task that a soft prompt is published for."""
    return f"bench-{prompt:04}"


def softcue_request(base_name: str, question: Question, *, stream: bool = False) -> bytes:
    """The question as our service takes it: the task by its name, the text as token ids."""
    model = base_name if question.prompt is None else task_name(question.prompt)
    return post({"model": model, "prompt": question.text, **_greedy(question), "stream": stream})


@dataclass(frozen=True)
class PromptEmbeds:
    """Writes a question as vLLM takes it: soft prompt and embedded text as one tensor [P + T, H].

    vLLM's wire format is `torch.save`; nothing here reads it.
    """

    base: Path
    prompts: Tensor

    @cached_property
    def _embedding(self) -> Tensor:
        return load_file(self.base / "model.safetensors")["model.embed_tokens.weight"]

    def request(self, question: Question) -> bytes:
        assert question.prompt is not None
        written = io.BytesIO()
        torch.save(torch.cat([self.prompts[question.prompt], self._embedding[question.text]]), written)
        embeds = base64.b64encode(written.getvalue()).decode("ascii")
        return post({"model": str(self.base), "prompt_embeds": embeds, **_greedy(question)})


def post(document: dict[str, object], path: str = "/v1/completions") -> bytes:
    """The bytes of an HTTP/1.1 request with a JSON body."""
    body = json.dumps(document).encode("utf-8")
    head = [f"POST {path} HTTP/1.1", "host: bench", "content-type: application/json", f"content-length: {len(body)}"]
    return "\r\n".join([*head, "", ""]).encode("ascii") + body


def _greedy(question: Question) -> dict[str, object]:
    return {"max_tokens": question.new_tokens, "temperature": 0, "ignore_eos": True}
