"""One workload: how many replicas it is to have, which pods serve which instances, and who goes when there are fewer.

Chiron asks for as many replicas as there are instances (``holds``), and never touches the rest: ``surplus`` counts the
replicas that somebody else asked for, or that were there before it. An instance gets a pod only when one is ready,
whichever comes first, so a pod that is slow or gone costs nobody more than its turn.

Fewer replicas: the pods that no instance uses are marked as the cheapest to delete before the number is lowered. Until
the workload's controller has acted, it may still choose others (pods that are not ready go before all marks), so a
marked pod that is left serves again. Pods with ordinals go from the end only: an instance on the last pod moves first.

Whoever else scales the same workload is noticed by a number that Chiron did not write, and is not fought: pods beyond
Chiron's own are left alone until an instance can use them, and after a cut Chiron asks for no more than what is left
for a while (``yield_s``).

Where another scaler is the one to set the number (``scaler``), Chiron never writes it: instances wait for pods until
that scaler has followed the plan, and pods that no instance needs are marked, for when it lowers the number.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from math import inf
from typing import Any

from chiron.core.backoff import doubled_s
from chiron.fleet.kubernetes.client import ApiError, Client, KubernetesError
from chiron.fleet.kubernetes.events import Involved, WorkloadEvents
from chiron.fleet.kubernetes.holds import Hold, Loss, StartFailedError
from chiron.fleet.kubernetes.pods import DELETION_COST, UID, Cause, Pod, read_pod, words
from chiron.fleet.kubernetes.replicas import Replicas
from chiron.fleet.kubernetes.source import CONSENT, CONSENTS, KubernetesSource
from chiron.fleet.kubernetes.watch import Watch, WatchSettings
from chiron.fleet.records import InstanceNotFoundError
from chiron.fleet.waiting import heard, pause

log = logging.getLogger("chiron.fleet")

CHEAPEST = -1_000_000
"""Deletion cost of a pod that is to go."""
TRIES_MAX = 8
"""Of one change of the scale, when others change the workload at the same moment."""
RESTARTS_MAX = 2
"""Restarts after which an engine that keeps ending counts as one that cannot start."""
MARKED_AT_ONCE = 16
"""Pods that are marked side by side."""
NOTES_MAX = 20
"""Shown at once: a broken image breaks every pod."""
CONFLICT, NOT_FOUND = 409, 404
CLAIMS_MAX = 4096
"""Instances of another gateway that are looked for at a time."""
REPLACE_PAUSE_S = 60.0
"""Between two pods that are deleted because they do not answer: an error of ours must not empty a fleet."""


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkloadState:
    """As it is now."""

    holds: int
    found: int
    """Replicas that instances should take over."""
    fewest: int
    """Replicas of which none should go yet, where another scaler sets the number: until those that may are marked."""
    known: bool
    """Its replicas and its pods are known, and whoever takes them over has had time for it."""
    overdue: int
    """Instances that have waited for a pod for too long."""
    most: int | None
    """Replicas that somebody else has cut it to."""
    cause: Cause | None
    """Why the first instance that waits has no pod."""
    notes: tuple[str, ...]
    """For operators."""


class Workload:
    """Started by ``run``; used on the loop's thread."""

    def __init__(
        self,
        source: KubernetesSource,
        client: Client,
        namespace: str,
        *,
        advise: bool = False,
        noted: Callable[[str], None] = lambda text: None,
        why: Callable[[], str] = lambda: "",
        wall_s: Callable[[], float] = lambda: 0.0,
        settings: WatchSettings | None = None,
    ) -> None:
        """``advise``: nothing is written. ``noted`` hears what an operator should know, once when it begins. ``why``:
        the reason of the plan in force, in words. ``wall_s``: Unix time, of events."""
        self.name = f"{source.workload} {namespace}/{source.name}"
        self._source = source
        self._client = client
        self._advise = advise
        self._follows = source.scaler == "external" and not advise
        self._noted = noted
        self._why = why
        self._events = WorkloadEvents(client, wall_s=wall_s, background=self._background)
        self._about = Involved(
            api_version=source.row.api.removeprefix("/apis/"),
            kind=source.row.kind,
            name=source.name,
            namespace=namespace,
        )
        self._planned: int | None = None
        """Instances that the last event of a plan told of."""
        self._settings = settings or WatchSettings()
        self._path = f"{source.row.api}/namespaces/{namespace}/{source.row.plural}"
        self._pods_path = f"/api/v1/namespaces/{namespace}/pods"
        self._pods: dict[str, Pod] = {}
        """Those of this workload, by uid."""
        self._waiting: list[Hold] = []
        self._bound: dict[str, Hold] = {}
        """By uid of the pod."""
        self._doomed: set[str] = set()
        """Pods marked to go, by uid."""
        self._condemned: set[str] = set()
        """Pods that have failed a start, by uid."""
        self._replicas = Replicas(advise=advise, follows=self._follows, yield_s=source.yield_s)
        self._making_way = False
        """Pods are being marked, and the number is not lowered yet."""
        self._allowed: bool | None = None if source.opt_in else True
        """The workload consents, where it has to; None: it has not been heard of yet."""
        self._listed = False
        """All pods are known."""
        self._known_s = inf
        """Since when."""
        self._replaced_s = -REPLACE_PAUSE_S
        self._dirty = asyncio.Event()
        self._woken = False
        self._trouble: dict[str, str] = {}
        """What is wrong, by topic."""
        self._refused: Cause | None = None
        self._controller: Cause | None = None
        self._told: dict[str, str] = {}
        """The last cause that was noted of a pod, by uid: a crash loop says the same with other numbers each time."""
        self._tasks: set[asyncio.Task[Any]] = set()

    # -- instances ---------------------------------------------------------------------------------------------------

    @property
    def spare(self) -> int:
        """Replicas that no instance has claimed."""
        return self._replicas.surplus if self._allowed else 0

    def may_claim(self, address: str) -> bool:
        """Whether the pod at this address, if there is one, may be somebody's who claims it."""
        claimed = {hold.address for hold in self._waiting if hold.address}
        bound = {pod.address for uid, pod in self._pods.items() if uid in self._bound}
        return address not in claimed | bound and len(claimed) < CLAIMS_MAX

    def hold(self, check_now: asyncio.Event, left: Callable[[str], None], address: str = "") -> Hold:
        """Another instance wants a pod: that at ``address``, where there is one."""
        hold = Hold(asyncio.get_running_loop().time(), check_now, left, address)
        self._replicas.take()
        self._waiting.append(hold)
        self._replicas.fewest = max(self._replicas.fewest, self._own())
        self._wake()
        return hold

    def wait_again(self, hold: Hold) -> None:
        """The pod that it had ended before the instance was ready."""
        self._unbind(hold)
        loop = asyncio.get_running_loop()
        hold.pod, hold.lost, hold.leaving = loop.create_future(), loop.create_future(), False
        if hold.without:
            hold.without = False
            self._replicas.take()
        self._waiting.insert(0, hold)
        self._wake()

    def release(self, hold: Hold) -> None:
        """The instance is gone. Harmless twice."""
        if hold.ended:
            return
        hold.ended = True
        if hold in self._waiting:
            self._waiting.remove(hold)
        self._unbind(hold)
        self._wake()

    def replace(self, hold: Hold) -> None:
        """The instance's engine does not answer while its pod claims to be ready, or its node is lost: have another pod
        made for it, if this is not the gateway's own trouble."""
        uid = next((uid for uid, each in self._bound.items() if each is hold), "")
        pod = self._pods.get(uid)
        now_s = asyncio.get_running_loop().time()
        if pod is None or pod.deleting or self._advise or not self._allowed:
            return
        lost = pod.cause is not None and pod.cause.name == "node_lost"
        if not (pod.ready or lost):
            return  # Kubernetes sees that something is wrong with it, and restarts its container.
        if now_s - self._replaced_s < REPLACE_PAUSE_S:
            return
        self._replaced_s = now_s
        self._note(f"pod {pod.name} does not answer{' and its node is lost' if lost else ''}: deleted, for a new one")
        self._background(self._client.delete(f"{self._pods_path}/{pod.name}", {"preconditions": {"uid": pod.uid}}))

    def state(self) -> WorkloadState:
        now_s = asyncio.get_running_loop().time()
        limit_s = self._source.start_timeout_s
        overdue = sum(1 for hold in self._waiting if now_s - hold.since_s > limit_s)
        notes = [
            f"{self.name}: {text}" for text in (*self._trouble.values(), self._replicas.foreign, self._behind()) if text
        ]
        unready = [pod for pod in self._pods.values() if pod.cause is not None and not pod.ready and not pod.deleting]
        notes += [f"pod {pod.name}: {pod.cause}" for pod in sorted(unready, key=_age)]
        return WorkloadState(
            holds=len(self._waiting) + len(self._bound),
            found=0 if not self._allowed else self._replicas.surplus if self._advise else self._replicas.found,
            fewest=self._replicas.fewest if self._follows else 0,
            known=self._known(),
            overdue=overdue,
            most=self._replicas.most,
            cause=self._why_waiting() if self._waiting else None,
            notes=tuple(notes[:NOTES_MAX]),
        )

    def _known(self) -> bool:
        return asyncio.get_running_loop().time() - self._known_s >= self._settings.settle_s

    # -- what runs ---------------------------------------------------------------------------------------------------

    async def run(self) -> None:
        """Until cancelled."""
        selector = await self._selector()
        pods = Watch(
            self._client,
            self._pods_path,
            {"labelSelector": selector},
            changed=self._pod_changed,
            gone=self._pod_gone,
            listed=self._pods_listed,
            troubled=self._pods_troubled,
            settings=self._settings,
        )
        itself = Watch(
            self._client,
            self._path,
            {"fieldSelector": f"metadata.name={self._source.name}"},
            changed=self._changed,
            gone=self._workload_gone,
            troubled=lambda why: self._troubled("workload", why and f"it cannot be watched: {why}"),
            settings=self._settings,
        )
        async with asyncio.TaskGroup() as tasks:
            for each in (pods.run(), itself.run(), self._keep_scaled()):
                tasks.create_task(each)

    async def close(self) -> None:
        """Nothing is scaled: whoever comes next takes over what runs."""
        for task in self._tasks:
            task.cancel()
        if self._tasks:
            await asyncio.wait(list(self._tasks), timeout=1.0)

    async def _selector(self) -> str:
        """Of its pods."""
        failures = 0
        while True:
            try:
                scale = await self._client.get(f"{self._path}/{self._source.name}/scale")
                selector = _table(scale, "status").get("selector")
                if not isinstance(selector, str) or not selector:
                    raise KubernetesError("its scale names no selector")
                self._observe(_replicas(scale))
                self._refusal(None)
                return selector
            except KubernetesError as error:
                self._refusal(error)
            failures += 1
            await pause(doubled_s(self._settings.backoff_first_s, self._settings.backoff_max_s, failures - 1))

    async def _keep_scaled(self) -> None:
        failures = 0
        while True:
            until_s = self._replicas.most_until_s if self._replicas.most is not None else None
            now_s = asyncio.get_running_loop().time()
            await heard(self._dirty, 3600.0 if until_s is None else until_s - now_s)
            self._dirty.clear()
            try:
                written = await self._scale()
                self._refusal(None)
                failures = 0
                self._assign()
                # What has to wait is asked again when something happens: at once would be a loop without a pause.
                if written and self._replicas.number != self._wanted():
                    self._dirty.set()
            except KubernetesError as error:
                self._refusal(error)
                failures += 1
                self._dirty.set()
                await pause(doubled_s(self._settings.backoff_first_s, self._settings.backoff_max_s, failures - 1))

    async def _scale(self) -> bool:
        """False: there is nothing to write now."""
        path = f"{self._path}/{self._source.name}/scale"
        for _ in range(TRIES_MAX):
            scale = await self._client.get(path)
            replicas = _replicas(scale)
            self._observe(replicas)
            self._tell_plan(replicas)
            if (
                not self._allowed
                or self._advise
                or self._wanted() == replicas
                or (self._follows and self._wanted() > replicas)
            ):
                self._replicas.fewest = self._wanted()
                return False
            self._making_way = True
            try:
                wanted = await self._make_way(replicas, self._wanted())
                self._replicas.fewest = max(wanted, self._own())
                if wanted == replicas or self._follows:
                    return False  # Its scaler lowers the number, when it likes, and finds marks.
                self._replicas.attempted = wanted
                await self._client.put(path, {**scale, "spec": {**_table(scale, "spec"), "replicas": wanted}})
                self._replicas.number = wanted
            except ApiError as error:
                if error.status < 500:  # Otherwise it may have been done.
                    self._replicas.attempted = None
                if error.status != CONFLICT:
                    raise
                continue  # Somebody else has changed it since: what does it say now?
            finally:
                self._making_way = False
            log.info("%s: %d -> %d replicas", self.name, replicas, wanted)
            self._tell("ScaledUp" if wanted > replicas else "ScaledDown", f"{replicas} -> {wanted} replicas")
            return True
        raise KubernetesError(f"its scale was changed by others {TRIES_MAX} times in a row")

    def _tell_plan(self, replicas: int) -> None:
        """To whoever scales in Chiron's place."""
        own = self._own()
        before, self._planned = self._planned, own
        if self._follows and before is not None and before != own:
            self._tell("Planned", f"{own} instances are planned, where {replicas} replicas are asked for")

    def _tell(self, reason: str, text: str) -> None:
        why = self._why()
        self._events.tell(self._about, reason, f"{text}: {why}" if why else text)

    def _wanted(self) -> int:
        claims = sum(1 for hold in self._waiting if hold.address)
        return self._replicas.wanted(self._own(), claims, asyncio.get_running_loop().time())

    def _own(self) -> int:
        """Replicas that instances have, or wait for."""
        return len(self._waiting) + sum(not hold.without for hold in self._bound.values())

    def _leave_without(self, hold: Hold, reason: str) -> None:
        """Its replica stays."""
        hold.leave(reason)
        if not hold.without:
            hold.without = True
            self._replicas.give_back(self._own())

    def _observe(self, number: int) -> None:
        replicas = self._replicas
        first, holds = replicas.number is None, len(self._waiting) + len(self._bound)
        others = replicas.observe(number, own=self._own(), holds=holds, now_s=asyncio.get_running_loop().time())
        if first and replicas.surplus and not self._advise:
            log.info("%s: it has %d replicas, which are taken over", self.name, number)
        if others:
            self._note(replicas.foreign)
            self._events.tell(self._about, "ScaledByOthers", replicas.foreign, warning=True)

    async def _make_way(self, replicas: int, wanted: int) -> int:
        """Name those that go. Returns how few replicas there can be now."""
        if wanted > replicas:
            return wanted
        if not self._listed or self._trouble.get("pods"):
            return replicas  # Nobody could be named.
        if self._source.row.ordinals:
            return self._from_the_end(replicas, wanted)
        idle = sorted(
            (pod for pod in self._active() if pod.uid not in self._bound),
            key=lambda pod: (pod.ready, pod.uid not in self._condemned, pod.created, pod.name),
        )
        going = idle[: replicas - wanted]
        self._doomed.update(pod.uid for pod in going)
        marks = [pod for pod in going if pod.cost != CHEAPEST]
        for i in range(0, len(marks), MARKED_AT_ONCE):
            await asyncio.gather(*(self._mark(pod, str(CHEAPEST)) for pod in marks[i : i + MARKED_AT_ONCE]))
        return wanted

    def _from_the_end(self, replicas: int, wanted: int) -> int:
        by_ordinal = {pod.ordinal: pod for pod in self._active()}
        while replicas > wanted:
            last = by_ordinal.get(replicas - 1)
            hold = self._bound.get(last.uid) if last is not None else None
            if last is not None and hold is not None:
                # Its instance moves to a pod that stays.
                hold.leave(f"pod {last.name} is the last of {self.name}, which goes first")
                break
            if last is not None:
                self._doomed.add(last.uid)
            replicas -= 1
        return replicas

    async def _mark(self, pod: Pod, cost: str | None) -> None:
        try:
            body = {"metadata": {"annotations": {DELETION_COST: cost}, "uid": pod.uid}}
            await self._client.patch(f"{self._pods_path}/{pod.name}", body)
        except ApiError as error:
            if error.status not in (CONFLICT, NOT_FOUND):  # It has gone meanwhile.
                raise

    # -- what the API server says ------------------------------------------------------------------------------------

    def _pod_changed(self, item: Mapping[str, Any]) -> None:
        try:
            pod = read_pod(item)
        except ValueError as error:
            log.warning("%s: %s", self.name, error)
            return
        if not self._is_ours(pod):
            return
        before = self._pods.get(pod.uid)
        self._pods[pod.uid] = pod
        if pod.cause is not None and not pod.ready and pod.cause.name != self._told.get(pod.uid):
            self._told[pod.uid] = pod.cause.name
            self._note(f"pod {pod.name}: {pod.cause}")
        hold = self._bound.get(pod.uid)
        if hold is not None and before is not None:
            self._look_at_bound(hold, before, pod)
        if hold is not None and pod.cost == CHEAPEST and not self._advise:
            # It was marked, and given to an instance before this was heard.
            self._background(self._mark(pod, None))
        self._wake()

    def _look_at_bound(self, hold: Hold, before: Pod, pod: Pod) -> None:
        if pod.over:
            _settle(hold.lost, Loss(reason=f"pod {pod.name} has ended: {pod.cause or 'for good'}", taken=False))
        elif pod.restarts > before.restarts or _has_ended(pod):
            why = f"the engine of pod {pod.name} has ended: {pod.cause or 'it was restarted'}"
            _settle(hold.lost, Loss(reason=why, taken=False))
        elif not pod.ready and before.ready:
            hold.check_now.set()
        if pod.deleting and not before.deleting:
            if self._known():
                hold.leave(_why_it_goes(pod))
            else:  # Nobody decides yet how many there are to be.
                self._leave_without(hold, _why_it_goes(pod))

    def _pods_listed(self) -> None:
        if not self._listed:
            self._known_s = asyncio.get_running_loop().time()
        self._listed = True
        self._wake()

    def _pods_troubled(self, why: str) -> None:
        if self._trouble.get("pods") and not why:
            self._wake()  # Fewer replicas may have had to wait for this.
        self._troubled("pods", why and f"its pods cannot be watched: {why}")

    def _pod_gone(self, uid: str) -> None:
        pod = self._pods.pop(uid, None)
        self._doomed.discard(uid)
        self._condemned.discard(uid)
        self._told.pop(uid, None)
        hold = self._bound.get(uid)
        if hold is not None and pod is not None:
            _settle(hold.lost, Loss(reason=f"pod {pod.name} is gone", taken=True))
        self._wake()

    def _changed(self, item: Mapping[str, Any]) -> None:
        """The workload itself."""
        uid = _table(item, "metadata").get("uid")
        if isinstance(uid, str) and UID.fullmatch(uid):
            self._about = replace(self._about, uid=uid)
        if self._source.opt_in:
            self._hear_consent(_table(_table(item, "metadata"), "labels").get(CONSENT) == CONSENTS)
        status = item.get("status")
        conditions = status.get("conditions") if isinstance(status, Mapping) else None
        self._controller = None
        for each in conditions if isinstance(conditions, list) else ():
            if isinstance(each, Mapping) and each.get("type") == "ReplicaFailure" and each.get("status") == "True":
                self._controller = Cause(name="no_pod", words=words(each.get("message") or each.get("reason")))
        self._troubled("controller", str(self._controller or ""))
        spec = item.get("spec")
        if isinstance(spec, Mapping) and spec.get("replicas") != self._replicas.number:
            self._dirty.set()

    def _workload_gone(self, uid: str) -> None:
        if self._source.opt_in:
            self._allowed = None  # One of this name that comes later has to consent, too.
        self._dirty.set()

    def _hear_consent(self, allowed: bool) -> None:
        if self._allowed and not allowed:
            for hold in self._bound.values():
                hold.leave(f"{self.name} has lost its label {CONSENT}={CONSENTS}")
                hold.without = True  # The replica is its owner's.
        if self._allowed is False and allowed:
            self._replicas.find_all(self._own())
        changed, self._allowed = self._allowed is not allowed, allowed
        self._troubled("consent", "" if allowed else self._no_consent())
        if changed:
            self._wake()
            self._dirty.set()

    def _no_consent(self) -> str:
        how = f"kubectl label {self._source.workload} {self._source.name} {CONSENT}={CONSENTS}"
        return f"a ChironModel may not use it until its owner says so: {how}"

    def _refusal(self, error: KubernetesError | None) -> None:
        self._troubled("scale", f"it cannot be scaled: {error}" if error is not None else "")
        said = error.status if isinstance(error, ApiError) else 0
        self._refused = Cause(name="forbidden", words=str(error)) if said in (401, 403, 404) else None

    # -- who gets which pod ------------------------------------------------------------------------------------------

    def _wake(self) -> None:
        """Something has happened. Once for all of one turn of the loop: a list may bring thousands of pods."""
        if not self._woken:
            self._woken = True
            asyncio.get_running_loop().call_soon(self._look)

    def _look(self) -> None:
        self._woken = False
        self._assign()
        if self._replicas.number != self._wanted():
            self._dirty.set()

    def _assign(self) -> None:
        """Ready pods to the instances that wait."""
        active = self._active()
        if not self._making_way and self._replicas.number is not None and len(active) <= self._replicas.number:
            self._doomed.clear()  # Those who are left stay.
        for hold in [each for each in self._waiting if each.address]:
            self._find(hold)
        free = [pod for pod in active if self._allowed and pod.ready and pod.address and self._is_idle(pod)]
        waiting = [hold for hold in self._waiting if not hold.address]
        for pod, hold in zip(sorted(free, key=_age), waiting, strict=False):
            self._bind(pod, hold)
        for hold, pod in self._pairs():
            if pod.cause is not None and _is_final(pod):
                self._condemned.add(pod.uid)
                self._waiting.remove(hold)
                _fail(hold.pod, StartFailedError(pod.cause))

    def _bind(self, pod: Pod, hold: Hold) -> None:
        self._waiting.remove(hold)
        self._bound[pod.uid] = hold
        self._condemned.discard(pod.uid)
        self._doomed.discard(pod.uid)
        _settle(hold.pod, pod)
        if pod.cost < 0 and not self._advise:
            self._background(self._mark(pod, None))

    def _find(self, hold: Hold) -> None:
        """The pod that this instance had under another gateway: it may be closing, or not ready for a moment."""
        if self._allowed is None:
            return
        there = (pod for pod in self._pods.values() if self._allowed and pod.address == hold.address and not pod.over)
        pod = next((pod for pod in there if pod.uid not in self._bound), None)
        if pod is not None:
            self._bind(pod, hold)
            if pod.deleting:
                self._leave_without(hold, _why_it_goes(pod))
        elif self._listed and not self._trouble.get("pods"):
            self._waiting.remove(hold)
            hold.ended = True
            why = f"has no pod at {hold.address} any more" if self._allowed else f"cannot be used: {self._no_consent()}"
            _fail(hold.pod, InstanceNotFoundError(f"{self.name} {why}"))
            self._replicas.give_back(self._own())

    def _pairs(self) -> list[tuple[Hold, Pod]]:
        """Instances that wait, each with the pod that it waits for if all goes as planned."""
        coming = [pod for pod in self._active() if not pod.ready and self._is_idle(pod)]
        coming = [pod for pod in coming if pod.uid not in self._condemned]
        waiting = [hold for hold in self._waiting if not hold.address]
        return list(zip(waiting, sorted(coming, key=_age), strict=False))

    def _why_waiting(self) -> Cause:
        if self._allowed is False:
            return Cause(name="forbidden", words=self._no_consent())
        pairs = self._pairs()
        cause = next((pod.cause for _, pod in pairs if pod.cause is not None), None)
        why = self._behind() or "there is no pod yet"
        unknown = Cause(name="not_started", words="") if pairs else Cause(name="no_pod", words=why)
        return cause or self._refused or self._controller or unknown

    def _behind(self) -> str:
        """What its scaler has not done yet; empty: nothing."""
        own = self._own()
        if not self._follows or self._replicas.number is None or self._replicas.number >= own:
            return ""
        return f"whoever scales it has it at {self._replicas.number} replicas; {own} are planned"

    def _active(self) -> list[Pod]:
        return [pod for pod in self._pods.values() if not pod.deleting and not pod.over]

    def _is_idle(self, pod: Pod) -> bool:
        return pod.uid not in self._bound and pod.uid not in self._doomed

    def _is_ours(self, pod: Pod) -> bool:
        """The selector may fit pods of others."""
        name = self._source.name
        # A Deployment's pods belong to ReplicaSets, which have its name and a hash without a dash.
        return name == (pod.owner.rpartition("-")[0] if self._source.workload == "deployment" else pod.owner)

    def _unbind(self, hold: Hold) -> None:
        for uid in [uid for uid, each in self._bound.items() if each is hold]:
            del self._bound[uid]

    def _troubled(self, topic: str, why: str) -> None:
        if why and not self._trouble.get(topic):
            self._note(why)
        elif not why and self._trouble.get(topic):
            log.warning("%s: no longer: %s", self.name, self._trouble[topic])
        self._trouble[topic] = why

    def _note(self, text: str) -> None:
        log.warning("%s: %s", self.name, text)
        self._noted(f"{self.name}: {text}")

    def _background(self, call: Any) -> None:
        async def run() -> None:
            try:
                await call
            except KubernetesError as error:
                log.warning("%s: %s", self.name, error)

        task = asyncio.get_running_loop().create_task(run())
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


def _age(pod: Pod) -> tuple[str, int, str]:
    """The oldest first; of numbered ones the lowest: they stay longest."""
    return pod.created, pod.ordinal, pod.name


def _why_it_goes(pod: Pod) -> str:
    return f"pod {pod.name} is being deleted: {pod.cause or 'by the cluster or by somebody else'}"


def _has_ended(pod: Pod) -> bool:
    return not pod.ready and pod.cause is not None and pod.cause.name in ("crash_loop", "out_of_memory")


def _is_final(pod: Pod) -> bool:
    """It will not become ready by waiting."""
    assert pod.cause is not None
    return pod.cause.name == "image" or (_has_ended(pod) and pod.restarts >= RESTARTS_MAX)


def _table(item: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    found = item.get(key)
    return found if isinstance(found, Mapping) else {}


def _replicas(scale: Mapping[str, Any]) -> int:
    replicas = _table(scale, "spec").get("replicas", 0)
    if not isinstance(replicas, int) or isinstance(replicas, bool) or replicas < 0:
        raise KubernetesError(f"its scale says replicas {replicas!r}")
    return replicas


def _settle(future: asyncio.Future[Any], value: object) -> None:
    if not future.done():
        future.set_result(value)


def _fail(future: asyncio.Future[Any], error: Exception) -> None:
    if not future.done():
        future.set_exception(error)
