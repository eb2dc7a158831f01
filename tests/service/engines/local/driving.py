"""Driving an EngineCore by hand: submit, step to the end, collect."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from collections.abc import Sequence as Rows
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from prompt_store.prompts.soft_prompt import SoftPrompt
from service.engines.local.engine import EngineCore
from service.engines.local.messages import Choosing, Logprob, Register, Score, Submit
from service.engines.local.model_runner import Logits, ModelRunner
from service.engines.local.scheduler import Batch


@dataclass
class Collected:
    """What came out of an engine, by request: `tokens`, `text` and `reasons` of first choices, `choices` of all."""

    choices: dict[str, dict[int, Said]] = field(default_factory=dict)
    scores: dict[str, list[float]] = field(default_factory=dict)
    failures: dict[str, str] = field(default_factory=dict)
    kinds: dict[str, str] = field(default_factory=dict)
    prompts: dict[str, list[Logprob | None]] = field(default_factory=dict)
    registered: dict[str, str | None] = field(default_factory=dict)

    @property
    def tokens(self) -> dict[str, list[int]]:
        return {name: choices[0].tokens for name, choices in self.choices.items() if 0 in choices}

    @property
    def text(self) -> dict[str, str]:
        return {name: choices[0].text for name, choices in self.choices.items() if 0 in choices}

    @property
    def reasons(self) -> dict[str, str]:
        return {
            name: choices[0].reason
            for name, choices in self.choices.items()
            if 0 in choices and choices[0].reason is not None
        }

    @property
    def ended(self) -> set[str]:
        return {*self.reasons, *self.scores, *self.failures}

    def all_tokens(self, name: str) -> list[list[int]]:
        """The tokens of each choice."""
        return [choice.tokens for _, choice in sorted(self.choices[name].items())]


@dataclass
class Said:
    """One choice so far."""

    tokens: list[int] = field(default_factory=list)
    text: str = ""
    reason: str | None = None
    logprobs: list[Logprob] = field(default_factory=list)
    news: int = 0


def register(core: EngineCore, prompt: SoftPrompt, *, pinned: bool = True) -> str:
    core.register(Register(prompt.digest, prompt.dtype, prompt.shape, prompt.data, pinned))
    return prompt.digest


CHOOSING = set(Choosing.__struct_fields__)


def submit(core: EngineCore, name: str, ids: list[int], soft_prompt: str | None = None, **options: Any) -> None:
    choosing = Choosing(**{key: options.pop(key) for key in CHOOSING & set(options)})
    core.submit(Submit(name, ids, soft_prompt, choosing=choosing, **{"max_tokens": 24, **options}))


def score(
    core: EngineCore,
    name: str,
    ids: list[int],
    soft_prompt: str | None,
    continuations: Rows[list[int]],
    **options: Any,
) -> None:
    core.score(Score(name, ids, soft_prompt, list(continuations), **options))


def step(core: EngineCore, into: Collected) -> None:
    news = core.step()
    for prompt in news.prompts:
        assert prompt.id not in into.prompts
        assert prompt.id not in into.choices, "the prompt comes first"
        into.prompts[prompt.id] = prompt.logprobs
    for output in news.outputs:
        assert output.id not in into.failures, "news after the end"
        said = into.choices.setdefault(output.id, {}).setdefault(output.index, Said())
        assert said.reason is None, "news after the end"
        said.tokens += output.token_ids
        said.text += output.text
        said.reason = output.finish_reason
        said.logprobs += output.logprobs
        said.news += 1
    for scored in news.scored:
        assert scored.id not in into.ended
        into.scores[scored.id] = scored.log_probabilities
    for failure in news.failures:
        assert failure.id not in into.ended, "it failed after its end"
        into.failures[failure.id] = failure.message
        into.kinds[failure.id] = failure.kind
    for registered in news.registered:
        into.registered[registered.digest] = registered.error


def finish(core: EngineCore, into: Collected | None = None) -> Collected:
    into = into or Collected()
    for _ in range(10_000):
        if not core.has_work:
            return into
        step(core, into)
    raise AssertionError("the engine never came to an end")


def assert_idle(core: EngineCore) -> None:
    """Nothing runs or waits, and all memory that is in use is that of cached prompts."""
    stats = core.stats()
    assert (stats.running, stats.waiting, core.has_work) == (0, 0, False)
    assert stats.kv_bytes == stats.prompt_bytes <= stats.kv_budget_bytes


def with_blocks(runner: ModelRunner, blocks: int) -> ModelRunner:
    """The same model over a KV cache of its own of so many blocks."""
    other = copy.copy(runner)
    other.cache = type(runner.cache)(runner.cache.shape, blocks)
    other.blocks = blocks - runner.cache.shape.scrap_blocks
    return other


class Watched:
    """A ModelRunner whose passes can be watched, timed and made to fail.

    `before` sees each batch before it is computed, and may raise.
    """

    def __init__(self, runner: ModelRunner, before: Callable[[Batch], None]) -> None:
        self._runner = runner
        self._before = before

    def __getattr__(self, name: str) -> Any:
        return getattr(self._runner, name)

    def run(self, batch: Batch, tensors: Mapping[str, Tensor]) -> Logits:
        self._before(batch)
        return self._runner.run(batch, tensors)


class Clock:
    """Time that passes when it is told to."""

    def __init__(self) -> None:
        self.now_s = 0.0

    def __call__(self) -> float:
        return self.now_s
