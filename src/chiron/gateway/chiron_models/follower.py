"""Follows the ``ChironModel`` resources of a namespace, beside a brain that serves those that are in force.

A brain keeps the models that it was started with. When the resources ask for others, those that can be are written to
the data directory, and the brain ends to be followed by another one: what runs goes on at the relays, which read the
same file before they speak with the next brain. What somebody changes in a row is taken up together, and not more often
than every few seconds.

Nothing is taken for deleted unless a list says so that was made a while after it was heard of: with the API server
away, or the definition gone, all goes on as it is. The API server tells of each resource that goes with its definition
as of one that somebody has deleted, and a definition that is back begins without any: what was in force then stays,
until there is a resource again.
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from chiron.fleet.health import require_positive
from chiron.fleet.kubernetes.access import Access, find_access
from chiron.fleet.kubernetes.client import Client, KubernetesError
from chiron.fleet.kubernetes.watch import Watch, WatchSettings
from chiron.fleet.waiting import heard, pause
from chiron.gateway.chiron_models.kept import FILE, Kept, content_of, read_kept, read_record, write_kept
from chiron.gateway.chiron_models.objects import ModelResource, Reader, Reading, path_of
from chiron.gateway.chiron_models.writer import Leader, Seen, StatusWriter, seen
from chiron.gateway.settings import KubernetesModelsSettings
from chiron.store.port import StoreError

log = logging.getLogger("chiron.gateway")

LISTED_MAX = 10_000
"""Of one list that says what has been deleted; more than a namespace should have."""
FIRST_LIST_S = 10.0
"""For so long a start waits for the API server, if it knows from before what it serves."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FollowSettings:
    settle_s: float = 1.0
    """From a change until it is taken up, with those that follow it."""
    restart_pause_s: float = 5.0
    """Between two brains that are made for changes; doubled while changes follow one another."""
    restart_pause_max_s: float = 300.0
    confirm_s: float = 3.0
    """From a deletion until it is believed."""
    status_period_s: float = 10.0
    """Between two writes of one resource's status."""

    def __post_init__(self) -> None:
        require_positive(self)


class Follower:
    """``run`` it beside the brain."""

    def __init__(
        self,
        *,
        client: Client,
        namespace: str,
        reader: Reader,
        kept: Path,
        changed: Callable[[], None],
        wall_s: Callable[[], float],
        shared: bool = False,
        settings: FollowSettings | None = None,
        watch: WatchSettings | None = None,
    ) -> None:
        """``kept``: the file of the resources in force; ``changed``: it has others now than at the start; ``wall_s``:
        Unix time. ``shared``: of several gateways only the one that leads (``lead``) takes changes up."""
        self.leader: Leader | None = None
        """Whose figures the status has; None: this process leads no gateways, and writes none."""
        self._reader = reader
        self._kept = kept
        self._shared = shared
        self._save: Callable[[bytes], Awaitable[None]] | None = None
        self._saved = not shared
        """The others know what is in force."""
        self._changed = changed
        self._settings = settings or FollowSettings()
        self._seen: dict[str, Seen] = {}
        """By uid."""
        self._missing: set[str] = set()
        """Uids of those that are said to have been deleted."""
        self._undefined = False
        """The definition has been away, and no resource has come since."""
        self._listed = False
        before = read_record(kept)
        self._in_force = before.resources if before is not None else ()
        self._pause_s = _next_pause_s(before, wall_s(), self._settings)
        self._client = client
        self._path = path_of(namespace)
        self._wall_s = wall_s
        self._reading: Reading | None = None
        self._news = asyncio.Event()
        self._status_due = asyncio.Event()
        self._told = ""
        loop = asyncio.get_running_loop()
        self._time_s = loop.time
        self._began_s = loop.time()
        self._writer = StatusWriter(client, wall_s=wall_s, time_s=loop.time, period_s=self._settings.status_period_s)
        self._watch = Watch(
            client,
            path_of(namespace),
            {},
            changed=self._heard,
            gone=self._gone,
            listed=self._all_listed,
            troubled=self._troubled,
            settings=watch,
        )

    def lead(self, leader: Leader, save: Callable[[bytes], Awaitable[None]] | None = None) -> None:
        """This process leads from now on; ``save`` tells the other gateways what is in force."""
        self.leader, self._save = leader, save
        if self._shared:
            before = read_record(self._kept)
            self._in_force = before.resources if before is not None else ()
            self._pause_s = _next_pause_s(before, self._wall_s(), self._settings)
            self._began_s = self._time_s()
            self._news.set()

    async def run(self) -> None:
        """Until cancelled."""
        async with asyncio.TaskGroup() as tasks:
            for each in (self._watch.run(), self._take_up(), self._tell()):
                tasks.create_task(each)

    # -- what the API server says ------------------------------------------------------------------------------

    def _heard(self, item: Mapping[str, Any]) -> None:
        try:
            found = seen(item)
        except ValueError as error:
            log.warning("a resource is left out: %s", error)
            return
        before = self._seen.get(found.resource.uid)
        if before is not None:
            found.written_s, found.told, found.events = before.written_s, before.told, before.events
        self._seen[found.resource.uid] = found
        self._missing.discard(found.resource.uid)
        self._undefined = False
        if before is None or before.resource.wanted != found.resource.wanted:
            self._news.set()
        elif before.resource.generation != found.resource.generation:
            self._status_due.set()

    def _gone(self, uid: str) -> None:
        if uid in self._seen:
            self._missing.add(uid)
            self._news.set()

    def _all_listed(self) -> None:
        self._listed = True
        self._news.set()

    def _troubled(self, why: str) -> None:
        if why.startswith("404"):
            self._undefined = True
        if why and why != self._told:
            log.warning("ChironModels cannot be followed, and stay as they are: %s", _hinted(why))
        self._told = why

    # -- what becomes of it ------------------------------------------------------------------------------------

    async def _take_up(self) -> None:
        while True:
            await self._news.wait()
            await pause(self._settings.settle_s)
            self._news.clear()
            if self._missing:
                await self._confirm()
            if self._undefined and not self._seen:
                self._troubled("their definition was away, and has come back without any")
            if not self._listed or self._undefined or (self._shared and self._save is None):
                continue
            wanted = [each.resource for each in self._seen.values()]
            reading = self._reading = await asyncio.to_thread(self._reader.read, wanted, self._in_force)
            self._status_due.set()
            if _wanted(reading.accepted) == _wanted(self._in_force):
                if not self._saved and not await self._keep(content_of(self._in_force)):
                    self._news.set()
                continue
            left_s = self._began_s + self._pause_s - self._time_s()
            if left_s > 0.0 and await heard(self._news, left_s):
                continue  # More has changed.
            if not await self._keep(content_of(reading.accepted, changed_s=self._wall_s(), pause_s=self._pause_s)):
                self._news.set()
                continue
            log.info(
                "ChironModels have changed (%s): another brain takes them up", _difference(self._in_force, reading)
            )
            self._changed()
            return

    async def _keep(self, content: bytes) -> bool:
        """Where the other gateways find it first, so that whoever follows this one has it. False, after a pause: it
        could not be written."""
        try:
            if self._save is not None:
                await self._save(content)
                self._saved = True
            write_kept(self._kept, content)
        except (OSError, StoreError, ValueError) as error:
            log.error("ChironModels cannot be taken up: what is in force cannot be written: %s", error)
            await pause(self._settings.restart_pause_s)
            return False
        return True

    async def _confirm(self) -> None:
        """Which of those that are said to be deleted are."""
        await pause(self._settings.confirm_s)
        try:
            page = await self._client.get(self._path, limit=str(LISTED_MAX))
            there = {str(item["metadata"]["uid"]) for item in page.get("items") or ()}
            more = bool(page["metadata"].get("continue"))
        except (KubernetesError, LookupError, TypeError, AttributeError) as error:
            self._troubled(str(error) or type(error).__name__)
            self._news.set()
            return
        for uid in self._missing - there if not more else ():
            self._seen.pop(uid, None)
        self._missing.clear()

    async def _tell(self) -> None:
        while True:
            await heard(self._status_due, self._settings.status_period_s)
            self._status_due.clear()
            if self.leader is not None and self._reading is not None:
                await self._writer.write(self._seen, self._reading, self.leader)
            await pause(self._settings.settle_s)


def _next_pause_s(before: Kept | None, now_s: float, settings: FollowSettings) -> float:
    """Twice the last one if the last change is not longer ago than that."""
    if before is None or not 0.0 <= now_s - before.changed_s <= 2.0 * before.pause_s:
        return settings.restart_pause_s
    return min(settings.restart_pause_max_s, max(settings.restart_pause_s, 2.0 * before.pause_s))


def _wanted(resources: Sequence[ModelResource]) -> list[tuple[str, bytes]]:
    return sorted(each.wanted for each in resources)


def _difference(before: Sequence[ModelResource], reading: Reading) -> str:
    old, new = ({each.name: each.wanted for each in resources} for resources in (before, reading.accepted))
    names = [
        *(f"+{name}" for name in new if name not in old),
        *(f"-{name}" for name in old if name not in new),
        *(name for name in new if name in old and new[name] != old[name]),
    ]
    return ", ".join(sorted(names))[:500]


def _hinted(why: str) -> str:
    """With what to do."""
    if why.startswith("404"):
        return f"{why}; their definition may not be installed: kubectl apply -f chironmodels.yaml"
    return f"{why}; the gateway's service account needs get, list and watch on them" if why.startswith("403") else why


def access_of(settings: KubernetesModelsSettings) -> tuple[Access, str]:
    """And the namespace. Raises AccessError."""
    access = find_access(os.environ, settings.kubeconfig, settings.context)
    return access, settings.namespace or access.namespace


async def read_first(settings: KubernetesModelsSettings, reader: Reader, data: Path) -> Reading:
    """The models to begin with, written to the data directory. Without an answer of the API server those of the last
    run; without these it waits. Raises AccessError and OSError."""
    access, namespace = access_of(settings)
    kept, found, listed = data / FILE, dict[str, Seen](), asyncio.Event()
    before = read_kept(kept)

    def changed(item: Mapping[str, Any]) -> None:
        try:
            each = seen(item)
            found[each.resource.uid] = each
        except ValueError as error:
            log.warning("a resource is left out: %s", error)

    def gone(uid: str) -> None:
        found.pop(uid, None)

    told = [""]

    def troubled(why: str) -> None:
        if why and why != told[0]:
            log.warning("ChironModels of namespace %s cannot be listed: %s; retrying", namespace, _hinted(why))
        told[0] = why

    client = Client(access)
    watch = Watch(client, path_of(namespace), {}, changed=changed, gone=gone, listed=listed.set, troubled=troubled)
    running = asyncio.get_running_loop().create_task(watch.run())
    try:
        there = await heard(listed, FIRST_LIST_S) if before is not None else await listed.wait()
    finally:
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
        await client.close()
    if not there:
        log.warning("the API server gives no answer: ChironModels are those of the last run")
        return reader.read(before or ())
    reading = reader.read([each.resource for each in found.values()], before or ())
    for uid, why in reading.refused.items():
        log.warning("ChironModel %s is refused: %s", found[uid].resource.name, why)
    write_kept(kept, content_of(reading.accepted))
    return reading
