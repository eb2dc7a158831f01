"""The compiled kernels against plain torch in float64, and the promise that a row never depends on its company."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import Tensor

from service.engines.local import kernels as compiled
from service.engines.local.attention import AttentionPlan, Segment, attend_planned
from service.engines.local.blocks import BLOCK_TOKENS, blocks_for
from service.engines.local.kernels import Kernels
from service.engines.local.kv_cache import KVShape, TurnedCache

LAYER = 1
NO_WINDOW = 0
NO_SOFTCAP = 0.0


@pytest.fixture(scope="module")
def kernels() -> Kernels:
    loaded = compiled.load()
    assert loaded is not None, "these tests need a C compiler"
    return loaded


@dataclass
class Written:
    """A sequence whose queries, keys and values [heads, T, D] are known, and the blocks where its KV goes."""

    query: Tensor
    key: Tensor
    value: Tensor
    blocks: list[int]

    def expected(self, window: int, softcap: float) -> Tensor:
        """[T, heads, D] in float64: every token sees its sequence up to itself."""
        heads, tokens, dim = self.query.shape
        group = heads // self.key.shape[0]
        key, value = (x.double().repeat_interleave(group, 0) for x in (self.key, self.value))
        scores = self.query.double() @ key.transpose(1, 2) * dim**-0.5
        if softcap:
            scores = torch.tanh(scores / softcap) * softcap
        own, other = torch.arange(tokens)[:, None], torch.arange(tokens)
        hidden = other > own
        if window:
            hidden |= other <= own - window
        return (scores.masked_fill(hidden, -math.inf).softmax(-1) @ value).transpose(0, 1)


@dataclass
class Bench:
    """A cache of shuffled blocks that hold rubbish, and sequences in it."""

    cache: TurnedCache
    sequences: list[Written]
    kernels: Kernels | None
    window: int
    softcap: float

    @classmethod
    def of(
        cls, kernels: Kernels | None, lengths: list[int], dim: int, group: int, *, window: int = NO_WINDOW,
        softcap: float = NO_SOFTCAP, kv_heads: int = 2,
    ) -> Bench:  # fmt: skip
        generator = torch.Generator().manual_seed(dim * 100 + group)
        blocks = sum(blocks_for(length) for length in lengths) + 3
        shape = KVShape(2, kv_heads, dim, torch.float32, torch.device("cpu"))
        cache = TurnedCache(shape, blocks)
        cache.keys.fill_(math.nan)  # what a freed block holds may be anything
        cache.values.fill_(math.nan)
        cache.keys[..., dim:, :] = 0
        cache.values[..., dim:] = 0
        free = torch.randperm(blocks, generator=generator).tolist()
        sequences = []
        for length in lengths:
            query, key, value = (
                torch.randn(heads, length, dim, generator=generator) for heads in (kv_heads * group, kv_heads, kv_heads)
            )
            own = [free.pop() for _ in range(blocks_for(length))]
            sequences.append(Written(query * 2, key, value, own))
        return cls(cache, sequences, kernels, window, softcap)

    def write_past(self, index: int, past: int) -> None:
        """Lay the first positions of a sequence into the cache, as a prefix is."""
        sequence, positions = self.sequences[index], torch.arange(past)
        blocks = torch.tensor(sequence.blocks)[positions // BLOCK_TOKENS]
        self.cache.write(LAYER, blocks, positions % BLOCK_TOKENS, sequence.key[:, :past], sequence.value[:, :past])

    def attend(self, spans: list[tuple[int, int, int]]) -> list[Tensor]:
        """One call over (sequence, past, count) each; returns [count, heads, D] for each."""
        table = np.zeros((len(spans), max(len(s.blocks) for s in self.sequences)), dtype=np.int32)
        segments, begin = [], 0
        for row, (index, past, count) in enumerate(spans):
            blocks = self.sequences[index].blocks
            table[row, : len(blocks)] = blocks
            segments.append(Segment(begin, count, row, past))
            begin += count
        plan = AttentionPlan(self.cache, table, segments, self.kernels)
        given = [
            torch.cat([getattr(self.sequences[i], name)[:, past : past + count] for i, past, count in spans], 1)[None]
            for name in ("query", "key", "value")
        ]
        dim = self.cache.shape.head_dim
        out = attend_planned(plan, *given, LAYER, dim**-0.5, self.softcap, self.window)[0]
        return [out[segment.begin : segment.begin + segment.count] for segment in segments]

    def assert_right(self, spans: list[tuple[int, int, int]]) -> None:
        for (index, past, count), got in zip(spans, self.attend(spans), strict=True):
            expected = self.sequences[index].expected(self.window, self.softcap)[past : past + count]
            torch.testing.assert_close(got.double(), expected, rtol=1e-4, atol=1e-5)


# A long prefill in the middle of a sequence, a decode beyond the span of 256, a first token, a decode, a whole prefill.
LENGTHS = [300, 280, 1, 17, 35]
SPANS = [(0, 240, 60), (1, 279, 1), (2, 0, 1), (3, 16, 1), (4, 0, 35)]


def mixed(kernels: Kernels | None, dim: int, group: int, **options: float) -> Bench:
    bench = Bench.of(kernels, LENGTHS, dim, group, **options)
    for index, past, _ in SPANS:
        bench.write_past(index, past)
    return bench


@pytest.mark.parametrize("path", ["kernels", "torch"])
@pytest.mark.parametrize("dim", [8, 16, 32, 48, 64, 80, 128, 256])
def test_attention_over_scattered_blocks_equals_plain_attention(kernels: Kernels, dim: int, path: str) -> None:
    mixed(kernels if path == "kernels" else None, dim, 3).assert_right(SPANS)


@pytest.mark.parametrize("group", range(1, 13))
def test_attention_takes_any_number_of_query_heads_for_a_key_head(kernels: Kernels, group: int) -> None:
    mixed(kernels, 20, group).assert_right(SPANS)


@pytest.mark.parametrize("path", ["kernels", "torch"])
@pytest.mark.parametrize("softcap", [NO_SOFTCAP, 2.0, 50.0])
@pytest.mark.parametrize("window", [1, 15, 16, 17, 250, 256, 257, 1000])
def test_windows_and_soft_caps_equal_plain_attention(kernels: Kernels, window: int, softcap: float, path: str) -> None:
    mixed(kernels if path == "kernels" else None, 16, 2, window=window, softcap=softcap).assert_right(SPANS)


@pytest.mark.parametrize("window", [NO_WINDOW, 21, 260])
@pytest.mark.parametrize("group", [1, 2, 3, 5, 12])
@pytest.mark.parametrize("dim", [16, 48])
def test_a_row_is_bit_identical_however_tokens_are_cut_into_calls(
    kernels: Kernels, dim: int, group: int, window: int
) -> None:
    length = 290
    whole = Bench.of(kernels, [length], dim, group, window=window).attend([(0, 0, length)])[0]
    for cuts in ([20, 40, 256, 271], [1, 2, 5, 250, 255, 257], list(range(270, length))):
        bench = Bench.of(kernels, [length], dim, group, window=window)
        edges = [0, *cuts, length]
        pieces = [bench.attend([(0, begin, end - begin)])[0] for begin, end in pairwise(edges)]
        assert torch.equal(torch.cat(pieces), whole)


@pytest.mark.parametrize("group", [1, 3, 9])
def test_a_row_is_bit_identical_whatever_else_is_in_the_call(kernels: Kernels, group: int) -> None:
    together = mixed(kernels, 32, group).attend(SPANS)
    for index, span in enumerate(SPANS):
        assert torch.equal(mixed(kernels, 32, group).attend([span])[0], together[index])
    for index, got in zip([3, 0, 1], mixed(kernels, 32, group).attend([SPANS[i] for i in (3, 0, 1)]), strict=True):
        assert torch.equal(got, together[index])


def test_attention_writes_its_own_layer_and_places_only(kernels: Kernels) -> None:
    bench = Bench.of(kernels, [20], 24, 1)
    bench.attend([(0, 0, 20)])
    keys, values = bench.cache.read(LAYER, torch.tensor([bench.sequences[0].blocks]), 20)
    assert torch.equal(keys[0].transpose(1, 2), bench.sequences[0].key)
    assert torch.equal(values[0], bench.sequences[0].value)
    assert bench.cache.keys[0, :, :, :24].isnan().all()
    assert int((~bench.cache.keys[LAYER, :, 0, 0].isnan()).sum()) == 20


def test_heads_may_lie_apart_in_memory(kernels: Kernels) -> None:
    bench = Bench.of(kernels, [33], 16, 2)
    sequence = bench.sequences[0]
    expected = bench.attend([(0, 0, 33)])[0]
    joined = torch.cat([x.transpose(0, 1).flatten(1) for x in (sequence.query, sequence.key, sequence.value)], 1)
    parts = joined.split([x.shape[0] * 16 for x in (sequence.query, sequence.key, sequence.value)], dim=1)
    sequence.query, sequence.key, sequence.value = (part.unflatten(1, (-1, 16)).transpose(0, 1) for part in parts)
    assert not sequence.query.is_contiguous()
    assert torch.equal(bench.attend([(0, 0, 33)])[0], expected)


@pytest.mark.parametrize("size", [1, 15, 16, 48, 64, 100, 576])
@pytest.mark.parametrize("magnitude", [1e-4, 1.0, 1e3])
def test_rms_norm_equals_its_formula_and_does_not_mix_rows(kernels: Kernels, size: int, magnitude: float) -> None:
    x, weight = torch.randn(2, 9, size) * magnitude, torch.randn(size)
    expected = x.double() / (x.double().square().mean(-1, keepdim=True) + 1e-6).sqrt() * weight.double()
    got = kernels.rms_norm(x, weight, 1e-6)
    torch.testing.assert_close(got.double(), expected, rtol=1e-5, atol=1e-7)
    assert torch.equal(kernels.rms_norm(x[1, 3:4], weight, 1e-6), got[1, 3:4])


@pytest.mark.parametrize("size", [1, 16, 31, 200])
def test_silu_multiply_takes_rows_of_a_wider_tensor(kernels: Kernels, size: int) -> None:
    both = torch.randn(70, 2 * size) * torch.logspace(-3, 3, 70)[:, None]
    gate, up = both[:, :size], both[:, size:]
    expected = torch.nn.functional.silu(gate.double()) * up.double()
    got = kernels.silu_multiply(gate, up)
    torch.testing.assert_close(got.double(), expected, rtol=1e-5, atol=1e-6)
    assert torch.equal(kernels.silu_multiply(gate[5:6], up[5:6]), got[5:6])


@pytest.mark.parametrize("dim", [2, 8, 30, 64, 128])
@pytest.mark.parametrize("tokens", [1, 3, 20])
def test_rotate_turns_halves_against_each_other(kernels: Kernels, dim: int, tokens: int) -> None:
    x = torch.randn(tokens, 3, dim).transpose(0, 1)
    cosine, sine = torch.randn(tokens, dim), torch.randn(tokens, dim)
    halves = torch.cat((-x[..., dim // 2 :], x[..., : dim // 2]), dim=-1)
    torch.testing.assert_close(kernels.rotate(x, cosine, sine), x * cosine + halves * sine, rtol=1e-5, atol=1e-6)
    contiguous = kernels.rotate(x.contiguous(), cosine, sine)
    assert torch.equal(contiguous, kernels.rotate(x, cosine, sine))


@pytest.mark.parametrize("rows", [1, 2, 11, 12, 13, 25, 40])
@pytest.mark.parametrize(("inputs", "outputs"), [(48, 80), (17, 33), (96, 31)])
def test_linear_adds_bias_and_residual_and_does_not_mix_rows(
    kernels: Kernels, inputs: int, outputs: int, rows: int
) -> None:
    x, weight, bias, added = (
        torch.randn(size) for size in ((rows, inputs), (outputs, inputs), outputs, (rows, outputs))
    )
    panels = compiled.panels_of(weight)
    product = x.double() @ weight.double().t()
    for given in (None, bias):
        for more in (None, added):
            got = kernels.linear(x, panels, given, outputs, more)
            expected = product + sum(part.double() for part in (given, more) if part is not None)
            torch.testing.assert_close(got.double(), expected, rtol=1e-5, atol=1e-4)
            alone = kernels.linear(x[-1:], panels, given, outputs, more[-1:] if more is not None else None)
            assert torch.equal(alone, got[-1:])


@pytest.mark.parametrize("size", [1, 16, 17, 4096, 4100])
def test_highest_is_the_first_of_the_highest(kernels: Kernels, size: int) -> None:
    rows = torch.randint(-5, 6, (40, size + 3)).float()[:, :size]
    rows[0] = -3.5
    rows[1] = torch.finfo(torch.float32).min
    expected = [row.tolist().index(max(row.tolist())) for row in rows]
    assert kernels.highest(rows).tolist() == expected


@pytest.mark.parametrize("place", [0, 20, 4095, 4099])
@pytest.mark.parametrize("wrong", [math.nan, math.inf, -math.inf])
def test_highest_of_what_is_not_finite_is_none(kernels: Kernels, wrong: float, place: int) -> None:
    rows = torch.randn(3, 4100)
    rows[1, place] = wrong
    whole = rows.argmax(-1).tolist()
    assert kernels.highest(rows).tolist() == [whole[0], -1, whole[2]]
