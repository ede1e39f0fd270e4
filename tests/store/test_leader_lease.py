"""One of several gateways holds a lease, until it says so no longer; its token tells leaders apart."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from chiron.fleet.kubernetes.testing.api import Refusal
from chiron.gateway.kubernetes_lease import TOKEN, KubernetesLease
from chiron.store.lease import RELAYS_MAX, Held, LeaderLease, OnlyHere, relays_of, relays_text
from chiron.store.port import StoreError, StoreUnavailable
from kubernetes_site import cluster, every_cluster
from store_sites import PostgresSite

LEASES = "/apis/coordination.k8s.io/v1/namespaces/default/leases"
LEASE_S = 1500.0


RELAYS = frozenset({f"{number:016x}" for number in range(3)})


async def taken_kept_and_released(lease: LeaderLease) -> None:
    assert await lease.holder() is None
    assert not await lease.renew()
    held = await lease.try_take()
    assert held is not None
    assert await lease.try_take() == held
    assert held.relays == frozenset()
    assert await lease.renew(RELAYS)
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
    assert (again.token > held.token, again.relays) == (True, RELAYS)
    assert await lease.renew(frozenset())
    assert (await lease.try_take()) == replace(again, relays=frozenset())


def test_relays_that_are_told_with_a_lease_are_few_and_well_named() -> None:
    many = frozenset(f"{number:016x}" for number in range(RELAYS_MAX + 5))
    assert len(relays_of(relays_text(many))) == RELAYS_MAX
    assert len(relays_of(" ".join(many))) == RELAYS_MAX
    odd = frozenset({"", "a b", "0" * 17, "x" * 16, "0" * 15 + "\n"})
    assert relays_of(relays_text(odd | RELAYS)) == RELAYS
    assert relays_of(" ".join(odd)) == frozenset()


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
        teller = await first.try_take()
        assert teller is not None
        assert await first.renew(RELAYS)
        for holder, relays in ((second, RELAYS), (first, frozenset())):  # The second one tells nothing.
            await (first if holder is second else second).release()
            next_one = await holder.try_take()
            assert next_one is not None
            assert next_one.relays == relays
        await first.release()
        short = await third.try_take()
        assert short is not None
        async with asyncio.timeout(60):
            while (taken := await first.try_take()) is None:  # By the server's clock it is over by itself.
                await asyncio.sleep(0.02)
        assert taken.token == short.token + 1
        # The server's clock is set back, and the leader is gone: it does not lead for another day.
        set_back = "UPDATE leaders SET until = until + INTERVAL '1 day' WHERE name = 'brain'"
        assert (await first._asked.ask(lambda db: db.execute(set_back))).rowcount == 1
        assert await first.holder() is None
        after = await second.try_take()
        assert after is not None
        assert after.token == taken.token + 1
        assert not await first.renew()
        assert not await third.renew()
        for each in (first, second, third, *contenders):
            await each.close()

    asyncio.run(run())


def test_one_that_has_seen_a_lease_counts_by_its_own_clock_how_long_it_lasts(
    postgres_place: Callable[[], PostgresSite],
) -> None:
    """The server's may be set back or forward meanwhile."""
    from chiron.store.postgres.lease import PostgresLease

    settings, now_s = postgres_place().settings, [0.0]

    def lease(holder: str, lease_s: float) -> PostgresLease:
        return PostgresLease(settings, name="brain", holder=holder, lease_s=lease_s, time_s=lambda: now_s[0])

    async def run() -> None:
        long, short, other, unaware = lease("a", 3000.0), lease("b", 0.2), lease("c", 3000.0), lease("d", 3000.0)
        assert await long.try_take() is not None
        seen = await other.holder()
        assert seen is not None
        assert 2900.0 < seen.left_s <= 3000.0
        now_s[0] += 2900.0
        assert await other.try_take() is None
        assert await long.renew()
        assert await other.holder() is not None
        now_s[0] += 2900.0
        assert await other.try_take() is None, "it was renewed since"
        now_s[0] += 101.0  # By the server's clock it lasts for most of an hour still.
        assert await other.holder() is None
        assert await unaware.try_take() is None
        assert await other.try_take() is not None
        assert not await long.renew()
        await other.release()
        # And the other way round.
        assert await short.try_take() is not None
        assert await other.holder() is not None
        async with asyncio.timeout(60):
            while await unaware.holder() is not None:  # By the server's clock it is over.
                await asyncio.sleep(0.02)
        assert await other.try_take() is None
        now_s[0] += 0.2
        assert await other.try_take() is not None
        for each in (long, short, other, unaware):
            await each.close()

    asyncio.run(run())


@pytest.mark.parametrize("ahead_s", [2000.0, 4000.0])
def test_one_that_was_renewed_before_the_servers_clock_was_set_forward_lasts(
    ahead_s: float, postgres_place: Callable[[], PostgresSite]
) -> None:
    """Whether it still seems to last by that clock or is over by it."""
    from chiron.store.postgres.lease import PostgresLease

    settings, now_s = postgres_place().settings, [0.0]

    def lease(holder: str) -> PostgresLease:
        return PostgresLease(settings, name="brain", holder=holder, lease_s=3000.0, time_s=lambda: now_s[0])

    async def run() -> None:
        leader, other, third = lease("a"), lease("b"), lease("c")
        assert await leader.try_take() is not None
        assert await other.holder() is not None
        assert await leader.renew()
        # The server's cannot be set here: all that it is compared with is set back.
        set_back = f"UPDATE leaders SET until = until - INTERVAL '{ahead_s:g} s'"
        assert (await leader._asked.ask(lambda db: db.execute(set_back))).rowcount == 1
        now_s[0] -= ahead_s
        for passed_s in (0.0, 1500.0, 1400.0):
            now_s[0] += passed_s
            assert await other.try_take() is None
            await other.holder()
        now_s[0] += 101.0
        taken = await other.try_take()
        assert taken is not None
        # One that is given back is not renewed.
        assert await third.holder() is not None
        await other.release()
        after = await third.try_take()
        assert after is not None
        assert after.token == taken.token + 1
        for each in (leader, other, third):
            await each.close()

    asyncio.run(run())


def test_a_lease_of_kubernetes_that_somebody_labels_is_kept(tmp_path: Path) -> None:
    now_s = [0.0]

    async def run() -> None:
        async with cluster("fake", tmp_path, nodes=0) as here:
            fake = here.fake
            assert fake is not None
            given: dict[str, Any] = {"lease_s": LEASE_S, "wall_s": lambda: now_s[0], "time_s": lambda: now_s[0]}
            first, second, third = (
                KubernetesLease(here.client, "default", name="chiron", holder=holder, **given) for holder in "abc"
            )
            assert await first.try_take() is not None
            conflicts = [0]

            def labelled(times: int) -> None:
                conflicts[0] = times

                def conflict(method: str, path: str) -> Refusal | None:
                    conflicts[0] -= method == "PUT"
                    return Refusal(409, "Conflict", "changed") if method == "PUT" and conflicts[0] >= 0 else None

                fake.interfere = conflict

            labelled(3)
            assert await first.renew(RELAYS)
            labelled(100)
            with pytest.raises(StoreError, match="changed by others 4 times in a row"):
                await first.renew()
            labelled(0)
            assert await first.renew(), "nothing is known after such an answer, and it holds the lease still"
            labelled(3)
            await first.release()
            # One that tells of no relays: of those before it nobody says whether they are there still.
            held = await second.try_take()
            assert held is not None
            assert held.relays == RELAYS
            assert await second.try_take() == held
            assert await second.renew()
            await second.release()
            held = await third.try_take()
            assert held is not None
            assert held.relays == frozenset()

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


@every_cluster
def test_one_of_several_leads_by_a_lease_of_kubernetes(what: str, tmp_path: Path) -> None:
    now_s = [0.0]

    async def run() -> None:
        async with cluster(what, tmp_path, nodes=0) as here:

            def lease(holder: str) -> KubernetesLease:
                given: dict[str, Any] = {"name": "chiron", "holder": holder, "lease_s": LEASE_S}
                return KubernetesLease(
                    here.client, "default", wall_s=lambda: now_s[0], time_s=lambda: now_s[0], **given
                )

            first, second = lease("a"), lease("b")
            await taken_kept_and_released(first)
            assert await second.try_take() is None
            assert not await second.renew()
            await second.release()  # It is not theirs to release.
            held = await second.holder()
            assert held is not None
            assert (held.holder, held.left_s > LEASE_S) == ("a", True)
            await first.release()
            contenders = [lease(f"c{number}") for number in range(4)]
            won = [one for one in await asyncio.gather(*(each.try_take() for each in contenders)) if one is not None]
            assert len(won) == 1, "two lead"
            assert won[0].token > held.token
            await asyncio.gather(*(each.release() for each in contenders))
            before = await first.try_take()
            assert before is not None
            # Whoever has it knows first that it is over, though both clocks began to count at different times.
            assert await second.holder() == Held(holder="a", token=before.token, left_s=LEASE_S * 4 / 3)
            now_s[0] += LEASE_S - 1.0
            assert await first.renew()
            now_s[0] += LEASE_S
            assert await first.holder() is None
            assert not await first.renew()
            assert await second.try_take() is None, "it has been seen to change, and lasts from then on"
            now_s[0] += LEASE_S + 1.0
            assert await second.try_take() is None, "others wait for longer than its holder counts"
            now_s[0] += LEASE_S / 3
            taken = await second.try_take()
            assert taken is not None
            assert taken.token > before.token
            assert not await first.renew()
            assert await first.try_take() is None
            # Deleted by somebody: nobody has it, and tokens grow all the same.
            await here.client.delete(f"{LEASES}/chiron")
            assert not await second.renew()
            after = await first.try_take()
            assert after is not None
            assert after.token > taken.token
            # The same name again, in another process: the one before it is over.
            again = await lease("a").try_take()
            assert again is not None
            assert again.token > after.token
            assert not await first.renew()

    asyncio.run(run())


def test_a_lease_of_kubernetes_that_says_what_cannot_be_is_not_believed(tmp_path: Path) -> None:
    now_s = [0.0]

    async def run() -> None:
        async with cluster("fake", tmp_path, nodes=0) as here:
            fake = here.fake
            assert fake is not None
            given: dict[str, Any] = {"name": "chiron", "holder": "a", "lease_s": LEASE_S}
            given |= {"wall_s": lambda: now_s[0], "time_s": lambda: now_s[0]}
            lease = KubernetesLease(here.client, "default", **given)

            def said(**spec: object) -> None:
                head = {"name": "chiron", "annotations": {TOKEN: "7"} | spec.pop("annotations", {})}  # type: ignore[dict-item, operator]
                fake.apply({"apiVersion": "coordination.k8s.io/v1", "kind": "Lease", "metadata": head, "spec": spec})

            said(holderIdentity="b", leaseDurationSeconds=10**9)
            assert await lease.try_take() is None
            now_s[0] += 3600.0
            assert await lease.try_take() is not None, "nothing lasts for longer than an hour"
            fake.interfere = lambda method, _: Refusal(409, "Conflict", "changed") if method == "PUT" else None
            assert await lease.try_take() is None, "somebody else was quicker"
            fake.interfere = lambda method, path: None
            said(holderIdentity="kube-scheduler", leaseDurationSeconds=15, annotations={TOKEN: None})
            with pytest.raises(StoreError, match="held by 'kube-scheduler', which is no gateway"):
                await lease.try_take()
            await fake.stop()
            with pytest.raises(StoreUnavailable, match="the API server gave no answer"):
                await lease.renew()
            await fake.start()
            for wrong in ({"name": "../x"}, {"lease_s": 0.5}, {"holder": ""}):
                with pytest.raises(ValueError, match=next(iter(wrong))):
                    KubernetesLease(here.client, "default", **given | wrong)

    asyncio.run(run())
