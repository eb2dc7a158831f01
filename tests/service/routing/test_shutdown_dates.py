from __future__ import annotations

import asyncio
import threading
from collections.abc import Mapping
from datetime import date
from typing import Any

import pytest

from prompt_store.errors import StoreUnavailable
from prompt_store.prompts.version import PromptVersion
from prompt_store.routing.routes import DirectRoute
from service.engines.errors import ProviderRefused, ProviderUnavailable
from service.routing.shutdown_dates import EVERY_S, LOOK_EVERY_S, Ask, ShutdownDates, shutdown_date
from tests.service.routing.remote_versions import BACKENDS, TUNED, snapshot, task, version

SOON = date(2026, 12, 1)


class Provider:
    """Answers as its script says, by path; remembers what it was asked."""

    def __init__(self, **answers: Mapping[str, Any] | Exception) -> None:
        self.answers = answers
        self.asked: list[str] = []

    async def __call__(self, path: str) -> Mapping[str, Any]:
        self.asked.append(path)
        answer = self.answers[path.removeprefix("/models/")]
        if isinstance(answer, Exception):
            raise answer
        return answer


class Notes:
    """Where dates are written down, as the store would, blocking and not on the event loop."""

    def __init__(self) -> None:
        self.written: list[tuple[str, date]] = []
        self.away = False

    def __call__(self, version: PromptVersion, day: date) -> None:
        assert threading.current_thread() is not threading.main_thread()
        if self.away:
            raise StoreUnavailable("the store is away")
        self.written.append((f"{version.task}@{version.label}", day))


def announced(day: str | None) -> dict[str, Any]:
    """OpenAI's description of a model."""
    return {"id": "m", "object": "model", "created": 1, "owned_by": "acme", "shutdown_date": day}


def dates(notes: Notes, **ask: Ask) -> ShutdownDates:
    return ShutdownDates(ask, BACKENDS, notes)


async def test_a_date_that_a_provider_gives_is_noted_with_every_version_of_the_model() -> None:
    notes, openai = Notes(), Provider(m=announced("2026-12-01"))
    support = task(DirectRoute(), version(1, "m"), version(2, None), version(3, "m"))
    await dates(notes, openai=openai).poll(snapshot(support))
    assert notes.written == [("support@v1", SOON), ("support@v3", SOON)]
    assert openai.asked == ["/models/m"]


async def test_a_date_that_is_known_is_not_noted_again() -> None:
    notes, openai = Notes(), Provider(m=announced("2026-12-01"))
    await dates(notes, openai=openai).poll(snapshot(task(DirectRoute(), version(1, "m", SOON))))
    assert not notes.written


@pytest.mark.parametrize("answer", [announced(None), {"id": "m", "object": "model"}])
async def test_silence_takes_back_nothing(answer: dict[str, Any]) -> None:
    notes = Notes()
    await dates(notes, openai=Provider(m=answer)).poll(snapshot(task(DirectRoute(), version(1, "m", SOON))))
    assert not notes.written


async def test_a_date_of_the_settings_is_noted_where_the_provider_gives_none_or_a_later_one() -> None:
    notes, openai = Notes(), Provider(m=announced(None), n=announced("2026-12-09"), o=announced("2026-11-30"))
    known = task(DirectRoute(), version(1, "m"), version(2, "n"), version(3, "o"), version(4, "m", date(2026, 11, 29)))
    alien = task(DirectRoute(), version(1, "p", task="other", provider="elsewhere"))
    await ShutdownDates({"openai": openai}, BACKENDS, notes, lambda _: SOON).poll(snapshot(known, alien))
    expected = [("support@v1", SOON), ("support@v2", SOON), ("support@v3", date(2026, 11, 30)), ("other@v1", SOON)]
    assert sorted(notes.written) == sorted(expected)


async def test_each_model_is_asked_of_the_backend_that_serves_it() -> None:
    notes, openai, together = Notes(), Provider(m=announced(None)), Provider(n=announced("2026-12-01"))
    both = task(DirectRoute(), version(1, "m"), version(2, "n", provider="together"))
    alien = version(3, "o", task="other", provider="elsewhere")
    await dates(notes, openai=openai, together=together).poll(snapshot(both, task(DirectRoute(), alien)))
    assert (openai.asked, together.asked) == (["/models/m"], ["/models/n"])
    assert notes.written == [("support@v2", SOON)]


async def test_a_models_name_cannot_lead_to_another_path() -> None:
    openai = Provider()
    openai.answers = {TUNED: announced(None), "..%2Ffiles%3Fx": announced(None)}
    support = task(DirectRoute(), version(1, TUNED), version(2, "../files?x"))
    await dates(Notes(), openai=openai).poll(snapshot(support))
    assert openai.asked == [f"/models/{TUNED}", "/models/..%2Ffiles%3Fx"]


async def test_a_model_that_is_refused_or_answered_with_nonsense_stops_no_other(
    caplog: pytest.LogCaptureFixture,
) -> None:
    notes = Notes()
    openai = Provider(
        gone=ProviderRefused("there is no such model", status=404), odd=announced("soon"), m=announced("2026-12-01")
    )
    support = task(DirectRoute(), version(1, "gone"), version(2, "odd"), version(3, "m"))
    await dates(notes, openai=openai).poll(snapshot(support))
    assert notes.written == [("support@v3", SOON)]
    assert "does not tell when 'gone' goes away: there is no such model" in caplog.text
    assert "says of when 'odd' goes away is no date" in caplog.text


async def test_a_provider_that_is_away_is_asked_once_and_holds_up_no_other(caplog: pytest.LogCaptureFixture) -> None:
    notes, together = Notes(), Provider(n=announced("2026-12-01"))
    openai = Provider(m=ProviderUnavailable("it hung up"), o=ProviderUnavailable("it hung up"))
    support = task(DirectRoute(), version(1, "m"), version(2, "o"), version(3, "n", provider="together"))
    await dates(notes, openai=openai, together=together).poll(snapshot(support))
    assert openai.asked == ["/models/m"]
    assert notes.written == [("support@v3", SOON)]
    assert caplog.text.count("cannot be asked when its models go away: it hung up") == 1


async def test_a_store_that_is_away_is_told_the_next_day(caplog: pytest.LogCaptureFixture) -> None:
    notes = Notes()
    notes.away = True
    asking = dates(notes, openai=Provider(m=announced("2026-12-01")))
    state = snapshot(task(DirectRoute(), version(1, "m")))
    slept_s = 0.0

    async def sleep(seconds: float) -> None:
        nonlocal slept_s
        assert bool(notes.written) is (slept_s >= EVERY_S)
        slept_s += seconds
        notes.away = False
        if slept_s > EVERY_S:
            raise asyncio.CancelledError

    with pytest.raises(asyncio.CancelledError):
        await asking.follow(lambda: state, sleep)
    assert notes.written == [("support@v1", SOON)]
    assert "which is not noted: the store is away" in caplog.text


async def test_a_version_that_is_published_is_asked_for_within_a_minute_and_what_is_known_once_a_day() -> None:
    notes, openai = Notes(), Provider(m=announced(None), n=announced("2026-12-01"))
    state = snapshot(task(DirectRoute(), version(1, "m")))
    asked: list[list[str]] = []
    slept_s = 0.0

    async def sleep(seconds: float) -> None:
        nonlocal slept_s, state
        asked.append(openai.asked.copy())
        openai.asked.clear()
        slept_s += seconds
        if slept_s == 3 * LOOK_EVERY_S:
            state = snapshot(task(DirectRoute(), version(1, "m"), version(2, "n"), version(3, None)))
        if slept_s > EVERY_S:
            raise asyncio.CancelledError

    with pytest.raises(asyncio.CancelledError):
        await dates(notes, openai=openai).follow(lambda: state, sleep)
    assert LOOK_EVERY_S == 60.0
    assert {place: paths for place, paths in enumerate(asked) if paths} == {
        0: ["/models/m"],
        3: ["/models/n"],
        EVERY_S / LOOK_EVERY_S: ["/models/m", "/models/n"],
    }
    assert notes.written[0] == ("support@v2", SOON)


async def test_another_version_of_a_known_model_gets_its_date_too() -> None:
    notes = Notes()
    asking = dates(notes, openai=Provider(m=announced("2026-12-01")))
    await asking.poll(snapshot(task(DirectRoute(), version(1, "m"))))
    await asking.poll(snapshot(task(DirectRoute(), version(1, "m", SOON), version(2, "m"))))
    assert notes.written == [("support@v1", SOON), ("support@v2", SOON)]


@pytest.mark.parametrize("said", ["soon", "2026-13-01", "", 1796083200, ["2026-12-01"]])
def test_what_is_no_date_is_refused(said: object) -> None:
    with pytest.raises(ValueError, match=r".+"):
        shutdown_date({"shutdown_date": said})


async def test_a_fault_that_nobody_expected_ends_no_watch(caplog: pytest.LogCaptureFixture) -> None:
    notes, slept_s = Notes(), 0.0
    answers = Provider(m=RuntimeError("a bug"))
    state = snapshot(task(DirectRoute(), version(1, "m")))

    async def sleep(seconds: float) -> None:
        nonlocal slept_s
        slept_s += seconds
        answers.answers = {"m": announced("2026-12-01")}
        if slept_s > EVERY_S:
            raise asyncio.CancelledError

    with pytest.raises(asyncio.CancelledError):
        await dates(notes, openai=answers).follow(lambda: state, sleep)
    assert notes.written == [("support@v1", SOON)]
    assert "a bug" in caplog.text
