"""Thin HTTP handlers: bodies in, answers out. What happens between is routing's subject."""
