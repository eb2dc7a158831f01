"""The bodies of outcomes over HTTP in both directions, as pydantic models."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Annotated, Any, Literal, Self

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    StrictBool,
    StrictFloat,
    StrictStr,
    ValidationError,
    ValidatorFunctionWrapHandler,
    WrapValidator,
    model_validator,
)

from prompt_store.ledger.entries import Outcome

LARGEST_BATCH = 1000

_TAKEN = ConfigDict(extra="forbid", hide_input_in_errors=True)


def _one_problem(value: Any, validate: ValidatorFunctionWrapHandler) -> Any:
    """Instead of one problem for each type that it could have been."""
    try:
        return validate(value)
    except ValidationError:
        raise ValueError("give true or false, a number, or text") from None


def _one_moment(value: Any, validate: ValidatorFunctionWrapHandler) -> Any:
    try:
        return validate(value)
    except ValidationError:
        raise ValueError("give an ISO time with its zone, or Unix seconds") from None


_Number = Annotated[StrictFloat, Field(allow_inf_nan=False)]
_MetricName = Annotated[str, Field(min_length=1, max_length=64)]
Value = Annotated[StrictBool | _Number | StrictStr, WrapValidator(_one_problem)]
Moment = Annotated[_Number | StrictStr, WrapValidator(_one_moment)]


class OutcomeBody(BaseModel):
    """One value of one metric. `at` is when that was so, as ISO time with its zone or in Unix seconds; else it is now.

    Of several values for a metric the newest by `at` holds, in whatever order they come.
    """

    model_config = _TAKEN

    metric: _MetricName
    value: Value
    at: Moment | None = None


class OutcomesBody(BaseModel):
    """`metric`, `value` and `at` of one outcome, or several under `outcomes`."""

    model_config = _TAKEN

    metric: _MetricName | None = None
    value: Value | None = None
    at: Moment | None = None
    outcomes: list[OutcomeBody] | None = Field(None, min_length=1, max_length=LARGEST_BATCH)

    @model_validator(mode="after")
    def _one_or_several(self) -> Self:
        single = (self.metric, self.value, self.at)
        if self.outcomes is not None and single != (None, None, None):
            raise ValueError("there is an outcome beside `outcomes`; give one or the other")
        if self.outcomes is None and (self.metric is None or self.value is None):
            raise ValueError("metric or value is missing; give both, or several outcomes under `outcomes`")
        return self

    def listed(self) -> list[tuple[str, OutcomeBody]]:
        """Each with the place where it stands, to put before its keys."""
        if self.outcomes is not None:
            return [(f"outcomes[{place}].", outcome) for place, outcome in enumerate(self.outcomes)]
        assert self.metric is not None
        assert self.value is not None
        return [("", OutcomeBody(metric=self.metric, value=self.value, at=self.at))]


class GenerationOutcomeBody(OutcomeBody):
    """`generation` is the id of an answer, as it was answered."""

    generation: Annotated[str, Field(min_length=1)]


class BatchBody(BaseModel):
    """Outcomes of several generations."""

    model_config = _TAKEN

    outcomes: list[GenerationOutcomeBody] = Field(min_length=1, max_length=LARGEST_BATCH)


class TakenOutcomeBody(BaseModel):
    """One that was taken, as it will be kept."""

    generation: str
    task: str
    metric: str
    value: bool | float | str
    at: datetime

    @classmethod
    def of(cls, generation: str, outcome: Outcome) -> Self:
        return cls(
            generation=generation,
            task=outcome.task,
            metric=outcome.metric,
            value=outcome.value,
            at=datetime.fromtimestamp(outcome.at_ms / 1000, UTC),
        )


class TakenOutcomesBody(BaseModel):
    """All that were taken, in the order of the request."""

    object: Literal["list"] = "list"
    data: list[TakenOutcomeBody]
