"""The frozen base model as everyone but the forward pass sees it: files, fingerprint, tokenizer, chat template, layout.

Imports no torch, so that the HTTP process can count tokens and refuse an over-long prompt before any compute.
`BaseModel.lay_out` is the only place where a prompt becomes token ids; the soft prompt stands before all of them.
"""

from __future__ import annotations

import datetime
import hashlib
import json
import mmap
import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import jinja2
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import Tokenizer

from prompt_store.canonical import canonical_json
from prompt_store.prompts.task import Message
from prompt_store.prompts.tensor_file import tensor_digest
from prompt_store.prompts.version import BaseDescription
from service.engines.base import Messages, Prompt, RawText, Sampling
from service.engines.errors import BaseModelError, InvalidRequest, PromptTooLong
from service.engines.weights_file import stored_tensors


@dataclass(frozen=True)
class BaseModel:
    """A base model's folder in the Hugging Face layout, opened without its weights."""

    folder: Path
    name: str
    fingerprint: str
    config: dict[str, Any]
    tokenizer: Tokenizer
    chat_template: str | None
    special_tokens: dict[str, str]
    eos_token_ids: frozenset[int]
    eos_token_id: int

    @property
    def text_config(self) -> dict[str, Any]:
        """The language model's own part of the configuration."""
        nested = self.config.get("text_config")
        return nested if isinstance(nested, dict) else self.config

    @property
    def dtypes(self) -> list[str]:
        """What the configuration says of the weights' dtype, under the key of now and the one before; may be nothing.

        The language model's own part comes first.
        """
        parts = (self.text_config, self.config)
        return [str(part[key]) for part in parts for key in ("dtype", "torch_dtype") if key in part]

    @property
    def hidden_size(self) -> int:
        return self._size("hidden_size", "n_embd", "d_model")

    @property
    def layers(self) -> int:
        return self._size("num_hidden_layers", "n_layer", "num_layers")

    @property
    def vocabulary_size(self) -> int:
        return self._size("vocab_size")

    @property
    def context_length(self) -> int:
        return self._size("max_position_embeddings", "n_positions")

    @property
    def kv_heads(self) -> int | None:
        """Heads of keys and values in each layer; None where the configuration does not say."""
        return self._given("num_key_value_heads", "num_attention_heads", "n_head", "num_heads")

    @property
    def head_size(self) -> int | None:
        """D, the width of a head of keys; None where the configuration does not say."""
        heads = self._given("num_attention_heads", "n_head", "num_heads")
        return self._given("head_dim") or (self.hidden_size // heads if heads else None)

    def _given(self, *keys: str) -> int | None:
        """The first of these that the configuration has: architectures name the same thing differently."""
        return next((size for key in keys if isinstance(size := self.text_config.get(key), int)), None)

    def _size(self, *keys: str) -> int:
        size = self._given(*keys)
        if size is not None:
            return size
        raise BaseModelError(
            f"config.json of base model '{self.name}' has no '{keys[0]}', so it is no decoder with attention that can "
            "be served here"
        )

    def describe(self) -> BaseDescription:
        """What the store keeps of this base."""
        architectures = self.config.get("architectures") or [self.config.get("model_type", "unknown")]
        return BaseDescription(
            fingerprint=self.fingerprint,
            name=self.name,
            hidden_size=self.hidden_size,
            layers=self.layers,
            context_length=self.context_length,
            vocabulary_size=self.vocabulary_size,
            architecture=str(architectures[0]),
            kv_heads=self.kv_heads,
            head_size=self.head_size,
        )

    @cached_property
    def _template(self) -> jinja2.Template:
        if self.chat_template is None:
            raise InvalidRequest(
                f"base model '{self.name}' has no chat template; use /v1/completions, or add chat_template.jinja to it",
                parameter="messages",
            )
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
        )
        environment.filters["tojson"] = lambda value, indent=None: json.dumps(value, ensure_ascii=False, indent=indent)
        environment.globals["raise_exception"] = _raise_from_template
        environment.globals["strftime_now"] = lambda pattern: datetime.datetime.now().strftime(pattern)
        return environment.from_string(self.chat_template)

    def render_chat(self, messages: Sequence[Message], *, add_generation_prompt: bool = True) -> str:
        """The conversation as text, through the base model's own chat template.

        Raises InvalidRequest when the template refuses the conversation (a role it does not know, say).
        """
        try:
            return self._template.render(
                messages=[{"role": message.role, "content": message.content} for message in messages],
                add_generation_prompt=add_generation_prompt,
                **self.special_tokens,
            )
        except jinja2.TemplateError as error:
            raise InvalidRequest(
                f"the chat template of '{self.name}' refused the messages: {error}", parameter="messages"
            ) from error

    def lay_out(self, prompt: Prompt) -> list[int]:
        """The token ids of a prompt, without its virtual tokens, which always stand before the first of these.

        A chat template brings its own special tokens; raw text gets those that the tokenizer's post-processor adds.
        Raises InvalidRequest for an empty prompt or for a token id outside the vocabulary.
        """
        if isinstance(prompt, Messages):
            if not prompt.messages:
                raise InvalidRequest("messages is empty; send at least one message", parameter="messages")
            ids = self.tokenizer.encode(self.render_chat(prompt.messages), add_special_tokens=False).ids
        elif isinstance(prompt, RawText):
            ids = self.tokenizer.encode(prompt.text, add_special_tokens=True).ids
        else:
            ids = list(prompt.ids)
            wrong = next((token for token in ids if not 0 <= token < self.vocabulary_size), None)
            if wrong is not None:
                raise InvalidRequest(
                    f"token id {wrong} is outside the vocabulary of {self.vocabulary_size}", parameter="prompt"
                )
        if not ids:
            raise InvalidRequest("the prompt is empty; send at least one token of text", parameter="prompt")
        return ids

    def check_tokens(self, sampling: Sampling) -> None:
        """Raise InvalidRequest for a token id outside the vocabulary among those that are biased or stop an answer."""
        for parameter, ids in (("logit_bias", sampling.logit_bias), ("stop_token_ids", sampling.stop_token_ids)):
            wrong = next((token for token in ids if not 0 <= token < self.vocabulary_size), None)
            if wrong is not None:
                raise InvalidRequest(
                    f"{parameter} names token id {wrong}, which is outside the vocabulary of {self.vocabulary_size}; "
                    f"use ids of this base model's tokenizer",
                    parameter=parameter,
                )

    def check_length(self, prompt_tokens: int, virtual_tokens: int) -> None:
        """Raise PromptTooLong unless the prompt and one new token fit the context."""
        if prompt_tokens + virtual_tokens + 1 > self.context_length:
            raise PromptTooLong(prompt_tokens, virtual_tokens, self.context_length)

    def text_of(self, ids: Sequence[int]) -> str:
        """Token ids as text, special tokens left out."""
        text: str = self.tokenizer.decode(list(ids), skip_special_tokens=True)
        return text

    def continuation(self, text: str) -> list[int]:
        """The token ids of an answer as training and scoring see it: its text, then the end-of-sequence token."""
        return [*self.tokenizer.encode(text, add_special_tokens=False).ids, self.eos_token_id]


def open_base_model(folder: str | Path, *, name: str | None = None, cache_folder: Path | None = None) -> BaseModel:
    """Open a base model's folder without reading its weights into memory.

    The fingerprint is cached in `cache_folder` (default `$XDG_CACHE_HOME/softcue`) under the files' paths, sizes and
    times. Raises BaseModelError when the folder is not a model, with the remedy.
    """
    folder = Path(folder).expanduser()
    weights = sorted(folder.glob("*.safetensors"))
    missing = [file for file in ("config.json", "tokenizer.json") if not (folder / file).is_file()]
    if not weights:
        missing.append("*.safetensors")
    if missing:
        raise BaseModelError(
            f"no base model at {folder} ({', '.join(missing)} missing); set [base] path (`base` in a recipe) to a "
            "folder in the Hugging Face layout with safetensors weights: examples/base holds the demo base, and "
            "`hf download ORGANISATION/MODEL --local-dir DIR` fetches others"
        )
    config = _read_json(folder / "config.json")
    tokenizer_config = _read_json(folder / "tokenizer_config.json")
    generation_config = _read_json(folder / "generation_config.json")
    try:
        tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    except Exception as error:  # the Rust binding raises bare Exception
        raise BaseModelError(f"{folder / 'tokenizer.json'} cannot be read: {error}") from error
    template_file = folder / "chat_template.jinja"
    template = template_file.read_text("utf-8") if template_file.is_file() else tokenizer_config.get("chat_template")
    special = {key: text for key in ("bos_token", "eos_token", "pad_token") if (text := _token(tokenizer_config, key))}
    eos = _eos_token_ids(config, generation_config, tokenizer, special)
    primary = tokenizer.token_to_id(special["eos_token"]) if "eos_token" in special else None
    return BaseModel(
        folder=folder,
        name=name or folder.resolve().name,
        fingerprint=fingerprint(folder, template, cache_folder),
        config=config,
        tokenizer=tokenizer,
        chat_template=template,
        special_tokens=special,
        eos_token_ids=frozenset(eos),
        eos_token_id=primary if primary is not None else eos[0],
    )


def fingerprint(folder: Path, chat_template: str | None, cache_folder: Path | None = None) -> str:
    """SHA-256 over the weights, the tokenizer and the chat template; not over how they are run.

    Weights are hashed tensor by tensor in order of their names, so that sharding does not change the fingerprint.
    """
    weights = sorted(folder.glob("*.safetensors"))
    files = [*weights, folder / "tokenizer.json"]
    seen = [[str(file.resolve()), (status := file.stat()).st_size, status.st_mtime_ns] for file in files]
    key = hashlib.sha256(canonical_json({"files": seen, "chat_template": chat_template})).hexdigest()
    default = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "softcue"
    cached = (cache_folder or default) / f"fingerprint-{key}"
    try:
        if len(known := cached.read_text("ascii").strip()) == 64:
            return known
    except OSError:
        known = ""  # not computed yet, or no cache can be kept here
    parts = {
        "weights": _weights_digest(weights),
        "tokenizer": hashlib.sha256((folder / "tokenizer.json").read_bytes()).hexdigest(),
        "chat_template": hashlib.sha256((chat_template or "").encode()).hexdigest(),
    }
    known = hashlib.sha256(canonical_json(parts)).hexdigest()
    try:
        cached.parent.mkdir(parents=True, exist_ok=True)
        partial = cached.with_suffix(f".{os.getpid()}")
        partial.write_text(known, "ascii")
        partial.replace(cached)
    except OSError:
        return known  # a read-only home costs the next start a hash, nothing more
    return known


def _weights_digest(files: Sequence[Path]) -> str:
    tensors: dict[str, str] = {}
    for file in files:
        stored = stored_tensors(file)
        with (
            file.open("rb") as handle,
            mmap.mmap(handle.fileno(), 0, access=mmap.ACCESS_READ) as content,
            memoryview(content) as view,
        ):
            for tensor in stored:
                with view[tensor.begin : tensor.end] as data:
                    tensors[tensor.name] = tensor_digest(tensor.dtype, tensor.shape, data)
    return hashlib.sha256(canonical_json(tensors)).hexdigest()


def _read_json(file: Path) -> dict[str, Any]:
    if not file.is_file():
        return {}
    try:
        document = json.loads(file.read_text("utf-8"))
    except ValueError as error:
        raise BaseModelError(f"{file} is not JSON: {error}") from error
    if not isinstance(document, dict):
        raise BaseModelError(f"{file} is not a JSON object")
    return document


def _token(tokenizer_config: dict[str, Any], key: str) -> str | None:
    value = tokenizer_config.get(key)
    return value.get("content") if isinstance(value, dict) else value


def _eos_token_ids(
    config: dict[str, Any], generation: dict[str, Any], tokenizer: Tokenizer, special: dict[str, str]
) -> list[int]:
    found: list[int] = []
    for value in (generation.get("eos_token_id"), config.get("eos_token_id")):
        found += value if isinstance(value, list) else [value] if isinstance(value, int) else []
    if "eos_token" in special and (token := tokenizer.token_to_id(special["eos_token"])) is not None:
        found.append(token)
    if not found:
        raise BaseModelError(
            "the base model names no end-of-sequence token; set eos_token_id in generation_config.json"
        )
    return list(dict.fromkeys(found))


def _raise_from_template(message: str) -> None:
    raise jinja2.TemplateError(message)
