"""Health checks of an engine: until it is ready, and while it is.

A starting engine is polled quickly at first. A ready one is checked now and then, and counts as failed only after
several failures in a row, because a busy engine may miss one; when the gateway suspects it, checks follow at once.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass, field

from chiron.core.backoff import doubled_s
from chiron.fleet.waiting import heard, pause
from chiron.net.client import NetError, Origin

_BODY_MAX_BYTES = 4 * 1024 * 1024
"""Of an answer, whose content does not matter; a list of models may be long."""


@dataclass(frozen=True, slots=True, kw_only=True)
class HealthSettings:
    """How often an engine is checked, and when it counts as failed."""

    health_period_s: float = 5.0
    """Seconds between checks of a ready instance."""
    health_timeout_s: float = 5.0
    """Seconds that one check may take; a busy engine may need some."""
    health_failures_max: int = 3
    """Checks that fail in a row before the instance counts as failed."""
    suspect_period_s: float = 0.2
    """Seconds between checks of an instance that the gateway suspects, until one passes."""
    poll_first_s: float = 0.05
    """Pause after the first check of a start; it doubles from there."""
    poll_max_s: float = 1.0
    """Longest pause between checks of a start."""

    def __post_init__(self) -> None:
        require_positive(self)


def require_positive(settings: object) -> None:
    """Raise ValueError unless every number of a settings dataclass is above 0."""
    for name in getattr(settings, "__dataclass_fields__", {}):
        value = getattr(settings, name)
        if isinstance(value, int | float) and not value > 0:
            raise ValueError(f"{name} is {value}; it must be above 0")


@dataclass(frozen=True, slots=True, kw_only=True)
class RecoverySettings:
    """How an endpoint that failed comes back."""

    recover_checks: int = 3
    """Checks that it must pass in a row."""
    recover_first_s: float = 1.0
    """Seconds between those checks; doubled with each that fails."""
    recover_max_s: float = 5.0
    """Longest pause between them, seconds."""
    bind_timeout_s: float = 300.0
    """Longest that an instance waits for an endpoint that is free and answers, before it is reported as failed."""

    def __post_init__(self) -> None:
        require_positive(self)


@dataclass(frozen=True, slots=True, kw_only=True)
class HealthTarget:
    """What is checked."""

    url: str
    path: str = "/health"
    fallback_path: str = ""
    """Used instead when the engine does not know ``path`` (404 or 405)."""
    headers: Mapping[str, str] = field(default_factory=dict, repr=False)
    """Such as an API key; not shown."""


class Probe:
    """Checks one engine. ``reason`` is why the last check failed; empty when it passed or there was none."""

    def __init__(self, target: HealthTarget, settings: HealthSettings) -> None:
        self.reason = ""
        self._target = target
        self._settings = settings
        self._path = target.path or target.fallback_path
        # A new connection each time: whether it accepts one is part of the question.
        self._origin = Origin(target.url, connect_timeout_s=settings.health_timeout_s, keepalive=False)

    async def passes(self) -> bool:
        status = await self._status(self._path)
        if status in (404, 405) and self._target.fallback_path not in ("", self._path):
            self._path = self._target.fallback_path
            status = await self._status(self._path)
        if status is not None:
            self.reason = "" if status == 200 else f"{self._target.url}{self._path} answers with status {status}"
        return not self.reason

    async def until_passed(self, check_now: asyncio.Event) -> None:
        """Return when a check has passed; the caller limits the time."""
        pause_s = self._settings.poll_first_s
        while not await self.passes():
            await heard(check_now, pause_s)
            check_now.clear()
            pause_s = doubled_s(pause_s, self._settings.poll_max_s, 1)

    async def until_failed(self, check_now: asyncio.Event) -> None:
        """Return when too many checks in a row have failed; ``check_now`` brings the next one forward."""
        settings = self._settings
        failures = 0
        urgent = False
        while True:
            asked = await heard(check_now, settings.suspect_period_s if urgent else settings.health_period_s)
            check_now.clear()
            urgent = urgent or asked
            if await self.passes():
                failures, urgent = 0, False
            else:
                failures += 1
                if failures >= settings.health_failures_max:
                    return
            if asked:  # However many requests find it suspicious, it is not asked without a pause.
                await pause(settings.suspect_period_s)

    async def close(self) -> None:
        await self._origin.close()

    async def _status(self, path: str) -> int | None:
        """None when there was no answer; ``reason`` then says why."""
        try:
            response = await self._origin.fetch(
                "GET",
                path,
                headers=self._target.headers,
                timeout_s=self._settings.health_timeout_s,
                body_max=_BODY_MAX_BYTES,
            )
        except NetError as error:
            self.reason = str(error)
            return None
        return response.status
