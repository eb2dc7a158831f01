from __future__ import annotations

from pathlib import Path

import pytest

from service.settings import SettingsError, load_settings


def write(folder: Path, text: str) -> Path:
    file = folder / "softcue.toml"
    file.write_text(text)
    return file


def test_the_file_then_the_environment_then_the_command_line(tmp_path: Path) -> None:
    file = write(tmp_path, "[server]\nport = 1\nhost = 'a'\ndrain_s = 3\n[engine]\nmax_sequences = 4\n")
    environment = {"SOFTCUE_SERVER_PORT": "2", "SOFTCUE_SERVER_HOST": "b", "SOFTCUE_UNRELATED": "x"}
    settings = load_settings(file, environment, {"server": {"host": "c"}})
    assert (settings.server.port, settings.server.host, settings.server.drain_s) == (2, "c", 3.0)
    assert settings.engine.options().max_sequences == 4


def test_paths_in_the_file_are_relative_to_it_and_urls_stay(tmp_path: Path) -> None:
    file = write(tmp_path, "[base]\npath = 'b'\n[store]\nurl = '../s.db'\nseed = '.'\n")
    settings = load_settings(file, {})
    assert (settings.base.path, settings.store.url) == (tmp_path / "b", str(tmp_path / "../s.db"))
    assert load_settings(write(tmp_path, "[store]\nurl = 'sqlite:///x'\n"), {}).store.url == "sqlite:///x"
    store = load_settings(write(tmp_path, "[store]\nbackups = 'b'\nfall_back_when_damaged = true\n"), {}).store
    assert (store.backups, store.fall_back_when_damaged) == (tmp_path / "b", True)


def test_a_stores_password_is_not_shown_with_the_settings() -> None:
    url = "postgresql+psycopg://softcue:secret@db.example/softcue"
    settings = load_settings(None, {"SOFTCUE_STORE_URL": url})
    assert settings.store.url == url
    assert "secret" not in repr(settings)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[server]\nprot = 1\n", r"there is no setting server\.prot; did you mean server\.port\?"),
        ("[sever]\n", r"there is no section \[sever\]; did you mean server\?"),
        ("[server]\nport = 'many'\n", r"setting server\.port: .*'many'"),
        ("[engine]\ndtype = 'half'\n", r"setting engine\.dtype: .*'bfloat16'.*'half'"),
        ("[server\n", "is not TOML"),
    ],
)
def test_a_mistake_is_named_with_its_remedy(tmp_path: Path, text: str, said: str) -> None:
    with pytest.raises(SettingsError, match=said):
        load_settings(write(tmp_path, text), {})


def test_an_unknown_variable_of_a_section_is_named(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="no setting SOFTCUE_SERVER_PROT; did you mean SOFTCUE_SERVER_PORT"):
        load_settings(None, {"SOFTCUE_SERVER_PROT": "1"})


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=r"nowhere\.toml cannot be read"):
        load_settings(tmp_path / "nowhere.toml", {})


def test_a_store_that_is_no_text_is_refused_without_what_it_is() -> None:
    with pytest.raises(SettingsError, match="setting store") as refused:
        load_settings(None, {}, {"store": {"url": ["postgresql://softcue:s3cret@db/softcue"]}})
    assert "s3cret" not in str(refused.value)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[backends.a]\nflavour = 'openai'\n", "setting backends.a.kind: is missing; make it"),
        ("[backends.a]\nkind = 'openai'\n", "setting backends.a.kind: is openai; make it openai_compatible or vllm"),
        ("[backends.a]\nkind = 'vllm'\n", "setting backends.a: a vLLM backend has no address"),
        ("[backends.a]\nkind = 'vllm'\nurl = 'http://a'\nconcurrency = 0\n", "setting backends.a.concurrency: Input"),
        ("[backends.local]\nkind = 'vllm'\nurl = 'http://a'\n", "setting backends.local: 'local' is the engine"),
        ("[engine]\nenabled = false\n", "engine.enabled is false and there are no [backends], so nothing would answer"),
    ],
)  # fmt: skip
def test_what_is_wrong_with_a_backend_is_said_by_the_key_that_was_written(tmp_path: Path, text: str, said: str) -> None:
    file = tmp_path / "softcue.toml"
    file.write_text(text)
    with pytest.raises(SettingsError) as caught:
        load_settings(file, {})
    assert str(caught.value).startswith(said)
