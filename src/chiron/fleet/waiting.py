"""Waiting with a limit."""

from __future__ import annotations

import asyncio
from collections.abc import Collection, Coroutine
from typing import Any, Protocol, TypeVar


class Ending(Protocol):
    """Of something that was waited for."""

    @property
    def reason(self) -> str: ...


Loss = TypeVar("Loss", bound=Ending)


async def heard(event: asyncio.Event, timeout_s: float) -> bool:
    """Whether the event was set within ``timeout_s`` seconds."""
    try:
        async with asyncio.timeout(max(0.0, timeout_s)):
            await event.wait()
    except TimeoutError:
        return event.is_set()
    return True


async def unless(lost: asyncio.Future[Loss], work: Coroutine[Any, Any, None]) -> Loss | None:
    """None once ``work`` is done; the loss if that comes first."""
    task = asyncio.get_running_loop().create_task(work)
    try:
        await asyncio.wait((task, lost), return_when=asyncio.FIRST_COMPLETED)
        if lost.done():
            return lost.result()
        await task
        return None
    finally:
        if not task.done():
            task.cancel()
            await asyncio.wait((task,))


async def until_known(
    known: Collection[asyncio.Future[Any]], otherwise: Coroutine[Any, Any, None], patience_s: float
) -> None:
    """Until one of ``known`` is. Once that has taken too long ``otherwise`` runs until then; raises what it raises."""
    try:
        await asyncio.wait(known, timeout=patience_s, return_when=asyncio.FIRST_COMPLETED)
        if not any(each.done() for each in known):
            task = asyncio.get_running_loop().create_task(otherwise)
            try:
                await asyncio.wait((task, *known), return_when=asyncio.FIRST_COMPLETED)
                if task.done() and not any(each.done() for each in known):
                    await task
            finally:
                task.cancel()
                await asyncio.gather(task, return_exceptions=True)
    finally:
        otherwise.close()


async def pause(seconds: float) -> None:
    await heard(asyncio.Event(), seconds)
