"""A backend's table in the settings, `[backends.NAME]`, as pydantic models: what may be said of a provider, and how it
becomes an engine's options. A key is never part of it, only the name of the environment variable that holds it.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, SecretStr, model_validator

from prompt_store.errors import InvalidName
from prompt_store.names import check_task_name
from prompt_store.routing.routes import DEFAULT_BACKEND
from service.engines.base import MAX_LOGPROBS
from service.engines.errors import BackendError
from service.engines.local.options import Precision
from service.engines.remote.breaker import BreakerLimits
from service.engines.remote.flavours import FEATURES, FLAVOURS, Flavour, FlavourName
from service.engines.remote.options import TransportOptions
from service.engines.remote.retrying import RetryPolicy
from service.engines.remote.vllm_options import VllmOptions

_FROZEN = ConfigDict(frozen=True, extra="forbid", hide_input_in_errors=True)
_KEY_WORDS = frozenset({"authorization", "auth", "key", "apikey", "token", "secret", "password", "cookie"})
_Seconds = Annotated[float, Field(gt=0.0, allow_inf_nan=False)]
_Money = Annotated[float, Field(ge=0.0, allow_inf_nan=False)]


def _variable(name: str) -> str:
    if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name):  # it may be the key itself: it is not shown
        raise ValueError("this is no name of an environment variable; name the variable that holds the key")
    return name


def _backend_name(name: str) -> str:
    if name == DEFAULT_BACKEND:
        raise ValueError(f"'{DEFAULT_BACKEND}' is the engine on this machine; give the backend another name")
    try:
        return check_task_name(name)
    except InvalidName as error:
        raise ValueError("this is no backend name; use a-z, 0-9, '_' and '-', starting with a letter") from error


class Price(BaseModel):
    """What a million tokens cost. Prompt tokens from the provider's cache cost `input` where `cached_input` is left
    out."""

    model_config = _FROZEN

    input: _Money
    output: _Money
    cached_input: _Money | None = None


class RemoteSettings(BaseModel):
    """What all backends behind HTTP share; see TransportOptions, RetryPolicy and BreakerLimits for the transport's.

    `provider` is what a version's remote model says that its provider is; the backend's own name where it is left out.
    `prices` are by the provider's model name, and `default` for all others.
    """

    model_config = _FROZEN

    url: str | None = None
    urls: tuple[str, ...] = ()
    key_env: Annotated[str, AfterValidator(_variable)] | None = None
    headers: dict[str, str] = Field(default_factory=dict, repr=False)
    provider: str | None = Field(None, min_length=1, max_length=64)
    prices: dict[str, Price] = Field(default_factory=dict)
    proxy: str | None = Field(None, repr=False)  # it may hold a password
    ca_file: Path | None = None
    connect_s: _Seconds = 5.0
    first_byte_s: _Seconds = 120.0
    between_bytes_s: _Seconds = 60.0
    done_marker: bool = True
    concurrency: int = Field(256, ge=1)
    max_waiting: int = Field(1024, ge=0)
    retries: RetryPolicy = RetryPolicy()
    breaker: BreakerLimits = BreakerLimits()

    @model_validator(mode="after")
    def _addressed(self) -> Self:
        if self.url is not None and self.urls:
            raise ValueError("url and urls are both given; give one address as url, or several as urls")
        if secret := sorted(name for name in self.headers if _KEY_WORDS & set(re.split("[-_]", name.lower()))):
            raise ValueError(f"the header {secret[0]} would hold a key; leave it out and name its variable as key_env")
        _check_numbers("retries", self.retries)
        _check_numbers("breaker", self.breaker)
        if self.breaker.failure_share > 1.0:
            raise ValueError(f"breaker.failure_share is {self.breaker.failure_share}; it is a share, at most 1")
        return self

    def addresses(self) -> tuple[str, ...]:
        return self.urls or ((self.url,) if self.url is not None else ())

    def key(self, name: str, environment: Mapping[str, str]) -> SecretStr | None:
        """The backend's key. Raises BackendError where its variable is not set."""
        if self.key_env is None:
            return None
        if not (key := environment.get(self.key_env, "")):
            raise BackendError(
                f"backend '{name}' needs its key in the environment variable {self.key_env}, which is not set; set it, "
                "or leave key_env out for a provider without keys"
            )
        return SecretStr(key)

    def transport(self, name: str, environment: Mapping[str, str], flavour: Flavour) -> TransportOptions:
        """How the provider is reached. Raises BackendError for what no request could be sent with."""
        urls = self.addresses() or ((flavour.url,) if flavour.url is not None else ())
        try:
            return TransportOptions(
                urls=urls,
                key=self.key(name, environment),
                key_header=flavour.key_header,
                headers=self.headers,
                proxy=self.proxy,
                ca_file=self.ca_file,
                connect_s=self.connect_s,
                first_byte_s=self.first_byte_s,
                between_bytes_s=self.between_bytes_s,
                done_marker=self.done_marker,
                concurrency=self.concurrency,
                max_waiting=self.max_waiting,
                retries=self.retries,
                breaker=self.breaker,
            )
        except ValueError as error:
            raise BackendError(f"backend '{name}' cannot be used: {error}") from error


def _check_numbers(table: str, limits: RetryPolicy | BreakerLimits) -> None:
    for field in dataclasses.fields(limits):
        value = getattr(limits, field.name)
        if not 0.0 < value < math.inf:
            raise ValueError(f"{table}.{field.name} is {value}; it must be above 0")


class OpenAICompatibleSettings(RemoteSettings):
    """A provider of OpenAI's API.

    `models` are patterns (`*` and `?`) of the bare `ft:...` ids that it answers. `features` stand in for the flavour's,
    where a model can do less or more, and fields of the body in `omit` are never sent (`temperature` to a model that
    refuses it, `stream_options` to a server that does not know it).
    Azure's classic addresses need `api_version`, and `deployment` where it is not the model; without a version its
    `/openai/v1/` is spoken to.
    """

    kind: Literal["openai_compatible"]
    flavour: FlavourName = "other"
    default_model: str | None = Field(None, min_length=1)
    models: tuple[str, ...] | None = None
    features: frozenset[str] | None = None
    omit: frozenset[str] = frozenset()
    api_version: str | None = Field(None, pattern=r"^[0-9A-Za-z.-]+$")
    deployment: str | None = Field(None, pattern=r"^[0-9A-Za-z._-]+$")

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if unknown := sorted((self.features or frozenset()) - FEATURES):
            raise ValueError(f"there is no feature '{unknown[0]}'; there are {', '.join(sorted(FEATURES))}")
        if not self.addresses() and FLAVOURS[self.flavour].url is None:
            raise ValueError(f"flavour '{self.flavour}' has no address of its own; give the provider's as url")
        if (self.api_version or self.deployment) and self.flavour != "azure":
            raise ValueError("api_version and deployment are Azure's; leave them out, or make the flavour azure")
        if self.deployment is not None and self.api_version is None:
            raise ValueError("deployment needs api_version; give both, or the deployment as default_model")
        return self

    def addresses(self) -> tuple[str, ...]:
        """For Azure a resource's address is enough: where its API lies below it follows from `api_version`."""
        if self.flavour != "azure":
            return super().addresses()
        below = "/openai/v1" if self.api_version is None else "/openai"
        return tuple(f"{url.rstrip('/').removesuffix(below)}{below}" for url in super().addresses())

    def spoken(self) -> Flavour:
        """The flavour as these settings change it."""
        flavour = FLAVOURS[self.flavour]
        return flavour.having(flavour.features if self.features is None else self.features, self.omit)

    def answers(self) -> tuple[str, ...]:
        """Patterns of the bare fine-tuned ids that this backend answers: all of them at OpenAI, elsewhere none."""
        if self.models is not None:
            return self.models
        return ("ft:*",) if self.flavour == "openai" else ()


class VllmSettings(RemoteSettings):
    """vLLM servers of the service's base model, started alike and with `--enable-prompt-embeds`; see VllmOptions."""

    kind: Literal["vllm"]
    model: str | None = Field(None, min_length=1)
    dtype: Precision = "auto"
    context_length: int | None = Field(None, ge=2)
    max_logprobs: int = Field(MAX_LOGPROBS, ge=1)
    prompt_memory_bytes: int = Field(64 * 2**20, ge=0)

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if not self.addresses():
            raise ValueError("a vLLM backend has no address of its own; give its servers' as url or urls")
        return self

    def options(self) -> VllmOptions:
        return VllmOptions(self.model, self.dtype, self.context_length, self.max_logprobs, self.prompt_memory_bytes)

    def answers(self) -> tuple[str, ...]:
        """As OpenAICompatibleSettings.answers: none."""
        return ()


BackendSettings = Annotated[OpenAICompatibleSettings | VllmSettings, Field(discriminator="kind")]
BackendName = Annotated[str, AfterValidator(_backend_name)]
