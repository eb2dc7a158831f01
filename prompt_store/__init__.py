"""Everything durable: tasks, prompt versions, aliases, routes and the ledger, in one database.

Floor 0 of the house: imports neither torch, transformers, litestar nor openai, nor `service` or `training`.
Everything here is synchronous. Start at `database.Database.open` and `prompts.registry.Registry`.
"""
