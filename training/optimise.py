"""The optimisation: a frozen model, one Parameter [P, H], and a generator of steps."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from training.dataset import Tokens, batches
from training.errors import Diverged
from training.recipe import OptimiseRecipe


@dataclass(frozen=True, slots=True)
class Step:
    """One optimiser step: its number from 1, the mean loss in nats per answer token, and the text tokens it read."""

    number: int
    loss: float
    tokens: int


class Optimiser:
    """The learning soft prompt and its AdamW state."""

    def __init__(self, model: PreTrainedModel, prompt: Tensor, recipe: OptimiseRecipe) -> None:
        self._model = model
        self._embedding = model.get_input_embeddings()
        self._recipe = recipe
        self.prompt = torch.nn.Parameter(prompt.detach().clone().to(model.device))
        self._adamw = torch.optim.AdamW([self.prompt], lr=recipe.learning_rate, weight_decay=recipe.weight_decay)
        self.step = 0

    def steps(self, rows: Sequence[Tokens]) -> Iterator[Step]:
        """Train from the current step to the last. Raises Diverged when the loss is no finite number."""
        recipe = self._recipe
        for indices in batches(len(rows), recipe.batch_size, recipe.seed, self.step):
            if self.step >= recipe.max_steps:
                return
            chosen = [rows[index] for index in indices]
            for group in self._adamw.param_groups:
                group["lr"] = learning_rate(recipe, self.step)
            loss = answer_loss(self._model, self._embedding, self.prompt, chosen)
            self._adamw.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            norm = torch.nn.utils.clip_grad_norm_([self.prompt], recipe.clip_norm)
            value = float(loss.detach())
            if not (math.isfinite(value) and math.isfinite(float(norm))):
                raise Diverged(
                    f"the loss is {value} and its gradient's norm {float(norm)} at step {self.step + 1}; lower "
                    f"optimise.learning_rate (it is {recipe.learning_rate}) or raise optimise.warmup_steps"
                )
            self._adamw.step()
            self.step += 1
            yield Step(self.step, value, sum(row.length for row in chosen))

    def tensors(self) -> dict[str, Tensor]:
        """Everything that a resumed run needs, beside `step`."""
        state = self._adamw.state.get(self.prompt, {})
        zeros = torch.zeros_like(self.prompt)
        return {
            "prompt": self.prompt.detach().clone(),
            "first_moment": state.get("exp_avg", zeros).clone(),
            "second_moment": state.get("exp_avg_sq", zeros).clone(),
        }

    def restore(self, tensors: dict[str, Tensor], step: int) -> None:
        """Continue exactly where `tensors` and `step` were taken."""
        with torch.no_grad():
            self.prompt.copy_(tensors["prompt"])
        self.step = step
        self._adamw.state[self.prompt] = {
            "step": torch.tensor(float(step)),
            "exp_avg": tensors["first_moment"].to(self.prompt),
            "exp_avg_sq": tensors["second_moment"].to(self.prompt),
        }


def learning_rate(recipe: OptimiseRecipe, step: int) -> float:
    """The rate of step `step` (from 0): linear warm-up, then cosine decay to zero at the last step."""
    if step < recipe.warmup_steps:
        return recipe.learning_rate * (step + 1) / recipe.warmup_steps
    span = max(1, recipe.max_steps - recipe.warmup_steps)
    return recipe.learning_rate * 0.5 * (1.0 + math.cos(math.pi * (step - recipe.warmup_steps) / span))


def answer_loss(model: PreTrainedModel, embedding: torch.nn.Module, prompt: Tensor, rows: Sequence[Tokens]) -> Tensor:
    """Mean cross-entropy over all answer tokens of the rows, the soft prompt [P, H] before every token.

    Rows are padded on the right. Logits are computed only where some row has an answer.
    """
    length = prompt.shape[0]
    longest = max(row.length for row in rows)
    device = prompt.device
    ids = torch.zeros(len(rows), longest, dtype=torch.long)
    mask = torch.zeros(len(rows), length + longest, dtype=torch.long)
    targets = torch.full((len(rows), length + longest), -100, dtype=torch.long)
    for index, row in enumerate(rows):
        ids[index, : row.length] = torch.tensor(row.prompt + row.answer)
        mask[index, : length + row.length] = 1
        # The token at position t is predicted from position t - 1.
        begin = length + len(row.prompt) - 1
        targets[index, begin : begin + len(row.answer)] = torch.tensor(row.answer)
    wanted = (targets != -100).any(dim=0).nonzero()[:, 0]
    inputs = torch.cat([prompt.expand(len(rows), -1, -1).to(model.dtype), embedding(ids.to(device))], dim=1)
    output = model(
        inputs_embeds=inputs, attention_mask=mask.to(device), use_cache=False, logits_to_keep=wanted.to(device)
    )
    logits: Tensor = output.logits.float()
    return F.cross_entropy(logits.flatten(0, 1), targets[:, wanted].flatten().to(device), ignore_index=-100)
