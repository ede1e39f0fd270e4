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
from kubernetes_site import cluster, every_cluster
from store_contract import start
from store_sites import PostgresSite

if TYPE_CHECKING:
    from chiron.store.postgres.store import PostgresStore

RELAYS = frozenset({"0123456789abcdef"})


async def led(site: PostgresSite, holder: str, which: Election) -> tuple[PostgresStore, int]:
    """It leads: its store, open, and its term."""
    from chiron.store.postgres.store import PostgresStore

    held = await which.lease.try_take()
    assert held is not None
    leads = Leads(name=LEADER, holder=holder, token=held.token)
    store = PostgresStore(site.directory, wall=lambda: site.now_s, settings=site.settings, leads=leads)
    await store.open()
    return store, held.token


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
            await second.lease.release()
            third = election(settings, site.settings, "c")
            elected: Any = third.lease
            held = await elected._lease.try_take()
            assert held is not None
            assert held.relays == RELAYS
            assert await elected._terms.begin("c", held.token) == term + 2
            with pytest.raises(StoreError, match="another gateway has been elected since"):
                await elected._terms.begin("late", held.token - 1)
            for store in (old, new):
                await store.close()
            for each in (first, second, third):
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
