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
        ("[journal]\nfoldr = 'x'\n", r"no setting journal\.foldr; did you mean journal\.folder\?"),
        ("[journal]\nmax_bytes = 1000\n", r"setting journal\.max_bytes: .*greater than or equal to 1048576 .*1000"),
        ("[journal]\nsegment_bytes = 0\n", r"setting journal\.segment_bytes: .*greater than or equal to 4096 .*0"),
        ("[ledger]\nretention = 1\n", r"no setting ledger\.retention; did you mean ledger\.retention_days\?"),
        ("[ledger]\nretention_days = 0\n", r"setting ledger\.retention_days: .*greater than 0"),
        ("[ledger]\nretention_days = inf\n", r"setting ledger\.retention_days: .*less than or equal to 36500"),
        ("[experiment]\n", r"no section \[experiment\]; did you mean experiments\?"),
        ("[experiments]\nforce_key = 'k'\n", r"experiments\.force_key; did you mean experiments\.force_key_env\?"),
        ("[captures]\nsample = 1\n", r"captures\.sample is no table; give it one as \[captures\.sample\]"),
        ("[captures.a]\nsampel = 1\n", r"no setting captures\.a\.sampel; did you mean captures\.a\.sample\?"),
        ("[captures.a]\nsample = 0\n", r"setting captures\.a\.sample: .*greater than 0"),
        ("[captures.a]\nsample = 2\n", r"setting captures\.a\.sample: .*less than or equal to 1"),
        ("[captures.a]\nretention_days = inf\n", r"captures\.a\.retention_days: .*less than or equal to 36500"),
        ("[captures.a]\nretention_days = nan\n", r"captures\.a\.retention_days: Input should be .*nan"),
        ("[captures.a]\nredact = 'hide'\n", r"captures\.a\.redact: is no function; name one as module:name .*'hide'"),
    ],
)
def test_a_mistake_is_named_with_its_remedy(tmp_path: Path, text: str, said: str) -> None:
    with pytest.raises(SettingsError, match=said):
        load_settings(write(tmp_path, text), {})


def test_an_unknown_variable_of_a_section_is_named(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="no setting SOFTCUE_SERVER_PROT; did you mean SOFTCUE_SERVER_PORT"):
        load_settings(None, {"SOFTCUE_SERVER_PROT": "1"})


def test_the_journal_and_what_is_kept_of_requests_have_defaults_and_can_be_set(tmp_path: Path) -> None:
    settings = load_settings(None, {})
    assert (settings.journal.folder, settings.ledger.retention_days) == (None, 365.0)
    assert (settings.experiments.force_key_env, settings.captures) == (None, {})
    text = "[journal]\nfolder = 'j'\n[captures.a]\n[captures.b]\nsample = 0.1\nredact = 'string:capwords'\n"
    environment = {"SOFTCUE_JOURNAL_MAX_BYTES": "2000000", "SOFTCUE_LEDGER_RETENTION_DAYS": "7"}
    settings = load_settings(write(tmp_path, text), environment)
    assert (settings.journal.folder, settings.journal.max_bytes) == (tmp_path / "j", 2_000_000)
    assert settings.ledger.retention_days == 7.0
    assert [(each.sample, each.redaction()("a  bc")) for each in settings.captures.values()] == [
        (1.0, "a  bc"),
        (0.1, "A Bc"),
    ]


@pytest.mark.parametrize(
    ("redact", "said"),
    [
        ("string:nothing_such", r"string:nothing_such cannot be loaded \(.*nothing_such.*a module on PYTHONPATH"),
        ("no_such_module:hide", r"no_such_module:hide cannot be loaded \(No module named.*a module on PYTHONPATH"),
        ("broken_redaction:hide", r"cannot be loaded \(it never can be\)"),
        ("string:digits", r"string:digits is no function; name one as module:name"),
    ],
)
def test_a_redaction_that_cannot_be_had_is_named_with_its_remedy(
    redact: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "broken_redaction.py").write_text("raise ValueError('it never can be')")
    monkeypatch.syspath_prepend(tmp_path)
    settings = load_settings(None, {}, {"captures": {"a": {"redact": redact}}})
    with pytest.raises(SettingsError, match=said):
        settings.captures["a"].redaction()


def test_the_force_keys_variable_is_named_by_file_or_environment_and_must_be_set(tmp_path: Path) -> None:
    named = load_settings(None, {"SOFTCUE_EXPERIMENTS_FORCE_KEY_ENV": "TESTERS"}).experiments
    assert named.force_key_env == "TESTERS"
    assert named == load_settings(write(tmp_path, "[experiments]\nforce_key_env = 'TESTERS'\n"), {}).experiments
    with pytest.raises(SettingsError, match="did you mean SOFTCUE_EXPERIMENTS_FORCE_KEY_ENV"):
        load_settings(None, {"SOFTCUE_EXPERIMENTS_FORCE_KEY": "secret"})


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
