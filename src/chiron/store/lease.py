"""The port of a lease that one of several gateways holds: who leads.

A lease has an end by the clock of whoever keeps it, never by a gateway's. Its token grows with each change of the
holder: what carries an older one comes from a leader that is over.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import Final, Protocol

LEADER: Final = "brain"
"""Name of the lease that a gateway's brain leads under."""
RELAYS_MAX: Final = 1024
"""That are told with a lease."""
_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:/-]{0,199}")
_RELAY: Final = re.compile(r"[0-9a-f]{16}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Held:
    holder: str
    token: int
    left_s: float
    """Until it is over, if it is not renewed; as of the answer's way back."""
    relays: frozenset[str] = frozenset()
    """Those that the last leader spoke with, as it told. One that follows it waits for them to tell what runs."""


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

    async def renew(self, relays: frozenset[str] | None = None) -> bool:
        """False: it was over, or is somebody else's. ``relays``: for whoever follows; None: as they were."""

    async def release(self) -> None:
        """Let others have it at once. Does nothing if it is not ours."""

    async def holder(self) -> Held | None:
        """Who has it now."""


def check_name(what: str, name: str) -> str:
    if not _NAME.fullmatch(name):
        raise ValueError(f"{what}: {name!r} must be 1 to 200 letters, digits, '.', '_', ':', '/' and '-'")
    return name


def relays_text(relays: frozenset[str]) -> str:
    """As a lease keeps them. Their names are drawn by the relays themselves: what is no name is left out."""
    return " ".join(sorted(each for each in relays if _RELAY.fullmatch(each))[:RELAYS_MAX])


def relays_of(text: str) -> frozenset[str]:
    return frozenset(each for each in text.split(" ")[:RELAYS_MAX] if _RELAY.fullmatch(each))


class OnlyHere:
    """Implements ``LeaderLease`` where there is only one gateway: it holds the lease while it wants it."""

    def __init__(self, holder: str, lease_s: float) -> None:
        self._held = Held(holder=holder, token=0, left_s=lease_s)
        self._has = False

    async def try_take(self) -> Held | None:
        if not self._has:
            self._has = True
            self._held = replace(self._held, token=self._held.token + 1)
        return self._held

    async def renew(self, relays: frozenset[str] | None = None) -> bool:
        if self._has and relays is not None:
            self._held = replace(self._held, relays=relays)
        return self._has

    async def release(self) -> None:
        self._has = False

    async def holder(self) -> Held | None:
        return self._held if self._has else None
