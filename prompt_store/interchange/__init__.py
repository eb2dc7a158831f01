"""Prompts from and for other software: PEFT's adapters, numpy files, archives of them. Nothing is unpickled."""
