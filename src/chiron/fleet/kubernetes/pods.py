"""What a pod's object says, checked, and why a pod is not ready, in words.

Only what Chiron needs is read. An object that another controller made, or that says what cannot be, is no pod here.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from ipaddress import ip_address
from typing import Any, Literal

from chiron.fleet.kubernetes.source import NAME

DELETION_COST = "controller.kubernetes.io/pod-deletion-cost"
"""Of the pods of a ReplicaSet those with the lowest go first. Kubernetes 1.22 and later."""
WORDS_MAX = 300

CauseName = Literal[
    "unschedulable", "image", "crash_loop", "out_of_memory", "node_lost", "no_pod", "not_started", "forbidden"
]

FOR_CLIENTS: Mapping[CauseName, str] = {
    "unschedulable": "no node has room for another instance",
    "image": "its engine's image cannot be pulled",
    "crash_loop": "its engine keeps failing to start",
    "out_of_memory": "its engine runs out of memory",
    "node_lost": "its node is lost",
    "no_pod": "the cluster makes no pod for it",
    "not_started": "its engine takes longer than usual to start",
    "forbidden": "the cluster does not let Chiron scale it",
}
"""Why an instance does not come, without what engines and clusters say."""

_PULLS = ("ErrImagePull", "ImagePullBackOff", "InvalidImageName", "ErrImageNeverPull", "RegistryUnavailable")
_CANNOT_RUN = ("CrashLoopBackOff", "CreateContainerConfigError", "CreateContainerError", "RunContainerError")
_NODE_LOST = ("NodeLost", "NodeNotReady", "TerminationByKubelet", "DeletionByTaintManager")
_ORDINAL = re.compile(r"-(\d{1,6})$")
UID = re.compile(r"[\w.:-]{1,128}", re.ASCII)


@dataclass(frozen=True, slots=True, kw_only=True)
class Cause:
    """Why a pod is not ready."""

    name: CauseName
    words: str
    """What the cluster says, for operators."""

    def __str__(self) -> str:
        return f"{self.name.replace('_', ' ')}: {self.words}" if self.words else self.name.replace("_", " ")


@dataclass(frozen=True, slots=True, kw_only=True)
class Pod:
    """One pod, as last heard of."""

    name: str
    uid: str
    created: str
    """RFC 3339."""
    owner: str
    """Name of the controller that made it."""
    address: str
    """An IP address; empty until it has one."""
    ready: bool
    """Kubernetes would send traffic there."""
    scheduled: bool
    deleting: bool
    over: bool
    """All of its containers have ended for good."""
    restarts: int
    cost: int
    cause: Cause | None

    @property
    def ordinal(self) -> int:
        """Of a StatefulSet's pod; -1 without one."""
        found = _ORDINAL.search(self.name)
        return int(found[1]) if found else -1


def read_pod(item: Mapping[str, Any]) -> Pod:
    """Raises ValueError for what is no pod."""
    meta, status = _table(item, "metadata"), _table(item, "status")
    name, uid = meta.get("name"), meta.get("uid")
    # Both become parts of requests, and of what operators read.
    for key, value, form in (("name", name, NAME), ("uid", uid, UID)):
        if not isinstance(value, str) or not form.fullmatch(value):
            raise ValueError(f"a pod whose {key} is {str(value)[:40]!r}, which is none")
    conditions = {str(each.get("type")): each for each in _tables(status, "conditions")}
    containers = _tables(status, "containerStatuses")
    phase = status.get("phase")
    return Pod(
        name=str(name),
        uid=str(uid),
        created=words(meta.get("creationTimestamp")),
        owner=_owner(meta),
        address=read_address(status.get("podIP")),
        ready=_is_true(conditions.get("Ready")) and phase == "Running",
        scheduled=bool(_table(item, "spec").get("nodeName")),
        deleting=bool(meta.get("deletionTimestamp")),
        over=phase in ("Failed", "Succeeded"),
        restarts=max((_whole(each.get("restartCount")) for each in containers), default=0),
        cost=_whole(_table(meta, "annotations").get(DELETION_COST)),
        cause=_cause(status, conditions, containers),
    )


def _cause(
    status: Mapping[str, Any], conditions: Mapping[str, Mapping[str, Any]], containers: list[Mapping[str, Any]]
) -> Cause | None:
    ready = conditions.get("Ready", {})
    for said in (status.get("reason"), ready.get("reason"), conditions.get("DisruptionTarget", {}).get("reason")):
        if said in _NODE_LOST:
            return Cause(name="node_lost", words=words(status.get("message") or ready.get("message") or said))
    scheduled = conditions.get("PodScheduled", {})
    if scheduled.get("status") == "False" and scheduled.get("reason") == "Unschedulable":
        return Cause(name="unschedulable", words=words(scheduled.get("message")))
    for each in [*_tables(status, "initContainerStatuses"), *containers]:
        waiting = _table(_table(each, "state"), "waiting")
        ended = _table(_table(each, "state"), "terminated") or _table(_table(each, "lastState"), "terminated")
        said = waiting.get("reason")
        if said in _PULLS:
            return Cause(name="image", words=words(f"{said}: {waiting.get('message') or each.get('image')}"))
        if ended.get("reason") == "OOMKilled" and not each.get("ready"):
            return Cause(name="out_of_memory", words=words(f"{each.get('name')} was killed for its memory"))
        if said in _CANNOT_RUN or (ended and not each.get("ready")):
            return Cause(name="crash_loop", words=_ending(each, ended, said))
    return None


def _ending(container: Mapping[str, Any], ended: Mapping[str, Any], said: object) -> str:
    how = f"exit code {ended.get('exitCode')}" if ended else str(said)
    message = ended.get("message") or _table(_table(container, "state"), "waiting").get("message")
    return words(f"{container.get('name')} ended ({how}): {message}" if message else f"{container.get('name')}: {how}")


def read_address(said: object) -> str:
    """Of a pod; empty for what no engine can be at."""
    try:
        found = ip_address(said) if isinstance(said, str) else None
    except ValueError:
        return ""
    if found is None or found.is_unspecified or found.is_multicast or found.is_link_local:
        return ""
    return "" if "%" in str(found) else str(found)  # What follows may be any text, in the middle of a URL.


def _owner(meta: Mapping[str, Any]) -> str:
    owners = [each for each in _tables(meta, "ownerReferences") if each.get("controller") is True]
    return words(owners[0].get("name")) if owners else ""


def _table(item: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    found = item.get(key)
    return found if isinstance(found, Mapping) else {}


def _tables(item: Mapping[str, Any], key: str) -> list[Mapping[str, Any]]:
    found = item.get(key)
    return [each for each in found if isinstance(each, Mapping)] if isinstance(found, list) else []


def _is_true(condition: Mapping[str, Any] | None) -> bool:
    return condition is not None and condition.get("status") == "True"


def _whole(value: object) -> int:
    try:
        return max(-(1 << 31), min((1 << 31) - 1, int(str(value))))
    except ValueError:
        return 0


def words(text: object) -> str:
    """One line of bounded length without control characters, for logs and terminals."""
    line = " ".join(str(text or "")[: 4 * WORDS_MAX].split())[:WORDS_MAX]
    return (
        line
        if line.isprintable()
        else "".join(each if each.isprintable() else "\N{REPLACEMENT CHARACTER}" for each in line)
    )
