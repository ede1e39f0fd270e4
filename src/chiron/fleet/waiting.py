"""Waiting with a limit."""

from __future__ import annotations

import asyncio


async def heard(event: asyncio.Event, timeout_s: float) -> bool:
    """Whether the event was set within ``timeout_s`` seconds."""
    try:
        async with asyncio.timeout(max(0.0, timeout_s)):
            await event.wait()
    except TimeoutError:
        return event.is_set()
    return True


async def pause(seconds: float) -> None:
    await heard(asyncio.Event(), seconds)
