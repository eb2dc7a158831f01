"""Settings: one TOML file, and environment variables `SOFTCUE_SECTION_KEY` over it."""

from __future__ import annotations

import difflib
import os
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel as Document
from pydantic import ConfigDict, Field, ValidationError

from prompt_store.prompts.soft_prompt import MAX_HEADER_BYTES, MAX_SOFT_PROMPT_BYTES
from service.engines.local.options import EngineOptions, Precision, Quantization


class SettingsError(Exception):
    """The settings cannot be used; the message names the key, the fact and the remedy."""


class _Section(Document):
    model_config = ConfigDict(extra="forbid", frozen=True)


class ServerSettings(_Section):
    """Where the service listens, and how long running requests may take to end after SIGTERM or Ctrl-C.

    `max_prompt_bytes` is the largest safetensors file that a publish takes, `max_body_bytes` any other body.
    """

    host: str = "127.0.0.1"
    port: int = Field(8000, ge=0, le=65535)
    drain_s: float = Field(20.0, ge=0)
    max_body_bytes: int = Field(2 * 1024 * 1024, ge=1024)
    max_prompt_bytes: int = Field(MAX_SOFT_PROMPT_BYTES + MAX_HEADER_BYTES + 8, ge=1024)


class StoreSettings(_Section):
    """The prompt store (a path or URL), how often it is asked for changes, and a folder of tasks to seed it with.

    `backups` is the folder for copies made before its schema changes; see `Database.open`. With
    `fall_back_when_damaged`, an alias whose version is damaged is answered by its previous target instead of an error.
    """

    url: str = Field(".softcue/softcue.db", repr=False)  # it may hold a password
    poll_s: float = Field(0.1, gt=0, le=1)
    seed: Path | None = None
    backups: Path | None = None
    fall_back_when_damaged: bool = False


class BaseSettings(_Section):
    """The frozen base model: its folder, and the name it is served under (the folder's when not given)."""

    path: Path = Path("examples/base")
    name: str | None = None


class EngineSettings(_Section):
    """How the local engine runs; see EngineOptions."""

    device: str = "cpu"
    dtype: Precision = "auto"
    threads: int = Field(0, ge=0)
    max_sequences: int = Field(64, ge=1)
    max_batch_tokens: int = Field(512, ge=1)
    kv_memory_bytes: int = Field(2 * 1024**3, ge=1)
    quantize: Quantization = "none"
    kernels: bool = True
    max_waiting: int = Field(256, ge=0)
    ready_timeout_s: float = Field(30.0, gt=0)

    def options(self) -> EngineOptions:
        return EngineOptions(**self.model_dump(exclude={"max_waiting", "ready_timeout_s"}))


class Settings(_Section):
    """All of it."""

    server: ServerSettings = ServerSettings()
    store: StoreSettings = StoreSettings()
    base: BaseSettings = BaseSettings()
    engine: EngineSettings = EngineSettings()


def load_settings(
    file: Path | None = None,
    environment: Mapping[str, str] | None = None,
    overrides: Mapping[str, Mapping[str, Any]] | None = None,
) -> Settings:
    """Settings from a TOML file, the environment over it, and `overrides` (the command line) over both.

    Paths in the file are relative to its folder. Raises SettingsError for an unknown key, naming the nearest known one.
    """
    document: dict[str, dict[str, Any]] = {}
    if file is not None:
        document = _read(file)
        for section, key in (("store", "url"), ("store", "seed"), ("store", "backups"), ("base", "path")):
            value = document.get(section, {}).get(key)
            if isinstance(value, str) and "://" not in value:
                document[section][key] = str(file.parent / Path(value).expanduser())
    environment = os.environ if environment is None else environment
    for section, model in _sections().items():
        prefix = f"SOFTCUE_{section}_".upper()
        for name in environment:
            key = name.removeprefix(prefix).lower()
            if name.startswith(prefix) and key not in model.model_fields:
                known = [prefix + field.upper() for field in model.model_fields]
                raise SettingsError(f"there is no setting {name}{_nearest(name, known)}")
            if name.startswith(prefix):
                document.setdefault(section, {})[key] = environment[name]
    for section, values in (overrides or {}).items():
        document.setdefault(section, {}).update(values)
    try:
        return Settings.model_validate(document)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        # The store's URL may hold a password.
        given = f" (it is {first['input']!r})" if key != "store.url" else ""
        raise SettingsError(f"setting {key}: {first['msg']}{given}") from error


def _read(file: Path) -> dict[str, dict[str, Any]]:
    try:
        document = tomllib.loads(file.read_text("utf-8"))
    except OSError as error:
        raise SettingsError(f"settings file {file} cannot be read: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise SettingsError(f"settings file {file} is not TOML: {error}") from error
    sections = _sections()
    for section, values in document.items():
        if section not in sections or not isinstance(values, dict):
            raise SettingsError(f"{file}: there is no section [{section}]{_nearest(section, sections)}")
        for key in values:
            if key not in sections[section].model_fields:
                known = [f"{section}.{name}" for name in sections[section].model_fields]
                raise SettingsError(f"{file}: there is no setting {section}.{key}{_nearest(f'{section}.{key}', known)}")
    return document


def _sections() -> dict[str, type[_Section]]:
    return {name: type(getattr(Settings(), name)) for name in Settings.model_fields}


def _nearest(name: str, known: Any) -> str:
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.0)
    return f"; did you mean {close[0]}?" if close else ""
