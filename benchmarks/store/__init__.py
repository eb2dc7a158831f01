"""The store's own figures, on SQLite and on PostgreSQL: `python -m benchmarks.store`."""
