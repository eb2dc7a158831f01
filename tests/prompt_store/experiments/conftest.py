import pytest

from prompt_store.prompts.registry import Registry
from tests.prompt_store.experiments.stage import fill


@pytest.fixture
def stage(registry: Registry) -> Registry:
    return fill(registry)
