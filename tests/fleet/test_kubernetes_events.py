"""Events are told and forgotten: what goes wrong with one is said, and only so many are written in a while."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any

import pytest

from chiron.fleet.kubernetes.access import Access
from chiron.fleet.kubernetes.client import Client, KubernetesError
from chiron.fleet.kubernetes.events import AT_MOST, PERIOD_S, Involved, WorkloadEvents
from chiron.fleet.kubernetes.testing.api import FakeKubernetes, Refusal

ABOUT = Involved(api_version="apps/v1", kind="Deployment", name="vllm", namespace="llm", uid="u")

Tell = Callable[[int], Awaitable[list[Any]]]
"""So many are told. Returns how each ended."""


def told(story: Callable[[FakeKubernetes, list[float], Tell], Awaitable[None]]) -> None:
    async def run() -> None:
        now_s = [0.0]
        async with FakeKubernetes() as fake:
            client = Client(Access(url=fake.url))
            writes: list[Coroutine[Any, Any, None]] = []
            events = WorkloadEvents(client, wall_s=lambda: now_s[0], background=writes.append)

            async def tell(count: int) -> list[Any]:
                for number in range(count):
                    events.tell(ABOUT, "ScaledUp", f"{number}\nlines and \x1b[2J" + "x" * 5000)
                ended = await asyncio.gather(*writes, return_exceptions=True)
                writes.clear()
                return ended

            await story(fake, now_s, tell)
            await client.close()

    asyncio.run(run())


def test_only_so_many_are_written_in_a_while() -> None:
    async def story(fake: FakeKubernetes, now_s: list[float], tell: Tell) -> None:
        assert await tell(AT_MOST + 5) == [None] * AT_MOST
        assert await tell(5) == []
        now_s[0] += PERIOD_S
        assert await tell(5) == [None] * 5
        assert len(fake.all("events")) == AT_MOST + 5
        now_s[0] -= 10 * PERIOD_S  # The clock was set back.
        assert await tell(1) == [None]

    told(story)


def test_they_are_one_short_line() -> None:
    async def story(fake: FakeKubernetes, _: list[float], tell: Tell) -> None:
        await tell(1)
        (event,) = fake.all("events")
        assert event["message"].isprintable()
        assert len(event["message"]) < 1024
        assert event["metadata"]["name"].startswith("vllm.")
        assert event["firstTimestamp"] == "1970-01-01T00:00:00Z"

    told(story)


@pytest.mark.parametrize("status", [401, 403])
def test_whoever_may_write_none_pauses_and_tries_again_later(status: int) -> None:
    async def story(fake: FakeKubernetes, now_s: list[float], tell: Tell) -> None:
        fake.interfere = lambda method, path: Refusal(500, "", "full")
        (failed,) = await tell(1)
        assert isinstance(failed, KubernetesError)
        fake.interfere = lambda method, path: Refusal(status, "Refused", "no")
        assert await tell(1) == [None]
        asked = len(fake.requests)
        assert await tell(3) == []
        assert len(fake.requests) == asked == 2
        now_s[0] += PERIOD_S
        fake.interfere = lambda method, path: None  # The token was replaced, or the right was given.
        assert await tell(2) == [None] * 2
        assert len(fake.all("events")) == 2

    told(story)
