"""When a gateway leads, by its own clock and the lease's answers; and what ends when it leads no more."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from math import inf

import pytest

from chiron.gateway.peers.leadership import Leadership, Peer
from chiron.gateway.processes.fence import Fence
from chiron.net.clock import LiveClock
from chiron.net.own_loop import OwnLoop
from chiron.store.lease import Held
from chiron.store.port import StoreUnavailable
from virtual_loop import run_virtual

LEASE_S = 3.0


class Row:
    """A lease as a database keeps it, by the loop's time."""

    def __init__(self) -> None:
        self.holder, self.token, self.until_s = "", 0, 0.0
        self.relays = frozenset[str]()
        self.away = False
        """It does not answer."""
        self.fails = False


class Asked:
    """Implements ``LeaderLease`` for one gateway."""

    def __init__(self, row: Row, holder: str) -> None:
        self.row, self.own = row, holder

    async def _ask(self) -> float:
        await asyncio.sleep(inf if self.row.away else 0.01)
        if self.row.fails:
            raise StoreUnavailable("the database is away")
        return asyncio.get_running_loop().time()

    async def try_take(self) -> Held | None:
        now_s, row = await self._ask(), self.row
        if row.holder != self.own and now_s < row.until_s:
            return None
        row.token += not (row.holder == self.own and now_s < row.until_s)
        row.holder, row.until_s = self.own, now_s + LEASE_S
        return Held(holder=self.own, token=row.token, left_s=LEASE_S, relays=row.relays)

    async def renew(self, relays: frozenset[str] | None = None) -> bool:
        now_s, row = await self._ask(), self.row
        if row.holder != self.own or now_s >= row.until_s:
            return False
        row.until_s = now_s + LEASE_S
        row.relays = row.relays if relays is None else relays
        return True

    async def release(self) -> None:
        now_s = await self._ask()
        if self.row.holder == self.own:
            self.row.until_s = now_s

    async def holder(self) -> Held | None:
        left_s = self.row.until_s - await self._ask()
        return Held(holder=self.row.holder, token=self.row.token, left_s=left_s) if left_s > 0 else None


class OverError(Exception):
    """Stands for the end of the process."""


def end() -> None:
    raise OverError


class Gateway:
    def __init__(self, row: Row, name: str) -> None:
        self.peer = Peer(name=name, host="127.0.0.1", port=1)
        self.now: Callable[[], float] = asyncio.get_running_loop().time
        self.fence = Fence(end, lambda: self.now())
        self.told: list[float] = []
        self.relays: frozenset[str] | None = None
        self.works = True
        holder = self.peer.holder("0a")
        self.leadership = Leadership(
            lease=Asked(row, holder),
            holder=holder,
            lease_s=LEASE_S,
            fence=self.fence,
            told=self.told.append,
            relays=lambda: self.relays,
            works=lambda: self.works,
            now=lambda: self.now(),
        )

    @property
    def leads(self) -> bool:
        try:
            self.fence.time_s()
        except OverError:
            return False
        return True


def test_another_one_leads_once_the_lease_of_the_first_is_over_and_never_both() -> None:
    async def main() -> None:
        row = Row()
        a, b = Gateway(row, "a"), Gateway(row, "b")
        assert not a.leads
        assert (await a.leadership.take()).token == 1
        keeping = asyncio.create_task(a.leadership.keep())
        second = asyncio.create_task(b.leadership.take())
        await asyncio.sleep(20.0)
        assert a.leads
        assert not b.leads
        assert b.leadership.leader == a.peer
        assert a.leadership.leader is None
        died_s = asyncio.get_running_loop().time()
        keeping.cancel()
        while not second.done():
            await asyncio.sleep(0.005)
            assert not (a.leads and b.leads)
        assert second.result().token == 2
        assert not a.leads
        assert asyncio.get_running_loop().time() - died_s < LEASE_S + 0.1

    run_virtual(main())


def test_one_that_follows_hears_which_relays_the_leader_spoke_with_last() -> None:
    async def main() -> None:
        row = Row()
        a, b = Gateway(row, "a"), Gateway(row, "b")
        assert (await a.leadership.take()).relays == frozenset()
        keeping = asyncio.create_task(a.leadership.keep())
        for a.relays in (frozenset({"one"}), None, frozenset({"one", "two"}), None):
            await asyncio.sleep(1.0)
        keeping.cancel()
        assert (await b.leadership.take()).relays == {"one", "two"}

    run_virtual(main())


@pytest.mark.parametrize("fault", ["away", "fails"])
def test_a_leader_without_an_answer_is_over_before_others_can_lead(fault: str) -> None:
    async def main() -> None:
        row = Row()
        a = Gateway(row, "a")
        await a.leadership.take()
        keeping = asyncio.create_task(a.leadership.keep())
        await asyncio.sleep(5.0)
        setattr(row, fault, True)
        said = await keeping
        assert said.startswith("the lease could not be renewed: ")
        assert asyncio.get_running_loop().time() <= row.until_s
        assert not a.leads

    run_virtual(main())


def test_a_leader_that_does_not_work_is_over_once_its_lease_is() -> None:
    async def main() -> None:
        a = Gateway(Row(), "a")
        await a.leadership.take()
        keeping = asyncio.create_task(a.leadership.keep())
        await asyncio.sleep(5.0)
        a.works = False
        async with asyncio.timeout(LEASE_S + 0.1):
            assert await keeping == "the lease could not be renewed: this process is held up, or hangs"
        assert not a.leads

    run_virtual(main())


def test_a_lease_is_renewed_while_the_process_computes() -> None:
    """Its own loop is held up for longer than the lease lasts."""
    renewed, over = threading.Event(), threading.Event()

    async def keep() -> None:
        while not over.is_set():
            await asyncio.sleep(0.001)
            renewed.set()

    async def main() -> None:
        own = OwnLoop("lease")
        keeping = asyncio.create_task(own.run(keep))
        await asyncio.sleep(0)
        assert renewed.wait(60.0), "which holds this loop"
        assert not keeping.done()
        over.set()
        await keeping
        heard: list[str] = []
        keeping = asyncio.create_task(own.run(lambda: asyncio.sleep(inf)))
        await asyncio.sleep(0)
        keeping.cancel()
        with pytest.raises(asyncio.CancelledError):
            await keeping
        own.call(lambda: heard.append(threading.current_thread().name))
        await own.close()
        assert heard == ["lease"]

    asyncio.run(main())


def test_a_leader_whose_lease_was_taken_hears_so() -> None:
    async def main() -> None:
        row = Row()
        a = Gateway(row, "a")
        await a.leadership.take()
        row.holder = "somebody"
        assert await a.leadership.keep() == "another gateway leads"

    run_virtual(main())


def test_a_leader_that_hears_of_another_one_asks_the_lease_at_once_and_believes_only_that() -> None:
    async def main() -> None:
        row = Row()
        a = Gateway(row, "a")
        await a.leadership.take()
        keeping = asyncio.create_task(a.leadership.keep())
        await asyncio.sleep(0.2)
        until_s = row.until_s
        a.leadership.look()
        await asyncio.sleep(0.1)
        assert row.until_s > until_s, "renewed before its time"
        row.holder = "somebody"
        a.leadership.look()
        async with asyncio.timeout(0.1):
            assert await keeping == "another gateway leads"

    run_virtual(main())


def test_one_that_gives_the_lease_back_is_followed_at_once() -> None:
    async def main() -> None:
        row = Row()
        a, b = Gateway(row, "a"), Gateway(row, "b")
        await a.leadership.take()
        second = asyncio.create_task(b.leadership.take())
        await asyncio.sleep(1.0)
        await a.leadership.release()
        began_s = asyncio.get_running_loop().time()
        assert (await second).token == 2
        assert asyncio.get_running_loop().time() - began_s <= LEASE_S / 8 + 0.1
        assert a.told[-1] == 0.0, "its keeper need not end it"
        watching = asyncio.create_task(a.leadership.watch())
        await asyncio.sleep(1.0)
        watching.cancel()
        assert a.leadership.leader == b.peer

    run_virtual(main())


def test_a_database_that_does_not_answer_holds_up_nobody_who_gives_the_lease_back() -> None:
    """Else the keeper would kill the brain at the lease's end, in the middle of a stop."""

    async def main() -> None:
        row = Row()
        a = Gateway(row, "a")
        await a.leadership.take()
        row.away = True
        giving = asyncio.create_task(a.leadership.release())
        await asyncio.sleep(0.01)
        assert a.told[-1] == 0.0
        async with asyncio.timeout(LEASE_S + 0.1):
            await giving
        assert a.leads, "what it says at its end is not stopped"

    run_virtual(main())


def test_a_process_that_wakes_up_after_the_end_runs_no_timer_and_takes_nothing() -> None:
    """Stopped, so that its loop did not run: what comes first is whatever was due, or has been sent, meanwhile."""

    async def main() -> None:
        row, ran = Row(), list[str]()
        a = Gateway(row, "a")
        await a.leadership.take()
        clock = LiveClock(asyncio.get_running_loop(), time_s=a.fence.time_s)
        clock.call_later(1.0, lambda: ran.append("timer"))
        clock.post(lambda: ran.append("before"))
        then_s = a.fence.until_s
        a.now = lambda: then_s
        with pytest.raises(OverError):
            clock.post(lambda: ran.append("message"))
        assert ran == ["before"]
        clock.stop()

    run_virtual(main())


@pytest.mark.parametrize("holder", ["", "gw", "gw/host/0a", "gw/host:x/0a", "gw/host:1/", "a/b/c:1/0a"])
def test_a_lease_held_by_something_else_names_no_gateway(holder: str) -> None:
    assert Peer.of(holder) is None


def test_a_gateway_is_found_by_what_it_is_called_in_the_lease() -> None:
    for host in ("10.0.0.5", "fd00::5", "gw-1.example.org"):
        peer = Peer(name="gw-1", host=host, port=9443)
        assert Peer.of(peer.holder("0a1b")) == peer
