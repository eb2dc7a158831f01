from __future__ import annotations

from itertools import islice, pairwise

import pytest
import torch
import torch.nn.functional as F
from peft import PromptTuningConfig, get_peft_model
from transformers import PreTrainedModel

from service.engines.base_model import BaseModel
from service.engines.local.weights import load_weights
from training.dataset import Tokens
from training.errors import Diverged
from training.optimise import Optimiser, answer_loss, learning_rate
from training.recipe import OptimiseRecipe

RECIPE = OptimiseRecipe(learning_rate=0.1, batch_size=3, max_steps=10, warmup_steps=2, evaluate_every=5, seed=3)


@pytest.fixture(scope="module")
def model(base: BaseModel) -> PreTrainedModel:
    return load_weights(base)


@pytest.fixture(scope="module")
def rows(base: BaseModel) -> list[Tokens]:
    texts = [("hello there", "greeting"), ("my money please", "get refund"), ("where", "track order"), ("a b c d", "x")]
    return [Tokens([0, *base.tokenizer.encode(text).ids], base.continuation(answer)) for text, answer in texts]


def start(seed: int = 1) -> torch.Tensor:
    return torch.randn(5, 192, generator=torch.Generator().manual_seed(seed)) * 0.1


def test_the_loss_is_the_mean_over_answer_tokens_alone(model: PreTrainedModel, rows: list[Tokens]) -> None:
    embedding, prompt, total, count = model.get_input_embeddings(), start(), 0.0, 0
    for row in rows:
        inputs = torch.cat([prompt[None], embedding(torch.tensor([row.prompt + row.answer]))], dim=1)
        logits = model(inputs_embeds=inputs).logits[0, -len(row.answer) - 1 : -1]
        total += float(F.cross_entropy(logits, torch.tensor(row.answer), reduction="sum"))
        count += len(row.answer)
    assert float(answer_loss(model, embedding, prompt, rows)) == pytest.approx(total / count, abs=1e-5)


def test_loss_and_gradient_equal_pefts(base: BaseModel, rows: list[Tokens]) -> None:
    ours = load_weights(base)
    prompt = torch.nn.Parameter(start())
    loss = answer_loss(ours, ours.get_input_embeddings(), prompt, rows[:1])
    loss.backward()
    peft = get_peft_model(load_weights(base), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=5))
    weight = peft.prompt_encoder["default"].embedding.weight
    weight.data = start()
    row = rows[0]
    ids = torch.tensor([row.prompt + row.answer])
    labels = torch.tensor([[-100] * len(row.prompt) + row.answer])
    output = peft(input_ids=ids, attention_mask=torch.ones_like(ids), labels=labels)
    output.loss.backward()
    assert float(loss.detach()) == pytest.approx(float(output.loss.detach()), abs=1e-5)
    torch.testing.assert_close(prompt.grad, weight.grad, atol=1e-5, rtol=1e-4)


def test_only_the_prompt_learns(base: BaseModel, rows: list[Tokens]) -> None:
    model = load_weights(base)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    optimiser = Optimiser(model, start(), RECIPE)
    losses = [step.loss for step in optimiser.steps(rows)]
    assert len(losses) == 10
    assert sum(losses[-3:]) < sum(losses[:3])
    assert not torch.equal(optimiser.prompt, start())
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name])
        assert all(parameter.grad is None for parameter in model.parameters())


def test_a_resumed_run_ends_at_the_same_bytes(model: PreTrainedModel, rows: list[Tokens]) -> None:
    whole = Optimiser(model, start(), RECIPE)
    list(whole.steps(rows))
    first = Optimiser(model, start(), RECIPE)
    list(islice(first.steps(rows), 4))
    second = Optimiser(model, start(seed=9), RECIPE)
    second.restore(first.tensors(), 4)
    assert [step.number for step in second.steps(rows)] == [5, 6, 7, 8, 9, 10]
    assert torch.equal(second.prompt, whole.prompt)


def test_the_rate_warms_up_and_decays_to_zero() -> None:
    rates = [learning_rate(RECIPE, step) for step in range(11)]
    assert rates[:2] == [0.05, 0.1]
    assert rates[2] == 0.1
    assert all(before > after for before, after in pairwise(rates[2:]))
    assert rates[10] == pytest.approx(0.0)


def test_a_loss_that_is_no_number_stops_the_run_with_a_remedy(model: PreTrainedModel, rows: list[Tokens]) -> None:
    broken = start()
    broken[0, 0] = float("nan")
    with pytest.raises(Diverged, match=r"the loss is nan .* at step 1; lower optimise\.learning_rate"):
        list(Optimiser(model, broken, RECIPE).steps(rows))
