"""Experiments and the ledger of what came of them: exposures, answers, outcomes, captures.

The tables `exposures` and `outcomes` that schema 0001 had were written by no release; they are made anew. All else is
added, so code that knows schema 0001 goes on beside it.
"""

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"
oldest_reader = "0001"


def upgrade() -> None:
    op.drop_table("exposures")
    op.drop_table("outcomes")
    op.add_column("shadow_answers", sa.Column("unit_hash", sa.String(length=64), nullable=True))
    op.create_index(op.f("ix_shadow_answers_unit_hash"), "shadow_answers", ["unit_hash"])
    op.create_table(
        "experiments",
        sa.Column("name", sa.String(length=64), nullable=False),
        sa.Column("task", sa.String(length=64), nullable=False),
        sa.Column("document", sa.Text(), nullable=False),
        sa.Column("state", sa.String(length=32), nullable=False),
        sa.Column("revision", sa.Integer(), nullable=False),
        sa.Column("versions", sa.Text(), nullable=False),
        sa.Column("route_before", sa.Integer(), nullable=False),
        sa.Column("started_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("started_by", sa.Text(), nullable=False),
        sa.Column("ended_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("ended_by", sa.Text(), nullable=False),
        sa.Column("reason", sa.Text(), nullable=False),
        sa.Column("winner", sa.String(length=64), nullable=True),
        sa.ForeignKeyConstraint(["task"], ["tasks.name"], name=op.f("fk_experiments_task")),
        sa.PrimaryKeyConstraint("name", name=op.f("pk_experiments")),
    )
    op.create_index(op.f("ix_experiments_task"), "experiments", ["task"])
    op.create_table(
        "allocations",
        sa.Column("task", sa.String(length=64), nullable=False),
        sa.Column("experiment", sa.String(length=64), nullable=False),
        sa.Column("number", sa.Integer(), autoincrement=False, nullable=False),
        sa.Column("weights", sa.Text(), nullable=False),
        sa.Column("parts", sa.Text(), nullable=False),
        sa.Column("at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("principal", sa.Text(), nullable=False),
        sa.ForeignKeyConstraint(["task"], ["tasks.name"], name=op.f("fk_allocations_task")),
        sa.PrimaryKeyConstraint("task", "experiment", "number", name=op.f("pk_allocations")),
    )
    op.create_table(
        "exposures",
        sa.Column("request", sa.String(length=64), nullable=False),
        sa.Column("task", sa.String(length=64), nullable=False),
        sa.Column("experiment", sa.String(length=64), nullable=False),
        sa.Column("arm", sa.String(length=64), nullable=False),
        sa.Column("allocation", sa.Integer(), nullable=False),
        sa.Column("probability", sa.Float(), nullable=False),
        sa.Column("unit_hash", sa.String(length=64), nullable=False),
        sa.Column("version", sa.String(length=64), nullable=False),
        sa.Column("forced", sa.Boolean(), nullable=False),
        sa.Column("at_ms", sa.BigInteger(), nullable=False),
        sa.Column("principal", sa.Text(), nullable=False),
        sa.CheckConstraint("probability > 0 AND probability <= 1", name=op.f("ck_exposures_probability")),
        sa.PrimaryKeyConstraint("request", name=op.f("pk_exposures")),
    )
    op.create_index(op.f("ix_exposures_at_ms"), "exposures", ["at_ms"])
    op.create_index(
        "ix_exposures_report",
        "exposures",
        ["experiment", "unit_hash", "allocation", "arm", "probability", "at_ms", "forced"],
    )
    op.create_index(op.f("ix_exposures_unit_hash"), "exposures", ["unit_hash"])
    op.create_table(
        "answers",
        sa.Column("request", sa.String(length=64), nullable=False),
        sa.Column("task", sa.String(length=64), nullable=False),
        sa.Column("experiment", sa.String(length=64), nullable=False),
        sa.Column("arm", sa.String(length=64), nullable=False),
        sa.Column("unit_hash", sa.String(length=64), nullable=False),
        sa.Column("version", sa.String(length=64), nullable=False),
        sa.Column("backend", sa.String(length=64), nullable=False),
        sa.Column("outcome", sa.String(length=32), nullable=False),
        sa.Column("latency_ms", sa.Float(), nullable=False),
        sa.Column("first_token_ms", sa.Float(), nullable=True),
        sa.Column("cost", sa.Float(), nullable=False),
        sa.Column("prompt_tokens", sa.Integer(), nullable=True),
        sa.Column("completion_tokens", sa.Integer(), nullable=True),
        sa.Column("refused", sa.Boolean(), nullable=True),
        sa.Column("valid_json", sa.Boolean(), nullable=True),
        sa.Column("at_ms", sa.BigInteger(), nullable=False),
        sa.Column("principal", sa.Text(), nullable=False),
        sa.PrimaryKeyConstraint("request", name=op.f("pk_answers")),
    )
    op.create_index(op.f("ix_answers_at_ms"), "answers", ["at_ms"])
    op.create_index(op.f("ix_answers_experiment_at_ms"), "answers", ["experiment", "at_ms"])
    op.create_index(op.f("ix_answers_task_at_ms"), "answers", ["task", "at_ms"])
    op.create_index(op.f("ix_answers_unit_hash"), "answers", ["unit_hash"])
    op.create_table(
        "outcomes",
        sa.Column("request", sa.String(length=64), nullable=False),
        sa.Column("task", sa.String(length=64), nullable=False),
        sa.Column("experiment", sa.String(length=64), nullable=False),
        sa.Column("arm", sa.String(length=64), nullable=False),
        sa.Column("unit_hash", sa.String(length=64), nullable=False),
        sa.Column("version", sa.String(length=16), nullable=False),
        sa.Column("generated_ms", sa.BigInteger(), nullable=False),
        sa.Column("metric", sa.String(length=64), nullable=False),
        sa.Column("value", sa.Float(), nullable=True),
        sa.Column("text", sa.Text(), nullable=True),
        sa.Column("at_ms", sa.BigInteger(), nullable=False),
        sa.Column("source", sa.String(length=16), nullable=False),
        sa.Column("principal", sa.Text(), nullable=False),
        sa.PrimaryKeyConstraint("request", "metric", name=op.f("pk_outcomes")),
    )
    op.create_index(op.f("ix_outcomes_experiment_metric_unit_hash"), "outcomes", ["experiment", "metric", "unit_hash"])
    op.create_index(op.f("ix_outcomes_generated_ms"), "outcomes", ["generated_ms"])
    op.create_index(op.f("ix_outcomes_task_metric_generated_ms"), "outcomes", ["task", "metric", "generated_ms"])
    op.create_index(op.f("ix_outcomes_unit_hash"), "outcomes", ["unit_hash"])
    op.create_table(
        "captures",
        sa.Column("request", sa.String(length=64), nullable=False),
        sa.Column("task", sa.String(length=64), nullable=False),
        sa.Column("revision", sa.String(length=64), nullable=False),
        sa.Column("version", sa.String(length=64), nullable=False),
        sa.Column("unit_hash", sa.String(length=64), nullable=False),
        sa.Column("inputs", sa.Text(), nullable=True),
        sa.Column("prompt", sa.Text(), nullable=False),
        sa.Column("answer", sa.Text(), nullable=False),
        sa.Column("at_ms", sa.BigInteger(), nullable=False),
        sa.Column("expires_ms", sa.BigInteger(), nullable=False),
        sa.Column("principal", sa.Text(), nullable=False),
        sa.PrimaryKeyConstraint("request", name=op.f("pk_captures")),
    )
    op.create_index(op.f("ix_captures_expires_ms"), "captures", ["expires_ms"])
    op.create_index(op.f("ix_captures_task_at_ms"), "captures", ["task", "at_ms"])
    op.create_index(op.f("ix_captures_unit_hash"), "captures", ["unit_hash"])
    op.create_table(
        "erased_units",
        sa.Column("unit_hash", sa.String(length=64), nullable=False),
        sa.Column("at_ms", sa.BigInteger(), nullable=False),
        sa.Column("principal", sa.Text(), nullable=False),
        sa.PrimaryKeyConstraint("unit_hash", name=op.f("pk_erased_units")),
    )
