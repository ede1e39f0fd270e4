"""The lease that decides which of several gateways leads: in PostgreSQL, or in a Lease of Kubernetes.

Leaders that Kubernetes elects are numbered in PostgreSQL, where what they write has to be fenced anyway.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from chiron.fleet.kubernetes.access import find_access
from chiron.fleet.kubernetes.client import Client
from chiron.gateway.kubernetes_lease import KubernetesLease
from chiron.gateway.processes.fence import machine_s
from chiron.gateway.settings import GatewaysSettings
from chiron.store.lease import LEADER, Held, LeaderLease
from chiron.store.port import StoreError
from chiron.store.postgres.settings import PostgresSettings

if TYPE_CHECKING:
    from chiron.store.postgres.terms import PostgresTerms


@dataclass(frozen=True, slots=True, kw_only=True)
class Election:
    """``close`` lets go of connections, not of the lease; on the loop that uses it."""

    lease: LeaderLease
    close: Callable[[], Awaitable[None]]


def election(settings: GatewaysSettings, store: PostgresSettings, holder: str) -> Election:
    """As the config says. Raises ValueError for credentials that cannot be used."""
    from chiron.store.postgres.lease import PostgresLease  # An extra.
    from chiron.store.postgres.terms import PostgresTerms

    if settings.elect == "postgres":
        lease = PostgresLease(store, name=LEADER, holder=holder, lease_s=settings.lease_s, time_s=machine_s)
        return Election(lease=lease, close=lease.close)
    access = find_access(os.environ, settings.kubeconfig, settings.kubernetes_context)
    client, terms = Client(access), PostgresTerms(store)
    elected = KubernetesLease(
        client,
        settings.kubernetes_namespace or access.namespace,
        name=settings.kubernetes_lease,
        holder=holder,
        lease_s=settings.lease_s,
        wall_s=time.time,
        time_s=machine_s,
    )

    numbered = Numbered(elected, terms, holder, settings.lease_s)

    async def close() -> None:
        await numbered.close()
        await client.close()
        await terms.close()

    return Election(lease=numbered, close=close)


class Numbered:
    """Implements ``LeaderLease``: leaders that are elected elsewhere, with a term of the database's for each."""

    def __init__(self, lease: LeaderLease, terms: PostgresTerms, holder: str, lease_s: float) -> None:
        self._lease = lease
        self._terms = terms
        self._holder = holder
        self._lease_s = lease_s
        self._other: Held | None = None
        """Who led by election of the database when this one was elected."""
        self._term = 0
        self._over = False
        """Somebody else has begun since."""
        self._looking: asyncio.Task[None] | None = None

    async def try_take(self) -> Held | None:
        """One that the database does not number, leads nothing: others may try."""
        if self._other is not None and (await self._who_else()) is not None:
            return None
        if await self._lease.try_take() is None:
            return None
        try:
            return await self._begin()
        except StoreError:
            with suppress(StoreError):
                await self._lease.release()
            raise

    async def _begin(self) -> Held | None:
        """It has the lease."""
        before = await self._terms.last()
        held = await self._lease.try_take()  # Still: whoever takes it after this moment reads the same, or more.
        if held is None:
            return None
        if self._term and self._term == before and not self._over and await self._keeps():
            return replace(held, token=self._term)
        term = await self._terms.begin(self._holder, before, self._lease_s)
        if term is None:
            await self._lease.release()
            await self._who_else()
            return None
        self._term, self._over = term, False
        return replace(held, token=term)

    async def _keeps(self) -> bool:
        return await self._terms.keep(self._holder, self._term, self._lease_s)

    async def _who_else(self) -> Held | None:
        found = await self._terms.holder()
        self._other = found if found is not None and found.holder != self._holder else None
        return self._other

    async def renew(self, relays: frozenset[str] | None = None) -> bool:
        """The database is only looked at beside it: one that leads goes on without."""
        if self._over:
            return False
        if self._looking is None or self._looking.done():
            self._looking = asyncio.get_running_loop().create_task(self._look())
        return await self._lease.renew(relays)

    async def _look(self) -> None:
        with suppress(StoreError):
            self._over = not await self._keeps()

    async def release(self) -> None:
        await self._lease.release()
        if self._term:
            await self._terms.end(self._holder)

    async def holder(self) -> Held | None:
        return await self._lease.holder() or self._other

    async def close(self) -> None:
        if self._looking is not None:
            self._looking.cancel()
            await asyncio.wait((self._looking,))
