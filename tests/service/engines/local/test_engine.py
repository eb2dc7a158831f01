"""The engine against transformers and PEFT, alone and in mixed batches, and what happens when things go wrong."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from prompt_store.prompts.soft_prompt import SoftPrompt
from service.engines.base import RawText
from service.engines.base_model import BaseModel
from service.engines.errors import BaseModelError
from service.engines.local.engine import EngineCore
from service.engines.local.options import EngineOptions
from tests.conftest import random_prompt
from tests.service.engines.local.bases import grouped_model
from tests.service.engines.local.driving import Collected, finish, register, score, step, submit
from tests.service.engines.local.oracle import Oracle
from tests.service.engines.local.tiny_models import save_base

TEXTS = [
    "I want my money back for the broken kettle",
    "The house stood at the end of a long road, and",
    "Which season had 12 wins ?",
    "hello",
    "She looked at the sea. " * 12,
    "can you change the address of my order please, it is wrong",
]


def prompts() -> list[SoftPrompt | None]:
    """A different soft prompt for each text, of different lengths, and none for one."""
    return [random_prompt(1, 20), random_prompt(2, 5), None, random_prompt(3, 1), random_prompt(4, 100), None]


def test_greedy_tokens_equal_transformers_and_peft_alone(base: BaseModel, core: EngineCore, oracle: Oracle) -> None:
    for index, (text, prompt) in enumerate(zip(TEXTS, prompts(), strict=True)):
        ids = base.lay_out(RawText(text))
        digest = register(core, prompt) if prompt is not None else None
        submit(core, str(index), ids, digest)
        tokens = finish(core).tokens[str(index)]
        oracle.assert_equal(tokens, ids, prompt)
        if prompt is not None:
            ties = oracle.ties
            oracle.assert_equal(oracle.peft_tokens(ids, prompt, len(tokens)), ids, prompt)
            assert oracle.ties == ties, "the oracles differ from each other"
    assert oracle.ties <= 1


@pytest.mark.parametrize(("slots", "budget"), [(6, 512), (3, 7), (2, 1)])
def test_a_mixed_batch_answers_as_each_request_alone(
    base: BaseModel, make_core: Callable[..., EngineCore], oracle: Oracle, slots: int, budget: int
) -> None:
    core = make_core(max_sequences=slots, max_batch_tokens=budget)
    work = [
        (str(index), base.lay_out(RawText(text)), prompt)
        for index, (text, prompt) in enumerate(zip(TEXTS, prompts(), strict=True))
    ]
    collected = Collected()
    for name, ids, prompt in work:
        submit(core, name, ids, register(core, prompt, pinned=False) if prompt is not None else None)
        step(core, collected)
    finish(core, collected)
    assert collected.ended == {name for name, _, _ in work}
    for name, ids, prompt in work:
        oracle.assert_equal(collected.tokens[name], ids, prompt)
    assert core.stats().running == 0


def test_soft_prompts_change_answers_and_are_never_mixed_up(base: BaseModel, core: EngineCore) -> None:
    ids = base.lay_out(RawText(TEXTS[1]))
    names = {f"p{seed}": register(core, random_prompt(seed, 8)) for seed in range(6)}
    for name, digest in names.items():
        submit(core, name, ids, digest)
    together = finish(core).tokens
    for name, digest in reversed(names.items()):
        submit(core, name, ids, digest)
        assert finish(core).tokens[name] == together[name]
    assert len({tuple(tokens) for tokens in together.values()}) == len(names)


def test_scores_equal_those_of_transformers(base: BaseModel, core: EngineCore, oracle: Oracle) -> None:
    ids = base.lay_out(RawText(TEXTS[0]))
    prompt = random_prompt(5, 12)
    labels = [base.continuation(text) for text in ("get refund", "cancel order", "x", "", "order a spare part now")]
    score(core, "with", ids, register(core, prompt), labels)
    score(core, "without", ids, None, labels)
    submit(core, "beside", ids)
    collected = finish(core)
    for name, used in (("with", prompt), ("without", None)):
        for got, label in zip(collected.scores[name], labels, strict=True):
            inputs = torch.cat([oracle.embeddings(ids, used), oracle.embeddings(label, None)], dim=1)
            rows = oracle.model(inputs_embeds=inputs).logits[0, -len(label) - 1 : -1].double().log_softmax(-1)
            expected = float(rows.gather(1, torch.tensor(label)[:, None]).sum())
            assert got == pytest.approx(expected, abs=1e-3)
    oracle.assert_equal(collected.tokens["beside"], ids, None)


def test_a_seeded_request_says_the_same_alone_and_in_company(base: BaseModel, core: EngineCore) -> None:
    ids = base.lay_out(RawText(TEXTS[1]))
    sampled = {"temperature": 1.0, "top_p": 0.9, "top_k": 50, "seed": 11}
    submit(core, "alone", ids, **sampled)
    alone = finish(core).text["alone"]
    for seed in range(5):
        submit(core, f"other{seed}", ids, temperature=1.2, seed=seed)
    submit(core, "again", ids, **sampled)
    collected = finish(core)
    assert collected.text["again"] == alone
    assert collected.text["other1"] != collected.text["other2"]


def test_max_tokens_stop_strings_and_the_end_token_end_a_generation(base: BaseModel, core: EngineCore) -> None:
    ids = base.lay_out(RawText(TEXTS[1]))
    submit(core, "short", ids, max_tokens=3)
    submit(core, "long", ids, max_tokens=24)
    collected = finish(core)
    assert (len(collected.tokens["short"]), collected.reasons["short"]) == (3, "length")
    full = collected.text["long"]
    stop = full[len(full) // 2 :][:4]
    submit(core, "stopped", ids, stop=[stop])
    chat = base.lay_out(RawText("<s><|user|>I want a refund\n<|assistant|>"))
    submit(core, "ended", chat, max_tokens=100)
    collected = finish(core)
    assert (collected.text["stopped"], collected.reasons["stopped"]) == (full.split(stop)[0], "stop")
    assert (collected.reasons["ended"], collected.tokens["ended"][-1]) == ("stop", base.eos_token_id)


def test_a_generation_ends_where_the_context_does(base: BaseModel, core: EngineCore) -> None:
    prompt = random_prompt(6, 24)
    ids = base.lay_out(RawText(TEXTS[1]))
    ids = (ids * 1000)[: base.context_length - 24 - 3]
    submit(core, "full", ids, register(core, prompt), max_tokens=50)
    collected = finish(core)
    assert collected.reasons["full"] == "length" or collected.tokens["full"][-1] == base.eos_token_id
    assert len(collected.tokens["full"]) <= 3


@pytest.mark.parametrize("steps", [0, 1, 3])
def test_cancel_frees_the_slot_at_every_stage(
    base: BaseModel, make_core: Callable[..., EngineCore], steps: int
) -> None:
    core = make_core(max_sequences=2, max_batch_tokens=8)
    ids = base.lay_out(RawText(TEXTS[4]))
    collected = Collected()
    for name in ("a", "b", "c"):
        submit(core, name, ids)
    for _ in range(steps):
        step(core, collected)
    for name in ("a", "b", "c"):
        core.cancel(name)
    assert (core.stats().running, core.stats().waiting, core.has_work) == (0, 0, False)
    submit(core, "after", ids)
    assert finish(core).reasons["after"] == "length"
    assert not collected.ended


def test_a_soft_prompt_that_is_not_known_is_a_failure_not_a_wrong_answer(base: BaseModel, core: EngineCore) -> None:
    submit(core, "lost", base.lay_out(RawText("hello")), "0" * 64)
    assert "is not loaded" in finish(core).failures["lost"]


def test_releasing_a_prompt_waits_for_the_requests_that_need_it(
    base: BaseModel, make_core: Callable[..., EngineCore]
) -> None:
    core = make_core(max_sequences=1)
    digest = register(core, random_prompt(9, 6))
    ids = base.lay_out(RawText("hello"))
    submit(core, "running", ids, digest, max_tokens=4)
    submit(core, "waiting", ids, digest, max_tokens=4)
    core.release(digest)
    collected = finish(core)
    assert collected.tokens["running"] == collected.tokens["waiting"]
    assert core.stats().prompts == 0
    submit(core, "late", ids, digest)
    assert "late" in finish(core).failures


def test_a_soft_prompt_of_another_width_is_refused(core: EngineCore) -> None:
    with pytest.raises(ValueError, match=r"has H=64 but base model 'demo-base' has H=192"):
        register(core, random_prompt(1, 4, hidden_size=64))


def test_a_budget_that_holds_no_sequence_is_refused_with_both_numbers(base: BaseModel) -> None:
    with pytest.raises(BaseModelError, match=r"needs 8,110,080 bytes of KV but the budget is 1,000"):
        EngineCore.load(base, EngineOptions(kv_memory_bytes=1000))


def test_grouped_heads_and_untied_embeddings_are_served_exactly(tmp_path: Path) -> None:
    base = save_base(tmp_path / "grouped", grouped_model())
    core, oracle = EngineCore.load(base, EngineOptions()), Oracle.load(base)
    prompt = random_prompt(3, 9, hidden_size=48, scale=1.0)
    digest = register(core, prompt)
    ids = base.lay_out(RawText(TEXTS[0]))
    submit(core, "with", ids, digest)
    submit(core, "without", ids)
    tokens = finish(core).tokens
    oracle.assert_equal(tokens["with"], ids, prompt)
    oracle.assert_equal(tokens["without"], ids, None)


def test_positions_that_depend_on_the_batch_are_refused_at_load(tmp_path: Path) -> None:
    model = grouped_model()
    model.config.rope_parameters = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}
    base = save_base(tmp_path / "dynamic", model)
    with pytest.raises(BaseModelError, match="scales its positions by the longest sequence in the batch"):
        EngineCore.load(base, EngineOptions())
