from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from prompt_store.errors import InvalidArtifact
from prompt_store.prompts.artifact import Artifact, decode_artifact, encode_artifact, read_artifact, write_artifact
from prompt_store.prompts.prefix import MAX_PREFIX_BYTES, PREFIX_TENSOR_NAME, Prefix
from prompt_store.prompts.soft_prompt import MAX_SOFT_PROMPT_BYTES, SoftPrompt, decode, encode
from prompt_store.prompts.tensor_file import ITEM_BYTES, Tensor, read_names, tensor_digest, write_tensors
from tests.prompt_store.building import BASE

SHAPE = (3, 2, 2, 4, 5)  # 3 layers, 2 KV heads, 4 virtual tokens, 5 numbers a head


def prefix(dtype: str = "F32", seed: int = 0) -> Prefix:
    bits = np.random.default_rng(seed).integers(0, 2**14, SHAPE)
    return Prefix(dtype, SHAPE, bits.astype("<u4" if dtype == "F32" else "<u2").tobytes())


@pytest.mark.parametrize("dtype", sorted(ITEM_BYTES))
def test_a_prefix_and_its_file_are_one_and_the_same(dtype: str) -> None:
    original = prefix(dtype)
    data = encode(original, {"a": "b"})
    assert decode(data) == (original, {"a": "b"})
    assert encode(*decode(data)) == data
    assert read_names(data, "") == ({PREFIX_TENSOR_NAME}, {"a": "b"})
    assert (original.length, original.size_bytes) == (4, 240 * ITEM_BYTES[dtype])
    assert original.digest == tensor_digest(dtype, SHAPE, original.data)


def test_a_soft_prompt_and_a_prefix_never_equal_each_other() -> None:
    values = bytes(8)
    assert SoftPrompt("F32", (1, 2), values) != Tensor("F32", (1, 2), values)
    assert SoftPrompt("F32", (1, 2), values).digest != Prefix("F32", (1, 2, 1, 1, 1), values).digest


@pytest.mark.parametrize(
    ("broken", "reason"),
    [
        (Prefix("F64", SHAPE, bytes(1920)), "prefix has dtype 'F64'"),
        (Prefix("F32", (3, 3, 2, 4, 5), bytes(1440)), r"must be \[L, 2, KV heads, P, D\]"),
        (Prefix("F32", (3, 2, 2, 0, 5), b""), "each at least 1"),
        (Prefix("F32", (6, 2, 4, 5), bytes(960)), r"shape \[6, 2, 4, 5\]"),
        (Prefix("F32", SHAPE, bytes(959)), "needs 960 bytes but has 959"),
        (
            Prefix("F16", SHAPE, prefix("F16").data[:-2] + b"\0\x7c"),
            "prefix has NaN or infinite values, first in layer 2",
        ),
    ],
)
def test_a_prefix_that_contradicts_itself_is_refused(broken: Prefix, reason: str) -> None:
    with pytest.raises(InvalidArtifact, match=reason):
        broken.check()
    with pytest.raises(InvalidArtifact, match=reason):
        encode(broken)


def test_a_file_holds_one_kind_in_its_own_shape() -> None:
    soft = SoftPrompt("F32", (1, 2), bytes(8))
    for tensors, reason in (
        ({"soft_prompt": soft, "prefix": prefix()}, "exactly one tensor, 'soft_prompt' or 'prefix'"),
        ({"prefix": soft}, r"prefix has shape \[1, 2\]"),
        ({"soft_prompt": prefix()}, r"soft prompt has shape \[3, 2, 2, 4, 5\]"),
    ):
        with pytest.raises(InvalidArtifact, match=reason):
            decode(write_tensors(tensors))


def test_a_prefix_may_be_larger_than_a_soft_prompt_within_bounds() -> None:
    data = bytes(MAX_SOFT_PROMPT_BYTES + 4)
    with pytest.raises(InvalidArtifact, match="more than the limit of 67108864; use fewer virtual tokens"):
        SoftPrompt("F32", (1, len(data) // 4), data).check()
    large = Prefix("F16", (1, 2, 1, 1, len(data) // 4), data)
    assert decode(encode(large))[0] == large
    too_large = bytes(MAX_PREFIX_BYTES + 4)
    with pytest.raises(InvalidArtifact, match="more than the limit of 268435456"):
        Prefix("F16", (1, 2, 1, 1, len(too_large) // 4), too_large).check()


def test_an_artifact_carries_a_prefix_and_is_read_from_bytes_too(tmp_path: Path) -> None:
    artifact = Artifact(prefix("BF16"), "support_intents", BASE.fingerprint, notes="n")
    path = tmp_path / "prefix.safetensors"
    write_artifact(path, artifact)
    assert read_artifact(path) == artifact
    assert path.read_bytes() == encode_artifact(artifact)
    assert decode_artifact(path.read_bytes(), "the body") == artifact
    with pytest.raises(InvalidArtifact, match=r"^the body: the file is cut"):
        decode_artifact(path.read_bytes()[:20], "the body")
