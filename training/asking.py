"""Asking a running service over HTTP, row by row: whole routes and what answers in them can only be judged there."""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any

import httpx

from prompt_store.prompts.task import Task
from service.engines.remote.failures import retry_after_s
from training.calibrating import Judged
from training.dataset import Example
from training.errors import CalibrationError
from training.scorers import Scorer

_ATTEMPTS = 6
_LONGEST_WAIT_S = 60.0
_PATIENCE = httpx.Timeout(300.0, connect=10.0)

Sleep = Callable[[float], Awaitable[object]]


@dataclass(frozen=True, slots=True)
class Question:
    """What is asked of a service: answers of one version, by digest and label, with their confidence by `measure`."""

    task: Task
    version: str
    label: str
    measure: str
    scorer: Scorer


async def ask_each(
    url: str, question: Question, examples: Sequence[Example], concurrency: int, sleep: Sleep = asyncio.sleep
) -> AsyncGenerator[Judged]:
    """Each answer as it comes, judged; at most `concurrency` are asked at once.

    Where the service has no room (429) or an engine is away (503), it is asked again a few times, when it says. Raises
    CalibrationError naming the row for any other refusal, for a version other than the one that was asked, and for a
    service that cannot be reached; then the others are given up.
    """
    room = asyncio.Semaphore(concurrency)
    address = url.rstrip("/").removesuffix("/v1")  # with which OpenAI's clients are given theirs
    async with httpx.AsyncClient(base_url=address, timeout=_PATIENCE) as client:

        async def ask(example: Example) -> Judged:
            async with room:
                return _judge(question, example, await _answer(client, question, example, sleep))

        asking = [asyncio.create_task(ask(example)) for example in examples]
        try:
            for done in asyncio.as_completed(asking):
                yield await done
        finally:
            for task in asking:
                task.cancel()
            await asyncio.gather(*asking, return_exceptions=True)


async def _answer(client: httpx.AsyncClient, question: Question, example: Example, sleep: Sleep) -> httpx.Response:
    endpoint = "classify" if question.task.kind == "classify" else "generate"
    body = {"inputs": example.inputs, "version": question.version, "confidence": [question.measure]}
    for attempt in range(1, _ATTEMPTS + 1):
        try:
            response = await client.post(f"/v1/tasks/{question.task.name}/{endpoint}", json=body)
        except httpx.HTTPError as error:
            raise CalibrationError(
                f"{client.base_url} does not answer ({str(error) or type(error).__name__}); start the service with "
                "`softcue serve`, or give its address as --url"
            ) from error
        if response.status_code not in (429, 503) or attempt == _ATTEMPTS:
            break
        await sleep(_wait_s(response, attempt))
    return response


def _judge(question: Question, example: Example, response: httpx.Response) -> Judged:
    body = _json(response)
    if response.status_code != 200:
        error = body.get("error")
        said = (error.get("message") if isinstance(error, dict) else None) or response.reason_phrase
        raise CalibrationError(f"{example.place}: the service answered {response.status_code}: {said}")
    answer = body.get("label" if question.task.kind == "classify" else "text")
    measured = body.get("confidence")
    if not isinstance(answer, str) or not isinstance(measured, dict) or question.measure not in measured:
        raise CalibrationError(
            f"{example.place}: the service's answer has no confidence by {question.measure}; upgrade the service"
        )
    if body.get("version") != question.label:
        raise CalibrationError(
            f"{example.place}: {body.get('version')} answered instead of {question.label}; ask a service on the same "
            "store, and calibrate a version that can answer"
        )
    return Judged(_number(measured[question.measure]), question.scorer(example, answer))


def _json(response: httpx.Response) -> dict[str, Any]:
    try:
        body = response.json()
    except (ValueError, RecursionError):
        body = None
    return body if isinstance(body, dict) else {}


def _number(value: Any) -> float | None:
    """A confidence that is known: JSON's parsers also take NaN."""
    known = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    return float(value) if known else None


def _wait_s(response: httpx.Response, attempt: int) -> float:
    asked = retry_after_s(response.headers) or 0.0
    return min(_LONGEST_WAIT_S, max(asked, float(2 ** (attempt - 1))))
