"""Experiments as documents with history: arms, how units are allocated to them, how they started and ended."""
