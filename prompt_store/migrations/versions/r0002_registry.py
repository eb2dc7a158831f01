"""What a registry for teams adds: a base's KV sizes, recipe and author of a version, rollbacks, idempotency keys.

Only adds, so code that knows schema 0001 goes on beside it.
"""

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"
oldest_reader = "0001"


def upgrade() -> None:
    op.add_column("bases", sa.Column("kv_heads", sa.Integer(), nullable=True))
    op.add_column("bases", sa.Column("head_size", sa.Integer(), nullable=True))
    op.add_column("versions", sa.Column("recipe", sa.Text(), nullable=True))
    op.add_column("versions", sa.Column("author", sa.Text(), nullable=True))
    op.add_column("alias_moves", sa.Column("undoes", sa.BigInteger(), nullable=True))
    op.create_table(
        "idempotency_keys",
        sa.Column("principal", sa.Text(), nullable=False),
        sa.Column("key", sa.String(length=255), nullable=False),
        sa.Column("request", sa.String(length=64), nullable=False),
        sa.Column("answer", sa.Text(), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.PrimaryKeyConstraint("principal", "key", name=op.f("pk_idempotency_keys")),
    )
    op.create_index(op.f("ix_idempotency_keys_created_at"), "idempotency_keys", ["created_at"], unique=False)
