"""Events on the workload, for whoever asks Kubernetes why it was scaled: ``kubectl describe deployment NAME``.

They are told and forgotten: an event that cannot be written costs nobody anything, and only so many are written in a
while, whatever happens.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Coroutine, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from chiron.fleet.kubernetes.client import ApiError, Client
from chiron.fleet.kubernetes.pods import words

log = logging.getLogger("chiron.fleet")

AT_MOST, PERIOD_S = 20, 300.0
"""Events of one workload in so many seconds."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Involved:
    """What they are about."""

    api_version: str
    kind: str
    name: str
    namespace: str
    uid: str = ""
    """Empty until it is known; ``kubectl describe`` then shows no event."""


class WorkloadEvents:
    def __init__(
        self,
        client: Client,
        *,
        wall_s: Callable[[], float],
        background: Callable[[Coroutine[Any, Any, None]], None],
    ) -> None:
        """``wall_s``: Unix time. ``background`` runs what writes one."""
        self._client = client
        self._wall_s = wall_s
        self._background = background
        self._written_s: deque[float] = deque(maxlen=AT_MOST)
        self._refused_until_s = 0.0
        """Who may write none now may do so later: its token was replaced, or it was given the right."""
        self._said_refused = False

    def tell(self, about: Involved, reason: str, message: str, *, warning: bool = False) -> None:
        now_s = self._wall_s()
        full = len(self._written_s) == AT_MOST and 0.0 <= now_s - self._written_s[0] < PERIOD_S
        if full or 0.0 < self._refused_until_s - now_s <= PERIOD_S:
            return
        self._written_s.append(now_s)
        self._background(self._write(event(about, reason, message, now_s, warning=warning)))

    async def _write(self, made: Mapping[str, Any]) -> None:
        try:
            await self._client.post(f"/api/v1/namespaces/{made['metadata']['namespace']}/events", made)
            self._said_refused = False
        except ApiError as error:
            if error.status not in (401, 403):
                raise
            self._refused_until_s = self._wall_s() + PERIOD_S
            if not self._said_refused:
                self._said_refused = True
                log.warning("no events are written for a while: %s", error)


def event(about: Involved, reason: str, message: str, now_s: float, *, warning: bool) -> dict[str, Any]:
    """The object. ``reason``: one word in upper camel case."""
    at = f"{datetime.fromtimestamp(now_s, UTC):%Y-%m-%dT%H:%M:%SZ}"
    return {
        "apiVersion": "v1",
        "kind": "Event",
        "metadata": {"generateName": f"{about.name}.", "namespace": about.namespace},
        "involvedObject": {
            "apiVersion": about.api_version,
            "kind": about.kind,
            "name": about.name,
            "namespace": about.namespace,
            **({"uid": about.uid} if about.uid else {}),
        },
        "type": "Warning" if warning else "Normal",
        "reason": reason,
        "message": words(message),
        "source": {"component": "chiron"},
        "reportingComponent": "chiron",
        "firstTimestamp": at,
        "lastTimestamp": at,
        "count": 1,
    }
