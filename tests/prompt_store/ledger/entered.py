"""Entries as requests leave them, for tests of what the store makes of them."""

from __future__ import annotations

from typing import Any

from prompt_store.ledger.entries import Answered, Captured, Exposure, Outcome

START_MS = 1_795_000_000_000


def exposure(request: str, **changes: Any) -> Exposure:
    known: dict[str, Any] = {
        "request": request, "task": "support", "experiment": "tone", "arm": "a", "allocation": 1, "probability": 0.5,
        "unit_hash": f"u{request}", "version": "v" * 64, "forced": False, "at_ms": START_MS, "principal": "anna",
    }  # fmt: skip
    return Exposure(**known | changes)


def answered(request: str, **changes: Any) -> Answered:
    known: dict[str, Any] = {
        "request": request, "task": "support", "experiment": "tone", "arm": "a", "unit_hash": f"u{request}",
        "version": "v" * 64, "backend": "local", "outcome": "stop", "latency_ms": 100.0, "first_token_ms": None,
        "cost": 0.0, "prompt_tokens": 3, "completion_tokens": 4, "refused": False, "valid_json": None,
        "at_ms": START_MS, "principal": "anna",
    }  # fmt: skip
    return Answered(**known | changes)


def outcome(request: str, value: bool | float | str = True, **changes: Any) -> Outcome:
    known: dict[str, Any] = {
        "request": request, "task": "support", "experiment": "tone", "arm": "a", "unit_hash": f"u{request}",
        "version": "v" * 16, "generated_ms": START_MS, "metric": "helpful", "value": value, "at_ms": START_MS,
        "source": "caller", "principal": "anna",
    }  # fmt: skip
    return Outcome(**known | changes)


def captured(request: str, **changes: Any) -> Captured:
    known: dict[str, Any] = {
        "request": request, "task": "support", "revision": "r" * 64, "version": "v" * 64, "unit_hash": f"u{request}",
        "inputs": {"text": "hello"}, "prompt": "", "answer": "hi", "at_ms": START_MS, "expires_ms": 2 * START_MS,
        "principal": "anna",
    }  # fmt: skip
    return Captured(**known | changes)
