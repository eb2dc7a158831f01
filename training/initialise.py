"""Where a soft prompt starts. Each function returns float32 [P, H], detached. `embeddings` is the base's [V, H]."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from prompt_store.prompts.task import Task
from service.engines.base_model import BaseModel
from training.errors import InitialisationError
from training.recipe import Recipe

COMMON_TOKENS = 5000


def initial_prompt(recipe: Recipe, task: Task, base: BaseModel, embeddings: Tensor) -> Tensor:
    """The start that a recipe asks for. Raises InitialisationError."""
    generator = torch.Generator().manual_seed(recipe.optimise.seed)
    length = recipe.prompt.length
    match recipe.prompt.initialise:
        case "text":
            return from_text(recipe.prompt.text or "", length, base, embeddings)
        case "labels":
            return from_labels(task.labels, length, base, embeddings, generator)
        case "vocabulary":
            return from_vocabulary(length, base, embeddings, generator)
        case "random":
            return from_random(length, embeddings, generator)


def from_text(text: str, length: int, base: BaseModel, embeddings: Tensor) -> Tensor:
    """The embeddings of a text, repeated until all positions are filled.

    Raises InitialisationError when the text is empty or has more tokens than positions: nothing is cut off.
    """
    ids = base.tokenizer.encode(text, add_special_tokens=False).ids
    if not ids:
        raise InitialisationError("prompt.text has no tokens; write the text to start from")
    if len(ids) > length:
        raise InitialisationError(
            f"prompt.text has {len(ids)} tokens but prompt.length is {length}; "
            f"shorten it or set prompt.length to {len(ids)}"
        )
    repeated = (ids * (length // len(ids) + 1))[:length]
    return embeddings[repeated].float().clone()


def from_labels(
    labels: Sequence[str], length: int, base: BaseModel, embeddings: Tensor, generator: torch.Generator
) -> Tensor:
    """Start positions at label embeddings; fill the rest from common vocabulary.

    A label of several tokens contributes their mean.
    Raises InitialisationError when there are more labels than positions, or none.
    Source: Lester et al. 2021, arXiv:2104.08691, section 3.2.
    """
    if not labels:
        raise InitialisationError("the task has no labels; choose another prompt.initialise")
    if len(labels) > length:
        raise InitialisationError(
            f"{len(labels)} labels do not fit prompt.length = {length}; set it to {len(labels)} or more"
        )
    means = [
        embeddings[base.tokenizer.encode(label, add_special_tokens=False).ids].float().mean(dim=0) for label in labels
    ]
    rest = from_vocabulary(length - len(labels), base, embeddings, generator)
    return torch.cat([torch.stack(means), rest])


def from_vocabulary(length: int, base: BaseModel, embeddings: Tensor, generator: torch.Generator) -> Tensor:
    """Embeddings of tokens drawn without replacement from the first 5,000 of the vocabulary.

    Tokenizers number tokens from frequent to rare. Special tokens are left out.
    Source: Lester et al. 2021, arXiv:2104.08691, section 3.2.
    """
    special = {token for token, added in base.tokenizer.get_added_tokens_decoder().items() if added.special}
    common = [token for token in range(min(COMMON_TOKENS + len(special), len(embeddings))) if token not in special]
    if length > len(common):
        raise InitialisationError(f"prompt.length is {length} but only {len(common)} tokens can be drawn; shorten it")
    drawn = torch.randperm(len(common), generator=generator)[:length].tolist()
    return embeddings[[common[index] for index in drawn]].float().clone()


def from_random(length: int, embeddings: Tensor, generator: torch.Generator) -> Tensor:
    """Normal numbers with the standard deviation of the base's embeddings."""
    spread = float(embeddings.float().std())
    return torch.randn(length, embeddings.shape[1], generator=generator) * spread
