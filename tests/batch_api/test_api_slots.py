"""Uploads: a share for each key, and who brings next to nothing loses the place to who waits for it."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest

from chiron.gateway.api.slots import Slots
from chiron.gateway.relay.errors import ApiError
from chiron.gateway.relay.keys import Key

A, B = Key(name="a"), Key(name="b")


class Site:
    def __init__(self, most: int, share: float) -> None:
        self.now_s = 0.0
        self.slots = Slots(most, share, "files", lambda: self.now_s)

    async def upload(self, key: Key, received: int, peers: tuple[str, ...] = ()) -> str:
        """How an upload ends that brings so much and no more."""
        request: Any = SimpleNamespace(scope={"state": {"peers": peers}})
        try:
            with self.slots.taken(request, key) as slot:
                slot.bytes = received
                await asyncio.Event().wait()
        except ApiError as error:
            return f"{error.status}: {error.message}"
        return "ended"


async def settled() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


def test_the_slowest_gives_way_once_all_places_are_taken() -> None:
    async def main() -> None:
        site = Site(3, 1.0)
        slow, fast, new = (asyncio.create_task(site.upload(A, size)) for size in (1000, 10 << 20, 0))
        await settled()
        early = asyncio.create_task(site.upload(B, 0))
        assert (await early).startswith("429: 3 files are being sent already")
        site.now_s = 6.0
        late = asyncio.create_task(site.upload(B, 0))
        await settled()
        assert [task.done() for task in (slow, fast, new, late)].count(True) == 1
        assert (await new).startswith("503: It came too slowly")
        again = asyncio.create_task(site.upload(B, 0))
        assert (await slow).startswith("503: It came too slowly")
        await settled()
        # Who brings enough keeps its place, however long it takes.
        assert (await site.upload(B, 0)).startswith("429: ")
        for task in (fast, late, again):
            task.cancel()
        await asyncio.gather(fast, late, again, return_exceptions=True)
        assert not site.slots._taken
        assert not site.slots._shares.held

    asyncio.run(main())


@pytest.mark.parametrize(("key", "peers"), [(A, ()), (Key(name=""), ("address 10.0.0.1",))])
def test_one_key_or_address_has_its_share_and_no_more(key: Key, peers: tuple[str, ...]) -> None:
    async def main() -> None:
        site = Site(4, 0.5)
        tasks = [asyncio.create_task(site.upload(key, 0, peers)) for _ in range(2)]
        await settled()
        refused = await site.upload(key, 0, peers)
        assert refused.startswith("429: ")
        assert "already" in refused
        other = asyncio.create_task(site.upload(B, 0))
        await settled()
        assert not other.done()
        for task in (*tasks, other):
            task.cancel()
        await asyncio.gather(*tasks, other, return_exceptions=True)

    asyncio.run(main())
