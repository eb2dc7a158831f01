"""Every table, as SQLAlchemy Core metadata. `migrations/` builds the same schema step by step; a test compares them.

Documents (tasks, payloads, routes, reports) are JSON in text columns: they are read whole. All but tasks, which keep
their author's order of keys, are spelled canonically, as digests are taken over them. Principals are names, without a
table: whoever wrote a row is written in it.
"""

from datetime import UTC, datetime
from typing import Any

from sqlalchemy import (
    BigInteger,
    Boolean,
    CheckConstraint,
    Column,
    Date,
    DateTime,
    Dialect,
    Float,
    ForeignKey,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    String,
    Table,
    Text,
    TypeDecorator,
    UniqueConstraint,
)

metadata = MetaData(
    naming_convention={
        "pk": "pk_%(table_name)s",
        "fk": "fk_%(table_name)s_%(column_0_name)s",
        "uq": "uq_%(table_name)s_%(column_0_N_name)s",
        "ix": "ix_%(table_name)s_%(column_0_N_name)s",
        "ck": "ck_%(table_name)s_%(constraint_name)s",
    }
)


class UtcDateTime(TypeDecorator[datetime]):
    """An aware datetime in UTC; SQLite has no time zones, so there it is stored without one."""

    impl = DateTime(timezone=True)
    cache_ok = True

    def process_bind_param(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        if value is None:
            return None
        if value.tzinfo is None:
            raise ValueError("a datetime without time zone cannot be stored; use datetime.now(UTC)")
        return value.astimezone(UTC).replace(tzinfo=None) if dialect.name == "sqlite" else value.astimezone(UTC)

    def process_result_value(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        if value is None:
            return None
        return value.replace(tzinfo=UTC) if value.tzinfo is None else value.astimezone(UTC)


def _name(column: str = "name", *arguments: Any, **options: Any) -> Column[str]:
    return Column(column, String(64), *arguments, **({"nullable": False} | options))


def _digest(column: str = "digest", *arguments: Any, **options: Any) -> Column[str]:
    return Column(column, String(64), *arguments, **({"nullable": False} | options))


def _moment(column: str = "created_at", **options: Any) -> Column[datetime]:
    return Column(column, UtcDateTime(), **({"nullable": False} | options))


def _principal() -> Column[str]:
    return Column("principal", Text, nullable=False)


# The store itself ---------------------------------------------------------------------------------------------------

meta = Table(
    "meta",
    metadata,
    Column("key", String(64), primary_key=True),
    Column("value", LargeBinary, nullable=False),
)

# One row, locked by whoever writes: PostgreSQL's own sequences would number changes out of commit order.
change_counter = Table(
    "change_counter",
    metadata,
    Column("id", Integer, primary_key=True, autoincrement=False),
    Column("sequence", BigInteger, nullable=False),
    CheckConstraint("id = 1", name="single_row"),
)

changes = Table(
    "changes",
    metadata,
    Column("sequence", BigInteger, primary_key=True, autoincrement=False),
    Column("kind", String(32), nullable=False),
    _name("task", nullable=True),
    Column("subject", Text, nullable=False),
    _moment("at"),
    _principal(),
)

# The change log may be trimmed one day; the audit trail is kept.
audit = Table(
    "audit",
    metadata,
    Column("sequence", BigInteger, primary_key=True, autoincrement=False),
    Column("action", String(64), nullable=False),
    _name("task", nullable=True),
    Column("subject", Text, nullable=False),
    Column("reason", Text, nullable=False),
    Column("details", Text, nullable=False),
    _moment("at"),
    _principal(),
    Index(None, "task"),
)

# Tasks, bases, versions ---------------------------------------------------------------------------------------------

bases = Table(
    "bases",
    metadata,
    Column("fingerprint", String(128), primary_key=True),
    Column("name", Text, nullable=False),
    Column("hidden_size", Integer, nullable=False),
    Column("layers", Integer, nullable=False),
    Column("context_length", Integer, nullable=False),
    Column("vocabulary_size", Integer, nullable=False),
    Column("architecture", Text, nullable=False),
    Column("kv_heads", Integer, nullable=True),
    Column("head_size", Integer, nullable=True),
    _moment(),
    _principal(),
)

# `current_revision` has no foreign key: it would close a circle with task_revisions. `last_version` outlives deleted
# versions, so a number is never given twice, and its row is what publishers of one task wait on.
tasks = Table(
    "tasks",
    metadata,
    _name("name", primary_key=True),
    _digest("current_revision"),
    Column("last_version", Integer, nullable=False),
    _moment(),
    _principal(),
)

task_revisions = Table(
    "task_revisions",
    metadata,
    _digest("digest", primary_key=True),
    _name("task", ForeignKey("tasks.name")),
    Column("number", Integer, nullable=False),
    Column("document", Text, nullable=False),
    _moment(),
    _principal(),
    UniqueConstraint("task", "number"),
)

tensors = Table(
    "tensors",
    metadata,
    _digest("digest", primary_key=True),
    Column("dtype", String(16), nullable=False),
    Column("shape", Text, nullable=False),
    Column("size_bytes", BigInteger, nullable=False),
    Column("data", LargeBinary, nullable=False),
)

versions = Table(
    "versions",
    metadata,
    _digest("digest", primary_key=True),
    _name("task", ForeignKey("tasks.name")),
    Column("number", Integer, nullable=False),
    _digest("task_revision", ForeignKey("task_revisions.digest")),
    Column("kind", String(32), nullable=False),
    Column("base_fingerprint", String(128), ForeignKey("bases.fingerprint"), nullable=True),
    Column("payload", Text, nullable=False),
    Column("provenance", Text, nullable=False),
    Column("report", Text, nullable=True),
    Column("notes", Text, nullable=False),
    Column("tags", Text, nullable=False),
    Column("recipe", Text, nullable=True),
    Column("author", Text, nullable=True),
    Column("shutdown_date", Date, nullable=True),
    _moment(),
    _principal(),
    UniqueConstraint("task", "number"),
    Index(None, "base_fingerprint"),
)

# Tensors are shared by content and named per version, so that a prefix payload (one pair per layer) fits as it is.
version_tensors = Table(
    "version_tensors",
    metadata,
    _digest("version", ForeignKey("versions.digest"), primary_key=True),
    Column("name", String(128), primary_key=True),
    _digest("tensor", ForeignKey("tensors.digest")),
    Index(None, "tensor"),
)

aliases = Table(
    "aliases",
    metadata,
    _name("task", ForeignKey("tasks.name"), primary_key=True),
    _name("name", primary_key=True),
    _digest("version", ForeignKey("versions.digest")),
    _moment("moved_at"),
    _principal(),
    Index(None, "version"),
)

# History names versions without foreign keys: it must outlive them. `target` is null when an alias is removed; `undoes`
# is the move that a rollback took back.
alias_moves = Table(
    "alias_moves",
    metadata,
    Column("sequence", BigInteger, primary_key=True, autoincrement=False),
    _name("task"),
    _name("alias"),
    _digest("previous", nullable=True),
    _digest("target", nullable=True),
    Column("reason", Text, nullable=False),
    Column("undoes", BigInteger, nullable=True),
    _moment("at"),
    _principal(),
    Index(None, "task", "alias"),
)

# `whole` is the route with its limits where `document`, which schema 0001 had, cannot say all of it; `restores` is the
# revision that a rollback put in force again.
route_revisions = Table(
    "route_revisions",
    metadata,
    _name("task", ForeignKey("tasks.name"), primary_key=True),
    Column("number", Integer, primary_key=True, autoincrement=False),
    Column("document", Text, nullable=False),
    Column("whole", Text, nullable=True),
    Column("reason", Text, nullable=True),
    Column("restores", Integer, nullable=True),
    _moment(),
    _principal(),
)

# What services have said of the backends that they run, in the order of their settings.
backends = Table(
    "backends",
    metadata,
    _name("name", primary_key=True),
    Column("kind", String(64), nullable=False),
    Column("place", Integer, nullable=False),
    Column("document", Text, nullable=False),
    _moment("updated_at"),
    _principal(),
)

# Deleted by the database with their version, because code that does not know the table deletes versions too.
calibrations = Table(
    "calibrations",
    metadata,
    _digest("version", ForeignKey("versions.digest", ondelete="CASCADE"), primary_key=True),
    Column("measure", String(64), primary_key=True),
    Column("document", Text, nullable=False),
    _moment("at"),
    _principal(),
)

# What a request with an idempotency key was answered, so that the same request again gets the same answer.
idempotency_keys = Table(
    "idempotency_keys",
    metadata,
    Column("principal", Text, primary_key=True),
    Column("key", String(255), primary_key=True),
    _digest("request"),
    Column("answer", Text, nullable=False),
    _moment(),
    Index(None, "created_at"),
)

# Experiments ---------------------------------------------------------------------------------------------------------

# `versions` are the labels that each arm's leaves were pinned to; `route_before` is the revision of the task's route
# that was in force when it started, 0 for none. `revision` counts changes, for compare-and-set.
experiments = Table(
    "experiments",
    metadata,
    _name("name", primary_key=True),
    _name("task", ForeignKey("tasks.name")),
    Column("document", Text, nullable=False),
    Column("state", String(32), nullable=False),
    Column("revision", Integer, nullable=False),
    Column("versions", Text, nullable=False),
    Column("route_before", Integer, nullable=False),
    _moment("started_at"),
    Column("started_by", Text, nullable=False),
    _moment("ended_at", nullable=True),
    Column("ended_by", Text, nullable=False),
    Column("reason", Text, nullable=False),
    _name("winner", nullable=True),
    Index(None, "task"),
)

# How each split of a task's route divides all units; the newest number is in force, and exposures name earlier ones.
allocations = Table(
    "allocations",
    metadata,
    _name("task", ForeignKey("tasks.name"), primary_key=True),
    _name("experiment", primary_key=True),
    Column("number", Integer, primary_key=True, autoincrement=False),
    Column("weights", Text, nullable=False),
    Column("parts", Text, nullable=False),
    _moment("at"),
    _principal(),
)

# The ledger: shipped in batches from each replica's journal and deduplicated, so without foreign keys. Times are Unix
# milliseconds by the clocks of the replicas; `unit_hash` is indexed for whoever wants all that a unit left erased.

exposures = Table(
    "exposures",
    metadata,
    Column("request", String(64), primary_key=True),
    _name("task"),
    _name("experiment"),
    _name("arm"),
    Column("allocation", Integer, nullable=False),
    Column("probability", Float, nullable=False),
    Column("unit_hash", String(64), nullable=False),
    _digest("version"),
    Column("forced", Boolean, nullable=False),
    Column("at_ms", BigInteger, nullable=False),
    _principal(),
    CheckConstraint("probability > 0 AND probability <= 1", name="probability"),
    # All that is asked of an experiment's exposures: reports read this alone.
    Index("ix_exposures_report", "experiment", "unit_hash", "allocation", "arm", "probability", "at_ms", "forced"),
    Index(None, "unit_hash"),
    Index(None, "at_ms"),
)

answers = Table(
    "answers",
    metadata,
    Column("request", String(64), primary_key=True),
    _name("task"),
    _name("experiment"),
    _name("arm"),
    Column("unit_hash", String(64), nullable=False),
    _digest("version"),
    _name("backend"),
    Column("outcome", String(32), nullable=False),
    Column("latency_ms", Float, nullable=False),
    Column("first_token_ms", Float, nullable=True),
    Column("cost", Float, nullable=False),
    Column("prompt_tokens", Integer, nullable=True),
    Column("completion_tokens", Integer, nullable=True),
    Column("refused", Boolean, nullable=True),
    Column("valid_json", Boolean, nullable=True),
    Column("at_ms", BigInteger, nullable=False),
    _principal(),
    Index(None, "experiment", "at_ms"),
    Index(None, "task", "at_ms"),
    Index(None, "unit_hash"),
    Index(None, "at_ms"),
)

# `value` is the number, or 1 and 0 for true and false; `text` is there instead for what is neither.
outcomes = Table(
    "outcomes",
    metadata,
    Column("request", String(64), primary_key=True),
    _name("task"),
    _name("experiment"),
    _name("arm"),
    Column("unit_hash", String(64), nullable=False),
    Column("version", String(16), nullable=False),
    Column("generated_ms", BigInteger, nullable=False),
    Column("metric", String(64), primary_key=True),
    Column("value", Float, nullable=True),
    Column("text", Text, nullable=True),
    Column("at_ms", BigInteger, nullable=False),
    Column("source", String(16), nullable=False),
    _principal(),
    Index(None, "experiment", "metric", "unit_hash"),
    Index(None, "task", "metric", "generated_ms"),
    Index(None, "unit_hash"),
    Index(None, "generated_ms"),
)

# Prompts and answers, of tasks that were opted in; `inputs` is JSON.
captures = Table(
    "captures",
    metadata,
    Column("request", String(64), primary_key=True),
    _name("task"),
    _digest("revision"),
    _digest("version"),
    Column("unit_hash", String(64), nullable=False),
    Column("inputs", Text, nullable=True),
    Column("prompt", Text, nullable=False),
    Column("answer", Text, nullable=False),
    Column("at_ms", BigInteger, nullable=False),
    Column("expires_ms", BigInteger, nullable=False),
    _principal(),
    Index(None, "task", "at_ms"),
    Index(None, "unit_hash"),
    Index(None, "expires_ms"),
)

# Units whose traces were erased, kept for good: what a journal still has of them from before then is not taken in.
erased_units = Table(
    "erased_units",
    metadata,
    Column("unit_hash", String(64), primary_key=True),
    Column("at_ms", BigInteger, nullable=False),
    _principal(),
)

spending = Table(
    "spending",
    metadata,
    Column("day", Date, primary_key=True),
    _name("task", primary_key=True),
    _name("backend", primary_key=True),
    Column("amount", Float, nullable=False),
)

shadow_answers = Table(
    "shadow_answers",
    metadata,
    Column("id", String(64), primary_key=True),
    Column("generation_id", Text, nullable=False),
    _name("task"),
    _digest("primary_version"),
    _name("primary_label"),
    _name("primary_backend"),
    Column("primary_text", Text, nullable=False),
    Column("primary_ms", Float, nullable=False),
    _digest("shadow_version"),
    _name("shadow_label"),
    _name("shadow_backend"),
    Column("shadow_text", Text, nullable=True),
    Column("shadow_error", Text, nullable=True),
    Column("shadow_ms", Float, nullable=False),
    Column("agreement", Float, nullable=True),
    Column("unit_hash", String(64), nullable=True),
    _moment("at"),
    Index(None, "task", "at"),
    Index(None, "unit_hash"),
    Index(None, "at"),
)

# Fine-tuning files and jobs ------------------------------------------------------------------------------------------

files = Table(
    "files",
    metadata,
    Column("id", String(64), primary_key=True),
    Column("filename", Text, nullable=False),
    Column("purpose", String(64), nullable=False),
    Column("size_bytes", BigInteger, nullable=False),
    _digest("digest"),
    Column("content", LargeBinary, nullable=False),
    _moment(),
    _moment("expires_at", nullable=True),
    _principal(),
)

jobs = Table(
    "jobs",
    metadata,
    Column("id", String(64), primary_key=True),
    Column("model", Text, nullable=False),
    Column("status", String(32), nullable=False),
    Column("training_file", String(64), nullable=False),
    Column("validation_file", String(64), nullable=True),
    Column("method", Text, nullable=False),
    Column("seed", BigInteger, nullable=False),
    Column("suffix", String(64), nullable=True),
    Column("metadata", Text, nullable=False),
    Column("fine_tuned_model", Text, nullable=True),
    Column("trained_tokens", BigInteger, nullable=True),
    Column("result_files", Text, nullable=False),
    Column("error", Text, nullable=True),
    _moment(),
    _moment("finished_at", nullable=True),
    _moment("estimated_finish", nullable=True),
    Column("lease_owner", Text, nullable=True),
    _moment("lease_expires_at", nullable=True),
    _principal(),
    Index(None, "status", "created_at"),
)

job_events = Table(
    "job_events",
    metadata,
    Column("id", String(64), primary_key=True),
    Column("job", String(64), ForeignKey("jobs.id"), nullable=False),
    Column("number", Integer, nullable=False),
    Column("level", String(16), nullable=False),
    Column("type", String(32), nullable=False),
    Column("message", Text, nullable=False),
    Column("data", Text, nullable=True),
    _moment(),
    UniqueConstraint("job", "number"),
)
