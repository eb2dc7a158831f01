"""A recorded program computes what was recorded for any number of tokens, or is refused."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from service.engines.local import kernels as compiled
from service.engines.local import operators
from service.engines.local.program import CannotRecord, Forward, Run, record

HIDDEN = 24
WEIGHT = torch.randn(HIDDEN, HIDDEN, generator=torch.Generator().manual_seed(0)) / 5


def recorded(forward: Forward) -> Run:
    with torch.no_grad():
        return record(forward, HIDDEN, {}, torch.zeros(1, HIDDEN))


def arguments(tokens: int, kept: int) -> tuple[Tensor, Tensor, Tensor]:
    """Embeddings, positions and kept rows that no trace has seen."""
    generator = torch.Generator().manual_seed(tokens)
    embeddings = torch.randn(1, tokens, HIDDEN, generator=generator)
    positions = torch.randint(0, 500, (1, tokens), generator=generator)
    return embeddings, positions, torch.randint(0, tokens, (kept,), generator=generator)


def assert_same(forward: Forward) -> None:
    run = recorded(forward)
    for tokens, kept in ((1, 1), (2, 1), (2, 2), (3, 2), (17, 5), (61, 47), (61, 1), (100, 100)):
        given = arguments(tokens, kept)
        assert torch.equal(run(*given, None), forward(*given)), (tokens, kept)


def test_the_result_follows_embeddings_positions_and_kept_rows() -> None:
    def forward(embeddings: Tensor, positions: Tensor, keep: Tensor) -> Tensor:
        angles = positions[..., None] * torch.linspace(0.1, 1, HIDDEN)
        return ((embeddings @ WEIGHT) * angles.cos())[:, keep].tanh()

    assert_same(forward)


def test_views_are_folded_right_for_one_token_and_for_many() -> None:
    def forward(embeddings: Tensor, positions: Tensor, keep: Tensor) -> Tensor:
        heads = (embeddings @ WEIGHT).view(1, -1, 3, 8).transpose(1, 2)
        first, second = heads.chunk(2, dim=-1)
        turned = torch.cat((-second, first), dim=-1) + heads
        mixed = (turned.softmax(-1) * heads).transpose(1, 2).reshape(1, -1, HIDDEN)
        flat = mixed.flatten(0, 1)[:, 2:].unsqueeze(0).expand(2, -1, -1)
        return (flat[1:] * embeddings[..., 2:])[:, keep]

    assert_same(forward)


def test_outputs_of_one_operator_are_taken_apart() -> None:
    def forward(embeddings: Tensor, positions: Tensor, keep: Tensor) -> Tensor:
        values, places = embeddings.topk(5, dim=-1)
        low, high = torch.nn.functional.layer_norm(values + places, (5,)).split([2, 3], dim=-1)
        return torch.cat((high, low), dim=-1)[:, keep]

    assert_same(forward)


def test_integer_indices_are_no_dependence_on_the_data() -> None:
    table = torch.randn(500, HIDDEN)

    def forward(embeddings: Tensor, positions: Tensor, keep: Tensor) -> Tensor:
        return (embeddings + table[positions])[:, keep]

    assert_same(forward)


def test_what_is_replaced_gets_the_plan() -> None:
    def forward(embeddings: Tensor, positions: Tensor, keep: Tensor) -> Tensor:
        return torch.relu(embeddings)[:, keep]

    with torch.no_grad():
        substitutes = {torch.ops.aten.relu.default: (lambda plan, x: x * plan, True)}
        run = record(forward, HIDDEN, substitutes, torch.zeros(1, HIDDEN))
    embeddings, positions, keep = arguments(4, 2)
    assert torch.equal(run(embeddings, positions, keep, 3.0), embeddings[:, keep] * 3.0)


def by_an_item(x: Tensor) -> Tensor:
    return x * 2 if x.sum().item() > 0 else x


def by_a_truth(x: Tensor) -> Tensor:
    return x * 2 if (x > 0).any() else x


def by_a_mask(x: Tensor) -> Tensor:
    chosen = x[0][x[0, :, 0] > 0]
    return (x * chosen.sum()) + chosen.mean()


def by_a_count(x: Tensor) -> Tensor:
    return x + (x[0, :, 0] > 0).nonzero().float().mean()


def by_repeating(x: Tensor) -> Tensor:
    return x + x[0].repeat_interleave((x[0, :, 0] > 0).long(), dim=0).sum()


def by_unique(x: Tensor) -> Tensor:
    return x + x.round().unique().sum()


@pytest.mark.parametrize("part", [by_an_item, by_a_truth, by_a_mask, by_a_count, by_repeating, by_unique])
def test_what_depends_on_the_data_is_refused(part: Callable[[Tensor], Tensor]) -> None:
    with pytest.raises(CannotRecord):
        recorded(lambda embeddings, positions, keep: part(embeddings)[:, keep])


def adding(x: Tensor) -> Tensor:
    return (x * 2).add_(1)


def filling(x: Tensor) -> Tensor:
    y = x * 2
    y[:, 0] = 0
    return y


@pytest.mark.parametrize("part", [adding, filling])
def test_writing_into_a_tensor_is_refused(part: Callable[[Tensor], Tensor]) -> None:
    with pytest.raises(CannotRecord, match="writes into a tensor"):
        recorded(lambda embeddings, positions, keep: part(embeddings)[:, keep])


def half(x: Tensor) -> Tensor:
    return x[:, : x.shape[1] // 2].sum() + x


def one_less(x: Tensor) -> Tensor:
    return torch.cat((x[:, 1:], x[:, :1]), dim=1)


def squared(x: Tensor) -> Tensor:
    return x + (x[0] @ x[0].T).flatten()[:: x.shape[1] + 1].sum()


def by_length(x: Tensor) -> Tensor:
    return x * x.shape[1]


def by_root_of_length(x: Tensor) -> Tensor:
    return x * x.shape[1] ** -0.5


def other_steps(x: Tensor) -> Tensor:
    return x.exp() if x.shape[1] > 64 else x.sin()


@pytest.mark.parametrize("part", [half, one_less, squared, by_root_of_length, other_steps])
def test_sizes_that_follow_no_rule_are_refused(part: Callable[[Tensor], Tensor]) -> None:
    with pytest.raises(CannotRecord):
        recorded(lambda embeddings, positions, keep: part(embeddings)[:, keep])


def test_a_size_that_is_a_multiple_is_followed() -> None:
    assert_same(lambda embeddings, positions, keep: by_length(embeddings).repeat(1, 3, 1)[:, keep])


def as_complex(x: Tensor) -> Tensor:
    turned = torch.view_as_complex(x.view(1, -1, HIDDEN // 2, 2)) * torch.polar(torch.ones(12), torch.arange(12.0))
    return torch.view_as_real(turned).flatten(2)


def as_bits(x: Tensor) -> Tensor:
    return (x * 2).view(torch.int32).abs().float()


@pytest.mark.parametrize("part", [as_complex, as_bits])
def test_reading_a_tensor_as_another_type_is_refused(part: Callable[[Tensor], Tensor]) -> None:
    with pytest.raises(CannotRecord, match="reads a tensor as another type"):
        recorded(lambda embeddings, positions, keep: part(embeddings)[:, keep])


def test_a_residual_is_joined_with_the_linear_layer_before_it() -> None:
    loaded = compiled.load()
    assert loaded is not None, "this test needs a C compiler"
    panels = compiled.panels_of(WEIGHT)
    linear = torch.ops.softcue.linear

    def forward(embeddings: Tensor, positions: Tensor, keep: Tensor) -> Tensor:
        first = embeddings + linear(embeddings.tanh(), panels, None, HIDDEN)  # on either side
        second = linear(first.sin(), panels, WEIGHT[0], HIDDEN) + first
        product = linear(second, panels, None, HIDDEN)
        wide = product[:, keep] + second[:, :1]  # what is broadcast cannot be joined, nor what is needed again
        return torch.cat((wide, (product + second)[:, keep], product[:, keep]))

    calls: list[bool] = []

    def counted(*given: Tensor) -> Tensor:
        calls.append(True)
        return loaded.linear(*given)

    substitutes = {torch.ops.softcue.linear_add.default: (counted, False)}
    with torch.no_grad():
        run = record(forward, HIDDEN, substitutes, torch.zeros(1, HIDDEN), operators.join_additions)
    for tokens, kept in ((1, 1), (2, 1), (7, 3), (61, 47)):
        calls.clear()
        given = arguments(tokens, kept)
        torch.testing.assert_close(run(*given, None), forward(*given))
        assert len(calls) == 2
