"""What providers of OpenAI's API do differently from each other: a table, and nothing that sends anything.

No hosted provider was asked. What the rows rest on, and how far:

- `softcue` is held against our own `/v1` by tests. `vllm` has the names of vLLM 0.32's `ChatCompletionRequest`; only
  its completions are held against a real server, by the engine in `vllm`.
- `openai` is held against OpenAI's OpenAPI description and the official client by tests; `azure` is taken to be the
  same at other addresses.
- `mistral` follows the OpenAPI description in mistralai/platform-docs-public of 2026-08, which forbids fields that it
  does not name: `logprobs`, `logit_bias`, `stream_options` and `max_completion_tokens` among them.
- `together` follows the one in togethercomputer/openapi of 2026-04. `stream_options` is not in it, nor forbidden.
- `fireworks` follows an undated copy of its reference of /chat/completions. `seed` and `stream_options` are not in
  it, and that it takes a response format for raw text is assumed.

Where a provider proves to do otherwise, `features` and `omit` of its backend's table put it right.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Literal

from service.engines.base import MAX_LOGPROBS, Sampling

FlavourName = Literal["openai", "azure", "together", "fireworks", "mistral", "vllm", "softcue", "other"]


@dataclass(frozen=True, slots=True)
class Flavour:
    """How one kind of provider is spoken to.

    `parameters` maps a field of Sampling to the provider's name for it; what is not there is refused unless it is
    neutral. `stated` are those sent even then, where a provider's own default may be another value.
    `constraint` says how a choice or a regular expression is asked for: by vLLM's `structured_outputs`, or a choice
    alone, by a JSON schema. `chat_logprobs` is `count` where chat takes the number of alternatives for `logprobs`.
    `completion_formats` and `token_ids` say whether `/completions` takes a response format and tokenised text.
    """

    url: str | None = None
    features: frozenset[str] = frozenset()
    parameters: Mapping[str, str] = dataclasses.field(default_factory=dict)
    stated: frozenset[str] = frozenset()
    chat_limit: Literal["max_tokens", "max_completion_tokens"] = "max_tokens"
    stream_usage: bool = True
    constraint: Literal["json_schema", "structured_outputs"] = "json_schema"
    chat_logprobs: Literal["openai", "count"] = "openai"
    most_logprobs: int = MAX_LOGPROBS
    completion_formats: bool = False
    token_ids: bool = False
    key_header: Literal["authorization", "api-key"] = "authorization"
    omitted: frozenset[str] = frozenset()

    def having(self, features: Collection[str], omitted: Collection[str] = ()) -> Flavour:
        """The same with other features, of which those that are fields of Sampling are sent by their own names.

        A remote model's name and a deadline are taken whatever they are: that is not the provider's doing.
        Fields of the body in `omitted` are never sent, whatever a request says.
        """
        parameters = {name: field for name, field in self.parameters.items() if name in features or name in _PLAIN}
        parameters |= {name: name for name in features if name in _SAMPLING and name not in parameters}
        return dataclasses.replace(
            self, features=frozenset(features) | _OURS, parameters=parameters, omitted=frozenset(omitted)
        )


_SAMPLING = frozenset(Sampling.__dataclass_fields__) - {"max_tokens"}
_PLAIN = frozenset({"temperature", "top_p", "stop", "seed", "top_k"})
_OURS = frozenset({"remote_model", "deadline"})
_TEMPERATURE = frozenset({"temperature", "top_p"})


def _named(*names: str) -> dict[str, str]:
    return {name: name for name in names}


_OPENAI = _named("temperature", "top_p", "stop", "seed", "frequency_penalty", "presence_penalty", "logit_bias")
_OPEN_WEIGHTS = _OPENAI | _named("top_k", "min_p", "repetition_penalty")
_VLLM = _OPEN_WEIGHTS | _named("min_tokens", "ignore_eos", "stop_token_ids")

_CHAT = _OURS | {
    "n", "logprobs", "structured_output", "tools", "rich_messages", "provider_options", "follow_up", "scores",
}  # fmt: skip

FEATURES = _CHAT | _SAMPLING
"""All that a backend's settings may say of it."""


def _features(parameters: Mapping[str, str], chat: frozenset[str] = _CHAT) -> frozenset[str]:
    return chat | (parameters.keys() - _PLAIN)


_MISTRAL = _named("temperature", "top_p", "stop", "frequency_penalty", "presence_penalty") | {"seed": "random_seed"}

FLAVOURS: Mapping[FlavourName, Flavour] = {
    "openai": Flavour(
        url="https://api.openai.com/v1",
        features=_features(_OPENAI),
        parameters=_OPENAI,
        chat_limit="max_completion_tokens",
        token_ids=True,
    ),
    "azure": Flavour(
        features=_features(_OPENAI),
        parameters=_OPENAI,
        chat_limit="max_completion_tokens",
        token_ids=True,
        key_header="api-key",
    ),
    "together": Flavour(
        url="https://api.together.xyz/v1",
        features=_features(_OPEN_WEIGHTS),
        parameters=_OPEN_WEIGHTS,
        stated=_TEMPERATURE,
        chat_logprobs="count",
    ),
    "fireworks": Flavour(
        url="https://api.fireworks.ai/inference/v1",
        features=_features(_OPEN_WEIGHTS),
        parameters=_OPEN_WEIGHTS,
        stated=_TEMPERATURE,
        most_logprobs=5,
        completion_formats=True,
    ),
    "mistral": Flavour(
        url="https://api.mistral.ai/v1",
        features=_features(_MISTRAL, _CHAT - {"logprobs"}),
        parameters=_MISTRAL,
        stated=_TEMPERATURE,
        stream_usage=False,  # its last chunk has the usage unasked
    ),
    "vllm": Flavour(
        features=_features(_VLLM),
        parameters=_VLLM,
        stated=_TEMPERATURE | {"top_k"},
        constraint="structured_outputs",
        completion_formats=True,
        token_ids=True,
    ),
    "softcue": Flavour(
        features=_features(_VLLM, _CHAT - {"tools", "rich_messages"}),
        parameters=_VLLM,
        stated=_TEMPERATURE | {"top_k"},
        constraint="structured_outputs",
        completion_formats=True,
        token_ids=True,
    ),
    "other": Flavour(features=_features(_OPENAI), parameters=_OPENAI),
}
