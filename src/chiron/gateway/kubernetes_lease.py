"""Who leads, in a Lease of Kubernetes (coordination.k8s.io): for gateways that have no PostgreSQL.

The API server keeps the object and says, by its version, who was first; it keeps no time. So each gateway measures by
its own clock, which only has to run evenly, never to be right: a lease that has not changed for as long as it says that
it lasts is over. Its holder counts less, from before it asked, and waits for no answer longer than the difference, so
that it knows first.

The token is the version that the taking write replaced. Unlike the count of transitions it also grows when the object
was deleted meanwhile; in a cluster that was restored from a copy it begins again.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from math import ceil
from typing import Any, TypeVar

from chiron.fleet.kubernetes.client import ApiError, Client, KubernetesError
from chiron.fleet.kubernetes.source import NAME
from chiron.store.lease import Held, check_name, relays_of, relays_text
from chiron.store.port import StoreError, StoreUnavailable

TOKEN, RELAYS = "chiron/token", "chiron/relays"
"""Annotations of the Lease."""
TOLD_BY = "token="
"""Before the token of who has told of relays, and these."""
LASTS_MAX_S = 3600.0
"""A lease that claims to last for longer is taken for one of that length."""
ANSWER_SHARE = 1 / 3
"""Of a lease's time: how long its holder waits for an answer, and others wait beyond it."""
CONFLICT, NOT_FOUND = 409, 404
TRIES_MAX = 4
"""Of one write, when others change the object at the same moment: anybody may label it."""

T = TypeVar("T")

_NUMBER = re.compile(r"[0-9]{1,18}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """What the object says."""

    version: str
    holder: str
    token: int
    lasts_s: float
    relays: frozenset[str] = frozenset()


class KubernetesLease:
    """Implements ``LeaderLease``. Used on one loop, one call at a time."""

    def __init__(
        self,
        client: Client,
        namespace: str,
        *,
        name: str,
        holder: str,
        lease_s: float,
        wall_s: Callable[[], float],
        time_s: Callable[[], float] | None = None,
    ) -> None:
        """To be made on its loop; ``client`` stays its owner's. ``wall_s``: Unix time, for people only, but each write
        changes it. ``time_s``: a clock that may begin anywhere; default: the loop's."""
        for key, value in (("name", name), ("namespace", namespace)):
            if not NAME.fullmatch(value):
                raise ValueError(f"{key} is {value!r}; it must be a Kubernetes name: a-z, 0-9, - and .")
        if not 1 <= lease_s <= LASTS_MAX_S / 2:
            raise ValueError(f"lease_s is {lease_s!r}; it must be 1 to {LASTS_MAX_S / 2:g} s")
        self._client = client
        self._name = name
        self._all = f"/apis/coordination.k8s.io/v1/namespaces/{namespace}/leases"
        self._path = f"{self._all}/{name}"
        self._holder = check_name("holder", holder)
        self._lease_s = lease_s
        self._answer_s = lease_s * ANSWER_SHARE
        self._wall_s = wall_s
        self._time_s = time_s or asyncio.get_running_loop().time
        self._seen = ("", 0.0)
        """The version that was read last, and when it was seen first."""
        self._own: tuple[int, float] | None = None
        """The token that was taken, and when the last write began that kept it."""
        self._before = frozenset[str]()
        """Relays that were told when it was taken, or since."""

    async def try_take(self) -> Held | None:
        async def take() -> Held | None:
            began_s = self._time_s()
            found = await self._read() or await self._create()
            record = self._record(found)
            if record.holder not in ("", self._holder) and not self._is_over(record):
                return None
            kept = self._holds(record)
            token = record.token if kept else _version(record.version)
            if not await self._write(found, self._holder, token, taken=not kept):
                return None
            self._own = (token, began_s)
            if not kept:
                self._before = record.relays
            return Held(holder=self._holder, token=token, left_s=self._lease_s, relays=self._before)

        return await self._asked(take())

    async def renew(self, relays: frozenset[str] | None = None) -> bool:
        async def renew() -> bool:
            for _ in range(TRIES_MAX):
                began_s = self._time_s()
                found = await self._read()
                record = self._record(found) if found is not None else None
                if found is None or record is None or not self._holds(record):
                    break
                if await self._write(found, self._holder, record.token, relays=relays):
                    self._own = (record.token, began_s)
                    self._before = self._before if relays is None else relays
                    return True
            else:
                raise StoreError(f"lease {self._name}: it was changed by others {TRIES_MAX} times in a row")
            self._own = None
            return False

        return await self._asked(renew())

    async def release(self) -> None:
        async def release() -> None:
            for _ in range(TRIES_MAX):
                found = await self._read()
                if found is None or self._record(found).holder != self._holder:
                    break
                if await self._write(found, "", self._record(found).token):
                    break
            self._own = None

        await self._asked(release())

    async def holder(self) -> Held | None:
        async def ask() -> Held | None:
            found = await self._read()
            record = self._record(found) if found is not None else None
            if record is None or not record.holder:
                return None
            own = self._own is not None and record.holder == self._holder and record.token == self._own[0]
            left_s = self._left_s() if own else self._seen[1] + record.lasts_s - self._time_s()
            return Held(holder=record.holder, token=record.token, left_s=left_s) if left_s > 0.0 else None

        return await self._asked(ask())

    # -- how it stands -----------------------------------------------------------------------------------------------

    def _holds(self, record: Record) -> bool:
        """It is ours, and has not been over."""
        own = self._own
        return own is not None and record.holder == self._holder and record.token == own[0] and self._left_s() > 0.0

    def _left_s(self) -> float:
        return self._own[1] + self._lease_s - self._time_s() if self._own is not None else 0.0

    def _is_over(self, record: Record) -> bool:
        return self._time_s() - self._seen[1] >= record.lasts_s

    def _record(self, item: Mapping[str, Any]) -> Record:
        meta, spec = _table(item, "metadata"), _table(item, "spec")
        version, holder, lasts = (
            meta.get("resourceVersion"),
            spec.get("holderIdentity"),
            spec.get("leaseDurationSeconds"),
        )
        token, relays = (_table(meta, "annotations").get(name) for name in (TOKEN, RELAYS))
        if not isinstance(version, str) or not version or (holder is not None and not isinstance(holder, str)):
            raise StoreError(f"lease {self._name}: the API server's answer is no Lease")
        if holder and (not isinstance(token, str) or not _NUMBER.fullmatch(token)):
            raise StoreError(f"lease {self._name} is held by {holder[:128]!r}, which is no gateway: give another name")
        known = isinstance(lasts, int) and not isinstance(lasts, bool) and 0 < lasts <= LASTS_MAX_S
        return Record(
            version=version,
            holder=holder or "",
            token=int(last) if (last := str(token)) and _NUMBER.fullmatch(last) else 0,
            lasts_s=float(lasts) if known else LASTS_MAX_S,  # type: ignore[arg-type]
            relays=_relays_of(relays, last) if isinstance(relays, str) else frozenset(),
        )

    # -- what is asked -----------------------------------------------------------------------------------------------

    async def _read(self) -> Mapping[str, Any] | None:
        try:
            found = await self._client.get(self._path)
        except ApiError as error:
            if error.status == NOT_FOUND:
                return None
            raise
        version = str(_table(found, "metadata").get("resourceVersion"))
        if version != self._seen[0]:
            self._seen = (version, self._time_s())  # Later than it was written: others are given too much time.
        return found

    async def _create(self) -> Mapping[str, Any]:
        """Without a holder: taking it is one write for all, and has a version to replace."""
        body = {
            "apiVersion": "coordination.k8s.io/v1",
            "kind": "Lease",
            "metadata": {"name": self._name, "labels": {"app.kubernetes.io/managed-by": "chiron"}},
            "spec": {},
        }
        try:
            return await self._client.post(self._all, body)
        except ApiError as error:
            found = await self._read() if error.status == CONFLICT else None
            if found is None:
                raise
            return found

    async def _write(
        self,
        found: Mapping[str, Any],
        holder: str,
        token: int,
        *,
        taken: bool = False,
        relays: frozenset[str] | None = None,
    ) -> bool:
        """False: somebody else has written it since."""
        meta, spec, now = (
            _table(found, "metadata"),
            _table(found, "spec"),
            f"{datetime.fromtimestamp(self._wall_s(), UTC):%Y-%m-%dT%H:%M:%S.%fZ}",
        )
        transitions = spec.get("leaseTransitions")
        count = transitions if isinstance(transitions, int) else 0
        notes = {**_table(meta, "annotations"), TOKEN: str(token)}
        if relays is not None:
            notes[RELAYS] = f"{TOLD_BY}{token} {relays_text(relays)}"
        body = {
            **found,
            "metadata": {**meta, "annotations": notes},
            "spec": {
                **spec,
                "holderIdentity": holder,
                "leaseDurationSeconds": ceil(self._lease_s + self._answer_s),
                "renewTime": now,
                **({"acquireTime": now, "leaseTransitions": min(count + 1, 2**31 - 1)} if taken else {}),
            },
        }
        try:
            await self._client.put(self._path, body)
        except ApiError as error:
            if error.status in (CONFLICT, NOT_FOUND):
                return False
            raise
        return True

    async def _asked(self, work: Awaitable[T]) -> T:
        try:
            async with asyncio.timeout(self._answer_s):
                return await work
        except TimeoutError:
            raise StoreUnavailable(f"lease {self._name}: no answer within {self._answer_s:g} s") from None
        except KubernetesError as error:
            raise StoreUnavailable(f"lease {self._name}: {error}") from None


def _relays_of(text: str, token: str) -> frozenset[str]:
    """As the last leader has told. What an earlier one told is too old: one in between may have died too soon."""
    teller, _, names = text.partition(" ")
    if not teller.startswith(TOLD_BY):  # By a gateway of a version that does not say who tells.
        return relays_of(text)
    return relays_of(names) if teller == f"{TOLD_BY}{token}" else frozenset()


def _version(version: str) -> int:
    if not _NUMBER.fullmatch(version):
        raise StoreError(f"the API server's versions are no numbers: {version[:40]!r}")
    return int(version)


def _table(item: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    found = item.get(key)
    return found if isinstance(found, Mapping) else {}
