"""Settings: one TOML file, and environment variables `SOFTCUE_SECTION_KEY` over its flat sections."""

from __future__ import annotations

import dataclasses
import datetime
import difflib
import importlib
import os
import re
import tomllib
from collections.abc import Callable, Mapping
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Union, get_args, get_origin, get_type_hints

from pydantic import BaseModel as Document
from pydantic import ConfigDict, Field, ValidationError, field_validator

from prompt_store.prompts.soft_prompt import MAX_HEADER_BYTES, MAX_SOFT_PROMPT_BYTES
from service.engines.local.options import EngineOptions, Precision, Quantization
from service.engines.remote.backend_settings import BackendName, BackendSettings

_PATHS = (("store", "url"), ("store", "seed"), ("store", "backups"), ("journal", "folder"), ("base", "path"))


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
    Answers of shadow routes are kept for `shadow_days`.
    """

    url: str = Field(".softcue/softcue.db", repr=False)  # it may hold a password
    poll_s: float = Field(0.1, gt=0, le=1)
    seed: Path | None = None
    backups: Path | None = None
    fall_back_when_damaged: bool = False
    shadow_days: float = Field(30.0, gt=0)


class BaseSettings(_Section):
    """The frozen base model: its folder, and the name it is served under (the folder's when not given)."""

    path: Path = Path("examples/base")
    name: str | None = None


class EngineSettings(_Section):
    """How the local engine runs; see EngineOptions. Not `enabled`, there is none and remote backends alone answer."""

    enabled: bool = True
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
        return EngineOptions(**self.model_dump(exclude={"enabled", "max_waiting", "ready_timeout_s"}))


class ExperimentSettings(_Section):
    """`force_key_env` names the environment variable with the key of testers.

    Whoever sends it as a bearer token may ask for an arm by the header x-softcue-arm, and is left out of analysis.
    """

    force_key_env: str | None = None


class CaptureSettings(_Section):
    """Keeps requests and answers of a task, for `softcue dataset export`: a share of them, for so many days.

    `redact` is a function `module:name` of one's own, which is given each text and returns what may be kept of it.
    """

    sample: float = Field(1.0, gt=0, le=1)
    retention_days: float = Field(30.0, gt=0, le=36500)
    redact: str | None = None

    @field_validator("redact")
    @classmethod
    def _names_a_function(cls, redact: str | None) -> str | None:
        if redact is not None and not re.fullmatch(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*", redact):
            raise ValueError("is no function; name one as module:name")
        return redact

    def redaction(self) -> Callable[[str], str]:
        """What is done to each text before it is kept. Raises SettingsError where the function cannot be had."""
        if self.redact is None:
            return str
        module, _, name = self.redact.partition(":")
        try:
            found: Callable[[str], str] = getattr(importlib.import_module(module), name)
        except Exception as error:  # the module is its operator's own code
            raise SettingsError(
                f"the redaction {self.redact} cannot be loaded ({error}); make it a function of a module on PYTHONPATH"
            ) from error
        if not callable(found):
            raise SettingsError(f"the redaction {self.redact} is no function; name one as module:name")
        return found


class JournalSettings(_Section):
    """Where exposures, outcomes and the like wait until the store has them, and how much may wait there.

    The folder is on a local disk; several processes on one machine may share it. By default it is beside a
    SQLite store, and in .softcue/journals for one in PostgreSQL. Two stores never share one.
    """

    folder: Path | None = None
    max_bytes: int = Field(1024**3, ge=1024**2)
    segment_bytes: int = Field(4 * 1024**2, ge=4096)


class LedgerSettings(_Section):
    """For how many days the store keeps exposures, answers and outcomes; captures have a time of their own each."""

    retention_days: float = Field(365.0, gt=0, le=36500)


class Settings(_Section):
    """All of it. `backends` are `[backends.NAME]`, the remote ones; `retirements` are the dates on which providers take
    models away, by the model's name or what it begins with; `captures` are `[captures.TASK]`, none by default."""

    server: ServerSettings = ServerSettings()
    store: StoreSettings = StoreSettings()
    journal: JournalSettings = JournalSettings()
    ledger: LedgerSettings = LedgerSettings()
    base: BaseSettings = BaseSettings()
    engine: EngineSettings = EngineSettings()
    backends: dict[BackendName, BackendSettings] = Field(default_factory=dict)
    retirements: dict[str, datetime.date] = Field(default_factory=dict)
    experiments: ExperimentSettings = ExperimentSettings()
    captures: dict[str, CaptureSettings] = Field(default_factory=dict)


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
        for section, key in _PATHS:
            value = document.get(section, {}).get(key)
            if isinstance(value, str) and "://" not in value:
                document[section][key] = str(file.parent / Path(value).expanduser())
        for backend in document.get("backends", {}).values():
            if isinstance(backend.get("ca_file"), str):
                backend["ca_file"] = str(file.parent / Path(backend["ca_file"]).expanduser())
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
        settings = Settings.model_validate(document)
    except ValidationError as error:
        raise SettingsError(_in_words(error)) from error
    if not settings.engine.enabled and not settings.backends:
        raise SettingsError(
            "engine.enabled is false and there are no [backends], so nothing would answer; add a backend"
        )
    return settings


def _in_words(error: ValidationError) -> str:
    """The first thing that is wrong with settings."""
    first = error.errors()[0]
    place = list(first["loc"])
    if place[0] == "backends":
        del place[2:3]  # the kind of the table, which is no part of the key
    key = ".".join(str(part) for part in place)
    if first["type"].startswith("union_tag"):
        return f"setting {key}.kind: is {first['ctx'].get('tag', 'missing')}; make it openai_compatible or vllm"
    # The store's URL may hold a password, and a backend's table a key that was put where its variable belongs.
    given = "" if key.startswith(("store.url", "backends")) else f" (it is {first['input']!r})"
    return f"setting {key}: {first['msg'].removeprefix('Value error, ')}{given}"


def _read(file: Path) -> dict[str, dict[str, Any]]:
    try:
        document = tomllib.loads(file.read_text("utf-8"))
    except OSError as error:
        raise SettingsError(f"settings file {file} cannot be read: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise SettingsError(f"settings file {file} is not TOML: {error}") from error
    for section, values in document.items():
        if section not in Settings.model_fields or not isinstance(values, dict):
            raise SettingsError(f"{file}: there is no section [{section}]{_nearest(section, Settings.model_fields)}")
    _refuse_unknown(file, "", document, Settings)
    return document


def _refuse_unknown(file: Path, place: str, given: Any, annotation: Any) -> None:
    """Raise SettingsError for the first key, in tables within tables too, that the annotated type does not know."""
    if not isinstance(given, dict):
        return  # of the wrong type, which is said when the settings are read
    if get_origin(annotation) is dict:
        for name, inner in given.items():
            if not isinstance(inner, dict) and _tables(get_args(annotation)[1]):
                raise SettingsError(f"{file}: {place}{name} is no table; give it one as [{place}{name}]")
            _refuse_unknown(file, f"{place}{name}.", inner, get_args(annotation)[1])
        return
    tables = _tables(annotation)
    if len(tables) > 1:  # of several kinds, the one that it says it is
        tables = [table for table in tables if given.get("kind") in get_args(_known(table).get("kind"))]
    for table in tables:
        known = _known(table)
        for key, inner in given.items():
            if key not in known:
                nearest = _nearest(place + key, [place + name for name in known])
                raise SettingsError(f"{file}: there is no setting {place}{key}{nearest}")
            _refuse_unknown(file, f"{place}{key}.", inner, known[key])


def _tables(annotation: Any) -> list[type]:
    """The models and dataclasses that a value of this annotation may be."""
    if get_origin(annotation) is Annotated:
        return _tables(get_args(annotation)[0])
    if get_origin(annotation) in (Union, UnionType):
        return [table for one in get_args(annotation) for table in _tables(one)]
    if not isinstance(annotation, type):
        return []
    return [annotation] if issubclass(annotation, Document) or dataclasses.is_dataclass(annotation) else []


def _known(table: type) -> dict[str, Any]:
    """The fields of a model or dataclass, and how they are annotated."""
    if issubclass(table, Document):
        return {name: field.annotation for name, field in table.model_fields.items()}
    return get_type_hints(table)


def _sections() -> dict[str, type[_Section]]:
    """The flat sections, which the environment can set."""
    sections = ((name, field.annotation) for name, field in Settings.model_fields.items())
    return {name: kind for name, kind in sections if isinstance(kind, type) and issubclass(kind, _Section)}


def _nearest(name: str, known: Any) -> str:
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.0)
    return f"; did you mean {close[0]}?" if close else ""
