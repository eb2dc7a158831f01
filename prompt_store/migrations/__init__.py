"""Alembic's environment and the schema's history; `prompt_store.migrating` runs it. Import nothing from here."""
