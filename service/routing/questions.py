"""What a caller asks, and the request to an engine that it becomes once it is known who answers."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from prompt_store.prompts.task import Message, Task, render_messages
from prompt_store.prompts.template import fill_in, template_fields
from prompt_store.prompts.version import RemoteModelPayload, TextPayload
from service.engines.base import (
    UNBOUNDED,
    Capabilities,
    GenerationRequest,
    Messages,
    Prompt,
    ResponseFormat,
    Sampling,
)
from service.engines.errors import UnsupportedFeature
from service.routing.plan import Target


@dataclass(frozen=True, slots=True)
class Question:
    """A request as it came. Of `request`, id, prompt, sampling and soft prompt are decided by who answers.

    `sampling` is what the caller says of it, by the names of Sampling's fields; the rest is the task's. `inputs` stand
    in place of the request's prompt. `constrained` holds the answer to an extract task's schema where that can be done.
    """

    request: GenerationRequest
    sampling: Mapping[str, Any] = field(default_factory=dict)
    inputs: Mapping[str, str] | None = None
    constrained: bool = False

    def request_for(self, target: Target, capabilities: Capabilities, **known: Any) -> GenerationRequest:
        """The request to the engine of this target, with what else is `known` of it by then: id, soft prompt, deadline.

        Raises InvalidInputs for inputs that are not the task's, UnsupportedFeature as `chat_prompt` and `raw_prompt`.
        """
        form = self.request.response_format
        if self.constrained and form.kind == "text" and "structured_output" in capabilities.features:
            form = _answer_form(target)
        return dataclasses.replace(
            self.request,
            prompt=self.prompt_for(target),
            sampling=dataclasses.replace(sampling_defaults(target), **self.sampling),
            response_format=form,
            remote_model=remote_model(target),
            **known,
        )

    def prompt_for(self, target: Target) -> Prompt:
        """As `request_for`."""
        if self.inputs is not None:
            return task_prompt(target, self.inputs)
        prompt = self.request.prompt
        return chat_prompt(target, prompt) if isinstance(prompt, Messages) else raw_prompt(target, prompt)


def only_input(task: Task, prompt: Prompt) -> Mapping[str, str] | None:
    """What a conversation of a single turn asks a task that has only one input; None where that is not known whole.

    What a system said before it is passed over.
    """
    if not isinstance(prompt, Messages) or prompt.wire or len(task.inputs) != 1:
        return None
    turns = [turn for turn in prompt.messages if turn.role != "system"]
    if len(turns) != 1 or turns[0].role != "user":
        return None
    return {task.inputs[0]: turns[0].content}


def remote_model(target: Target) -> str | None:
    """The model as its provider knows it; None where a backend's own model answers."""
    if target.version is not None and isinstance(target.version.payload, RemoteModelPayload):
        return target.version.payload.model
    return target.remote_model


def sampling_defaults(target: Target) -> Sampling:
    """The task's defaults; greedy and 128 tokens for the bare base, and a provider's own for its model asked bare."""
    if target.task is None:
        return Sampling() if target.remote_model is None else Sampling(max_tokens=UNBOUNDED, temperature=1.0)
    defaults = target.task.task.sampling
    return Sampling(
        max_tokens=defaults.max_tokens,
        temperature=defaults.temperature,
        top_p=defaults.top_p,
        top_k=defaults.top_k,
        stop=tuple(defaults.stop),
    )


def chat_prompt(target: Target, asked: Messages) -> Messages:
    """A conversation as it is; a version that is a text prompt stands before it, its last turn left to the caller.

    Raises UnsupportedFeature for a text prompt whose other turns have placeholders: only inputs can fill them.
    """
    payload = target.version.payload if target.version is not None else None
    if not isinstance(payload, TextPayload):
        return asked
    before = payload.messages
    if before[-1].role == "user":
        before = before[:-1]
    if template_fields(before):
        raise UnsupportedFeature(
            f"{target.label} is a text prompt with placeholders; ask it with inputs at /v1/tasks", parameter="model"
        )
    said = render_messages(before, {})
    wire = (*({"role": turn.role, "content": turn.content} for turn in said), *asked.wire) if asked.wire else ()
    return Messages((*said, *asked.messages), wire)


def raw_prompt(target: Target, prompt: Prompt) -> Prompt:
    """Raw text as it is. Raises UnsupportedFeature for a text prompt, which has no place in it."""
    if target.version is not None and isinstance(target.version.payload, TextPayload):
        raise UnsupportedFeature(
            f"{target.label} is a text prompt; ask it at /v1/chat/completions or /v1/tasks", parameter="model"
        )
    return prompt


def task_prompt(target: Target, inputs: Mapping[str, str]) -> Messages:
    """Inputs through the task's template, or through the version's own where it is a text prompt."""
    assert target.task is not None
    task = target.task.task
    payload = target.version.payload if target.version is not None else None
    messages: tuple[Message, ...] = payload.messages if isinstance(payload, TextPayload) else task.messages
    # A text prompt may leave inputs out; a request brings all of them whichever version answers.
    return Messages(fill_in(messages, inputs, task.inputs))


def extract_task(target: Target) -> Task | None:
    """The target's task where it is one to extract."""
    return target.task.task if target.task is not None and target.task.task.kind == "extract" else None


def _answer_form(target: Target) -> ResponseFormat:
    """The JSON schema of an extract task."""
    task = extract_task(target)
    return ResponseFormat("json_schema", task.json_schema, lenient=True) if task is not None else ResponseFormat()
