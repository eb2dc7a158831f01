"""The local engine: continuous batching of requests with different soft prompts on torch and transformers."""
