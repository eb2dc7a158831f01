"""A provider that misbehaves, and the transport to it, for tests."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

from service.engines.remote.options import TransportOptions
from service.engines.remote.provider import Provider
from service.engines.remote.retrying import RetryPolicy

PATH = "/chat/completions"
ONCE = RetryPolicy(attempts=1)
AT_ONCE = RetryPolicy(attempts=3, first_backoff_s=0.0)


@asynccontextmanager
async def transport(
    *urls: str, draw: Callable[[], float] = lambda: 0.0, retries: RetryPolicy = ONCE, **options: Any
) -> AsyncIterator[Provider]:
    """A started Provider; it makes one attempt, unless `retries` says otherwise, and waits without jitter."""
    provider = Provider(TransportOptions(urls, retries=retries, **options), draw=draw)
    await provider.start()
    try:
        yield provider
    finally:
        await provider.close()
    assert provider.stats().running == provider.stats().waiting == 0


async def read(provider: Provider, **options: Any) -> list[dict[str, Any]]:
    """All events of a stream."""
    async with provider.events(PATH, b'{"stream":true}', **options) as events:
        return [document async for document in events]
