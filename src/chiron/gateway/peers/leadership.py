"""Whether this gateway leads: it asks for the lease again and again, and renews it while it has it.

The lease ends by the clock of the database. Here it is counted from the moment before the question was sent on, so
that it ends here first; a leader that gets no answer in time is over, whatever the reason.
"""

from __future__ import annotations

import asyncio
import logging
import re
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from math import inf

from chiron.gateway.processes.fence import Fence, machine_s
from chiron.store.lease import Held, LeaderLease
from chiron.store.port import StoreError

log = logging.getLogger("chiron.gateways")

ASKS = 8
"""In the time of one lease."""
AGAIN_MIN_S = 0.01
"""Between two questions, also where the lease is about to end."""
_HOLDER = re.compile(r"([^/]+)/([^/]+):([0-9]{1,5})/([0-9a-f]+)")


@dataclass(frozen=True, slots=True, kw_only=True)
class Peer:
    """A gateway, and where the others reach it."""

    name: str
    host: str
    port: int

    def holder(self, nonce: str) -> str:
        """What it is called in the lease. ``nonce`` tells it from another one that was given the same name."""
        return f"{self.name}/{self.host}:{self.port}/{nonce}"

    @staticmethod
    def of(holder: str) -> Peer | None:
        """None: the lease is held by something else."""
        found = _HOLDER.fullmatch(holder)
        return Peer(name=found[1], host=found[2], port=int(found[3])) if found is not None else None


class Leadership:
    """``leader`` is which other gateway leads, as last heard."""

    def __init__(
        self,
        *,
        lease: LeaderLease,
        holder: str,
        lease_s: float,
        fence: Fence,
        told: Callable[[float], None] = lambda until_s: None,
        relays: Callable[[], frozenset[str] | None] = lambda: None,
        works: Callable[[], bool] = lambda: True,
        now: Callable[[], float] = machine_s,
    ) -> None:
        """``holder``: this gateway in the lease. ``told`` hears until when it leads, whenever that has changed.
        ``relays``: those that it speaks with while it leads; None: that is not known yet. ``works``: while it does not,
        the lease is not renewed."""
        self.leader: Peer | None = None
        self.term = 0
        """The lease's token, while that is another one's."""
        self._lease = lease
        self._holder = holder
        self._lease_s = lease_s
        self._fence = fence
        self._told = told
        self._relays = relays
        self._works = works
        self._now = now
        self._hint = asyncio.Event()
        self._left_s = inf
        """Until the other one's lease ends, as last heard."""
        self._said = ""

    def look(self) -> None:
        """Another one may lead: ask at once."""
        self._hint.set()

    async def take(self) -> Held:
        """Wait until this gateway leads."""
        while True:
            asked_s = self._now()
            try:
                held = await self._lease.try_take()
                if held is not None:
                    self.leader = None
                    self._extend(asked_s)
                    return held
                await self._ask()
            except StoreError as error:
                # Whoever led as last heard may lead still: relays find out.
                self._left_s = inf
                self._say(f"nobody knows who leads: {error}")
            await self._pause(AGAIN_MIN_S + self._left_s)

    async def watch(self) -> None:
        """Know who leads, and do not want to."""
        while True:
            try:
                await self._ask()
            except StoreError as error:
                self._say(f"nobody knows who leads: {error}")
            await self._pause(AGAIN_MIN_S + self._left_s)

    async def keep(self) -> str:
        """Renew it as long as that can be. Returns why it is over."""
        why = ""
        while (left_s := self._fence.until_s - self._now()) > 0:
            asked_s = self._now()
            try:
                if not self._works():
                    raise TimeoutError("this process is held up, or hangs")
                async with asyncio.timeout(left_s):
                    if not await self._lease.renew(self._relays()):
                        return "another gateway leads"
            except (StoreError, TimeoutError) as error:
                why = f": {error}" if str(error) else ": the database has not answered"
            else:
                self._extend(asked_s)
            await self._pause(max(0.0, self._fence.until_s - self._now()))
        return f"the lease could not be renewed{why}"

    async def release(self) -> None:
        """Others may lead at once; nothing may be decided here any more. A database that does not answer holds up
        nobody: the lease ends by itself."""
        self.leader = None
        self._fence.until_s = inf  # What is still done here decides nothing.
        self._told(0.0)
        try:
            async with asyncio.timeout(self._lease_s):
                await self._lease.release()
        except (StoreError, TimeoutError) as error:
            log.warning("others lead only once the lease is over: %s", str(error) or "the database has not answered")

    async def _ask(self) -> None:
        now = await self._lease.holder()
        self._left_s = now.left_s if now is not None else inf
        self.term = now.token if now is not None else 0
        self.leader = Peer.of(now.holder) if now is not None and now.holder != self._holder else None
        self._say(f"{self.leader.name} leads; this gateway stands by" if self.leader is not None else "")

    def _extend(self, asked_s: float) -> None:
        self._fence.until_s = asked_s + self._lease_s
        self._told(self._fence.until_s)

    def _say(self, words: str) -> None:
        """Once."""
        if words and words != self._said:
            log.info("%s", words)
        self._said = words

    async def _pause(self, most_s: float) -> None:
        """Until it is time to ask again, or there is a reason to."""
        self._hint.clear()
        await asyncio.sleep(AGAIN_MIN_S)  # However many reasons there are.
        with suppress(TimeoutError):
            async with asyncio.timeout(min(self._lease_s / ASKS, most_s)):
                await self._hint.wait()
