"""From a backend's configuration to its Engine; used by the service's wiring and by training."""

from __future__ import annotations

from service.engines.base_model import BaseModel
from service.engines.local.client import LocalEngine
from service.engines.local.options import EngineOptions
from service.engines.local.process import ProcessHost


def build_local(
    base: BaseModel, options: EngineOptions, *, max_waiting: int = 256, ready_timeout_s: float = 30.0
) -> LocalEngine:
    """The local engine in a process of its own, not started yet. This process imports no torch for it."""
    host = ProcessHost(base, options)
    return LocalEngine(base, host, max_waiting=max_waiting, ready_timeout_s=ready_timeout_s)
