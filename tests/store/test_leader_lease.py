"""One of several gateways holds a lease, until it says so no longer; its token tells leaders apart."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import pytest

from chiron.store.lease import LeaderLease, OnlyHere
from store_sites import PostgresSite


async def taken_kept_and_released(lease: LeaderLease) -> None:
    assert await lease.holder() is None
    assert not await lease.renew()
    held = await lease.try_take()
    assert held is not None
    assert await lease.try_take() == held
    assert await lease.renew()
    now = await lease.holder()
    assert now is not None
    assert (now.holder, now.token) == ("a", held.token)
    await lease.release()
    await lease.release()
    assert not await lease.renew()
    assert await lease.holder() is None
    again = await lease.try_take()
    assert again is not None
    assert again.token > held.token


def test_where_there_is_one_gateway_it_leads() -> None:
    asyncio.run(taken_kept_and_released(OnlyHere("a", 10.0)))


def test_one_of_several_leads(postgres_place: Callable[[], PostgresSite]) -> None:
    from chiron.store.postgres.lease import PostgresLease

    settings = postgres_place().settings

    def lease(holder: str, lease_s: float = 3600.0, name: str = "brain") -> PostgresLease:
        return PostgresLease(settings, name=name, holder=holder, lease_s=lease_s)

    async def run() -> None:
        first, second, third = lease("a"), lease("b"), lease("c", 0.1)
        await taken_kept_and_released(first)
        assert await second.try_take() is None
        assert not await second.renew()
        await second.release()  # It is not theirs to release.
        held = await second.holder()
        assert held is not None
        assert held.holder == "a"
        await first.release()
        contenders = [lease(f"c{number}") for number in range(4)]
        won = [one for one in await asyncio.gather(*(each.try_take() for each in contenders)) if one is not None]
        assert len(won) == 1, "two lead"
        assert won[0].token > held.token
        await asyncio.gather(*(each.release() for each in contenders))
        short = await third.try_take()
        assert short is not None
        async with asyncio.timeout(60):
            while (taken := await first.try_take()) is None:  # By the server's clock it is over by itself.
                await asyncio.sleep(0.02)
        assert taken.token == short.token + 1
        # The server's clock is set back, and the leader is gone: it does not lead for another day.
        set_back = "UPDATE leaders SET until = until + INTERVAL '1 day'"
        assert (await first._run(lambda db: db.execute(set_back))).rowcount == 1
        assert await first.holder() is None
        after = await second.try_take()
        assert after is not None
        assert after.token == taken.token + 1
        assert not await first.renew()
        assert not await third.renew()
        for each in (first, second, third, *contenders):
            await each.close()

    asyncio.run(run())


@pytest.mark.parametrize(("key", "value"), [("name", ""), ("holder", "a b"), ("lease_s", 0.0)])
def test_odd_leases_are_refused(key: str, value: object) -> None:
    pytest.importorskip("psycopg")
    from chiron.store.postgres.lease import PostgresLease
    from chiron.store.postgres.settings import PostgresSettings

    settings = PostgresSettings(url="postgresql://nobody@nowhere/none")

    values: dict[str, object] = {"name": "brain", "holder": "a", "lease_s": 3.0} | {key: value}
    with pytest.raises(ValueError, match=key):
        PostgresLease(settings, **values)  # type: ignore[arg-type]
