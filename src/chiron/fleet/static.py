"""Instances as endpoints that somebody else runs.

Creating an instance binds an endpoint that answers, removing it lets the endpoint go; nothing is started or stopped.
An endpoint that fails is left alone until it has answered several checks in a row, asked less and less often.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal

from chiron.core.ports import Engine, FleetEvents
from chiron.core.types import Instance
from chiron.fleet.health import HealthSettings, HealthTarget, Probe, require_positive
from chiron.fleet.lives import InstanceFailedError, Life, Lives
from chiron.fleet.waiting import heard, pause
from chiron.net.clock import LiveClock

log = logging.getLogger("chiron.fleet")

FALLBACK_PATH = "/v1/models"
"""What every OpenAI-compatible endpoint has."""
_CLOSE_TIMEOUT_S = 5.0


@dataclass(frozen=True, slots=True, kw_only=True)
class StaticKind:
    """The endpoints of one kind, in order of preference."""

    urls: tuple[str, ...]
    health_path: str = "/health"
    """Answers 200 when the engine can take requests; where it is empty or unknown (404), ``/v1/models`` is asked."""
    headers: Mapping[str, str] = field(default_factory=dict, repr=False)
    """Sent with health checks, such as the endpoint's API key; not shown."""

    def __post_init__(self) -> None:
        if not self.urls:
            raise ValueError("urls is empty; it must name at least one endpoint")
        if len(set(self.urls)) != len(self.urls):
            raise ValueError(f"urls are {list(self.urls)}; each may be named once")


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
class StaticFleetSettings:
    health: HealthSettings = field(default_factory=HealthSettings)
    recovery: RecoverySettings = field(default_factory=RecoverySettings)


EndpointState = Literal["free", "checking", "bound", "failed"]


@dataclass(frozen=True, slots=True, kw_only=True)
class EndpointStatus:
    state: EndpointState
    """``checking``: an instance is about to be bound to it; ``failed``: it has yet to recover."""
    reason: str
    """Why the last check failed; empty if it passed or there was none."""


class Endpoint:
    """One URL and what is known of it."""

    __slots__ = ("probe", "state", "url")

    def __init__(self, url: str, probe: Probe) -> None:
        self.url = url
        self.probe = probe
        self.state: EndpointState = "free"


class StaticFleet:
    """Implements the ``Fleet`` port. To be made and used on the loop's thread."""

    def __init__(
        self,
        *,
        clock: LiveClock,
        kinds: Mapping[str, StaticKind],
        attach: Callable[[Instance, str], Engine],
        settings: StaticFleetSettings | None = None,
    ) -> None:
        """``kinds`` by InstanceKind.name; ``attach`` makes the engine of an instance bound to a URL. Raises
        ValueError for a URL that is none."""
        self._settings = settings or StaticFleetSettings()
        self._attach = attach
        self._lives = Lives(clock=clock, serve=self._serve)
        self._endpoints = {
            name: [Endpoint(url, Probe(self._target(kind, url), self._settings.health)) for url in kind.urls]
            for name, kind in kinds.items()
        }
        self._freed = {name: asyncio.Event() for name in kinds}
        """Set, and replaced, whenever an endpoint of the kind becomes free."""
        self._recoveries: set[asyncio.Task[None]] = set()

    @property
    def listener(self) -> FleetEvents | None:
        """Set before the first ``create``."""
        return self._lives.listener

    @listener.setter
    def listener(self, listener: FleetEvents | None) -> None:
        self._lives.listener = listener

    @property
    def reasons(self) -> Mapping[int, str]:
        """Why instances failed, by id; the latest thousand."""
        return self._lives.reasons

    def create(self, instance: Instance) -> None:
        """Answered by ``instance_ready`` once an endpoint is free and answers, or by ``instance_failed``."""
        assert instance.kind.name in self._endpoints, f"no endpoints of kind {instance.kind.name!r}"
        self._lives.begin(instance)

    def remove(self, instance: Instance) -> None:
        """At any time; harmless twice."""
        self._lives.end(instance)

    def suspect(self, instance: Instance) -> None:
        """Somebody could not reach it: check now, and fail it if it does not answer."""
        self._lives.suspect(instance)

    def status(self) -> dict[str, dict[str, EndpointStatus]]:
        """By kind and URL."""
        return {
            name: {e.url: EndpointStatus(state=e.state, reason=e.probe.reason) for e in endpoints}
            for name, endpoints in self._endpoints.items()
        }

    async def close(self) -> None:
        """Let every endpoint go."""
        await self._lives.close(_CLOSE_TIMEOUT_S)
        for task in self._recoveries:
            task.cancel()
        if self._recoveries:
            await asyncio.wait(list(self._recoveries), timeout=_CLOSE_TIMEOUT_S)
        for endpoints in self._endpoints.values():
            for endpoint in endpoints:
                await endpoint.probe.close()

    def _target(self, kind: StaticKind, url: str) -> HealthTarget:
        return HealthTarget(url=url, path=kind.health_path, fallback_path=FALLBACK_PATH, headers=kind.headers)

    async def _serve(self, life: Life) -> None:
        kind = life.instance.kind.name
        endpoint = await self._bind(kind, life)
        life.held.callback(self._let_go, kind, endpoint)
        self._lives.ready(life, lambda: self._attach(life.instance, endpoint.url))
        await endpoint.probe.until_failed(life.poke)
        self._recover(kind, endpoint)
        raise InstanceFailedError(f"the endpoint stopped answering: {endpoint.probe.reason}")

    async def _bind(self, kind: str, life: Life) -> Endpoint:
        """An endpoint that just answered."""
        bind_timeout_s = self._settings.recovery.bind_timeout_s
        loop = asyncio.get_running_loop()
        until_s = loop.time() + bind_timeout_s
        while True:
            freed = self._freed[kind]
            endpoint = next((e for e in self._endpoints[kind] if e.state == "free"), None)
            if endpoint is None:
                if not await heard(freed, until_s - loop.time()):
                    raise InstanceFailedError(f"no endpoint within {bind_timeout_s:g} s: {self._why(kind)}")
                continue
            endpoint.state = "checking"
            life.began_s = loop.time()
            try:
                passed = await endpoint.probe.passes()
            except asyncio.CancelledError:
                self._let_go(kind, endpoint)
                raise
            if passed:
                endpoint.state = "bound"
                return endpoint
            self._recover(kind, endpoint)

    def _why(self, kind: str) -> str:
        failed = [e.probe.reason or f"{e.url} is recovering" for e in self._endpoints[kind] if e.state == "failed"]
        used = sum(1 for e in self._endpoints[kind] if e.state in ("bound", "checking"))
        return "; ".join([*failed, f"{used} of {len(self._endpoints[kind])} are in use"])

    def _let_go(self, kind: str, endpoint: Endpoint) -> None:
        if endpoint.state != "failed":
            endpoint.state = "free"
            self._freed[kind].set()
            self._freed[kind] = asyncio.Event()

    def _recover(self, kind: str, endpoint: Endpoint) -> None:
        endpoint.state = "failed"
        log.warning("endpoint %s failed: %s", endpoint.url, endpoint.probe.reason)
        task = asyncio.get_running_loop().create_task(self._until_recovered(kind, endpoint))
        self._recoveries.add(task)
        task.add_done_callback(self._recoveries.discard)

    async def _until_recovered(self, kind: str, endpoint: Endpoint) -> None:
        recovery = self._settings.recovery
        passed = 0
        pause_s = recovery.recover_first_s
        while passed < recovery.recover_checks:
            await pause(pause_s)
            if await endpoint.probe.passes():
                passed += 1
                pause_s = recovery.recover_first_s
            else:
                passed = 0
                pause_s = min(2.0 * pause_s, recovery.recover_max_s)
        log.warning("endpoint %s answers again", endpoint.url)
        endpoint.state = "free"
        self._freed[kind].set()
        self._freed[kind] = asyncio.Event()
