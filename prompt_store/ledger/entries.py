"""Entries of the ledger. Replicas append them to a local journal and ship them in batches; the store deduplicates.

`request` is a generation's own id within the store, which its signed id carries; times are Unix milliseconds by the
clock of the replica that wrote the entry. `unit_hash` is salted: the store never learns who the unit is. An entry is
encoded as an array that begins with its tag, so a field is only ever added at the end, with a default.
"""

from __future__ import annotations

from typing import Literal

from msgspec import Struct

HOLDOUT = "holdout"
"""The arm of units that see none of an experiment; no arm may be called so."""

DEMONSTRATION = "demonstration"
"""The metric of every task whose value is the answer that should have been given."""


class Exposure(Struct, frozen=True, array_like=True, tag="exposure"):
    """A unit is about to be answered by an arm of an experiment.

    `probability` is what the arm had in the allocation of that number: analysis weighs by it. `version` is the digest
    that the arm's first leaf names, empty where it cannot be said. A `forced` arm was asked for rather than drawn, and
    is left out of analysis.
    """

    request: str
    task: str
    experiment: str
    arm: str
    allocation: int
    probability: float
    unit_hash: str
    version: str
    forced: bool
    at_ms: int
    principal: str


class Answered(Struct, frozen=True, array_like=True, tag="answered"):
    """How a request ended: the outcomes that nobody has to report.

    `experiment` is empty where it counts for none: there was none, or its arm was forced. `version` is the digest of
    what answered, `outcome` a finish reason, `error` or `cancelled`. None is what cannot be said: whether JSON is valid
    of a task that does not extract, and tokens of an answer that broke off.
    """

    request: str
    task: str
    experiment: str
    arm: str
    unit_hash: str
    version: str
    backend: str
    outcome: str
    latency_ms: float
    first_token_ms: float | None
    cost: float
    prompt_tokens: int | None
    completion_tokens: int | None
    refused: bool | None
    valid_json: bool | None
    at_ms: int
    principal: str


class Outcome(Struct, frozen=True, array_like=True, tag="outcome"):
    """Later feedback on a generation: one value a metric, of which the newest by `at_ms` holds.

    Task to version are what the generation's signed id says; `version` is the first 16 digits of a digest.
    """

    request: str
    task: str
    experiment: str
    arm: str
    unit_hash: str
    version: str
    generated_ms: int
    metric: str
    value: bool | float | str
    at_ms: int
    source: Literal["caller", "judge"]
    principal: str


class Captured(Struct, frozen=True, array_like=True, tag="captured"):
    """A request and its answer, kept until `expires_ms`, of a task that its operator opted in.

    `inputs` are by the task's fields, as a chat of a single turn has them of a task with a single one. They are None of
    other conversations and of raw text, which are in `prompt`. `revision` is the digest of the task's revision.
    """

    request: str
    task: str
    revision: str
    version: str
    unit_hash: str
    inputs: dict[str, str] | None
    prompt: str
    answer: str
    at_ms: int
    expires_ms: int
    principal: str


Entry = Exposure | Answered | Outcome | Captured
