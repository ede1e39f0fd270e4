"""The lease that decides which of several gateways leads: in PostgreSQL, or in a Lease of Kubernetes.

Kubernetes' tokens are versions of its whole database. Leaders that it elects are numbered in PostgreSQL, where what
they write has to be fenced anyway.
"""

from __future__ import annotations

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
    from chiron.store.postgres.lease import PostgresTerms


@dataclass(frozen=True, slots=True, kw_only=True)
class Election:
    """``close`` lets go of connections, not of the lease; on the loop that uses it."""

    lease: LeaderLease
    close: Callable[[], Awaitable[None]]


def election(settings: GatewaysSettings, store: PostgresSettings, holder: str) -> Election:
    """As the config says. Raises ValueError for credentials that cannot be used."""
    from chiron.store.postgres.lease import PostgresLease, PostgresTerms  # An extra.

    if settings.elect == "postgres":
        lease = PostgresLease(store, name=LEADER, holder=holder, lease_s=settings.lease_s)
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

    async def close() -> None:
        await client.close()
        await terms.close()

    return Election(lease=Numbered(elected, terms, holder), close=close)


class Numbered:
    """Implements ``LeaderLease``: leaders that are elected elsewhere, with a term of the database's for each."""

    def __init__(self, lease: LeaderLease, terms: PostgresTerms, holder: str) -> None:
        self._lease = lease
        self._terms = terms
        self._holder = holder

    async def try_take(self) -> Held | None:
        """One that the database does not number, leads nothing: others may try."""
        held = await self._lease.try_take()
        if held is None:
            return None
        try:
            return replace(held, token=await self._terms.begin(self._holder, held.token))
        except StoreError:
            with suppress(StoreError):
                await self._lease.release()
            raise

    async def renew(self, relays: frozenset[str] | None = None) -> bool:
        return await self._lease.renew(relays)

    async def release(self) -> None:
        await self._lease.release()

    async def holder(self) -> Held | None:
        return await self._lease.holder()
