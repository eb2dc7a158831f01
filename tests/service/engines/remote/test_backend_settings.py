from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from pydantic import SecretStr, TypeAdapter

from service.engines.build import build_backends
from service.engines.errors import BackendError
from service.engines.remote.backend_settings import BackendSettings, Price
from service.settings import SettingsError, load_settings

SETTINGS: TypeAdapter[BackendSettings] = TypeAdapter(BackendSettings)
KEY = "sk-very-secret"


def settings(**given: Any) -> BackendSettings:
    return SETTINGS.validate_python({"kind": "openai_compatible", **given})


def loaded(folder: Path, text: str) -> Any:
    file = folder / "softcue.toml"
    file.write_text(text)
    return load_settings(file, {})


def test_backends_and_retirements_are_read_from_the_file(tmp_path: Path) -> None:
    read = loaded(
        tmp_path,
        """
        [engine]
        enabled = false
        [backends.openai]
        kind = "openai_compatible"
        flavour = "openai"
        key_env = "OPENAI_API_KEY"
        ca_file = "own.pem"
        retries.attempts = 5
        breaker = { consecutive = 3 }
        prices.default = { input = 0.3, output = 1.2 }
        prices."ft:gpt-4o-mini:acme::1" = { input = 0.3, cached_input = 0.15, output = 1.2 }
        [retirements]
        "gpt-4o-mini-2024-07-18" = 2027-01-06
        """,
    )
    backend = read.backends["openai"]
    assert not read.engine.enabled
    assert (backend.retries.attempts, backend.breaker.consecutive) == (5, 3)
    assert backend.prices["default"] == Price(input=0.3, output=1.2)
    assert backend.ca_file == tmp_path / "own.pem"
    assert {model: str(day) for model, day in read.retirements.items()} == {"gpt-4o-mini-2024-07-18": "2027-01-06"}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("url = 'http://x'\ntimout = 1", r"there is no setting backends\.b\.timout; did you mean backends\.b\.\w+\?"),
        ("[backends.b.retries]\natempts = 1", r"no setting backends\.b\.retries\.atempts; did you mean .*\.attempts\?"),
        ("[backends.b.prices.m]\ninptu = 1", r"no setting backends\.b\.prices\.m\.inptu; did you mean .*\.m\.input\?"),
        ("prices = { m = 3 }", r"backends\.b\.prices\.m is no table"),
        ("url = 'http://x'\nflavour = 'opnai'", r"setting backends\.b.*flavour: .*'openai'"),
        ("", r"flavour 'other' has no address of its own"),
        ("url = 'http://x'\n[backends.b.retries]\nattempts = 0", r"retries\.attempts is 0; it must be above 0"),
        ("url = 'http://x'\nbreaker.failure_share = 50", r"breaker\.failure_share is 50.*; it is a share, at most 1"),
    ],
)
def test_a_mistake_in_a_backends_table_is_named_with_its_remedy(tmp_path: Path, text: str, said: str) -> None:
    with pytest.raises(SettingsError, match=said):
        loaded(tmp_path, f"[backends.b]\nkind = 'openai_compatible'\n{text}\n")


def test_a_backend_that_is_no_table_and_a_name_that_is_none_are_refused(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=r"backends\.b is no table"):
        loaded(tmp_path, "[backends]\nb = 1\n")
    for name, said in (("Big", "no backend name"), ("local", "'local' is the engine on this machine")):
        with pytest.raises(SettingsError, match=rf"setting backends\.{name}.*{said}"):
            loaded(tmp_path, f"[backends.{name}]\nkind = 'openai_compatible'\nurl = 'http://x'\n")


def test_a_key_that_stands_where_its_variables_name_belongs_is_refused_and_not_shown(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="no name of an environment variable") as refused:
        loaded(tmp_path, f"[backends.b]\nkind = 'openai_compatible'\nurl = 'http://x'\nkey_env = '{KEY}'\n")
    assert KEY not in str(refused.value)
    with pytest.raises(SettingsError, match="header Authorization would hold a key") as refused:
        loaded(
            tmp_path,
            f"[backends.b]\nkind = 'openai_compatible'\nurl = 'http://x'\nheaders = {{ Authorization = '{KEY}' }}\n",
        )
    assert KEY not in str(refused.value)


@pytest.mark.parametrize("name", ["Authorization", "X-Goog-Api-Key", "helicone-auth", "X-Auth-Token", "Cookie"])
def test_a_header_that_would_hold_a_key_is_refused_by_its_name(name: str) -> None:
    with pytest.raises(ValueError, match=f"header {name} would hold a key"):
        settings(url="http://x", headers={name: "a"})
    assert settings(url="http://x", headers={"X-Portkey-Provider": "openai"}).headers


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"headers": {"x-a": "b\r\nauthorization: c"}}, "the header 'x-a' cannot be sent"),
        ({"headers": {"x a": "b"}}, "the header 'x a' cannot be sent"),
        ({"proxy": f"socks5://user:{KEY}@proxy:1080"}, "the proxy at proxy is no HTTP proxy"),
        ({"proxy": KEY}, "the proxy is no HTTP proxy"),
    ],
)
def test_headers_and_proxies_that_nothing_could_be_sent_with_are_refused(given: dict[str, Any], said: str) -> None:
    with pytest.raises(BackendError, match=said) as refused:
        build_backends({"b": settings(url="http://x", **given)}, {})
    assert KEY not in f"{refused.value!r} {refused.value.__cause__!r}"


def test_a_key_comes_from_the_environment_when_the_backend_is_built_and_is_shown_nowhere() -> None:
    backend = settings(flavour="openai", key_env="THE_KEY", headers={"x-org": "hidden-org"})
    options = backend.transport("openai", {"THE_KEY": KEY}, backend.spoken())
    assert options.key == SecretStr(KEY)
    assert options.urls == ("https://api.openai.com/v1",)
    for shown in (repr(backend), repr(options)):
        assert KEY not in shown
        assert "hidden-org" not in shown


@pytest.mark.parametrize("environment", [{}, {"THE_KEY": ""}])
def test_a_missing_key_is_named_with_its_remedy(environment: dict[str, str]) -> None:
    with pytest.raises(BackendError, match="backend 'b' needs its key in the environment variable THE_KEY"):
        build_backends({"b": settings(flavour="openai", key_env="THE_KEY")}, environment)


def test_an_address_that_is_none_names_its_backend() -> None:
    with pytest.raises(BackendError, match="backend 'b' cannot be used: 'ftp://x'"):
        build_backends({"b": settings(url="ftp://x")}, {})


def test_a_backend_without_a_key_is_built_without_one() -> None:
    backend = settings(url="http://localhost:8000/v1", default_model="m")
    assert backend.transport("b", {}, backend.spoken()).key is None
    (engine,) = build_backends({"b": backend}, {}).values()
    assert engine.capabilities().payload_kinds == {"remote_model", "text"}


def test_what_a_backend_can_do_is_its_flavours_unless_its_table_says_so() -> None:
    engines = build_backends(
        {
            "openai": settings(flavour="openai"),
            "mistral": settings(flavour="mistral"),
            "small": settings(flavour="openai", features=["n", "scores"]),
        },
        {},
    )
    features = {name: engine.capabilities().features for name, engine in engines.items()}
    assert {"logprobs", "tools", "follow_up", "logit_bias", "scores"} <= features["openai"]
    assert not {"min_p", "echo", "prompt_logprobs", "top_k"} & features["openai"]
    assert not {"logprobs", "logit_bias"} & features["mistral"]
    assert features["small"] == {"n", "scores", "remote_model", "deadline"}


def test_bare_fine_tuned_ids_are_openais_unless_a_table_says_whose() -> None:
    assert settings(flavour="openai").answers() == ("ft:*",)
    assert settings(flavour="together").answers() == ()
    assert settings(flavour="together", models=["ft:acme*"]).answers() == ("ft:acme*",)


def test_azures_addresses_follow_from_the_resource() -> None:
    resource = "https://r.openai.azure.com"
    for url in (resource, f"{resource}/", f"{resource}/openai/v1"):
        assert settings(flavour="azure", url=url).addresses() == (f"{resource}/openai/v1",)
    for url in (resource, f"{resource}/openai"):
        assert settings(flavour="azure", url=url, api_version="2024-10-21").addresses() == (f"{resource}/openai",)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"url": "http://x", "urls": ["http://y"]}, "url and urls are both given"),
        ({"url": "http://x", "api_version": "2024-10-21"}, "api_version and deployment are Azure's"),
        ({"url": "http://x", "flavour": "azure", "deployment": "d"}, "deployment needs api_version"),
        ({"url": "http://x", "features": ["logprob"]}, "no feature 'logprob'; there are .*logprobs"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(given: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        settings(**given)
