"""What the store keeps of requests no longer than it may."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from datetime import datetime, timedelta

from prompt_store.errors import StoreError

log = logging.getLogger(__name__)


async def forget_older(age: timedelta, forget: Callable[[int], object], now: Callable[[], datetime]) -> None:
    """Have the store delete what is older, by Unix milliseconds. It is tried again by whoever calls again."""
    before_ms = round((now() - age).timestamp() * 1000)
    try:
        await asyncio.to_thread(forget, before_ms)
    except StoreError as error:
        log.warning("old exposures, outcomes and captures cannot be deleted now: %s", error)
