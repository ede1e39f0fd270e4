"""Instances as endpoints that somebody else runs.

Creating an instance binds an endpoint that answers, removing it lets the endpoint go; nothing is started or stopped.
An endpoint that fails is left alone until it has answered several checks in a row, asked less and less often.
"""

from __future__ import annotations

import asyncio
import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar

from chiron.core.types import Instance
from chiron.fleet.health import HealthTarget, Probe
from chiron.fleet.port import Claim, EndpointState, EndpointStatus, FleetEnvironment, FleetReport, KindReport, Trouble
from chiron.fleet.records import InstanceFailedError, InstanceRecord, InstanceRecords
from chiron.fleet.waiting import heard, pause

log = logging.getLogger("chiron.fleet")

FALLBACK_PATH = "/v1/models"
"""What every OpenAI-compatible endpoint has."""
REASON_MAX = 200
"""Characters of an endpoint's own reason that are passed on to clients."""
_DETAIL = re.compile(r"[:(]")
_CLOSE_TIMEOUT_S = 5.0


@dataclass(frozen=True, slots=True, kw_only=True)
class EndpointsSource:
    """The endpoints of one kind, in order of preference."""

    urls: tuple[str, ...]
    """Without a path, such as ``http://127.0.0.1:8001``."""
    health_path: str = "/health"
    """Answers 200 when the engine can take requests; where it is empty or unknown (404), ``/v1/models`` is asked."""
    headers: Mapping[str, str] = field(default_factory=dict, repr=False)
    """Sent with health checks, such as the endpoint's API key; not shown."""
    gpus: ClassVar[int] = 0

    def __post_init__(self) -> None:
        if not self.urls:
            raise ValueError("urls is empty; it must name at least one endpoint")
        if len(set(self.urls)) != len(self.urls):
            raise ValueError(f"urls are {list(self.urls)}; each may be named once")

    @property
    def standing(self) -> int:
        return len(self.urls)

    @property
    def instances_max(self) -> int:
        return len(self.urls)

    @property
    def summary(self) -> str:
        return f"{len(self.urls)} endpoint" + ("s" if len(self.urls) != 1 else "")


class Endpoint:
    """One URL and what is known of it."""

    __slots__ = ("probe", "state", "url")

    def __init__(self, url: str, probe: Probe) -> None:
        self.url = url
        self.probe = probe
        self.state: EndpointState = "free"


class EndpointsFleet:
    """Implements ``LiveFleet``."""

    def __init__(self, sources: Mapping[str, EndpointsSource], environment: FleetEnvironment) -> None:
        """``sources`` by InstanceKind.name. Raises ValueError for a URL that is none."""
        self._settings = environment.settings
        self._records = InstanceRecords(clock=environment.clock, events=environment.events, serve=self._serve)
        self._endpoints = {
            name: [Endpoint(url, Probe(self._target(source, url), self._settings.health)) for url in source.urls]
            for name, source in sources.items()
        }
        self._freed = {name: asyncio.Event() for name in sources}
        """Set, and replaced, whenever an endpoint of the kind becomes free."""
        self._recoveries: set[asyncio.Task[None]] = set()
        self._adopted: dict[int, Endpoint] = {}
        """Of instances that were up before, until they are watched."""

    def create(self, instance: Instance) -> None:
        """Answered by ``instance_ready`` once an endpoint is free and answers, or by ``instance_failed``."""
        assert instance.kind.name in self._endpoints, f"no endpoints of kind {instance.kind.name!r}"
        self._records.begin(instance)

    def remove(self, instance: Instance) -> None:
        """At any time; harmless twice."""
        self._records.end(instance)
        if (endpoint := self._adopted.pop(instance.id, None)) is not None:  # Before anybody looked after it.
            self._let_go(instance.kind.name, endpoint)

    def suspect(self, instance: Instance) -> None:
        """Somebody could not reach it: check now, and fail it if it does not answer."""
        self._records.suspect(instance)

    def adopt(self, kind: str, url: str) -> Claim | None:
        endpoint = next((each for each in self._endpoints.get(kind, ()) if each.url == url), None)
        if endpoint is None or endpoint.state != "free":
            return None

        def begin(instance: Instance) -> None:
            endpoint.state = "bound"
            self._adopted[instance.id] = endpoint
            self._records.begin(instance)

        return Claim(begin=begin, found=True)

    def report(self) -> FleetReport:
        return FleetReport(kinds={name: self._kind(endpoints) for name, endpoints in self._endpoints.items()})

    async def close(self, *, hands_over: bool = False) -> None:
        """Let every endpoint go."""
        await self._records.close(_CLOSE_TIMEOUT_S)
        for task in self._recoveries:
            task.cancel()
        if self._recoveries:
            await asyncio.wait(list(self._recoveries), timeout=_CLOSE_TIMEOUT_S)
        for endpoints in self._endpoints.values():
            for endpoint in endpoints:
                await endpoint.probe.close()

    def _target(self, source: EndpointsSource, url: str) -> HealthTarget:
        return HealthTarget(url=url, path=source.health_path, fallback_path=FALLBACK_PATH, headers=source.headers)

    def _kind(self, endpoints: list[Endpoint]) -> KindReport:
        status = {each.url: EndpointStatus(state=each.state, reason=each.probe.reason) for each in endpoints}
        reason = _none_answers(status)
        retry_s = self._settings.recovery.recover_max_s
        trouble = Trouble(reason=reason, retry_s=retry_s, outside=True) if reason else None
        usable = sum(1 for each in endpoints if each.state != "failed")
        return KindReport(endpoints=status, trouble=trouble, instances_max=usable if usable < len(endpoints) else None)

    async def _serve(self, record: InstanceRecord) -> None:
        kind = record.instance.kind.name
        adopted = self._adopted.pop(record.instance.id, None)
        endpoint = adopted or await self._bind(kind, record)
        record.resources.callback(self._let_go, kind, endpoint)
        if adopted is None:
            self._records.ready(record, endpoint.url)
        else:
            record.check_now.set()
        await endpoint.probe.until_failed(record.check_now)
        self._recover(kind, endpoint)
        raise InstanceFailedError(f"the endpoint stopped answering: {endpoint.probe.reason}")

    async def _bind(self, kind: str, record: InstanceRecord) -> Endpoint:
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
            record.began_s = loop.time()
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


def _none_answers(endpoints: Mapping[str, EndpointStatus]) -> str:
    """Why, for clients; empty if one may answer."""
    reasons = []
    for url, status in endpoints.items():
        if status.state != "failed" or not status.reason:  # Without a reason its last check passed.
            return ""
        # Where engines are is nothing to clients: the system's own words name addresses.
        reasons.append(_DETAIL.split(status.reason.replace(url, "").lstrip(": "))[0][:REASON_MAX])
    count = len(reasons)
    which = "its endpoint does not answer" if count == 1 else f"none of its {count} endpoints answers"
    return f"{which} ({'; '.join(dict.fromkeys(reasons))})"
