from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
from safetensors.torch import load_file, save_file

from prompt_store.errors import InvalidArtifact
from prompt_store.interchange.peft import CONFIG_FILE, TENSORS_FILE, read_peft, write_peft
from prompt_store.prompts.prefix import Prefix
from prompt_store.prompts.soft_prompt import SoftPrompt
from tests.prompt_store.building import prompt
from tests.prompt_store.interchange.adapters import (
    BASE_NAME,
    GROUPED,
    LENGTH,
    PLAIN,
    PREFIXES,
    SOFT,
    base_model,
    load,
    logits,
    make_adapter,
    prefix,
    save,
    saved,
    soft_prompt,
)
from tests.service.engines.local.tiny_models import HIDDEN


@pytest.mark.parametrize("kind", SOFT)
def test_a_soft_prompt_is_read_as_peft_computes_it_and_written_as_prompt_tuning(kind: str, tmp_path: Path) -> None:
    tuned = make_adapter(SOFT[kind]())
    task = 1 if kind == "MULTITASK_PROMPT_TUNING" else None
    imported = read_peft(save(tuned, tmp_path / "in"), task_index=task)
    assert isinstance(imported.prompt, SoftPrompt)
    np.testing.assert_array_equal(imported.prompt.to_float32(), soft_prompt(tuned, task))
    assert (imported.format, imported.base_name) == (f"PEFT {kind.split(' ')[0]}", BASE_NAME)
    assert bool(imported.note) == (kind != "PROMPT_TUNING")

    write_peft(tmp_path / "out", imported.prompt, imported.base_name)
    again = load(tmp_path / "out")
    assert again.peft_config["default"].peft_type == "PROMPT_TUNING"
    assert torch.equal(logits(again), logits(tuned, task))
    copy = read_peft(tmp_path / "out")
    assert (copy.prompt, copy.base_name, copy.note) == (imported.prompt, BASE_NAME, "")


@pytest.mark.parametrize("architecture", [GROUPED, PLAIN])
@pytest.mark.parametrize("kind", PREFIXES)
def test_a_prefix_is_read_as_peft_computes_it_and_written_as_what_it_was(
    kind: str, architecture: str, tmp_path: Path
) -> None:
    tuned = make_adapter(PREFIXES[kind](), architecture)
    imported = read_peft(save(tuned, tmp_path / "in"))
    assert isinstance(imported.prompt, Prefix)
    assert imported.prompt.shape == (3, 2, *((2, LENGTH, 16) if architecture == GROUPED else (4, LENGTH, 12)))
    np.testing.assert_array_equal(imported.prompt.to_float32(), prefix(tuned))

    write_peft(tmp_path / "out", imported.prompt, imported.base_name, cartridge=kind == "CARTRIDGE")
    again = load(tmp_path / "out", architecture)
    assert again.peft_config["default"].peft_type == kind.split(" ")[0]
    assert torch.equal(logits(again), logits(tuned))
    assert read_peft(tmp_path / "out").prompt == imported.prompt


@pytest.mark.parametrize("kind", [*SOFT, *PREFIXES])
def test_an_adapter_that_was_loaded_and_saved_again_reads_as_before(kind: str, tmp_path: Path) -> None:
    task = 2 if kind == "MULTITASK_PROMPT_TUNING" else None
    first = saved({**SOFT, **PREFIXES}[kind](), tmp_path / "first")
    second = save(load(first), tmp_path / "second")
    assert read_peft(second, task_index=task) == read_peft(first, task_index=task)


@pytest.mark.parametrize("cartridge", [False, True])
def test_a_prefix_may_leave_as_either_kind(cartridge: bool, tmp_path: Path) -> None:
    tuned = make_adapter(PREFIXES["PREFIX_TUNING" if cartridge else "CARTRIDGE"]())
    imported = read_peft(save(tuned, tmp_path / "in"))
    write_peft(tmp_path / "out", imported.prompt, None, cartridge=cartridge)
    assert torch.equal(logits(load(tmp_path / "out")), logits(tuned))


def test_columns_of_several_ranks_fold_to_what_peft_computes_but_for_rounding(tmp_path: Path) -> None:
    tuned = make_adapter(
        peft.MultitaskPromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=LENGTH, num_tasks=2, num_ranks=5)
    )
    folder = save(tuned, tmp_path / "in")
    folded = [read_peft(folder, task_index=task).prompt for task in (0, 1)]
    for task in (0, 1):
        np.testing.assert_allclose(folded[task].to_float32(), soft_prompt(tuned, task), rtol=1e-5, atol=1e-7)
    assert folded[0] != folded[1]
    assert read_peft(folder, task_index=1).note.startswith("folded in float32 for task 1 of 2")


@pytest.mark.parametrize("kind", ["PROMPT_TUNING", "PREFIX_TUNING", "CARTRIDGE"])
@pytest.mark.parametrize(("dtype", "name"), [(torch.bfloat16, "BF16"), (torch.float16, "F16")])
def test_values_keep_their_dtype_to_the_bit(kind: str, dtype: torch.dtype, name: str, tmp_path: Path) -> None:
    tuned = make_adapter({**SOFT, **PREFIXES}[kind]())
    tuned.prompt_encoder.to(dtype)
    imported = read_peft(save(tuned, tmp_path / "in"))
    assert imported.prompt.dtype == name
    write_peft(tmp_path / "out", imported.prompt, BASE_NAME, cartridge=kind == "CARTRIDGE")
    before, after = (load_file(tmp_path / side / TENSORS_FILE)["prompt_embeddings"] for side in ("in", "out"))
    assert after.dtype == dtype
    assert torch.equal(before, after)
    weight = load(tmp_path / "out").prompt_encoder["default"].embedding.weight
    assert torch.equal(weight, before.float())


def test_values_folded_from_narrow_ones_are_float32(tmp_path: Path) -> None:
    tuned = make_adapter(SOFT["MULTITASK_PROMPT_TUNING"]())
    tuned.prompt_encoder.to(torch.bfloat16)
    imported = read_peft(save(tuned, tmp_path / "in"), task_index=0)
    assert imported.prompt.dtype == "F32"
    np.testing.assert_array_equal(imported.prompt.to_float32(), soft_prompt(load(tmp_path / "in"), 0))


def test_the_only_task_needs_no_index_and_one_of_several_does(tmp_path: Path) -> None:
    single = peft.MultitaskPromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=LENGTH, num_tasks=1)
    assert read_peft(saved(single, tmp_path / "one")) == read_peft(tmp_path / "one", task_index=0)
    folder = saved(SOFT["MULTITASK_PROMPT_TUNING"](), tmp_path / "three")
    for index, reason in (
        (None, "3 tasks; say which by --task-index, 0 to 2"),
        (3, "none of index 3"),
        (-1, "index -1"),
    ):
        with pytest.raises(InvalidArtifact, match=reason):
            read_peft(folder, task_index=index)
    with pytest.raises(InvalidArtifact, match="leave the index out"):
        read_peft(saved(SOFT["PROMPT_TUNING"](), tmp_path / "soft"), task_index=0)


def test_an_adapter_of_the_base_s_layers_is_refused_with_what_to_do(tmp_path: Path) -> None:
    config = peft.LoraConfig(task_type="CAUSAL_LM", r=2)
    model = peft.get_peft_model(base_model(), config)
    with pytest.raises(InvalidArtifact, match=r"adapter_config\.json: is a 'LORA' adapter.*merge_and_unload"):
        read_peft(save(model, tmp_path / "lora"))


def folder_of(
    path: Path, tensors: dict[str, torch.Tensor] | None = None, leave_out: str | None = None, **changes: Any
) -> Path:
    """An adapter folder as PEFT writes it, with other tensors or another configuration."""
    write_peft(path, prompt(1, LENGTH, HIDDEN), BASE_NAME)
    config = json.loads((path / CONFIG_FILE).read_text()) | {"a_key_of_tomorrow": {"x": [1]}} | changes
    config.pop(leave_out, None)
    (path / CONFIG_FILE).write_text(json.dumps(config))
    if tensors is not None:
        save_file(tensors, path / TENSORS_FILE)
    return path


EMBEDDINGS = torch.ones(LENGTH, HIDDEN)
PREFIX_CONFIG = {"peft_type": "PREFIX_TUNING", "num_layers": 3, "num_attention_heads": 2, "token_dim": 32}


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"peft_type": "IA3"}, "is a 'IA3' adapter"),
        ({"peft_type": "NEXT_YEARS_TUNING"}, "is a 'NEXT_YEARS_TUNING' adapter"),
        ({"leave_out": "peft_type"}, "does not say its peft_type"),
        ({"peft_type": ["LORA"]}, "does not say its peft_type"),
        ({"leave_out": "num_virtual_tokens"}, "num_virtual_tokens: Field required"),
        ({"num_virtual_tokens": "6"}, "num_virtual_tokens: Input should be a valid integer"),
        ({"num_virtual_tokens": True}, "num_virtual_tokens: Input should be a valid integer"),
        ({"num_virtual_tokens": 0}, "num_virtual_tokens: Input should be greater than or equal to 1"),
        (
            {"num_virtual_tokens": 7},
            r"has shape \[6, 48\], but .* num_virtual_tokens=7, token_dim=48",
        ),
        ({"token_dim": 47}, "num_virtual_tokens=6, token_dim=47"),
        ({"task_type": "SEQ_2_SEQ_LM"}, "is for 'SEQ_2_SEQ_LM' .* train it as CAUSAL_LM"),
        ({"task_type": "SEQ_CLS"}, "is for 'SEQ_CLS'"),
        ({"num_transformer_submodules": 2}, "num_transformer_submodules=2"),
        ({"base_model_name_or_path": 1}, "base_model_name_or_path: Input should be a valid string"),
        ({**PREFIX_CONFIG}, r"prompt_embeddings has shape \[6, 48\].*2 \* num_layers \* token_dim=192"),
        ({**PREFIX_CONFIG, "num_layers": None}, "num_layers=None.*a prefix needs all three"),
        ({**PREFIX_CONFIG, "num_attention_heads": 3}, "heads that divide token_dim"),
        ({"tensors": {}}, "holds none"),
        ({"tensors": {"prompt_embeddings": EMBEDDINGS, "lm_head.weight": torch.ones(2)}}, "holds 'lm_head.weight'"),
        ({"tensors": {"base_model.model.lora_A.weight": torch.ones(2, 2)}}, "holds 'base_model.model.lora_A.weight'"),
        ({"tensors": {"prompt_embeddings": EMBEDDINGS.double()}}, "dtype 'F64'"),
        ({"tensors": {"prompt_embeddings": EMBEDDINGS.int()}}, "dtype 'I32'"),
        ({"tensors": {"prompt_embeddings": EMBEDDINGS / 0}}, "NaN or infinite values, first in row 0"),
        ({"tensors": {"prompt_embeddings": torch.ones(3, 2, 192)}, **PREFIX_CONFIG}, r"shape \[3, 2, 192\]"),
        (
            {"tensors": {"prompt_embeddings": torch.full((6, 192), torch.nan)}, **PREFIX_CONFIG},
            "prompt_embeddings has NaN",
        ),
        ({"peft_type": "MULTITASK_PROMPT_TUNING"}, "tensors prefix_task_cols, prefix_task_rows, prompt_embeddings and"),
    ],
)
def test_a_folder_that_contradicts_itself_is_refused_with_the_reason(
    changes: dict[str, Any], reason: str, tmp_path: Path
) -> None:
    with pytest.raises(InvalidArtifact, match=reason) as caught:
        read_peft(folder_of(tmp_path / "adapter", **changes))
    assert str(tmp_path / "adapter") in str(caught.value)


@pytest.mark.parametrize("name", ["prefix_task_cols", "prefix_task_rows"])
def test_the_parts_of_a_multitask_prompt_are_checked(name: str, tmp_path: Path) -> None:
    folder = saved(SOFT["MULTITASK_PROMPT_TUNING"](), tmp_path / "in")
    tensors = load_file(folder / TENSORS_FILE)
    tensors["prompt_embeddings"].fill_(1e30)
    for value, reason in (
        (torch.ones(2, 2), rf"{name} has shape \[2, 2\], but adapter_config.json says num_tasks=3"),
        (tensors[name].double(), f"{name} has dtype 'F64'"),
        (tensors[name] / 0, f"{name} has NaN or infinite values, first in task 0"),
        (torch.full_like(tensors[name], 1e30), "soft prompt has NaN or infinite values"),
    ):
        save_file({**tensors, name: value}, folder / TENSORS_FILE)
        with pytest.raises(InvalidArtifact, match=reason):
            read_peft(folder, task_index=0)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "is not JSON"),
        ("[" * 100_000, "is not JSON"),
        ('{"peft_type": "PROMPT_TUNING", "peft_type": "LORA"}', "a key appears twice"),
        ("[1]", "holds no JSON object"),
        ('{"peft_type": "' + "x" * 2**20 + '"}', "larger than the limit"),
        ('{"num_virtual_tokens": 1' + "0" * 5000 + "}", "is not JSON"),
    ],
)
def test_a_configuration_is_one_bounded_json_object(text: str, reason: str, tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "adapter")
    (folder / CONFIG_FILE).write_text(text)
    with pytest.raises(InvalidArtifact, match=reason):
        read_peft(folder)


def test_a_pickled_adapter_is_refused_with_what_to_do(tmp_path: Path) -> None:
    tuned = make_adapter(SOFT["PROMPT_TUNING"]())
    tuned.save_pretrained(tmp_path / "in", save_embedding_layers=False, safe_serialization=False)
    assert (tmp_path / "in" / "adapter_model.bin").exists()
    with pytest.raises(InvalidArtifact, match=r"adapter_model\.bin: is a Python pickle.*safe_serialization=True"):
        read_peft(tmp_path / "in")
    (tmp_path / "in" / "adapter_model.bin").rename(tmp_path / "in" / TENSORS_FILE)
    with pytest.raises(InvalidArtifact, match=r"a zip archive, as torch\.save writes"):
        read_peft(tmp_path / "in")


@pytest.mark.parametrize("name", [CONFIG_FILE, TENSORS_FILE])
def test_a_file_that_is_missing_or_links_outside_is_refused(name: str, tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "adapter")
    (folder / name).rename(folder / "blob")
    with pytest.raises(InvalidArtifact, match=f"holds no {name}|{name}: cannot be read"):
        read_peft(folder)
    (folder / name).symlink_to("blob")
    assert read_peft(folder).prompt == prompt(1, LENGTH, HIDDEN)
    (folder / "blob").rename(tmp_path / "blob")
    (folder / name).unlink()
    (folder / name).symlink_to("../blob")
    with pytest.raises(InvalidArtifact, match=f"{name}: is a link to outside its folder"):
        read_peft(folder)
    (folder / name).unlink()
    (folder / name).symlink_to(name)
    with pytest.raises(InvalidArtifact, match=f"{name}: cannot be read"):
        read_peft(folder)


def test_nothing_is_written_over_and_nothing_by_halves(tmp_path: Path) -> None:
    folder = tmp_path / "adapter"
    folder.mkdir()
    write_peft(folder, prompt(1), BASE_NAME)
    with pytest.raises(InvalidArtifact, match="is there already"):
        write_peft(folder, prompt(2), BASE_NAME)
    assert read_peft(folder).prompt == prompt(1)
    with pytest.raises(InvalidArtifact, match="cannot be written"):
        write_peft(tmp_path / "missing" / "adapter", prompt(1), BASE_NAME)
    with pytest.raises(InvalidArtifact, match="a cartridge holds a prefix"):
        write_peft(tmp_path / "other", prompt(1), BASE_NAME, cartridge=True)
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]
    assert {path.name for path in folder.iterdir()} == {CONFIG_FILE, TENSORS_FILE}
