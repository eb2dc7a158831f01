"""What a failure is called, whether it is tried again, and what its message may say."""

from __future__ import annotations

import json
import time
from typing import Any

import pytest
from pydantic import SecretStr

from service.engines.errors import (
    ProviderDenied,
    ProviderError,
    ProviderMisbehaved,
    ProviderRateLimited,
    ProviderRefused,
    ProviderUnavailable,
)
from service.engines.remote.failures import AttemptFailed, Complaints, request_id, retry_after_s
from service.engines.remote.options import TransportOptions

KEY = "sk-proj-0123456789"
NOW = 1_700_000_000.0  # Tue, 14 Nov 2023 22:13:20 GMT


def complaint(status: int, error: Any = None, headers: dict[str, str] | None = None) -> AttemptFailed:
    body = json.dumps({"error": error or {"message": "so it is"}}).encode()
    return Complaints((KEY,)).status("the provider", status, headers or {}, body)


@pytest.mark.parametrize(
    ("status", "kind", "again", "verdict"),
    [
        (401, ProviderDenied, False, "failed"),
        (403, ProviderDenied, False, "answered"),
        (408, ProviderUnavailable, True, "failed"),
        (409, ProviderUnavailable, True, "failed"),
        (429, ProviderRateLimited, True, "silent"),
        (500, ProviderUnavailable, True, "failed"),
        (503, ProviderUnavailable, True, "failed"),
        (529, ProviderUnavailable, True, "failed"),
        (400, ProviderRefused, False, "answered"),
        (404, ProviderRefused, False, "answered"),
        (422, ProviderRefused, False, "answered"),
        (302, ProviderMisbehaved, False, "failed"),
    ],
)
def test_each_status_has_its_error(status: int, kind: type[ProviderError], again: bool, verdict: str) -> None:
    failed = complaint(status)
    assert type(failed.error) is kind
    assert (failed.again, failed.verdict, failed.error.status) == (again, verdict, status)


def test_a_refusal_has_the_providers_words_parameter_and_request_id() -> None:
    error = {"message": "no such model", "param": "model", "code": "model_not_found"}
    refused = complaint(404, error, {"x-request-id": "req_7"}).error
    assert isinstance(refused, ProviderRefused)
    assert str(refused) == (
        "the provider refused the request (404): no such model (the provider's request id is req_7)"
    )
    assert (refused.parameter, refused.request_id) == ("model", "req_7")


@pytest.mark.parametrize(("told", "status", "again"), [("true", 400, True), ("false", 500, False), ("what", 500, True)])
def test_a_provider_that_says_whether_to_retry_is_obeyed(told: str, status: int, again: bool) -> None:
    assert complaint(status, headers={"x-should-retry": told}).again is again


def test_a_quota_that_is_used_up_is_not_asked_again() -> None:
    failed = complaint(429, {"message": "pay", "type": "insufficient_quota", "code": "insufficient_quota"})
    assert not failed.again
    assert "billing" in str(failed.error)


@pytest.mark.parametrize("status", [400, 401, 403, 429, 500])
def test_a_key_that_a_provider_echoes_is_not_shown(status: int) -> None:
    failed = complaint(status, {"message": f"what is {KEY}?", "param": KEY})
    assert KEY not in f"{failed.error} {failed.error!r} {failed} {getattr(failed.error, 'parameter', '')}"


def test_a_key_is_hidden_before_the_words_are_cut() -> None:
    failed = complaint(400, {"message": "x" * 490 + KEY})
    assert KEY[:4] not in str(failed.error)


def test_a_long_message_is_cut_and_put_on_one_line() -> None:
    message = str(complaint(400, {"message": "word\r\n\x1b[31m" * 1000}).error)
    assert message.isprintable()
    assert len(message) < 600


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (b'{"detail": "not there"}', "not there"),
        (b'{"object": "error", "message": "old style"}', "old style"),
        (b'{"error": "a text"}', "a text"),
        (b'{"detail": [{"loc": ["body"]}]}', '[{"loc":["body"]}]'),
        (b"plain words", "plain words"),
        (b"[1, 2]", "does not say why"),
        (b"", "does not say why"),
        (b"[" * 100_000, "refused"),
    ],
)
def test_other_shapes_of_errors_are_understood(body: bytes, words: str) -> None:
    assert words in str(Complaints().status("the provider", 400, {}, body).error)


def test_a_page_of_html_is_not_quoted() -> None:
    failed = Complaints().status("the provider", 502, {"content-type": "text/html"}, b"<html>oops</html>")
    assert str(failed.error) == "the provider answered 502; try again"


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        ({"message": "slow down", "code": "rate_limit_exceeded"}, ProviderRateLimited),
        ({"message": "bad", "type": "invalid_request_error"}, ProviderRefused),
        ({"message": "bad", "type": "BadRequestError", "code": 400}, ProviderRefused),
        ({"message": "oops", "type": "server_error"}, ProviderUnavailable),
        ({"message": "who", "type": "invalid_request_error", "code": "invalid_api_key"}, ProviderDenied),
        ({"message": "slow", "type": "invalid_request_error", "code": "rate_limit_exceeded"}, ProviderRateLimited),
        ({"message": "slow", "type": "invalid_request_error", "code": "tokens"}, ProviderRateLimited),
        ({"message": "pay", "type": "invalid_request_error", "code": "insufficient_quota"}, ProviderRateLimited),
        ({"message": "slow", "code": "429"}, ProviderRateLimited),
        ("a text", ProviderUnavailable),
        ({"code": True}, ProviderUnavailable),
    ],
)
def test_an_error_in_place_of_an_answer_is_known_by_its_code_or_type(error: Any, kind: type[ProviderError]) -> None:
    assert type(Complaints().document("the provider", {}, error).error) is kind


@pytest.mark.parametrize(
    ("headers", "expected"),
    [
        ({"retry-after": "7"}, 7.0),
        ({"retry-after": "1.5"}, 1.5),
        ({"retry-after-ms": "250", "retry-after": "9"}, 0.25),
        ({"retry-after-ms": "soon", "retry-after": "9"}, 9.0),
        ({"retry-after": "Tue, 14 Nov 2023 22:13:50 GMT"}, 30.0),
        ({"retry-after": "Tue, 14 Nov 2023 22:13:00 GMT"}, None),
        ({"retry-after": "0"}, None),
        ({"retry-after": "-3"}, None),
        ({"retry-after": "nan"}, None),
        ({"retry-after": "inf"}, 1e9),
        ({"retry-after": "1e999"}, 1e9),
        ({"retry-after": "Tue, 14 Nov 99999 22:13:00 GMT"}, None),
        ({"retry-after": "whenever"}, None),
        ({}, None),
    ],
)
def test_how_long_to_wait_is_read_in_every_form(headers: dict[str, str], expected: float | None) -> None:
    assert retry_after_s(headers, NOW) == expected


def test_a_date_without_a_zone_is_universal_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TZ", "Asia/Tokyo")
    time.tzset()
    try:
        assert retry_after_s({"retry-after": "Tue Nov 14 22:13:50 2023"}, NOW) == 30.0
    finally:
        monkeypatch.undo()
        time.tzset()


def test_a_short_header_is_no_secret_and_a_proxys_password_is_one() -> None:
    headers = {"x-priority": "high", "x-tenant": "tenant-0123456789"}
    options = TransportOptions(
        ("http://a/v1",), SecretStr(KEY), headers=headers, proxy="http://user:p%40ssword-of-proxy@proxy:3128"
    )
    error = {"message": f"a high limit for {KEY}, tenant-0123456789 by p@ssword-of-proxy"}
    body = json.dumps({"error": error}).encode()
    said = str(Complaints(options.secrets()).status("the provider", 400, {}, body).error)
    assert said.endswith("a high limit for [hidden], [hidden] by [hidden]")


def test_a_rate_limit_carries_how_long_to_wait() -> None:
    failed = complaint(429, headers={"retry-after": "7"})
    assert isinstance(failed.error, ProviderRateLimited)
    assert failed.error.retry_after_s == failed.retry_after_s == 7.0


@pytest.mark.parametrize("name", ["x-request-id", "apim-request-id", "x-ms-request-id", "request-id"])
def test_every_name_of_a_request_id_is_known(name: str) -> None:
    assert request_id({name: "a b\n" + "c" * 500}) == "ab" + "c" * 126
