"""What a request needs of an engine beyond plain text, held against what the engine serves."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from service.engines.base import Capabilities, GenerationRequest, Messages, Prompt
from service.engines.errors import UnsupportedFeature

HARMLESS_OPTIONS = frozenset({"service_tier", "prompt_cache_key", "prompt_cache_retention"})
"""Provider options that change nothing of an answer: a backend without such options may leave them aside."""


def required_features(request: GenerationRequest) -> dict[str, str]:
    """The features a request needs beyond plain generation, each with the request's field that asks for it."""
    sampling = request.sampling
    rich = _first_rich_message(request.prompt)
    option = next((name for name in request.provider_options if name not in HARMLESS_OPTIONS), "")
    asked = {
        "n": (request.n != 1, "n"),
        "logprobs": (request.logprobs is not None, "logprobs"),
        "prompt_logprobs": (request.prompt_logprobs is not None, "prompt_logprobs"),
        "echo": (request.echo, "echo"),
        "structured_output": (request.response_format.kind != "text", "response_format"),
        "tools": (bool(request.tools), "tools"),
        "rich_messages": (bool(rich), rich),
        "provider_options": (bool(option), option),
        "remote_model": (request.remote_model is not None, "model"),
        "deadline": (request.deadline_s is not None, "deadline_s"),
        "min_p": (sampling.min_p != 0.0, "min_p"),
        "min_tokens": (sampling.min_tokens != 0, "min_tokens"),
        "ignore_eos": (sampling.ignore_eos, "ignore_eos"),
        "stop_token_ids": (bool(sampling.stop_token_ids), "stop_token_ids"),
        "frequency_penalty": (sampling.frequency_penalty != 0.0, "frequency_penalty"),
        "presence_penalty": (sampling.presence_penalty != 0.0, "presence_penalty"),
        "repetition_penalty": (sampling.repetition_penalty != 1.0, "repetition_penalty"),
        "logit_bias": (bool(sampling.logit_bias), "logit_bias"),
    }
    return {feature: parameter for feature, (wanted, parameter) in asked.items() if wanted}


def check_supported(request: GenerationRequest, capabilities: Capabilities) -> None:
    """Raise UnsupportedFeature when the request asks for what the engine does not serve: never ignore it."""
    for feature, parameter in required_features(request).items():
        if feature not in capabilities.features:
            remedy = _INSTEAD.get(feature, "leave it out")
            raise UnsupportedFeature(f"{parameter} is not served by this task's backend; {remedy}", parameter=parameter)


_INSTEAD = {
    "tools": (
        "it answers in text and calls no tools, only remote backends can pass them on. Leave tools out, or ask for "
        "an answer in JSON and call them yourself"
    ),
    "rich_messages": (
        "it takes roles and texts alone, only remote backends can pass on names, tool calls, images and audio. Leave "
        "them out"
    ),
}


def holds_only_text(message: Mapping[str, Any]) -> bool:
    """Whether a message in OpenAI's form says no more than a role and texts."""
    if message.keys() != {"role", "content"} or message["role"] == "tool":
        return False
    content = message["content"]
    return isinstance(content, str) or all(part["type"] == "text" for part in content)


def _first_rich_message(prompt: Prompt) -> str:
    """`messages[i]` of the first message that holds more than text; empty where there is none."""
    wire = prompt.wire if isinstance(prompt, Messages) else ()
    return next((f"messages[{index}]" for index, message in enumerate(wire) if not holds_only_text(message)), "")
