"""Accuracy and calibration of label scoring, with and without length normalisation and contextual calibration.

    python -m benchmarks.label_scoring [FOLDER of a classify example]

Scores the held-out rows by the engine that serves, three times: by the tuned prompt, by the bare base, and by the
recipe's text prompt. The expected calibration error is over ten equal bins of the top label's probability (Guo et al.
2017, arXiv 1706.04599, equation 3). The defaults of /v1/tasks/{task}/classify rest on this table.
"""

from __future__ import annotations

import asyncio
import dataclasses
import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from prompt_store.prompts.artifact import read_artifact
from prompt_store.prompts.task import Message, Task, load_task
from service.engines.base import Engine, Messages, ScoreRequest, Scores, SoftPromptReference
from service.engines.base_model import BaseModel, open_base_model
from service.engines.local.client import LocalEngine
from service.engines.local.engine import EngineCore
from service.engines.local.options import EngineOptions
from service.engines.local.thread import ThreadHost
from service.engines.scoring import CONTENT_FREE, Normalise, label_log_probabilities
from training.dataset import Findings, read_examples
from training.recipe import load_recipe

BINS = 10


def main() -> None:
    """Print the table of one example."""
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent.parent / "examples" / "support_intents"
    asyncio.run(measure(folder))


async def measure(folder: Path) -> None:
    recipe = load_recipe(folder / "recipe.toml")
    task = load_task(folder / recipe.task)
    base = open_base_model(folder / recipe.base)
    rows = read_examples(folder / recipe.data.test, task, Findings())
    right = [task.labels.index(row.answer) for row in rows]
    tuned = SoftPromptReference.to(read_artifact(folder / "prompt.safetensors").prompt, base.fingerprint)
    instruction = (Message(role="system", content=recipe.baseline.text),)
    inputs = [*(row.inputs for row in rows), dict.fromkeys(task.inputs, CONTENT_FREE)]
    host = ThreadHost(lambda: EngineCore.load(base, EngineOptions()))
    engine = LocalEngine(base, host, max_waiting=len(inputs))
    await engine.start()
    try:
        print(f"{folder.name}: {len(rows)} held-out rows, {len(task.labels)} labels\n")
        print("| prompt | normalise | calibrate | accuracy | expected calibration error |\n|---|---|---|---|---|")
        for name, soft_prompt, before in (("soft", tuned, ()), ("none", None, ()), ("text", None, instruction)):
            *scores, prior = await score(engine, base, task, inputs, soft_prompt, before)
            for normalise in ("none", "length"):
                for calibrate in (False, True):
                    accuracy, error = judge(scores, right, normalise, prior if calibrate else None)
                    used = "yes" if calibrate else "no"
                    print(f"| {name} | {normalise} | {used} | {accuracy:.1%} | {error:.3f} |")
    finally:
        await engine.close()


async def score(
    engine: Engine,
    base: BaseModel,
    task: Task,
    inputs: Sequence[Mapping[str, str]],
    soft_prompt: SoftPromptReference | None,
    before: tuple[Message, ...],
) -> list[Scores]:
    lengths = tuple(len(base.continuation(label)) for label in task.labels)
    given = await asyncio.gather(
        *(
            engine.score(ScoreRequest(str(place), Messages((*before, *task.render(one))), task.labels, soft_prompt))
            for place, one in enumerate(inputs)
        )
    )
    return [dataclasses.replace(scores, lengths=lengths) for scores in given]


def judge(
    rows: Sequence[Scores], right: Sequence[int], normalise: Normalise, prior: Scores | None
) -> tuple[float, float]:
    """Accuracy and expected calibration error."""
    bins: list[list[tuple[float, bool]]] = [[] for _ in range(BINS)]
    for scores, answer in zip(rows, right, strict=True):
        values = label_log_probabilities(scores, normalise, prior)
        best = max(range(len(values)), key=values.__getitem__)
        confidence = math.exp(values[best])
        bins[min(int(confidence * BINS), BINS - 1)].append((confidence, best == answer))
    accuracy = sum(hit for rows_of_bin in bins for _, hit in rows_of_bin) / len(rows)
    error = sum(abs(sum(hit - confidence for confidence, hit in rows_of_bin)) for rows_of_bin in bins) / len(rows)
    return accuracy, error


if __name__ == "__main__":
    main()
