"""From a model name to an answer: which task, which version, which backend, and what became of it."""
