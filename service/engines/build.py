"""From a backend's configuration to its Engine; used by the service's wiring and by training."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace

from service.engines.base_model import BaseModel
from service.engines.errors import BackendError
from service.engines.local.client import LocalEngine
from service.engines.local.options import EngineOptions
from service.engines.local.process import ProcessHost
from service.engines.remote.backend_settings import BackendSettings, OpenAICompatibleSettings, VllmSettings
from service.engines.remote.embeddings import EmbeddingMatrix
from service.engines.remote.flavours import FLAVOURS
from service.engines.remote.openai_compatible import AzureDeployment, OpenAICompatibleEngine
from service.engines.remote.options import TransportOptions
from service.engines.remote.provider import Provider
from service.engines.remote.vllm import VllmEngine
from service.engines.remote.vllm_options import VllmOptions


def build_local(
    base: BaseModel, options: EngineOptions, *, max_waiting: int = 256, ready_timeout_s: float = 30.0
) -> LocalEngine:
    """The local engine in a process of its own, not started yet. This process imports no torch for it."""
    host = ProcessHost(base, options)
    return LocalEngine(base, host, max_waiting=max_waiting, ready_timeout_s=ready_timeout_s)


def build_vllm(base: BaseModel, transport: TransportOptions, options: VllmOptions) -> VllmEngine:
    """The engine over vLLM servers, not started yet. They are asked for their health at `/health`.

    Raises BaseModelError for a base model whose embeddings cannot be sent.
    """
    matrix = EmbeddingMatrix.open(base, options.dtype)
    return VllmEngine(base, Provider(replace(transport, health_path="/health")), matrix, options)


def build_backends(
    settings: Mapping[str, BackendSettings],
    environment: Mapping[str, str] = os.environ,
    *,
    base: BaseModel | None = None,
) -> dict[str, OpenAICompatibleEngine | VllmEngine]:
    """The remote engines by their names, not started yet; their keys are read from the environment now.

    `base` is what vLLM backends serve. Raises BackendError for a key that is not there, or a table that no request
    could be sent with, and BaseModelError as `build_vllm`.
    """
    return {name: _remote(name, backend, environment, base) for name, backend in settings.items()}


def _remote(
    name: str, settings: BackendSettings, environment: Mapping[str, str], base: BaseModel | None
) -> OpenAICompatibleEngine | VllmEngine:
    match settings:
        case VllmSettings():
            if base is None:
                raise BackendError(f"backend '{name}' is vLLM and needs the base model that it serves; set [base] path")
            return build_vllm(base, settings.transport(name, environment, FLAVOURS["vllm"]), settings.options())
        case OpenAICompatibleSettings():
            flavour = settings.spoken()
            version = settings.api_version
            azure = AzureDeployment(version, settings.deployment) if version is not None else None
            provider = Provider(settings.transport(name, environment, flavour))
            return OpenAICompatibleEngine(provider, flavour, default_model=settings.default_model, azure=azure)
