import json
import os
import pickle
import subprocess
import sys
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import peft
import pytest

from prompt_store.database import Database
from prompt_store.interchange.peft import read_peft
from prompt_store.prompts.registry import BaseDescription, Registry
from tests.prompt_store.building import ANNA, prefix, publish
from tests.prompt_store.commands.shell import Shell
from tests.prompt_store.interchange.adapters import BASE_NAME, LENGTH, PREFIXES, SOFT, base_model, load, save, saved
from tests.prompt_store.interchange.standin_hub import TOKEN, running_hub
from tests.service.engines.local.tiny_models import HIDDEN

ROOT = Path(__file__).parents[3]
# Of the tiny model that PEFT tunes: 2 KV heads of 16.
TINY = BaseDescription("c3" * 32, "tiny-base", HIDDEN, 3, 64, 512, "LlamaForCausalLM", kv_heads=2, head_size=16)
LORA = peft.LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"])


@pytest.fixture
def tiny(shell_on_either: Shell) -> Shell:
    """The store knows the base of the adapters too."""
    with Database.open(shell_on_either.store) as database:
        Registry(database).register_base(TINY, ANNA)
    return shell_on_either


def bring(shell: Shell, path: Path, *more: str) -> dict[str, object]:
    found = shell.json("import", "support_intents", str(path), "--base", "tiny-base", *more)
    assert isinstance(found, dict)
    return found


def test_every_kind_of_adapter_comes_in(tiny: Shell) -> None:
    for name, make in {**SOFT, **PREFIXES}.items():
        folder = saved(make(), tiny.folder / name.replace(" ", "-"))
        more = ["--task-index", "1"] if name.startswith("MULTITASK") else []
        entry = bring(tiny, folder, *more)
        with Database.open(tiny.store) as database:
            found = Registry(database).prompt(str(entry["digest"]))
        assert found == read_peft(folder, task_index=1 if more else None).prompt
        if name != "CARTRIDGE":  # of the same numbers as PREFIX_TUNING's, so it is the same version
            assert f"imported from PEFT {name.split()[0]} of {BASE_NAME}" in str(entry["notes"])
    assert len(tiny.json("list", "--kind", "soft_prompt")) == len(SOFT)
    assert len(tiny.json("list", "--kind", "prefix")) == len(PREFIXES) - 1


def test_an_export_is_what_peft_loads_and_an_import_of_it_is_the_same_version(tiny: Shell) -> None:
    for name, config, format in (
        ("soft", SOFT["PROMPT_TUNING"](), "peft"),
        ("prefix", PREFIXES["PREFIX_TUNING"](), "peft"),
        ("cartridge", PREFIXES["CARTRIDGE"](), "cartridge"),
    ):
        label = bring(tiny, saved(config, tiny.folder / name))["version"]
        out = tiny.folder / f"{name}-out"
        told = tiny.run("export", f"support_intents@{label}", str(out), "--format", format, "--base-path", BASE_NAME)
        assert "PeftModel.from_pretrained" in told
        assert load(out).peft_config["default"].num_virtual_tokens == LENGTH
        again = bring(tiny, out)
        assert (again["version"], again["created"]) == (label, False)


def test_an_import_says_where_the_adapter_names_another_base(tiny: Shell) -> None:
    folder = str(saved(SOFT["PROMPT_TUNING"](), tiny.folder / "adapter"))
    told = tiny.run("import", "support_intents", folder, "--base", "tiny-base")
    assert "note: " not in told
    with Database.open(tiny.store) as database:
        renamed = replace(TINY, fingerprint="d4" * 32, name="llama-of-ours")
        Registry(database).register_base(renamed, ANNA)
    told = tiny.run("import", "support_intents", folder, "--base", "llama-of-ours", "--notes", "trial")
    note = f"it names '{BASE_NAME}' as its base, and was imported for 'llama-of-ours', whose sizes it fits"
    assert f"note: {note}" in told
    notes = tiny.json("show", "support_intents@v2")["notes"]
    assert notes == f"trial; imported from PEFT PROMPT_TUNING of {BASE_NAME}; {note}"


def test_an_import_is_checked_against_its_base(tiny: Shell) -> None:
    folder = str(saved(SOFT["PROMPT_TUNING"](), tiny.folder / "adapter"))
    assert "name it with --base" in tiny.fail("import", "support_intents", folder)
    refusal = tiny.fail("import", "support_intents", folder, "--base", "demo-base")
    assert f"has H={HIDDEN} but base 'demo-base' has H=16" in refusal
    folder = str(saved(PREFIXES["CARTRIDGE"](), tiny.folder / "cartridge"))
    assert "demo-base" in tiny.fail("import", "support_intents", folder, "--base", "demo-base")
    assert tiny.json("list") == []


def test_arrays_and_zips_come_in(tiny: Shell) -> None:
    np.save(tiny.folder / "a.npy", np.ones((3, HIDDEN), "<f4"))
    assert bring(tiny, tiny.folder / "a.npy", "--alias", "production")["aliases"] == ["production"]
    folder = saved(SOFT["P_TUNING"](), tiny.folder / "adapter")
    with zipfile.ZipFile(tiny.folder / "a.zip", "w") as archive:
        for file in folder.iterdir():
            archive.write(file, f"adapter/{file.name}")
    assert bring(tiny, tiny.folder / "a.zip")["digest"] == bring(tiny, folder)["digest"]
    told = tiny.run("import", "support_intents", str(folder), "--base", "tiny-base")
    assert "note: the prompt encoder was evaluated by PEFT" in told


def test_what_cannot_come_in_is_refused_in_a_line(tiny: Shell) -> None:
    (tiny.folder / "a.safetensors").write_bytes(pickle.dumps([1]))
    multitask = saved(SOFT["MULTITASK_PROMPT_TUNING"](), tiny.folder / "multitask")
    refused = [
        (tiny.folder / "a.safetensors", "is a Python pickle"),
        (tiny.folder / "absent", "cannot be read"),
        (tiny.folder, "is no PEFT adapter, for it holds no adapter_config.json"),
        (multitask, "say which by --task-index, 0 to 2"),
        (save(peft.get_peft_model(base_model(), LORA), tiny.folder / "lora"), "is a 'LORA' adapter"),
        (Path(tiny.artifact(1, task="other")), "was made for task 'other'"),
    ]
    for path, reason in refused:
        assert reason in tiny.fail("import", "support_intents", str(path), "--base", "tiny-base")
    assert tiny.json("list") == []


def test_each_format_goes_out_and_what_does_not_fit_it_is_refused(shell: Shell) -> None:
    with Database.open(shell.store) as database:
        publish(Registry(database), 1, "production")
        publish(Registry(database), payload_content=prefix(2))
    for format, name in (("safetensors", "a.safetensors"), ("npy", "a.npy"), ("peft", "adapter")):
        out = shell.folder / name
        document = shell.json("export", "support_intents@production", str(out), "--format", format)
        assert document == {"task": "support_intents", "version": "v1", "path": str(out), "format": format}
        found = shell.json("import", "support_intents", str(out), "--base", "demo-base")
        assert (found["version"], found["created"]) == ("v1", False)
    assert read_peft(shell.folder / "adapter").base_name == "demo-base"
    out = str(shell.folder / "other")
    shell.publish(3)
    shell.run("ensemble", "support_intents", "v1", "v3")
    refused = [
        ("support_intents@v1", "cartridge", "a cartridge holds a prefix"),
        ("support_intents@v2", "npy", "a numpy file holds a soft prompt"),
        ("support_intents@v1", "pft", "did you mean 'peft'?"),
        ("support_intents@v4", "peft", "`softcue prompts push` takes every kind"),
    ]
    for name, format, reason in refused:
        assert reason in shell.fail("export", name, out, "--format", format)
    occupied = str(shell.folder / "adapter")
    assert "is there already" in shell.fail("export", "support_intents@v1", occupied, "--format", "peft")
    assert "give a version as TASK@SELECTOR" in shell.misuse("export", "support_intents", out)


def test_a_version_is_pushed_to_a_folder_and_pulled_into_another_store(shell_on_either: Shell, tmp_path: Path) -> None:
    shell = shell_on_either
    shell.publish(1, 2)
    shell.run("alias", "support_intents", "production", "v2")
    place = str(tmp_path / "shared")
    pushed = shell.json("push", "support_intents@production", place)
    assert (len(pushed["written"]), pushed["present"], pushed["commit"]) == (1, [], None)
    assert "support_intents@v1 pushed to" in shell.run("push", "support_intents", place)
    assert "support_intents@v1, v2 lies already in" in shell.run("push", "support_intents", place)
    other = Shell(tmp_path, str(tmp_path / "other.db"))
    (pulled,) = other.json("pull", place, "support_intents@production", "--alias", "production")
    assert (pulled["version"], pulled["version_there"], pulled["created"]) == ("v1", "v2", True)
    assert pulled["digest"] == pushed["written"][0]
    told = other.run("pull", place)
    assert "`softcue prompts alias support_intents ALIAS v" in told
    assert "point an alias" not in other.run("pull", place)
    assert "--alias needs one version" in other.misuse("pull", place, "--alias", "x")
    assert "there is no folder" in other.fail("pull", str(tmp_path / "absent"))
    assert "no place to share at" in shell.fail("push", "support_intents", "https://example.org")


def test_a_hub_is_reached_without_a_word_beside_the_answer(shell: Shell) -> None:
    shell.publish(1)
    with running_hub({"acme"}) as hub:
        environment = {
            **os.environ,
            "PYTHONPATH": str(ROOT),
            "SOFTCUE_STORE_URL": shell.store,
            "HF_ENDPOINT": hub.endpoint,
            "HF_TOKEN": TOKEN,
            "HF_HUB_DISABLE_XET": "1",
            "HF_HOME": str(shell.folder / "hf"),
        }
        answers = []
        for arguments in (
            ["push", "support_intents", "hf://acme/prompts"],
            ["pull", "hf://acme/prompts", "--store", str(shell.folder / "other.db")],
        ):
            done = subprocess.run(
                [sys.executable, "-m", "softcue", "prompts", *arguments, "--json"],
                capture_output=True, text=True, env=environment, timeout=120,
            )  # fmt: skip
            assert (done.returncode, done.stderr) == (0, "")
            answers.append(json.loads(done.stdout))
    assert answers[0]["written"] == [answers[1][0]["digest"]]
    assert answers[0]["commit"].startswith(hub.endpoint)
