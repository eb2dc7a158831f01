"""What the engine says of each architecture: the same as transformers, or why it is not served."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch

from prompt_store.prompts.soft_prompt import SoftPrompt
from service.engines.base_model import BaseModel
from service.engines.errors import BaseModelError
from service.engines.local.engine import EngineCore
from service.engines.local.model_runner import ModelRunner
from service.engines.local.options import EngineOptions
from service.engines.local.survey import survey
from tests.conftest import random_prompt
from tests.service.engines.local.driving import Collected, finish, register, score, step, submit
from tests.service.engines.local.oracle import Oracle
from tests.service.engines.local.tiny_models import (
    CONTEXT,
    HIDDEN,
    NAMED,
    REFUSED,
    UNUSUAL,
    WITHOUT_PROGRAM,
    make_model,
    save_base,
)

SOFT_PROMPT = random_prompt(3, 21, hidden_size=HIDDEN, scale=1.0)
# Text tokens and whether a soft prompt stands before them: within a block and the window, at their edges, beyond both.
REQUESTS = [(1, False), (3, True), (15, False), (16, True), (40, False), (70, True)]
NEW_TOKENS = 40


@dataclass
class Served:
    """An architecture's folder, and transformers' view of it."""

    name: str
    base: BaseModel
    oracle: Oracle
    requests: dict[str, tuple[list[int], SoftPrompt | None]] = field(default_factory=dict)

    def core(self, *, kernels: bool) -> EngineCore:
        options = EngineOptions(threads=1, max_batch_tokens=20, kv_memory_bytes=1 << 24, kernels=kernels)
        runner = ModelRunner.load(self.base, options)
        assert runner.recorded == (self.name not in WITHOUT_PROGRAM)
        return EngineCore(runner, options)


@pytest.fixture(scope="module")
def serve(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Served]:
    made: dict[str, Served] = {}

    def get(name: str) -> Served:
        if name not in made:
            model = make_model(name, {**NAMED, **UNUSUAL}[name])
            base = save_base(tmp_path_factory.mktemp("models") / name, model)
            generator = torch.Generator().manual_seed(1)
            requests = {
                f"{length} tokens": (
                    torch.randint(3, base.vocabulary_size, (length,), generator=generator).tolist(),
                    SOFT_PROMPT if behind else None,
                )
                for length, behind in REQUESTS
            }
            made[name] = Served(name, base, Oracle.load(base), requests)
        return made[name]

    return get


def ask(core: EngineCore, name: str, served: Served) -> None:
    ids, prompt = served.requests[name]
    submit(core, name, ids, register(core, prompt) if prompt is not None else None, max_tokens=NEW_TOKENS)


@pytest.mark.parametrize("kernels", [True, False], ids=["kernels", "torch"])
@pytest.mark.parametrize("name", NAMED)
def test_greedy_tokens_equal_transformers_alone_and_batched(
    serve: Callable[[str], Served], name: str, kernels: bool
) -> None:
    served = serve(name)
    core, oracle = served.core(kernels=kernels), served.oracle
    oracle.ties = 0
    together = Collected()
    for request in served.requests:
        ask(core, request, served)
        step(core, together)  # they come one after the other, so that prefills run beside decoding
    finish(core, together)
    for request, (ids, prompt) in served.requests.items():
        oracle.assert_equal(together.tokens[request], ids, prompt)
    for request in ("3 tokens", "40 tokens"):
        ask(core, request, served)
        alone = finish(core).tokens[request]
        if alone != together.tokens[request]:
            oracle.assert_equal(alone, *served.requests[request])
    assert oracle.ties <= 1
    assert len({token for tokens in together.tokens.values() for token in tokens}) > 40, "the answers hardly vary"


@pytest.mark.parametrize("name", UNUSUAL)
def test_what_is_unusual_is_served_exactly_too(serve: Callable[[str], Served], name: str) -> None:
    served = serve(name)
    core = served.core(kernels=True)
    served.oracle.ties = 0
    for request in served.requests:
        ask(core, request, served)
    collected = finish(core)
    for request, (ids, prompt) in served.requests.items():
        served.oracle.assert_equal(collected.tokens[request], ids, prompt)
    assert served.oracle.ties <= 1


@pytest.mark.parametrize("kernels", [True, False], ids=["kernels", "torch"])
@pytest.mark.parametrize("name", ["Gemma2", "Mixtral"])
def test_scores_equal_those_of_transformers(serve: Callable[[str], Served], name: str, kernels: bool) -> None:
    served = serve(name)
    core, oracle = served.core(kernels=kernels), served.oracle
    labels = [[7], [9, 1], [500, 501, 502, 503], list(range(1000, 1030))]
    for request, (ids, prompt) in served.requests.items():
        score(core, request, ids, register(core, prompt) if prompt is not None else None, labels)
    collected = finish(core)
    for request, (ids, prompt) in served.requests.items():
        for got, label in zip(collected.scores[request], labels, strict=True):
            inputs = torch.cat([oracle.embeddings(ids, prompt), oracle.embeddings(label, None)], dim=1)
            with torch.inference_mode():
                rows = oracle.model(inputs_embeds=inputs).logits[0, -len(label) - 1 : -1].double().log_softmax(-1)
            assert got == pytest.approx(float(rows.gather(1, torch.tensor(label)[:, None]).sum()), abs=1e-3, rel=1e-4)


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_served_exactly_is_refused_with_the_reason(tmp_path: Path, case: str) -> None:
    architecture, options, reason = REFUSED[case]
    base = save_base(tmp_path / "base", make_model(architecture, options))
    with pytest.raises(BaseModelError, match=reason):
        EngineCore.load(base, EngineOptions(threads=1, kv_memory_bytes=1 << 24))


def test_an_attention_that_says_another_window_than_transformers_masks_is_refused() -> None:
    model = make_model("Gemma2", NAMED["Gemma2"])
    shape = survey(model, CONTEXT)
    assert (shape.layers, shape.kv_heads, shape.head_dim) == (3, 2, 16)
    model.model.layers[2].self_attn.sliding_window += 1
    with pytest.raises(BaseModelError, match=r"masks other positions in layer 2 .*\(a window of 25\)"):
        survey(model, CONTEXT)


def test_attention_to_what_comes_later_is_refused(tmp_path: Path) -> None:
    model = make_model("Llama", NAMED["Llama"])
    model.config.is_causal = False
    base = save_base(tmp_path / "base", model)
    with pytest.raises(BaseModelError, match="masks other positions"):
        EngineCore.load(base, EngineOptions(threads=1, kv_memory_bytes=1 << 24))
