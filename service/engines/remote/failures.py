"""What went wrong in one attempt, in the terms of `service.engines.errors`, and whether another attempt may help.

What a provider says is quoted without our keys and without pages of HTML.
"""

from __future__ import annotations

import datetime
import email.utils
import math
import os
import re
import ssl
import time
from collections.abc import Mapping
from typing import Any, Literal

import aiohttp
import msgspec

from service.engines.errors import (
    DeadlineExceeded,
    EngineError,
    ProviderDenied,
    ProviderMisbehaved,
    ProviderRateLimited,
    ProviderRefused,
    ProviderUnavailable,
)

Verdict = Literal["failed", "answered", "silent"]
_Kinds = tuple[str, ...]
"""What an error calls itself, by its code and then by its type: the code says more."""

_REQUEST_ID_HEADERS = (
    "x-request-id", "apim-request-id", "x-ms-request-id", "request-id", "x-amzn-requestid", "cf-ray",
)  # fmt: skip
_MAX_WORDS = 500
_MAX_REQUEST_ID = 128
_LONGER_THAN_ANY_WAIT_S = 1e9
_STATUS_OF_KIND = {
    "insufficient_quota": 429,
    "rate_limit_exceeded": 429,
    "rate_limit_error": 429,
    "tokens": 429,
    "requests": 429,
    "invalid_request_error": 400,
    "authentication_error": 401,
    "invalid_api_key": 401,
    "permission_error": 403,
}


class AttemptFailed(Exception):
    """One attempt ended in `error`, which is raised where no other attempt is made.

    `verdict` is what it says of the provider: it `failed`, it `answered`, or nothing (`silent`). `unreached` says that
    nothing was sent, `stale` that the connection had been kept open and was closed before the first byte came.
    """

    def __init__(
        self,
        error: EngineError,
        *,
        again: bool = False,
        retry_after_s: float | None = None,
        verdict: Verdict = "failed",
        unreached: bool = False,
        stale: bool = False,
    ) -> None:
        super().__init__(str(error))
        self.error = error
        self.again = again
        self.retry_after_s = retry_after_s
        self.verdict = verdict
        self.unreached = unreached
        self.stale = stale


class Complaints:
    """Makes failures of the answers and silences of one provider; `secrets` are texts that it may not give away."""

    def __init__(self, secrets: tuple[str, ...] = ()) -> None:
        self._secrets = secrets

    def status(self, where: str, status: int, headers: Mapping[str, str], body: bytes) -> AttemptFailed:
        """An answer whose status is not 2xx; `body` may have been cut."""
        try:
            document = msgspec.json.decode(body)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
            document = None
        if document is None and "html" not in headers.get("content-type", "") and b"\0" not in body:
            document = body.decode(errors="replace")
        return self._complaint(where, status, headers, *_said(document))

    def document(self, where: str, headers: Mapping[str, str], error: Any) -> AttemptFailed:
        """An error that came in place of an answer under status 200, or within a stream."""
        words, parameter, kinds = _said({"error": error})
        code = str(error.get("code")) if isinstance(error, dict) else ""
        statuses = (_STATUS_OF_KIND[kind] for kind in kinds if kind in _STATUS_OF_KIND)
        status = int(code) if re.fullmatch(r"[45]\d\d", code) else next(statuses, 500)
        return self._complaint(where, status, headers, words, parameter, kinds)

    def _complaint(
        self,
        where: str,
        status: int,
        headers: Mapping[str, str],
        words: str,
        parameter: str | None,
        kinds: _Kinds,
    ) -> AttemptFailed:
        name = request_id(headers)
        quoted = f": {self._presentable(words)}" if words else ""
        wait_s = retry_after_s(headers)
        again = _again(status, kinds, headers)
        if status == 401:
            # Some quote the key that they do not take, with only its middle blotted out: their words are left out.
            denied = ProviderDenied(
                f"{where} does not take the backend's key (401); give it a key that is valid there",
                status=status,
                request_id=name,
            )
            return AttemptFailed(denied, again=again, retry_after_s=wait_s)
        if status == 403:
            message = f"{where} does not let the backend's key do this (403){quoted}; give the key that right"
            forbidden = ProviderDenied(message, status=status, request_id=name)
            # It may be one model that the key has no right to, or one text: others are answered meanwhile.
            return AttemptFailed(forbidden, again=again, retry_after_s=wait_s, verdict="answered")
        if status == 429:
            remedy = (
                "see to its quota and billing"
                if "insufficient_quota" in kinds
                else "send less, or give the route a fallback"
            )
            limited = ProviderRateLimited(
                f"{where} takes no more requests now (429){quoted}; {remedy}",
                retry_after_s=1.0 if wait_s is None else wait_s,
                request_id=name,
            )
            return AttemptFailed(limited, again=again, retry_after_s=wait_s, verdict="silent")
        if status in (408, 409) or status >= 500:
            message = f"{where} answered {status}{quoted}; try again"
            unavailable = ProviderUnavailable(message, status=status, request_id=name)
            return AttemptFailed(unavailable, again=again, retry_after_s=wait_s)
        if status < 400:
            return misbehaviour(where, f"answered {status} in place of an answer", headers, status, again=again)
        blamed = self._presentable(parameter) if parameter else None
        refused = ProviderRefused(
            f"{where} refused the request ({status}){quoted or '; it does not say why'}",
            status=status,
            request_id=name,
            parameter=blamed,
        )
        return AttemptFailed(refused, again=again, retry_after_s=wait_s, verdict="answered")

    def _presentable(self, words: str) -> str:
        """What a provider says, on one line, without our secrets, cut to a length that one reads."""
        for secret in self._secrets:
            words = words.replace(secret, "[hidden]")
        words = " ".join("".join(letter if letter.isprintable() else " " for letter in words).split())
        return words if len(words) <= _MAX_WORDS else words[: _MAX_WORDS - 1] + "…"


def unreached(where: str, error: aiohttp.ClientError | TimeoutError, connect_s: float) -> AttemptFailed:
    """No connection was made."""
    if isinstance(error, aiohttp.ClientConnectorCertificateError):
        message = (
            f"{where} has a certificate that is not trusted ({_reason(error.certificate_error)}); see that the address "
            "is right, and name the authority that signed it as the backend's ca_file"
        )
        return AttemptFailed(ProviderUnavailable(message), unreached=True)
    if isinstance(error, aiohttp.ClientSSLError):
        what = f"could not be reached over TLS ({_reason(error)})"
    elif isinstance(error, aiohttp.ClientConnectorDNSError):
        what = "has a name that cannot be resolved"
    elif isinstance(error, TimeoutError):
        what = f"took no connection within {connect_s:g} s"
    else:
        what = f"took no connection ({_reason(error)})"
    message = f"{where} {what}; see that the address is right and that it is running"
    return AttemptFailed(ProviderUnavailable(message), again=True, unreached=True)


def hung_up(where: str, *, stale: bool) -> AttemptFailed:
    """The connection was closed before the first byte of an answer."""
    message = f"{where} hung up without an answer; try again"
    return AttemptFailed(ProviderUnavailable(message), again=True, stale=stale)


def broken_off(where: str, headers: Mapping[str, str]) -> AttemptFailed:
    """A connection that closed within an answer."""
    message = f"{where} hung up before its answer was whole; try again"
    return AttemptFailed(ProviderUnavailable(message, status=200, request_id=request_id(headers)), again=True)


def misbehaviour(
    where: str, what: str, headers: Mapping[str, str], status: int, *, again: bool = False
) -> AttemptFailed:
    """An answer that cannot be read; `what` continues the sentence."""
    message = f"{where} {what}; see that the backend's address is that of an OpenAI-compatible API, or ask it again"
    return AttemptFailed(ProviderMisbehaved(message, status=status, request_id=request_id(headers)), again=again)


def silent(where: str, silence_s: float, headers: Mapping[str, str] | None) -> AttemptFailed:
    """Nothing came for `silence_s`; `headers` are those of the answer that had begun."""
    message = f"{where} was silent for {silence_s:g} s; try again, or allow the backend more time"
    return AttemptFailed(ProviderUnavailable(message, request_id=request_id(headers or {})), again=True)


def too_late(where: str, *, answering: bool) -> AttemptFailed:
    """The request's deadline passed; it is held against a provider that had said nothing until then."""
    message = f"{where} had not answered in full when the request's deadline passed; allow it more time"
    return AttemptFailed(DeadlineExceeded(message), verdict="silent" if answering else "failed")


def request_id(headers: Mapping[str, str]) -> str:
    """What the provider calls the request, for its support; empty if it does not say."""
    return next((cleaned_id(value) for name in _REQUEST_ID_HEADERS if (value := headers.get(name))), "")


def cleaned_id(said: str) -> str:
    """A provider's name for a request, as it can stand in a message and in a header."""
    return re.sub(r"[^\x21-\x7e]", "", said)[:_MAX_REQUEST_ID]


def retry_after_s(headers: Mapping[str, str], now: float | None = None) -> float | None:
    """Seconds that a provider asks to wait, by `retry-after-ms` or `retry-after` (seconds or a date); else None.

    `now` is the time of day, in seconds since 1970.
    """
    for name, per_second in (("retry-after-ms", 1000.0), ("retry-after", 1.0)):
        try:
            wait_s = float(headers[name]) / per_second
        except (KeyError, ValueError):
            continue
        if not math.isnan(wait_s):
            return min(wait_s, _LONGER_THAN_ANY_WAIT_S) if wait_s > 0.0 else None
    try:
        date = email.utils.parsedate_to_datetime(headers.get("retry-after", ""))
        if date.tzinfo is None:  # HTTP knows no other zone
            date = date.replace(tzinfo=datetime.UTC)
        wait_s = date.timestamp() - (time.time() if now is None else now)
    except (ValueError, OverflowError, TypeError):
        return None
    return wait_s if wait_s > 0.0 else None


def _again(status: int, kinds: _Kinds, headers: Mapping[str, str]) -> bool:
    """Whether to ask again, as the official client decides it; a quota that is used up does not come back so soon."""
    told = headers.get("x-should-retry")
    if told in ("true", "false"):
        return told == "true"
    return (status in (408, 409, 429) or status >= 500) and "insufficient_quota" not in kinds


def _said(document: Any) -> tuple[str, str | None, _Kinds]:
    """The words, the parameter, and the kinds of an error in OpenAI's shape or one that is common beside it."""
    error = document.get("error", document) if isinstance(document, dict) else document
    if not isinstance(error, dict):
        return (error if isinstance(error, str) else ""), None, ()
    words = next((error[name] for name in ("message", "detail", "error") if error.get(name)), "")
    parameter = error.get("param")
    kinds = tuple(kind for kind in (error.get("code"), error.get("type")) if isinstance(kind, str))
    return (
        words if isinstance(words, str) else msgspec.json.encode(words).decode(),
        parameter if isinstance(parameter, str) else None,
        kinds,
    )


def _reason(error: BaseException) -> str:
    if isinstance(error, aiohttp.ClientConnectorError):
        error = error.os_error
    if isinstance(error, OSError) and not isinstance(error, ssl.SSLError) and (error.errno or 0) > 0:
        return os.strerror(error.errno or 0)  # asyncio's own words are "Connect call failed" and the address
    return getattr(error, "verify_message", None) or getattr(error, "strerror", None) or type(error).__name__
