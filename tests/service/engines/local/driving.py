"""Driving an EngineCore by hand: submit, step to the end, collect."""

from __future__ import annotations

from collections.abc import Sequence as Rows
from dataclasses import dataclass, field
from typing import Any

from prompt_store.prompts.soft_prompt import SoftPrompt
from service.engines.local.engine import EngineCore
from service.engines.local.messages import Choosing, Register, Score, Submit


@dataclass
class Collected:
    """What came out of an engine, by request."""

    tokens: dict[str, list[int]] = field(default_factory=dict)
    text: dict[str, str] = field(default_factory=dict)
    reasons: dict[str, str] = field(default_factory=dict)
    scores: dict[str, list[float]] = field(default_factory=dict)
    failures: dict[str, str] = field(default_factory=dict)

    @property
    def ended(self) -> set[str]:
        return {*self.reasons, *self.scores, *self.failures}


def register(core: EngineCore, prompt: SoftPrompt, *, pinned: bool = True) -> str:
    core.register(Register(prompt.digest, prompt.dtype, prompt.shape, prompt.data, pinned))
    return prompt.digest


CHOOSING = set(Choosing.__struct_fields__)


def submit(core: EngineCore, name: str, ids: list[int], soft_prompt: str | None = None, **options: Any) -> None:
    choosing = Choosing(**{key: options.pop(key) for key in CHOOSING & set(options)})
    core.submit(Submit(name, ids, soft_prompt, choosing=choosing, **{"max_tokens": 24, **options}))


def score(core: EngineCore, name: str, ids: list[int], soft_prompt: str | None, continuations: Rows[list[int]]) -> None:
    core.score(Score(name, ids, soft_prompt, list(continuations)))


def step(core: EngineCore, into: Collected) -> None:
    news = core.step()
    for output in news.outputs:
        assert output.id not in into.ended, "news after the end"
        into.tokens.setdefault(output.id, []).extend(output.token_ids)
        into.text[output.id] = into.text.get(output.id, "") + output.text
        if output.finish_reason is not None:
            into.reasons[output.id] = output.finish_reason
    for scored in news.scored:
        into.scores[scored.id] = scored.log_probabilities
    for failure in news.failures:
        into.failures[failure.id] = failure.message


def finish(core: EngineCore, into: Collected | None = None) -> Collected:
    into = into or Collected()
    for _ in range(10_000):
        if not core.has_work:
            return into
        step(core, into)
    raise AssertionError("the engine never came to an end")
