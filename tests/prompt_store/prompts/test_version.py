import pytest
from pydantic import ValidationError

from prompt_store.prompts.template import Message
from prompt_store.prompts.version import (
    PAYLOAD,
    EnsemblePayload,
    Payload,
    PrefixPayload,
    RemoteModelPayload,
    SoftPromptPayload,
    TextPayload,
    version_digest,
)

A, B, REVISION = "a" * 64, "b" * 64, "c" * 64

SOFT = SoftPromptPayload(tensor_digest=A, dtype="F32", shape=(4, 16), base_fingerprint="base")
PAYLOADS: list[Payload] = [
    SOFT,
    PrefixPayload(tensors={"layers.0.key": A, "layers.0.value": B}, dtype="BF16", length=4, base_fingerprint="base"),
    TextPayload(messages=(Message(role="user", content="{message}"),)),
    RemoteModelPayload(provider="openai", model="ft:gpt-4o:acme::1"),
    EnsemblePayload(members=(A, B), base_fingerprint="base"),
]


@pytest.mark.parametrize("payload", PAYLOADS, ids=lambda payload: payload.kind)
def test_every_kind_of_payload_survives_json(payload: Payload) -> None:
    assert PAYLOAD.validate_json(payload.model_dump_json()) == payload


def test_whatever_makes_answers_differ_changes_the_digest() -> None:
    others = [
        SOFT.model_copy(update={"tensor_digest": B}),
        SOFT.model_copy(update={"base_fingerprint": "other"}),
        *PAYLOADS[1:],
        PAYLOADS[2].model_copy(update={"messages": (Message(role="system", content="{message}"),)}),
        PAYLOADS[3].model_copy(update={"model": "ft:gpt-4o:acme::2"}),
        PAYLOADS[4].model_copy(update={"members": (A, REVISION)}),
        PAYLOADS[4].model_copy(update={"vote": "mean_logprob"}),
    ]
    digests = {version_digest(REVISION, SOFT), version_digest(B, SOFT)}
    digests |= {version_digest(REVISION, other) for other in others}
    assert len(digests) == 2 + len(others)


def test_the_digest_of_a_version_never_changes_between_releases() -> None:
    # Aliases, routes and clients hold this value: do not edit it, keep the digest.
    assert version_digest(REVISION, SOFT) == "2aec77d89920b38edf64b953cff1890cf1c183c8c364b91c597f1527a3fddda6"


@pytest.mark.parametrize(
    "document",
    [
        {"kind": "lora"},
        {"kind": "text", "messages": []},
        {"kind": "ensemble", "members": [A], "base_fingerprint": "base"},
        {"kind": "soft_prompt", "tensor_digest": "short", "dtype": "F32", "shape": [1, 1], "base_fingerprint": "x"},
        {"kind": "remote_model", "provider": "openai", "model": "x", "more": 1},
    ],
)
def test_other_payloads_are_refused(document: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        PAYLOAD.validate_python(document)
