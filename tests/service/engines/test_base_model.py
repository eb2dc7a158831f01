from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from prompt_store.prompts.artifact import read_artifact
from prompt_store.prompts.task import Message
from service.engines.base import Messages, RawText, Sampling, TokenIds
from service.engines.base_model import BaseModel, open_base_model
from service.engines.errors import BaseModelError, InvalidRequest, PromptTooLong
from tests.conftest import BASE_FOLDER


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    return Path(shutil.copytree(BASE_FOLDER, tmp_path / "base"))


def test_chat_messages_are_laid_out_as_transformers_does_it(base: BaseModel) -> None:
    tokenizer = AutoTokenizer.from_pretrained(BASE_FOLDER)
    conversation = [
        Message(role="system", content="Label this {braces} request."),
        Message(role="user", content="Où est mon colis?\n<b>&"),
        Message(role="assistant", content="track order"),
        Message(role="user", content="and now"),
    ]
    expected = tokenizer.apply_chat_template(
        [message.model_dump() for message in conversation], add_generation_prompt=True, return_dict=False
    )
    assert base.lay_out(Messages(tuple(conversation))) == expected


def test_raw_text_gets_what_the_tokenizer_adds_and_nothing_else(base: BaseModel) -> None:
    assert base.lay_out(RawText("hello there")) == AutoTokenizer.from_pretrained(BASE_FOLDER)("hello there").input_ids


def test_a_token_id_outside_the_vocabulary_is_refused(base: BaseModel) -> None:
    with pytest.raises(InvalidRequest, match="token id 4096 is outside the vocabulary of 4096"):
        base.lay_out(TokenIds((1, 4096)))


@pytest.mark.parametrize("prompt", [Messages(()), RawText(""), TokenIds(())])
def test_an_empty_prompt_is_refused(base: BaseModel, prompt: Messages | RawText | TokenIds) -> None:
    with pytest.raises(InvalidRequest, match="empty"):
        base.lay_out(prompt)


def test_an_over_long_prompt_is_refused_with_both_numbers(base: BaseModel) -> None:
    base.check_length(1003, virtual_tokens=20)
    with pytest.raises(PromptTooLong, match=r"has 1004 tokens but at most 1003 fit .* 20 virtual tokens"):
        base.check_length(1004, virtual_tokens=20)


def test_the_fingerprint_ignores_sharding_and_folder_but_not_weights(copy: Path) -> None:
    original = open_base_model(copy).fingerprint
    assert original == open_base_model(BASE_FOLDER).fingerprint
    tensors = load_file(copy / "model.safetensors")
    (copy / "model.safetensors").unlink()
    names = sorted(tensors)
    save_file({name: tensors[name] for name in names[::2]}, copy / "model-00001-of-00002.safetensors")
    save_file({name: tensors[name] for name in names[1::2]}, copy / "model-00002-of-00002.safetensors")
    assert open_base_model(copy).fingerprint == original
    changed = {name: tensors[name].clone() for name in names[::2]}
    changed[names[0]].view(-1)[0] += 1e-3
    save_file(changed, copy / "model-00001-of-00002.safetensors")
    assert open_base_model(copy).fingerprint != original


def test_the_fingerprint_is_the_one_that_prompts_were_published_with(tmp_path: Path) -> None:
    published = read_artifact(BASE_FOLDER.parent / "support_intents" / "prompt.safetensors")
    assert open_base_model(BASE_FOLDER, cache_folder=tmp_path).fingerprint == published.base_fingerprint


def test_the_fingerprint_depends_on_tokenizer_and_chat_template(copy: Path) -> None:
    original = open_base_model(copy).fingerprint
    template = copy / "chat_template.jinja"
    template.write_text(template.read_text() + " ")
    with_template = open_base_model(copy).fingerprint
    tokenizer = json.loads((copy / "tokenizer.json").read_text())
    (copy / "tokenizer.json").write_text(json.dumps(tokenizer, indent=1))
    assert len({original, with_template, open_base_model(copy).fingerprint}) == 3


def test_a_second_opening_reads_the_fingerprint_from_the_cache(copy: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    first = open_base_model(copy, cache_folder=cache).fingerprint
    (entry,) = cache.iterdir()
    entry.write_text("f" * 64)
    assert open_base_model(copy, cache_folder=cache).fingerprint == "f" * 64
    entry.write_text("damaged")
    assert open_base_model(copy, cache_folder=cache).fingerprint == first


def test_a_folder_without_a_model_says_how_to_get_one(tmp_path: Path) -> None:
    with pytest.raises(BaseModelError, match=r"no base model at .*config\.json.*examples/base"):
        open_base_model(tmp_path)


def test_truncated_weights_are_refused(copy: Path) -> None:
    weights = copy / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(BaseModelError, match="truncated"):
        open_base_model(copy)
    weights.write_bytes(b"\xff" * 64)
    with pytest.raises(BaseModelError, match="not a safetensors file"):
        open_base_model(copy)


def test_a_template_that_refuses_a_role_is_the_callers_error(copy: Path) -> None:
    (copy / "chat_template.jinja").write_text("{{ raise_exception('only users speak here') }}")
    with pytest.raises(InvalidRequest, match="only users speak here"):
        open_base_model(copy).lay_out(Messages((Message(role="user", content="x"),)))


def test_a_chat_template_cannot_reach_python(copy: Path) -> None:
    (copy / "chat_template.jinja").write_text("{{ messages.__class__.__mro__ }}")
    with pytest.raises(InvalidRequest, match="unsafe"):
        open_base_model(copy).lay_out(Messages((Message(role="user", content="x"),)))


def test_opening_a_base_reads_no_weights_into_torch(base: BaseModel) -> None:
    assert base.hidden_size == 192
    assert base.context_length == 1024
    assert base.describe().vocabulary_size == 4096
    assert base.continuation("") == [base.eos_token_id]
    assert isinstance(torch.tensor(base.continuation("get refund")), torch.Tensor)


def test_biased_and_stopping_tokens_must_be_in_the_vocabulary(base: BaseModel) -> None:
    last = base.vocabulary_size - 1
    base.check_tokens(Sampling(logit_bias={0: 1.0, last: -1.0}, stop_token_ids=(0, last)))
    for sampling, parameter in (
        (Sampling(logit_bias={last + 1: 1.0}), "logit_bias"),
        (Sampling(stop_token_ids=(-1,)), "stop_token_ids"),
    ):
        with pytest.raises(InvalidRequest, match=f"{parameter} names token id .* outside the vocabulary") as refused:
            base.check_tokens(sampling)
        assert refused.value.parameter == parameter
