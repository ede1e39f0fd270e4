"""The instances of one namespace of a Ray cluster: which one serves which of Chiron's, which come and which go.

Every second, or as soon as there is something to do, the cluster is asked (``RayCluster.ask``), and what it tells is
compared with what should be. Ray places and adds nodes: an instance for which there is no room is a pending placement
group, which its autoscaler sees. An instance that is no longer wanted is stopped by name until it is not there any
more, whatever happens between.

What runs and nobody has is taken over if it was started with the same settings. It has a holder while a gateway asks
for it; one whose gateway was killed is free after ``LEASE_S``. What nobody has, and this gateway or one before it
has started (``owner``), is ended if it is not needed: it runs with other settings than the config has now, is of a kind
that was removed, or there are more than may be. One with other settings where requests still run, as relays tell, is
held until they have ended. What others have started is said and not touched, but for the dead.

Two of these may look at one namespace of one cluster and not know it, as an address has several spellings. What another
one sees or has asked for is left to it where it is of its kinds; what is of no kind is the first one's to end.
"""

from __future__ import annotations

import asyncio
import logging
import os
import secrets
import socket
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import inf
from typing import Any

from chiron.core.backoff import doubled_s
from chiron.fleet.ray.cluster import LEASE_S, Answer, Order, Question, RayCluster, RayError, Seen, new_name, read_name
from chiron.fleet.ray.source import RaySource
from chiron.fleet.records import InstanceNotFoundError
from chiron.fleet.waiting import heard, pause

log = logging.getLogger("chiron.fleet")

NOTES_MAX = 20
CLAIMS_MAX = 4096
"""Instances of another gateway that are looked for at a time."""
STOP_TIMEOUT_S = 10.0
"""Of what is of no kind any more, as ``stop_timeout`` usually is."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RayTimes:
    """Seconds."""

    quick_s: float = 0.25
    """Between two questions while something is under way."""
    calm_s: float = 1.0
    """Between two questions otherwise."""
    backoff_first_s: float = 0.5
    """Between two attempts to ask a cluster that does not answer; doubled with each."""
    backoff_max_s: float = 10.0
    settle_s: float = 2.0
    """After the first answer, until whoever takes over has had time for it."""
    other_s: float = 2.0
    """After the first answer, and the time that relays have to tell what runs there, until what runs with other
    settings is ended."""
    unknown_s: float = 5.0
    """For so long Ray may take to say whether an instance of another gateway is there."""
    patience_s: float = 2.0 * LEASE_S
    """How long an instance waits for one that an earlier gateway may have left behind, before it asks for a new one."""
    spare_s: float = 60.0
    """How long one that nobody takes over may run before it counts as more than may be."""
    free_timeout_s: float = 3.0
    """Longest that the end of a gateway waits for the cluster to hear that its instances are free."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Loss:
    """An instance has ended."""

    reason: str
    outside: bool
    """Its actor or its node ended; otherwise its engine."""


class Hold:
    """One of Chiron's instances, and its claim to one in the cluster."""

    __slots__ = (
        "asked",
        "before_url",
        "begun",
        "check_now",
        "ended",
        "kind",
        "lost",
        "name",
        "placed",
        "since_s",
        "url",
        "why",
    )

    def __init__(self, kind: str, now_s: float, check_now: asyncio.Event, before_url: str) -> None:
        loop = asyncio.get_running_loop()
        self.kind = kind
        self.before_url = before_url
        """Where it was under another gateway; empty: any will do."""
        self.since_s = now_s
        """Since when it has waited."""
        self.check_now = check_now
        """Set when Ray doubts it."""
        self.name = ""
        """In the cluster; empty until it is known whether there is one to take over."""
        self.asked = False
        """The cluster has been asked for it."""
        self.begun = False
        """Its engine has."""
        self.ended = False
        self.why = ""
        self.placed: asyncio.Future[None] = loop.create_future()
        """An error, if it is not where it was before."""
        self.url: asyncio.Future[str] = loop.create_future()
        self.lost: asyncio.Future[Loss] = loop.create_future()


@dataclass(frozen=True, slots=True, kw_only=True)
class KindState:
    """Of one kind, as it is now."""

    holds: int
    found: int
    """That run and should be taken over."""
    overdue: int
    """That have waited for a node for too long."""
    why: str
    """Why the first that waits does; empty: none."""
    known: bool
    notes: tuple[str, ...]
    """For operators."""


class RayInstances:
    """Started by ``run``; used on the loop's thread."""

    def __init__(
        self,
        cluster: RayCluster,
        namespace: str,
        sources: Mapping[str, RaySource],
        *,
        owner: str = "",
        advise: bool = False,
        settle_s: float = 0.0,
        grace_s: float = 0.0,
        noted: Callable[[str, str], None] = lambda kind, text: None,
        hint: str = "",
        changes: Callable[[], object] = lambda: None,
        times: RayTimes | None = None,
    ) -> None:
        """``sources`` by kind. ``owner``: in the names of what this starts. ``advise``: nothing is started or stopped,
        and what others have is used too. ``settle_s``: for so long relays may tell what runs; ``grace_s``: for so long
        requests may go on where a kind is gone. ``hint``: options of ``chiron ray`` that name this place. ``changes``
        is called just before the cluster is asked to change anything, and ends this process if it may not."""
        self._changes = changes
        self._owner = owner
        self._settle_s = settle_s
        self._grace_s = grace_s
        self._hint = hint
        self._cluster = cluster
        self.namespace = namespace
        self._sources = dict(sources)
        self._advise = advise
        self._noted = noted
        self._times = times or RayTimes()
        self._holder = f"{socket.gethostname()}-{os.getpid()}-{secrets.token_hex(4)}"
        self._holds: list[Hold] = []
        self._stops: dict[str, float] = {}
        """Grace, by name, of what is not to be there."""
        self._spare: dict[str, Seen] = {}
        """What runs and nobody has, by name."""
        self._seen_s: dict[str, float] = {}
        """Since when others have what could be ours, by name."""
        self._spare_s: dict[str, float] = {}
        """Since when, by name."""
        self._dead_s: dict[str, float] = {}
        """Since when what nobody has is dead, by name."""
        self._neighbours: Sequence[RayInstances] = ()
        self._told: frozenset[str] = frozenset()
        """Names in the last answer."""
        self._own = 0
        """Instances that this gateway, or one that it replaces, has started."""
        self._known_s = inf
        self._trouble = ""
        """Why the cluster does not answer."""
        self._strange: dict[str, tuple[str, str]] = {}
        """Kind and text of what is said and not touched, by name."""
        self._dirty = asyncio.Event()
        self._answered = asyncio.Event()
        """Set, and replaced, with every answer."""

    def beside(self, neighbours: Sequence[RayInstances]) -> None:
        """Those of this process, in their order, that have a namespace of this name, maybe the same one. This one may
        be among them; otherwise it comes after them."""
        self._neighbours = neighbours

    # -- instances ---------------------------------------------------------------------------------------------------

    def may_claim(self, kind: str, url: str) -> bool:
        """Whether the instance at this address, if there is one, may be somebody's who claims it."""
        claimed = {hold.before_url for hold in self._holds if hold.kind == kind and hold.before_url}
        return url not in claimed and len(claimed) < CLAIMS_MAX

    def hold(self, kind: str, check_now: asyncio.Event, before_url: str = "") -> Hold:
        """Another instance is wanted: that at ``before_url``, where it is given."""
        hold = Hold(kind, asyncio.get_running_loop().time(), check_now, before_url)
        self._holds.append(hold)
        if self._known_s < inf:
            self._assign()
        self._dirty.set()
        return hold

    def release(self, hold: Hold) -> None:
        """It is gone, and what it had in the cluster must go. Harmless twice."""
        if hold.ended:
            return
        hold.ended = True
        self._holds.remove(hold)
        if hold.name and not self._advise:
            self._stops[hold.name] = self._sources[hold.kind].stop_timeout_s
        self._dirty.set()

    def spare(self, kind: str) -> int:
        return sum(1 for name in self._spare if _kind(name) == kind)

    def state(self, kind: str) -> KindState:
        now_s = asyncio.get_running_loop().time()
        holds = [hold for hold in self._holds if hold.kind == kind]
        waiting = [hold for hold in holds if not hold.placed.done()]
        limit_s = self._sources[kind].absent_after_s
        notes = [f"Ray does not answer: {self._trouble}"] if self._trouble else []
        notes += [f"an instance waits: {hold.why}" for hold in waiting[:1] if hold.why]
        notes += [text for of, text in self._strange.values() if of == kind]
        why = (self._trouble or waiting[0].why or "Ray has not placed it yet") if waiting else ""
        return KindState(
            holds=len(holds),
            found=self.spare(kind),
            overdue=sum(1 for hold in waiting if now_s - hold.since_s > limit_s),
            why=why,
            known=now_s - self._known_s >= self._times.settle_s,
            notes=tuple(notes[:NOTES_MAX]),
        )

    # -- the cluster -------------------------------------------------------------------------------------------------

    async def run(self) -> None:
        """Until cancelled."""
        failures = 0
        while True:
            self._dirty.clear()
            question = self._question()
            try:
                answer = await self._ask(question)
            except RayError as error:
                failures += 1
                self._troubled(str(error))
                await pause(doubled_s(self._times.backoff_first_s, self._times.backoff_max_s, failures - 1))
                continue
            failures = 0
            self._troubled("")
            self._hear(question, answer)
            self._answered.set()
            self._answered = asyncio.Event()
            busy = self._stops or any(not hold.url.done() for hold in self._holds)
            await heard(self._dirty, self._times.quick_s if busy else self._times.calm_s)

    def end_spares(self) -> None:
        """What nobody has is not for the next gateway either."""
        for name in [name for name in self._spare if self._is_mine(name)]:
            del self._spare[name]
            self._end(name, "and the gateway stops")

    async def until_swept(self, timeout_s: float) -> bool:
        """Whether there is nothing left of this gateway's within ``timeout_s``; ``run`` must be running."""
        loop = asyncio.get_running_loop()
        until_s = loop.time() + timeout_s
        while loop.time() < until_s:
            if loop.time() - self._known_s >= self._times.patience_s and not self._own and not self._stops:
                return True
            await heard(self._answered, until_s - loop.time())
        return False

    async def until_stopped(self, timeout_s: float) -> bool:
        """Whether all that must go has gone within ``timeout_s``; ``run`` must be running."""
        loop = asyncio.get_running_loop()
        until_s = loop.time() + timeout_s
        while self._stops and loop.time() < until_s:
            await heard(self._answered, until_s - loop.time())
        return not self._stops

    async def free(self) -> None:
        """Let what runs go on without this gateway, and be taken over at once; ``run`` must have ended. What has no
        node yet is given up: it would be demand that nobody needs."""
        if self._advise or self._known_s == inf:
            return
        names = frozenset(hold.name for hold in self._holds if hold.name and hold.placed.done())
        pending = {hold.name: 0.0 for hold in self._holds if hold.asked and not hold.placed.done()}
        try:
            async with asyncio.timeout(self._times.free_timeout_s):
                stop = {**self._stops, **pending}
                await self._ask(Question(stop=stop, free=names, holder=self._holder))
        except (RayError, TimeoutError) as error:
            log.warning("Ray was not told that its instances are free; they are in %g s: %s", LEASE_S, error)

    async def _ask(self, question: Question) -> Answer:
        if question.start or question.stop or question.hold:
            self._changes()
        return await self._cluster.ask(question)

    def _question(self) -> Question:
        if self._advise:
            return Question(holder=self._holder)
        named = [hold for hold in self._holds if hold.name]
        for hold in named:
            hold.asked = True
        return Question(
            start=tuple(self._order(hold) for hold in named if not hold.begun),
            stop=dict(self._stops),
            hold=frozenset(hold.name for hold in named),
            holder=self._holder,
        )

    def _order(self, hold: Hold) -> Order:
        source = self._sources[hold.kind]
        return Order(
            name=hold.name,
            nodes=source.nodes,
            resources=source.needs,
            command=source.command,
            follower_args=source.follower_args,
            env=dict(source.env),
            grace_s=source.stop_timeout_s,
            log_bytes_max=source.log_bytes_max,
        )

    def _hear(self, question: Question, answer: Answer) -> None:
        now_s = asyncio.get_running_loop().time()
        if self._known_s == inf:
            self._known_s = now_s
        for hold in [each for each in self._holds if each.before_url and not each.name]:
            self._find(hold, answer, now_s)
        self._told = frozenset(each.name for each in answer.instances)
        sure = all(each._known_s < inf for each in self._neighbours)
        self._own = sum(self._is_mine(name) and not (sure and self._is_neighbours(name)) for name in self._told)
        seen = {each.name: each for each in answer.instances}
        for name in question.stop:
            if name not in seen or seen[name].holder not in ("", self._holder):
                self._stops.pop(name, None)  # Gone, or another gateway's by now.
        held = {hold.name: hold for hold in self._holds if hold.name}
        for name, hold in held.items():
            if name in seen:
                self._look(hold, seen[name])
            elif name in question.hold or self._advise:
                _settle(hold.lost, Loss(reason="its placement group is gone: somebody removed it", outside=True))
        self._sort([each for each in answer.instances if each.name not in held], now_s)
        self._assign()

    def _find(self, hold: Hold, answer: Answer, now_s: float) -> None:
        """What this instance had under another gateway, whose it may still be for a while."""
        taken = {each.name for each in self._holds}
        for seen in answer.instances:
            name = read_name(seen.name)
            if name is None or (name.namespace, name.kind) != (self.namespace, hold.kind) or seen.name in taken:
                continue
            if _url(seen) != hold.before_url:
                continue
            fits = name.fingerprint == self._sources[hold.kind].fingerprint
            if fits or self._is_mine(seen.name):
                hold.name, hold.since_s = seen.name, now_s
                self._dirty.set()
                if not fits:
                    hold.begun = True  # With its own settings; it is never started with those of now.
                    _not_found(hold, f"{seen.name} runs with other settings: it is ended when its requests have")
                return
        if now_s - max(hold.since_s, self._known_s) >= self._times.settle_s:
            hold.ended = True
            self._holds.remove(hold)
            _not_found(hold, f"Ray has no instance of {hold.kind!r} at {hold.before_url} any more")

    def _look(self, hold: Hold, seen: Seen) -> None:
        hold.why = seen.why
        now_s = asyncio.get_running_loop().time()
        patient = hold.before_url and now_s - hold.since_s < self._times.patience_s
        if seen.holder not in ("", self._holder) and not self._advise and not patient:
            hold.name = ""  # Whatever becomes of this one, that is not to be stopped.
            _settle(hold.lost, Loss(reason=f"another gateway ({seen.holder}) has it", outside=True))
            return
        if seen.phase == "ended":
            _settle(hold.lost, Loss(reason=f"its engine ended: {seen.why}", outside=False))
        elif seen.phase == "gone":
            _settle(hold.lost, Loss(reason=seen.why or "its actor is gone", outside=True))
        elif seen.phase == "unknown":
            hold.check_now.set()
        elif seen.phase != "pending":
            _settle(hold.placed, None)
        if seen.phase in ("starting", "ready"):
            hold.begun = True
        if seen.phase == "ready" and (url := _url(seen)):
            _settle(hold.url, url)

    def _sort(self, others: list[Seen], now_s: float) -> None:
        """What no instance of this gateway has: spare, strange or left behind."""
        self._spare = {}
        strange: dict[str, tuple[str, str]] = {}
        seen_s, self._seen_s = self._seen_s, {}
        dead_s, self._dead_s = self._dead_s, {}
        spare_s, self._spare_s = self._spare_s, {}
        for seen in others:
            name = read_name(seen.name)
            if name is None or name.namespace != self.namespace or seen.name in self._stops or seen.stopping:
                continue
            if self._is_neighbours(seen.name):
                continue
            source = self._sources.get(name.kind)
            fits = source is not None and name.fingerprint == source.fingerprint
            if not fits and (seen.holder or seen.phase == "unknown"):
                continue  # Somebody has it, or may have it.
            if not fits and self._is_mine(seen.name):
                told_s = self._settle_s if name.kind in self._sources else self._grace_s
                in_use_s = self._times.other_s + told_s
                if now_s - self._known_s >= in_use_s:
                    self._end(seen.name, self._other(name.kind))
            elif not self._sources:
                continue  # Nobody who could be told.
            elif not fits and seen.phase not in ("ended", "gone"):
                strange[seen.name] = self._stale(name.kind, seen.name, self._other(name.kind))
            elif fits and seen.holder not in ("", self._holder) and not self._advise:
                self._seen_s[seen.name] = since_s = seen_s.get(seen.name, now_s)
                if now_s - since_s > self._times.patience_s:
                    text = f"{seen.name} is another gateway's ({seen.holder}): give each gateway a namespace of its own"
                    strange[seen.name] = name.kind, text
            elif seen.phase in ("ended", "gone"):
                # It was ours, and is dead, or so young that it has no actor yet. The dead give their nodes back.
                self._dead_s[seen.name] = since_s = dead_s.get(seen.name, now_s)
                if now_s - since_s > self._times.settle_s and not self._advise:
                    self._stops[seen.name] = 0.0
            elif seen.phase == "ready" or (not self._advise and seen.phase != "unknown"):
                self._spare_s[seen.name] = since_s = spare_s.get(seen.name, now_s)
                if now_s - since_s <= self._times.spare_s or self._advise:
                    self._spare[seen.name] = seen
                elif self._is_mine(seen.name):
                    self._end(seen.name, "and there are more than may be")
                else:
                    self._spare[seen.name] = seen
                    strange[seen.name] = self._stale(name.kind, seen.name, "and there are more than may be")
        for each in strange.keys() - self._strange.keys():
            kind, text = strange[each]
            log.warning("%s", text)
            self._noted(kind, text)
        self._strange = strange

    def _is_neighbours(self, name: str) -> bool:
        """Another one looks after it, or would if its cluster, which has not answered yet, is this one."""
        kind = _kind(name)
        if kind in self._sources:
            return False
        comes_first = True
        for each in self._neighbours:
            if each is self:
                comes_first = False
            elif (comes_first or kind in each._sources) and each._may_have(name):
                return True
        return False

    def _may_have(self, name: str) -> bool:
        """One that it has only just asked for is in no answer yet."""
        if self._known_s == inf or name in self._told or name in self._stops:
            return True
        return any(hold.name == name for hold in self._holds)

    def _is_mine(self, name: str) -> bool:
        """This gateway, or one that it replaces, has started it, and it may be ended."""
        read = read_name(name)
        return read is not None and bool(self._owner) and read.owner == self._owner and not self._advise

    def _end(self, name: str, why: str) -> None:
        log.warning("%s runs %s: it is ended", name, why)
        source = self._sources.get(_kind(name))
        self._stops[name] = source.stop_timeout_s if source is not None else STOP_TIMEOUT_S
        self._dirty.set()

    def _other(self, kind: str) -> str:
        return "with other settings" if kind in self._sources else f"of {kind!r}, which this config does not have"

    def _stale(self, kind: str, name: str, what: str) -> tuple[str, str]:
        told = kind if kind in self._sources else next(iter(self._sources))
        return told, f"{name} runs {what}; it is not touched (chiron ray remove {self._hint}{name})"

    def _assign(self) -> None:
        """Names for those who have none: of what runs already, else new ones."""
        open_ones = [hold for hold in self._holds if not hold.lost.done() and not hold.placed.done()]
        for hold in [hold for hold in open_ones if not hold.before_url]:
            best = self._best_spare(hold)
            if best is not None:
                if hold.name and not self._advise:
                    self._stops[hold.name] = 0.0  # It has no node, and need not wait for one any more.
                del self._spare[best]
                hold.name, hold.since_s = best, asyncio.get_running_loop().time()
                log.info("takes over %s", best)
                self._dirty.set()
            elif not hold.name and not self._advise and not self._may_be_freed(hold.kind):
                source = self._sources[hold.kind]
                hold.name = new_name(self.namespace, hold.kind, source.fingerprint, self._owner)
                self._dirty.set()

    def _best_spare(self, hold: Hold) -> str | None:
        """What runs already, for one that has nothing yet, or nothing but a place in the queue."""
        order = ("ready", "starting", "idle", "pending", "unknown")
        wanted = order[:3] if hold.name else order
        found = [seen for name, seen in self._spare.items() if _kind(name) == hold.kind and seen.phase in wanted]
        best = min(found, key=lambda seen: (order.index(seen.phase), seen.name), default=None)
        return best.name if best is not None else None

    def _may_be_freed(self, kind: str) -> bool:
        """There are some that an earlier gateway may have left behind; each of those who wait may hope for one."""
        now_s = asyncio.get_running_loop().time()
        hopes = [
            name
            for name, since_s in self._seen_s.items()
            if _kind(name) == kind and now_s - since_s <= self._times.patience_s
        ]
        waiting = [hold for hold in self._holds if hold.kind == kind and not (hold.name or hold.before_url)]
        return len(hopes) >= len(waiting) > 0

    def _troubled(self, why: str) -> None:
        if bool(why) != bool(self._trouble):
            text = f"Ray does not answer: {why}" if why else "Ray answers again"
            log.warning("%s", text)
            if why:
                for kind in self._sources:
                    self._noted(kind, text)
        self._trouble = why


def _url(seen: Seen) -> str:
    """Of its engine; empty until that is known."""
    host = f"[{seen.host}]" if ":" in seen.host else seen.host
    return f"http://{host}:{seen.port}" if seen.host and seen.port else ""


def _kind(name: str) -> str:
    read = read_name(name)
    return read.kind if read is not None else ""


def _not_found(hold: Hold, why: str) -> None:
    """Nothing new begins there, and it goes once what runs there has ended."""
    if not hold.placed.done():
        hold.placed.set_exception(InstanceNotFoundError(why))
        hold.placed.exception()  # It may be removed before anybody asks.


def _settle(future: asyncio.Future[Any], value: object) -> None:
    if not future.done():
        future.set_result(value)
