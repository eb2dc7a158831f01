"""What routes over several backends add: backends, calibrations, spending, shadow answers, shutdown dates, reasons.

Only adds, so code that knows schema 0001 goes on beside it.
"""

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"
oldest_reader = "0001"


def upgrade() -> None:
    op.add_column("versions", sa.Column("shutdown_date", sa.Date(), nullable=True))
    op.add_column("route_revisions", sa.Column("whole", sa.Text(), nullable=True))
    op.add_column("route_revisions", sa.Column("reason", sa.Text(), nullable=True))
    op.add_column("route_revisions", sa.Column("restores", sa.Integer(), nullable=True))
    op.create_table(
        "backends",
        sa.Column("name", sa.String(length=64), nullable=False),
        sa.Column("kind", sa.String(length=64), nullable=False),
        sa.Column("place", sa.Integer(), nullable=False),
        sa.Column("document", sa.Text(), nullable=False),
        sa.Column("updated_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("principal", sa.Text(), nullable=False),
        sa.PrimaryKeyConstraint("name", name=op.f("pk_backends")),
    )
    op.create_table(
        "calibrations",
        sa.Column("version", sa.String(length=64), nullable=False),
        sa.Column("measure", sa.String(length=64), nullable=False),
        sa.Column("document", sa.Text(), nullable=False),
        sa.Column("at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("principal", sa.Text(), nullable=False),
        sa.ForeignKeyConstraint(
            ["version"], ["versions.digest"], name=op.f("fk_calibrations_version"), ondelete="CASCADE"
        ),
        sa.PrimaryKeyConstraint("version", "measure", name=op.f("pk_calibrations")),
    )
    op.create_table(
        "spending",
        sa.Column("day", sa.Date(), nullable=False),
        sa.Column("task", sa.String(length=64), nullable=False),
        sa.Column("backend", sa.String(length=64), nullable=False),
        sa.Column("amount", sa.Float(), nullable=False),
        sa.PrimaryKeyConstraint("day", "task", "backend", name=op.f("pk_spending")),
    )
    op.create_table(
        "shadow_answers",
        sa.Column("id", sa.String(length=64), nullable=False),
        sa.Column("generation_id", sa.Text(), nullable=False),
        sa.Column("task", sa.String(length=64), nullable=False),
        sa.Column("primary_version", sa.String(length=64), nullable=False),
        sa.Column("primary_label", sa.String(length=64), nullable=False),
        sa.Column("primary_backend", sa.String(length=64), nullable=False),
        sa.Column("primary_text", sa.Text(), nullable=False),
        sa.Column("primary_ms", sa.Float(), nullable=False),
        sa.Column("shadow_version", sa.String(length=64), nullable=False),
        sa.Column("shadow_label", sa.String(length=64), nullable=False),
        sa.Column("shadow_backend", sa.String(length=64), nullable=False),
        sa.Column("shadow_text", sa.Text(), nullable=True),
        sa.Column("shadow_error", sa.Text(), nullable=True),
        sa.Column("shadow_ms", sa.Float(), nullable=False),
        sa.Column("agreement", sa.Float(), nullable=True),
        sa.Column("at", sa.DateTime(timezone=True), nullable=False),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_shadow_answers")),
    )
    op.create_index(op.f("ix_shadow_answers_task_at"), "shadow_answers", ["task", "at"], unique=False)
    op.create_index(op.f("ix_shadow_answers_at"), "shadow_answers", ["at"], unique=False)
