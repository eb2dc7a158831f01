"""Experiments: assignment, statistics and decisions, as pure functions. Reserved: no route splits yet."""
