"""Writes the status of ``ChironModel`` resources: by the gateway that leads, only what has changed, and not too often.

What is new in it, a decision or a verdict, is told as an Event of the resource, too: ``kubectl describe chironmodel``.

Each write names the version that it was made of. A conflict (409) means that somebody has changed the object since: it
is read and written again, a few times. A status that cannot be written costs nobody anything.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, Protocol

from chiron.control.snapshot import Readers
from chiron.fleet.kubernetes.client import ApiError, Client, KubernetesError
from chiron.fleet.kubernetes.events import Involved, WorkloadEvents
from chiron.gateway.chiron_models.objects import GROUP, KIND, VERSION, ModelResource, Reading, path_of, read_resource
from chiron.gateway.chiron_models.status import Condition, accepted, is_news, model_report, resource_status
from chiron.gateway.reporting.journal import LiveJournal
from chiron.gateway.reporting.status import StatusSources

log = logging.getLogger("chiron.gateway")

TRIES_MAX = 4
"""Of one write, while others change the object."""
CONFLICT, NOT_FOUND = 409, 404
FORBIDDEN_PAUSE_S = 300.0
"""After a refusal (401, 403): the right may come, and the token is replaced."""


class Leader(Protocol):
    """Who serves the models: a ``Service``."""

    @property
    def plane(self) -> Readers: ...

    @property
    def journal(self) -> LiveJournal: ...

    def around(self) -> StatusSources: ...


@dataclass(slots=True)
class Seen:
    """A resource as it was heard of last."""

    resource: ModelResource
    version: str
    status: Mapping[str, Any]
    written_s: float = float("-inf")
    told: dict[str, str] = field(default_factory=dict)
    """The last event about each thing."""
    events: WorkloadEvents | None = None


def seen(item: Mapping[str, Any]) -> Seen:
    """Raises ValueError for an object that is no ChironModel."""
    resource, status = read_resource(item), item.get("status")
    return Seen(
        resource=resource,
        version=str(item["metadata"].get("resourceVersion") or ""),
        status=status if isinstance(status, Mapping) else {},
    )


class StatusWriter:
    def __init__(
        self, client: Client, *, wall_s: Callable[[], float], time_s: Callable[[], float], period_s: float
    ) -> None:
        """``period_s``: between two writes to one resource, unless it was accepted or refused meanwhile."""
        self._client = client
        self._wall_s = wall_s
        self._time_s = time_s
        self._period_s = period_s
        self._silent_until_s = float("-inf")
        self._told = ""
        self._tasks: set[asyncio.Task[None]] = set()

    async def write(self, resources: Mapping[str, Seen], reading: Reading, leader: Leader) -> None:
        """One round. ``resources`` by uid; ``reading``: what became of them."""
        if self._time_s() < self._silent_until_s:
            return
        plane, around = leader.plane.snapshot(), leader.around()
        reports = {model.spec.name: model_report(model, leader.journal, around) for model in plane.models}
        for uid, each in list(resources.items()):
            if uid not in reading.refused and uid not in reading.in_force:
                continue  # It has come since.
            served = reading.in_force.get(uid)
            name = str(served.spec.get("model", served.name)) if served is not None else ""
            report, ready = reports.get(name, (dict[str, Any](), None))
            conditions = [accepted(each.resource, reading.refused.get(uid, ""))]
            if not around.advise:
                self._tell_events(each, conditions[0], report)
            try:
                await self._write_one(each, [*conditions, *([ready] if ready is not None else [])], report)
                self._told = ""
            except KubernetesError as error:
                self._tell(f"the status of ChironModel {each.resource.name} cannot be written: {error}")
                if isinstance(error, ApiError) and error.status in (401, 403):
                    self._silent_until_s = self._time_s() + FORBIDDEN_PAUSE_S
                    return

    async def _write_one(self, each: Seen, conditions: list[Condition], report: Mapping[str, Any]) -> None:
        now = f"{datetime.fromtimestamp(self._wall_s(), UTC):%Y-%m-%dT%H:%M:%SZ}"
        path = f"{path_of(each.resource.namespace)}/{each.resource.name}"
        for _ in range(TRIES_MAX):
            status = resource_status(each.resource, conditions, report, each.status, now)
            if not is_news(status, each.status):
                return
            recent = self._time_s() - each.written_s < self._period_s
            if recent and _verdict(status) == _verdict(each.status):
                return
            try:
                body = {"metadata": {"resourceVersion": each.version}, "status": status}
                self._heard(each, await self._client.patch(f"{path}/status", body))
                each.written_s = self._time_s()
                return
            except ApiError as error:
                if error.status == NOT_FOUND:
                    return  # It was deleted, which its watch will say.
                if error.status != CONFLICT:
                    raise
            self._heard(each, await self._client.get(path))
        raise KubernetesError(f"it was changed by others {TRIES_MAX} times in a row")

    def _tell_events(self, each: Seen, verdict: Condition, report: Mapping[str, Any]) -> None:
        """Each once: what the status said before this process is known."""
        resource, last = each.resource, report.get("lastDecision")
        if each.events is None:
            each.events = WorkloadEvents(self._client, wall_s=self._wall_s, background=self._background)
            before = each.status.get("lastDecision")
            each.told["decision"] = str(before.get("text")) if isinstance(before, Mapping) else ""
            each.told["verdict"] = next((str(said[1]) for said in _verdict(each.status)), "")
        about = Involved(
            api_version=f"{GROUP}/{VERSION}",
            kind=KIND,
            name=resource.name,
            namespace=resource.namespace,
            uid=resource.uid,
        )
        if last is not None and each.told["decision"] != last["text"]:
            each.told["decision"] = last["text"]
            each.events.tell(about, "Planned", last["text"])
        if each.told["verdict"] != verdict.message:
            each.told["verdict"] = verdict.message
            each.events.tell(about, verdict.reason, verdict.message, warning=not verdict.status)

    def _background(self, call: Coroutine[Any, Any, None]) -> None:
        async def run() -> None:
            try:
                await call
            except KubernetesError as error:
                log.warning("an event of a ChironModel cannot be written: %s", error)

        task = asyncio.get_running_loop().create_task(run())
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def _heard(self, each: Seen, item: Mapping[str, Any]) -> None:
        try:
            found = seen(item)
        except ValueError as error:
            raise KubernetesError(f"the API server's answer is no ChironModel: {error}") from None
        if found.resource.uid == each.resource.uid:
            each.version, each.status = found.version, found.status

    def _tell(self, why: str) -> None:
        if why != self._told:
            self._told = why
            log.warning("%s", why)


def _verdict(status: Mapping[str, Any]) -> list[Any]:
    """What must not wait: whether it was accepted, and which version of it."""
    conditions = status.get("conditions")
    return [
        (each.get("status"), each.get("message"), each.get("observedGeneration"))
        for each in (conditions if isinstance(conditions, list) else ())
        if isinstance(each, Mapping) and each.get("type") == "Accepted"
    ]
