"""A fleet policy of Chiron beside Ray Serve, through its external scaler: read the load, decide, say how many.

For deployments with a plain ``num_replicas`` in an application with ``external_scaler_enabled: true``. Replicas are
read from the dashboard (``GET /api/serve/applications/``), the load from Prometheus, which scrapes Ray's metrics, and
the target is set by ``POST /api/v1/applications/APP/deployments/DEPLOYMENT/scale``. Where a figure is missing nothing
is scaled.
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from math import nan
from typing import Any
from urllib.parse import quote, urlencode

from chiron.fleet.waiting import pause
from chiron.net.client import NetError, Origin
from chiron.ray.decisions import Decisions, Memory
from chiron.ray.load import ServeLoad

log = logging.getLogger("chiron.ray")

RUNNING = 'sum(ray_serve_replica_processing_queries{{application="{application}",deployment="{deployment}"}})'
QUEUED = 'sum(ray_serve_deployment_queued_queries{{application="{application}",deployment="{deployment}"}})'
TIMEOUT_S = 10.0
BODY_MAX = 32 * 1024 * 1024


class ScalerError(Exception):
    """Ray Serve or Prometheus could not be asked; the message says why."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """The deployment, and where it is asked and told."""

    application: str
    deployment: str
    min_replicas: int = 1
    max_replicas: int = 8
    dashboard: str = "http://127.0.0.1:8265"
    """Ray's."""
    prometheus: str = "http://127.0.0.1:9090"
    running_query: str = RUNNING
    """Requests at replicas; ``{application}`` and ``{deployment}`` are filled in."""
    queued_query: str = QUEUED
    """Requests that wait at handles; no series means none."""
    token: str = field(default="", repr=False)
    """Of a cluster with tokens; not shown."""
    period_s: float = 1.0

    def __post_init__(self) -> None:
        if not 0 <= self.min_replicas <= self.max_replicas or self.max_replicas < 1:
            raise ValueError(
                f"min_replicas is {self.min_replicas}; it must be 0 to max_replicas ({self.max_replicas}, 1 or more)"
            )
        if not self.period_s > 0:
            raise ValueError(f"period_s is {self.period_s}; it must be above 0")


class ExternalScaler:
    """``run`` until cancelled, or ``step`` by step."""

    def __init__(self, target: Target, decisions: Decisions) -> None:
        self.memory: Memory | None = None
        """The last decision, with its reason."""
        self._target = target
        self._decisions = decisions
        self._dashboard = Origin(target.dashboard, connect_timeout_s=TIMEOUT_S)
        self._prometheus = Origin(target.prometheus, connect_timeout_s=TIMEOUT_S)

    async def run(self) -> None:
        trouble = ""
        while True:
            try:
                await self.step(asyncio.get_running_loop().time())
                trouble = ""
            except ScalerError as error:
                if str(error) != trouble:
                    log.warning("nothing is scaled: %s", error)
                trouble = str(error)
            await pause(self._target.period_s)

    async def step(self, time_s: float) -> int | None:
        """The target that was set; None: it stays. Raises ScalerError."""
        details = await self._deployment()
        load = ServeLoad(
            running=await self._figure(self._target.running_query),
            queued=await self._figure(self._target.queued_query),
            replicas=sum(1 for each in _list(details, "replicas") if each.get("state") == "RUNNING"),
            target=_whole(details, "target_num_replicas"),
            least=self._target.min_replicas,
            most=self._target.max_replicas,
        )
        self.memory = self._decisions.decide(load, time_s, self.memory)
        wanted = self.memory.target
        if wanted is None or wanted == load.target or not load.sound:
            return None
        await self._scale(wanted)
        log.info("%s: %d -> %d replicas: %s", self._target.deployment, load.target, wanted, self.memory.reason)
        return wanted

    async def close(self) -> None:
        await self._dashboard.close()
        await self._prometheus.close()

    async def _deployment(self) -> Mapping[str, Any]:
        target = self._target
        said = await self._asked(self._dashboard, "GET", "/api/serve/applications/")
        application = _table(_table(said, "applications"), target.application)
        details = _table(_table(application, "deployments"), target.deployment)
        if not details:
            raise ScalerError(f"Ray Serve has no deployment {target.deployment!r} in {target.application!r}")
        return details

    async def _figure(self, query: str) -> float:
        filled = query.format(application=self._target.application, deployment=self._target.deployment)
        said = await self._asked(self._prometheus, "GET", f"/api/v1/query?{urlencode({'query': filled})}")
        result = _list(_table(said, "data"), "result")
        if not result:
            return 0.0 if query == self._target.queued_query else nan
        try:
            return float(result[0]["value"][1])
        except (KeyError, IndexError, TypeError, ValueError):
            return nan

    async def _scale(self, count: int) -> None:
        names = quote(self._target.application, safe=""), quote(self._target.deployment, safe="")
        path = "/api/v1/applications/{}/deployments/{}/scale".format(*names)
        await self._asked(self._dashboard, "POST", path, json.dumps({"target_num_replicas": count}).encode())

    async def _asked(self, origin: Origin, method: str, path: str, body: bytes = b"") -> Mapping[str, Any]:
        headers = {"content-type": "application/json"} if body else {}
        if self._target.token and origin is self._dashboard:
            headers["authorization"] = f"Bearer {self._target.token}"
        where = f"{method} {path.partition('?')[0]}"
        try:
            answer = await origin.fetch(
                method, path, headers=headers, body=body, timeout_s=TIMEOUT_S, body_max=BODY_MAX
            )
            said = json.loads(answer.body or b"{}")
        except (NetError, ValueError) as error:
            raise ScalerError(f"{where}: {error}") from None
        if answer.status == 412:
            raise ScalerError(f"{where}: set external_scaler_enabled: true in the application's config")
        if answer.status != 200 or not isinstance(said, Mapping):
            raise ScalerError(f"{where} answers with status {answer.status}")
        return said


def _table(value: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    found = value.get(key)
    return found if isinstance(found, Mapping) else {}


def _list(value: Mapping[str, Any], key: str) -> list[Mapping[str, Any]]:
    found = value.get(key)
    return [each for each in found if isinstance(each, Mapping)] if isinstance(found, list) else []


def _whole(value: Mapping[str, Any], key: str) -> int:
    found = value.get(key)
    if not isinstance(found, int) or isinstance(found, bool) or found < 0:
        raise ScalerError(f"Ray Serve says {key} is {found!r}")
    return found
