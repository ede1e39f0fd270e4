"""Gateways elected by a Lease of Kubernetes: one leads, and the database refuses what those before it write."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from chiron.gateway.peers.election import Election, election
from chiron.gateway.settings import GatewaysSettings
from chiron.store.lease import LEADER, Leads
from chiron.store.port import StoreError
from kubernetes_site import Cluster, cluster, every_cluster
from store_calls import start
from store_sites import PostgresSite

if TYPE_CHECKING:
    from chiron.store.postgres.store import PostgresStore

RELAYS = frozenset({"0123456789abcdef"})
LEASES = "/apis/coordination.k8s.io/v1/namespaces/default/leases"


async def led(site: PostgresSite, holder: str, which: Election) -> tuple[PostgresStore, int]:
    """It leads: its store, open, and its term."""
    from chiron.store.postgres.store import PostgresStore

    held = await which.lease.try_take()
    assert held is not None
    leads = Leads(name=LEADER, holder=holder, token=held.token)
    store = PostgresStore(site.directory, wall=lambda: site.now_s, settings=site.settings, leads=leads)
    await store.open()
    return store, held.token


@pytest.mark.slow
@every_cluster
def test_one_leads_and_its_term_is_one_higher_than_the_last(
    what: str, postgres_place: Callable[[], PostgresSite], tmp_path: Path
) -> None:
    site = postgres_place()

    async def run() -> None:
        async with cluster(what, tmp_path, nodes=0) as here:
            settings = GatewaysSettings(
                certificate="a",
                key="b",
                ca="c",
                elect="kubernetes",
                kubernetes_namespace="default",
                kubeconfig=str(here.kubeconfig),
                lease_s=300.0,
            )
            first, second = (election(settings, site.settings, holder) for holder in ("a", "b"))
            old, term = await led(site, "a", first)
            again = await first.lease.try_take()
            assert again is not None
            assert again.token == term
            assert await second.lease.try_take() is None
            assert await first.lease.renew(RELAYS)
            await start(site, old, 1)
            await first.lease.release()
            new, later = await led(site, "b", second)
            assert later == term + 1
            assert not await first.lease.renew()
            with pytest.raises(StoreError):
                await start(site, old, 1)
            await start(site, new, 1)
            # One that was elected before the last, and numbered only now.
            assert await second.lease.renew(RELAYS)
            late: Any = election(settings, site.settings, "late").lease
            await second.lease.release()
            before = await late._terms.last()
            third = election(settings, site.settings, "c")
            held = await third.lease.try_take()
            assert held is not None
            assert held.relays == RELAYS
            assert held.token == term + 2
            assert await late._terms.begin("late", before, 300.0) is None, "another one has begun since"
            assert await third.lease.renew()
            assert await third.lease._terms.keep("c", term + 2, 300.0)  # type: ignore[attr-defined]
            await late.close()
            await late._terms.close()
            for store in (old, new):
                await store.close()
            for each in (first, second, third):
                await each.close()

    asyncio.run(run())


def kubernetes(here: Cluster, **given: Any) -> GatewaysSettings:
    return GatewaysSettings(
        certificate="a",
        key="b",
        ca="c",
        elect="kubernetes",
        kubernetes_namespace="default",
        kubeconfig=str(here.kubeconfig),
        lease_s=300.0,
        **given,
    )


def test_a_cluster_whose_versions_begin_again_elects_leaders_all_the_same(
    postgres_place: Callable[[], PostgresSite], tmp_path: Path
) -> None:
    """It was restored from a copy, or made anew; the database is the old one."""
    site = postgres_place()
    (tmp_path / "old").mkdir()
    (tmp_path / "new").mkdir()

    async def run() -> None:
        async with cluster("fake", tmp_path / "old", nodes=0) as old, cluster("fake", tmp_path / "new", nodes=0) as new:
            for _ in range(20):  # Its versions are higher.
                await old.client.post(LEASES, {"kind": "Lease", "metadata": {"generateName": "x-"}, "spec": {}})
            terms = []
            for number, here in enumerate((old, new, old)):
                which = election(kubernetes(here), site.settings, f"gw-{number}")
                held = await which.lease.try_take()
                assert held is not None
                terms.append(held.token)
                await which.lease.release()
                await which.close()
            assert terms == [1, 2, 3]

    asyncio.run(run())


def test_while_the_way_of_election_is_changed_there_is_one_leader(
    postgres_place: Callable[[], PostgresSite], tmp_path: Path
) -> None:
    site = postgres_place()

    async def run() -> None:
        async with cluster("fake", tmp_path, nodes=0) as here:
            by_database = GatewaysSettings(certificate="a", key="b", ca="c", lease_s=300.0)
            old, late = (election(by_database, site.settings, name) for name in ("old", "late"))
            new = election(kubernetes(here), site.settings, "new")
            first = await old.lease.try_take()
            assert first is not None
            for _ in range(2):
                assert await new.lease.try_take() is None, "the database's leader leads still"
                found = await new.lease.holder()
                assert found is not None
                assert found.holder == "old", "it knows whom to send its relays to"
            await old.lease.release()
            second = await new.lease.try_take()
            assert second is not None
            assert second.token > first.token
            assert await late.lease.try_take() is None, "Kubernetes' leader leads"
            found = await late.lease.holder()
            assert found is not None
            assert found.holder == "new"
            # The database was away for longer than a lease, so that nobody knows there who leads.
            terms: Any = new.lease
            await terms._terms.end("new")
            third = await late.lease.try_take()
            assert third is not None
            assert third.token > second.token
            async with asyncio.timeout(60):
                while await new.lease.renew():
                    await asyncio.sleep(0.01)
            await late.lease.release()
            await new.lease.release()
            fourth = await new.lease.try_take()
            assert fourth is not None
            assert fourth.token > third.token
            await new.lease.release()
            assert await late.lease.try_take() is not None, "it need not wait"
            for each in (old, late, new):
                await each.close()

    asyncio.run(run())


def test_one_that_the_database_does_not_number_leads_nothing(
    postgres_place: Callable[[], PostgresSite], tmp_path: Path
) -> None:
    site = postgres_place()

    async def run() -> None:
        async with cluster("fake", tmp_path, nodes=0) as here:
            settings = GatewaysSettings(
                certificate="a", key="b", ca="c", elect="kubernetes", kubeconfig=str(here.kubeconfig), lease_s=300.0
            )
            away = replace(site.settings, url="postgresql://nobody@127.0.0.1:1/none", connect_timeout_s=1.0)
            first, second = election(settings, away, "a"), election(settings, site.settings, "b")
            with pytest.raises(StoreError):
                await first.lease.try_take()
            assert await second.lease.try_take() is not None
            for each in (first, second):
                await each.close()

    asyncio.run(run())
