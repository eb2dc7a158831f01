import pytest
from sqlalchemy import update

from prompt_store.errors import InvalidArtifact, InvalidName, UnknownAlias, UnknownBase, UnknownTask
from prompt_store.prompts.registry import ListedVersion, Registry
from prompt_store.prompts.template import Message
from prompt_store.prompts.unreadable import UnreadableVersion
from prompt_store.prompts.version import TextPayload
from prompt_store.tables import versions
from tests.prompt_store.building import ANNA, OTHER_BASE, publish, task

TEXT = TextPayload(messages=(Message(role="user", content="Sort {message}"),))


@pytest.fixture
def filled(registry: Registry) -> Registry:
    """alpha with v1 to v3 on one base, support_intents with v1 on another and v2 as text."""
    registry.register_base(OTHER_BASE, ANNA)
    registry.apply_task(task("alpha"), ANNA)
    for seed in range(3):
        publish(registry, seed, task="alpha", tags=("sweep", f"seed {seed}"))
    registry.move_alias("alpha", "production", "v2", reason="", principal=ANNA)
    publish(registry, 0, alias="production", base_fingerprint=OTHER_BASE.fingerprint, report={"accuracy": 0.5})
    publish(registry, alias="canary", payload_content=TEXT, base_fingerprint=None, tags=('é", "',))
    registry.move_alias("support_intents", "baseline", "v2", reason="", principal=ANNA)
    return registry


def names(entries: tuple[ListedVersion, ...]) -> list[str]:
    return [f"{entry.version.task}@{entry.version.label}" for entry in entries]


ALL = ["alpha@v3", "alpha@v2", "alpha@v1", "support_intents@v2", "support_intents@v1"]


@pytest.mark.parametrize("limit", [1, 2, 3, 4, 5, 6])
def test_pages_of_any_size_show_every_version_once_by_task_and_the_newest_first(filled: Registry, limit: int) -> None:
    seen: list[str] = []
    page = filled.page(limit=limit)
    while page.after is not None:
        assert len(page.entries) == limit
        seen += names(page.entries)
        page = filled.page(limit=limit, after=page.after)
    assert [*seen, *names(page.entries)] == ALL


def test_an_entry_brings_the_aliases_that_point_at_it(filled: Registry) -> None:
    entries = dict(zip(ALL, filled.page().entries, strict=True))
    assert {name: entry.aliases for name, entry in entries.items() if entry.aliases} == {
        "alpha@v2": ("production",),
        "support_intents@v2": ("baseline", "canary"),
        "support_intents@v1": ("production",),
    }


@pytest.mark.parametrize(
    ("filters", "expected"),
    [
        ({"task": "alpha"}, ALL[:3]),
        ({"kind": "text"}, ["support_intents@v2"]),
        ({"base": "demo-base"}, ALL[:3]),
        ({"base": OTHER_BASE.fingerprint[:12]}, ["support_intents@v1"]),
        ({"tag": "sweep"}, ALL[:3]),
        ({"tag": "seed 1"}, ["alpha@v2"]),
        ({"tag": 'é", "'}, ["support_intents@v2"]),
        ({"tag": ", "}, []),
        ({"tag": "seed"}, []),
        ({"alias": "production"}, ["alpha@v2", "support_intents@v1"]),
        ({"alias": "production", "task": "alpha", "tag": "seed 1", "kind": "soft_prompt"}, ["alpha@v2"]),
        ({"alias": "production", "task": "alpha", "tag": "seed 2"}, []),
        ({"kind": "prefix"}, []),
    ],
)
def test_filters_combine(filled: Registry, filters: dict[str, str], expected: list[str]) -> None:
    assert names(filled.page(**filters).entries) == expected  # type: ignore[arg-type]


def test_filters_hold_on_every_page(filled: Registry) -> None:
    first = filled.page(alias="production", limit=1)
    assert names(first.entries) == ["alpha@v2"]
    second = filled.page(alias="production", limit=1, after=first.after)
    assert (names(second.entries), second.after) == (["support_intents@v1"], None)


def test_a_version_published_between_two_pages_shifts_nothing(filled: Registry) -> None:
    first = filled.page(limit=2)
    publish(filled, 9, task="alpha")
    assert names(filled.page(limit=2, after=first.after).entries) == ALL[2:4]


@pytest.mark.parametrize(
    ("asked", "error", "said"),
    [
        ({"task": "alhpa"}, UnknownTask, "did you mean 'alpha'"),
        ({"task": "al\0pha"}, InvalidName, "is not a task name"),
        ({"base": "demo"}, UnknownBase, "did you mean 'demo-base'"),
        ({"alias": "v7"}, InvalidName, "is not an alias"),
        ({"tag": "a\0"}, InvalidArtifact, "holds NUL"),
        ({"kind": "\ud800"}, InvalidArtifact, "half a character"),
        ({"limit": 0}, InvalidName, "ask for 1 to 200"),
        ({"limit": 201}, InvalidName, "ask for 1 to 200"),
        *(
            ({"after": cursor}, InvalidName, "`after` is not what a page")
            for cursor in ("", "x", "é", "YWxwaGE", "YWxwaGEgMA", "YWxwaGEgOTk5OTk5OTk5OTk5", "YWxwaGEgMSA", "a\0b")
        ),
    ],
)
def test_what_no_list_has_is_refused(
    filled: Registry, asked: dict[str, object], error: type[Exception], said: str
) -> None:
    with pytest.raises(error, match=said):
        filled.page(**asked)  # type: ignore[arg-type]


def test_an_aliass_moves_come_newest_first_page_by_page(filled: Registry) -> None:
    for number in (1, 2, 3):
        filled.move_alias("alpha", "canary", f"v{number}", reason=f"try {number}", principal=ANNA)
    first = filled.alias_moves("alpha", "canary", limit=2)
    second = filled.alias_moves("alpha", "canary", limit=2, after=first.after)
    assert [move.reason for move in first.moves + second.moves] == ["try 3", "try 2", "try 1"]
    assert (first.after is not None, second.after) == (True, None)
    assert list(reversed(first.moves + second.moves)) == filled.alias_history("alpha", "canary")
    with pytest.raises(UnknownAlias, match="did you mean 'canary'"):
        filled.alias_moves("alpha", "canari")
    with pytest.raises(InvalidName, match="is not an alias"):
        filled.alias_moves("alpha", "a\0b")


def test_versions_are_counted_by_kind(filled: Registry) -> None:
    assert filled.version_counts("support_intents") == {"soft_prompt": 1, "text": 1}


def test_bases_say_how_many_versions_they_carry_and_which_tasks_have_none(filled: Registry) -> None:
    carried = {entry.base.name: (entry.versions, entry.count, entry.missing) for entry in filled.carried_by_bases()}
    assert carried == {
        "demo-base": ({"alpha": ("v1", "v2", "v3")}, 3, ("support_intents",)),
        "other-base": ({"support_intents": ("v1",)}, 1, ("alpha",)),
    }


def test_a_version_that_cannot_be_read_is_listed_in_its_place_and_hides_no_other(filled: Registry) -> None:
    with filled.database.write() as connection:
        here = (versions.c.task == "alpha") & (versions.c.number == 2)
        connection.execute(update(versions).where(here).values(payload="{}"))
    listed = filled.page(task="alpha").entries
    assert [entry.version.label for entry in listed] == ["v3", "v2", "v1"]
    assert [isinstance(entry.version, UnreadableVersion) for entry in listed] == [False, True, False]
    assert listed[1].aliases == ("production",)
