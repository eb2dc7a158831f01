"""What happened on live traffic: exposures (a unit saw an arm) and outcomes (what came of it).

Replicas append these to a local journal and ship them in batches; the store deduplicates by id. The shapes are here so
that ids and probabilities are recorded right from the first request; the tables are `tables.exposures` and `.outcomes`.
"""

from typing import Annotated

from pydantic import AwareDatetime, BaseModel, ConfigDict, Field

from prompt_store.prompts.version import Digest

_FROZEN = ConfigDict(frozen=True, extra="forbid", hide_input_in_errors=True)

_Id = Annotated[str, Field(min_length=1, max_length=64)]
_Name = Annotated[str, Field(min_length=1, max_length=64)]


class Exposure(BaseModel):
    """A unit was answered by an arm of an experiment.

    `assignment_probability` is what the arm had when it was drawn: analysis weighs by it, and the test for sample-ratio
    mismatch needs it. `forced` marks an arm that was asked for rather than drawn; such rows are left out of analysis.
    `unit_hash` is salted: the store never learns who the unit is.
    """

    model_config = _FROZEN

    id: _Id
    generation_id: Annotated[str, Field(min_length=1)]
    experiment: _Name
    task: _Name
    arm: _Name
    version: Digest
    unit_hash: _Id
    assignment_probability: float = Field(gt=0.0, le=1.0, allow_inf_nan=False)
    forced: bool = False
    at: AwareDatetime
    principal: str


class Outcome(BaseModel):
    """Later feedback on a generation: the value of one of the task's metrics."""

    model_config = _FROZEN

    id: _Id
    generation_id: Annotated[str, Field(min_length=1)]
    task: _Name
    metric: _Name
    value: float = Field(allow_inf_nan=False)
    at: AwareDatetime
    principal: str
