"""Fine-tuning files, jobs and their events in the shape of OpenAI's objects, plus the lease of the worker on a job.

Shapes only; the tables are `tables.files`, `.jobs` and `.job_events`. `status` is open text: OpenAI adds values. A
worker holds a job while `lease_expires_at` lies ahead; another may take it afterwards.
"""

from typing import Any

from pydantic import AwareDatetime, BaseModel, ConfigDict, Field

from prompt_store.prompts.version import Digest

_FROZEN = ConfigDict(frozen=True, extra="forbid", hide_input_in_errors=True)


class StoredFile(BaseModel):
    """An uploaded file without its content."""

    model_config = _FROZEN

    id: str
    filename: str
    purpose: str
    size_bytes: int = Field(ge=0)
    digest: Digest
    created_at: AwareDatetime
    expires_at: AwareDatetime | None = None
    principal: str


class JobError(BaseModel):
    model_config = _FROZEN

    code: str
    message: str
    param: str | None = None


class Job(BaseModel):
    """A fine-tuning job; `model` is the base to tune and `fine_tuned_model` what came of it."""

    model_config = _FROZEN

    id: str
    model: str
    status: str
    training_file: str
    validation_file: str | None = None
    method: dict[str, Any]
    seed: int
    suffix: str | None = Field(default=None, max_length=64)
    metadata: dict[str, str] = {}
    fine_tuned_model: str | None = None
    trained_tokens: int | None = None
    result_files: tuple[str, ...] = ()
    error: JobError | None = None
    created_at: AwareDatetime
    finished_at: AwareDatetime | None = None
    estimated_finish: AwareDatetime | None = None
    lease_owner: str | None = None
    lease_expires_at: AwareDatetime | None = None
    principal: str


class JobEvent(BaseModel):
    """One line of a job's log; `number` counts within the job."""

    model_config = _FROZEN

    id: str
    job: str
    number: int = Field(ge=1)
    level: str
    type: str
    message: str
    data: dict[str, Any] | None = None
    created_at: AwareDatetime
