"""Alembic's environment: runs inside the connection and transaction that `prompt_store.migrating` hands over."""

from alembic import context

attributes = context.config.attributes

# Batch mode: SQLite alters a table by copying it.
context.configure(
    connection=attributes["connection"], target_metadata=attributes["target_metadata"], render_as_batch=True
)
context.run_migrations()
