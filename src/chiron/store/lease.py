"""The port of a lease that one of several gateways holds: who leads.

A lease has an end by the clock of whoever keeps it, never by a gateway's. Its token grows with each change of the
holder: what carries an older one comes from a leader that is over.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Final, Protocol

_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:/-]{0,199}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Held:
    holder: str
    token: int
    left_s: float
    """Until it is over, if it is not renewed; as of the answer's way back."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Leads:
    """The lease under which a gateway writes. Once somebody else has had it, nothing more is written."""

    name: str
    holder: str
    token: int


class LeaderLease(Protocol):
    """One named lease, asked for by one gateway. All may raise ``StoreError``: nothing is known then, and a leader must
    count from the last answer on."""

    async def try_take(self) -> Held | None:
        """Take it, or keep it, if nobody else has it. None: somebody has."""

    async def renew(self) -> bool:
        """False: it was over, or is somebody else's."""

    async def release(self) -> None:
        """Let others have it at once. Does nothing if it is not ours."""

    async def holder(self) -> Held | None:
        """Who has it now."""


def check_name(what: str, name: str) -> str:
    if not _NAME.fullmatch(name):
        raise ValueError(f"{what}: {name!r} must be 1 to 200 letters, digits, '.', '_', ':', '/' and '-'")
    return name


class OnlyHere:
    """Implements ``LeaderLease`` where there is only one gateway: it holds the lease while it wants it."""

    def __init__(self, holder: str, lease_s: float) -> None:
        self._held = Held(holder=holder, token=0, left_s=lease_s)
        self._has = False

    async def try_take(self) -> Held | None:
        if not self._has:
            self._has = True
            self._held = Held(holder=self._held.holder, token=self._held.token + 1, left_s=self._held.left_s)
        return self._held

    async def renew(self) -> bool:
        return self._has

    async def release(self) -> None:
        self._has = False

    async def holder(self) -> Held | None:
        return self._held if self._has else None
