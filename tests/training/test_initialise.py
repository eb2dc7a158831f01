from __future__ import annotations

import pytest
import torch

from service.engines.base_model import BaseModel
from service.engines.local.weights import embedding_matrix, load_weights
from training.errors import InitialisationError
from training.initialise import COMMON_TOKENS, from_labels, from_random, from_text, from_vocabulary


@pytest.fixture(scope="module")
def embeddings(base: BaseModel) -> torch.Tensor:
    return embedding_matrix(load_weights(base))


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(5)


def test_text_is_repeated_until_all_positions_are_filled(base: BaseModel, embeddings: torch.Tensor) -> None:
    ids = base.tokenizer.encode("name the colour").ids
    prompt = from_text("name the colour", len(ids) * 2 + 1, base, embeddings)
    assert torch.equal(prompt, embeddings[[*ids, *ids, ids[0]]])


def test_text_that_does_not_fit_is_refused_with_both_numbers(base: BaseModel, embeddings: torch.Tensor) -> None:
    with pytest.raises(InitialisationError, match=r"prompt\.text has \d+ tokens but prompt\.length is 2"):
        from_text("name the colour of this thing", 2, base, embeddings)


def test_labels_contribute_their_mean_and_vocabulary_the_rest(base: BaseModel, embeddings: torch.Tensor) -> None:
    labels = ["track order", "x"]
    prompt = from_labels(labels, 5, base, embeddings, generator())
    for row, label in zip(prompt, labels, strict=False):
        torch.testing.assert_close(row, embeddings[base.tokenizer.encode(label).ids].mean(dim=0))
    assert torch.equal(prompt[2:], from_vocabulary(3, base, embeddings, generator()))


def test_more_labels_than_positions_are_refused(base: BaseModel, embeddings: torch.Tensor) -> None:
    with pytest.raises(InitialisationError, match=r"3 labels do not fit prompt\.length = 2; set it to 3"):
        from_labels(["a", "b", "c"], 2, base, embeddings, generator())
    with pytest.raises(InitialisationError, match="no labels"):
        from_labels([], 2, base, embeddings, generator())


def test_vocabulary_draws_different_ordinary_tokens(base: BaseModel, embeddings: torch.Tensor) -> None:
    prompt = from_vocabulary(60, base, embeddings, generator())
    rows = [int((embeddings == row).all(dim=1).nonzero()[0]) for row in prompt]
    assert len(set(rows)) == 60
    assert min(rows) > 5
    assert max(rows) < COMMON_TOKENS
    assert torch.equal(prompt, from_vocabulary(60, base, embeddings, generator()))


def test_random_has_the_spread_of_the_embeddings(embeddings: torch.Tensor) -> None:
    prompt = from_random(200, embeddings, generator())
    assert prompt.shape == (200, 192)
    assert float(prompt.std()) == pytest.approx(float(embeddings.std()), rel=0.05)
