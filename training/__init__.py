"""Offline training: from a recipe to a published soft prompt. Nothing in the service imports it."""
