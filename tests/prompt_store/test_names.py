import pytest

from prompt_store.errors import InvalidName
from prompt_store.names import (
    AliasSelector,
    DigestSelector,
    NumberSelector,
    RemoteModel,
    TaskModel,
    check_alias,
    check_task_name,
    parse_model_name,
    parse_selector,
)

DIGEST = "0123456789abcdef" * 4


@pytest.mark.parametrize("name", ["a", "support_intents", "x-1", "a" * 64, "deadbeef", "v7"])
def test_task_names_are_lower_case_words(name: str) -> None:
    assert check_task_name(name) == name


@pytest.mark.parametrize(
    "name", ["", "A", "1a", "_a", "a" * 65, "a b", "a.b", "a/b", "../a", "a@b", "ä", "a\n", "a\x00"]
)
def test_other_task_names_are_refused_with_the_rule(name: str) -> None:
    with pytest.raises(InvalidName, match="starting with a letter"):
        check_task_name(name)


@pytest.mark.parametrize("name", ["production", "v", "v7a", "version7", "cafe", "beef5", "candidate-2"])
def test_aliases_are_words(name: str) -> None:
    assert check_alias(name) == name


@pytest.mark.parametrize("name", ["v7", "v0", "v007", "facade", "deadbeef", DIGEST, "", "Production", "a" * 65])
def test_aliases_never_look_like_numbers_or_digests(name: str) -> None:
    with pytest.raises(InvalidName, match="is not an alias"):
        check_alias(name)


@pytest.mark.parametrize(
    ("text", "selector"),
    [
        ("v7", NumberSelector(7)),
        ("v10", NumberSelector(10)),
        (DIGEST, DigestSelector(DIGEST)),
        (DIGEST[:8], DigestSelector(DIGEST[:8])),
        ("production", AliasSelector("production")),
        ("cafe", AliasSelector("cafe")),
    ],
)
def test_a_selector_reads_one_way(text: str, selector: object) -> None:
    assert parse_selector(text) == selector


@pytest.mark.parametrize("text", ["v0", "v07", "abcdef1", DIGEST + "0", "V7", "", "a b", "v7 ", DIGEST.upper()])
def test_other_selectors_are_refused(text: str) -> None:
    with pytest.raises(InvalidName):
        parse_selector(text)


@pytest.mark.parametrize(
    ("text", "model"),
    [
        ("support_intents", TaskModel("support_intents")),
        ("support_intents@candidate", TaskModel("support_intents", "candidate")),
        ("support_intents@v7", TaskModel("support_intents", "v7")),
        (f"support_intents@{DIGEST[:12]}", TaskModel("support_intents", DIGEST[:12])),
        ("ft:gpt-4o-mini-2024-07-18:acme::Ab12", RemoteModel("ft:gpt-4o-mini-2024-07-18:acme::Ab12")),
        ("ft:gpt-4o:acme:x:1:ckpt-step-90", RemoteModel("ft:gpt-4o:acme:x:1:ckpt-step-90")),
    ],
)
def test_a_model_name_is_a_task_or_a_fine_tuned_id(text: str, model: object) -> None:
    assert parse_model_name(text) == model


@pytest.mark.parametrize("text", ["", "@v7", "a@", "a@v0", "a@b@c", "ft:", "ft:a b", "gpt 4", "A", "ft:" + "x" * 252])
def test_other_model_names_are_refused(text: str) -> None:
    with pytest.raises(InvalidName):
        parse_model_name(text)


def test_a_refusal_shows_only_the_start_of_a_long_name() -> None:
    with pytest.raises(InvalidName) as caught:
        parse_model_name("x" * 100_000)
    assert len(str(caught.value)) < 300
