"""Of several gateways the one that leads says which models are in force; nobody is sent to it before that is known."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from typing import cast

from chiron.gateway.peers.shared_models import LOOK_S, SharedModels
from chiron.gateway.settings import ServeConfig
from chiron.store.port import StoreUnavailable

CONFIG = cast(ServeConfig, object())


class Store:
    """Implements ``Saved``; ``news`` is what nobody has read."""

    def __init__(self) -> None:
        self.news: bytes | None = None
        self.away = False
        self.asked = 0
        self.answers = asyncio.Event()

    async def load(self) -> bytes | None:
        self.asked += 1
        await self.answers.wait()
        if self.away:
            raise StoreUnavailable("away")
        news, self.news = self.news, None
        return news


class Own:
    """Implements ``Models``."""

    def __init__(self) -> None:
        self.taken: list[bytes] = []

    def take(self, saved: bytes) -> None:
        self.taken.append(saved)

    def renewed(self) -> ServeConfig | None:
        return CONFIG if self.taken else None


async def until(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(60.0):
        while not condition():
            await asyncio.sleep(0.01)


def test_each_time_that_somebody_begins_to_lead_what_it_serves_is_read_first() -> None:
    async def main() -> None:
        store, own, led, late = Store(), Own(), [0], list[bytes]()
        shared = SharedModels(own, store, lambda: ("a", led[0]), late=lambda: late.append(own.taken[-1]))
        following = asyncio.create_task(shared.follow())
        for term in (1, 2, 3):  # The same one, anew.
            led[0] = term
            await until(lambda: store.asked == led[0])
            assert not shared.known
            store.news = b"%d" % term
            store.answers.set()
            await until(lambda: shared.known)
            assert own.taken[-1] == b"%d" % term
            store.answers.clear()
        # Without the store nobody can have changed them.
        store.away = True
        store.answers.set()
        led[0] = 4
        await until(lambda: store.asked == 4 and shared.known)
        store.away, store.news = False, b"later"
        await until(lambda: late == [b"later"])  # Whoever was sent there meanwhile has to know.
        asked = store.asked
        await asyncio.sleep(4 * LOOK_S)
        assert store.asked == asked, "nothing changes while nobody else begins"
        following.cancel()

    asyncio.run(main())


def test_whoever_begins_to_lead_serves_what_was_in_force() -> None:
    async def main() -> None:
        store, own = Store(), Own()
        store.answers.set()
        shared = SharedModels(own, store, lambda: None)
        assert await shared.config() is None, "nobody has said anything"
        store.away = True
        assert await shared.config() is None
        store.away, store.news = False, b"one"
        assert await shared.config() is CONFIG

    asyncio.run(main())


def test_what_is_read_for_one_who_asks_is_taken_before_another_one_is_answered() -> None:
    """A gateway that begins to lead asks while it still follows: news is told once."""

    async def main() -> None:
        store, own, taking, take = Store(), Own(), threading.Event(), threading.Event()
        store.answers.set()
        store.news = b"one"
        plain = own.take

        class Slow(Own):
            def take(self, saved: bytes) -> None:
                taking.set()
                assert take.wait(60.0)
                plain(saved)

            def renewed(self) -> ServeConfig | None:
                return own.renewed()

        shared = SharedModels(Slow(), store, lambda: None)
        following = asyncio.create_task(shared.follow())
        await until(taking.is_set)
        asked = asyncio.create_task(shared.config())
        for _ in range(20):  # As long as it takes to be answered by a store that has no news.
            await asyncio.sleep(0.01)
        assert not asked.done()
        take.set()
        assert await asked is CONFIG
        following.cancel()

    asyncio.run(main())
