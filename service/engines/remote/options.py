"""How a backend reaches its provider: addresses, key, times, bounds. Where they come from is settings' subject."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from pydantic import SecretStr
from yarl import URL

from service.engines.remote.breaker import BreakerLimits
from service.engines.remote.retrying import RetryPolicy

_HEADER_NAME = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+")
_SHORTEST_SECRET = 8


@dataclass(frozen=True, slots=True)
class TransportOptions:
    """`urls` are base addresses as the official client takes them (`https://api.openai.com/v1`), all alike.

    `connect_s` covers name, socket and TLS; `first_byte_s` is the time from the request to the first byte of the
    answer's body, `between_bytes_s` the longest silence after that. A request's deadline that gave a provider less than
    `patience_s` is not held against it: who asks sets it, and could have the backend left alone for everybody.
    `concurrency` requests run at once and have a connection each; beyond `max_waiting` more are refused. `done_marker`
    says that streams end with `data: [DONE]`, so that one without it was cut off. `health_path` is a path from the root
    of an address's host (vLLM's `/health`), asked every `health_every_s` where there are several addresses. `ca_file`
    is trusted beside what the system trusts.

    Raises ValueError for an address, proxy, header or key that no request could be sent with.
    """

    urls: tuple[str, ...]
    key: SecretStr | None = None
    key_header: str = "authorization"
    headers: Mapping[str, str] = field(default_factory=dict, repr=False)
    proxy: str | None = field(default=None, repr=False)
    ca_file: Path | None = None
    connect_s: float = 5.0
    first_byte_s: float = 120.0
    between_bytes_s: float = 60.0
    patience_s: float = 1.0
    keep_alive_s: float = 60.0
    concurrency: int = 256
    max_waiting: int = 1024
    max_answer_bytes: int = 32 * 2**20
    max_event_bytes: int = 4 * 2**20
    done_marker: bool = True
    health_path: str = ""
    health_every_s: float = 5.0
    retries: RetryPolicy = field(default_factory=RetryPolicy)
    breaker: BreakerLimits = field(default_factory=BreakerLimits)

    def __post_init__(self) -> None:
        if not self.urls or len(set(self.urls)) != len(self.urls):
            raise ValueError("a backend needs one address or several that differ; give its base URLs")
        for url in self.urls:
            _check_address(url)
        key = self.key.get_secret_value() if self.key is not None else ""
        if not (key.isascii() and key.isprintable() and key == key.strip()):
            raise ValueError("the key has spaces around it or characters that no header can carry; copy it anew")
        for name, value in self.headers.items():
            if not _HEADER_NAME.fullmatch(name) or not value.isprintable():
                raise ValueError(f"the header {name!r} cannot be sent; a name is one word, a value is on one line")
        if self.proxy is not None:
            _check_proxy(self.proxy)

    def secrets(self) -> tuple[str, ...]:
        """Texts that no message may show, the longest first: the key, the proxy's password, what headers hold.

        A header's value that is short is a word such as `high`, which messages need, and no secret.
        """
        key = self.key.get_secret_value() if self.key is not None else ""
        password = URL(self.proxy).password if self.proxy is not None else None
        values = (value for value in self.headers.values() if len(value) >= _SHORTEST_SECRET)
        return tuple(sorted(filter(None, (key, password, *values)), key=len, reverse=True))


def _check_proxy(text: str) -> None:
    """It may hold a password, so that it is not shown."""
    try:
        url = URL(text)
    except ValueError:
        url = URL()
    if url.scheme not in ("http", "https") or not url.host:
        at = f" at {url.host}" if url.host else ""
        raise ValueError(f"the proxy{at} is no HTTP proxy; give a URL such as http://proxy:3128")


def _check_address(text: str) -> None:
    try:
        url = URL(text)
    except ValueError:
        url = URL()
    if url.scheme not in ("http", "https") or not url.host:
        raise ValueError(f"{text!r} is no address of a provider; give a URL such as https://api.openai.com/v1")
    if url.raw_user is not None or url.raw_password is not None:
        raise ValueError(f"the address of {url.host} has credentials in it; give them as the backend's key instead")
    if url.raw_query_string or url.raw_fragment:
        raise ValueError(f"{text!r} has a query or a fragment; paths are put behind an address, give it without")
