"""What transformers and PEFT answer: the oracles that the engine's tokens are held against."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from peft import PromptTuningConfig, get_peft_model
from transformers import PreTrainedModel

from prompt_store.prompts.soft_prompt import SoftPrompt
from service.engines.base_model import BaseModel
from service.engines.local.weights import load_weights

# Two tokens whose logits differ by less than this may swap when rows are computed in another shape.
TIE = 1e-4


@dataclass
class Oracle:
    """Greedy answers of plain transformers; `ties` counts the comparisons that ended at a near tie."""

    model: PreTrainedModel
    ties: int = field(default=0)

    @classmethod
    def load(cls, base: BaseModel) -> Oracle:
        return cls(load_weights(base))

    def embeddings(self, ids: list[int], prompt: SoftPrompt | None) -> torch.Tensor:
        """[1, P + T, H]: the soft prompt before every token."""
        text = self.model.get_input_embeddings()(torch.tensor([ids]))
        return text if prompt is None else torch.cat([as_tensor(prompt)[None], text], dim=1)

    def assert_equal(self, tokens: list[int], ids: list[int], prompt: SoftPrompt | None) -> None:
        """Tokens are those of `generate(inputs_embeds=...)`, up to the first near tie of the oracle."""
        made = self.model.generate(
            inputs_embeds=self.embeddings(ids, prompt),
            attention_mask=torch.ones(1, len(ids) + (prompt.length if prompt else 0), dtype=torch.long),
            max_new_tokens=len(tokens),
            do_sample=False,
            output_logits=True,
            return_dict_in_generate=True,
        )
        expected = made.sequences[0].tolist()
        for position, (ours, theirs) in enumerate(zip(tokens, expected, strict=True)):
            if ours != theirs:
                first, second = made.logits[position][0].topk(2).values.tolist()
                assert first - second < TIE, f"token {position} is {ours}, transformers says {theirs}"
                self.ties += 1
                return

    def peft_tokens(self, ids: list[int], prompt: SoftPrompt, count: int) -> list[int]:
        """`PeftModel.generate`'s greedy tokens with this soft prompt."""
        config = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=prompt.length)
        peft = get_peft_model(self.model, config)
        try:
            peft.prompt_encoder["default"].embedding.weight.data = as_tensor(prompt)
            made = peft.generate(
                input_ids=torch.tensor([ids]),
                attention_mask=torch.ones(1, len(ids), dtype=torch.long),
                max_new_tokens=count,
                do_sample=False,
            )
        finally:
            self.model = peft.get_base_model()
        return [int(token) for token in made[0, len(ids) :].tolist()]


def as_tensor(prompt: SoftPrompt) -> torch.Tensor:
    """Float32 [P, H]."""
    return torch.from_numpy(prompt.to_float32().copy())
