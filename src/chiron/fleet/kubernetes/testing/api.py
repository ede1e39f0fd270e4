"""A Kubernetes API server in memory, for tests without a cluster.

What clients build on is as in the real one: versions that grow with every change, conflicts (409) on stale writes,
lists in pages, watches that begin at a version and expire (410) when it is too old, bookmarks, label and field
selectors, the scale and status subresources, deletion with grace, preconditions, and owners whose deletion takes what
they own along.
Objects are not validated beyond that. Our own tests hold it and a real kube-apiserver to the same contract.

    async with FakeKubernetes() as api:
        api.url                                  # http://127.0.0.1:PORT
        api.apply({"apiVersion": "apps/v1", "kind": "Deployment", ...})

``testing.controllers`` turns Deployments and StatefulSets into pods and places them, ``testing.kubelet`` runs them.
"""

from __future__ import annotations

import asyncio
import copy
import datetime
import re
import uuid
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import parse_qs, unquote

import orjson

from chiron.net.server import HttpServer, Incoming, serve

Object = dict[str, Any]

HISTORY = 1000
"""Events that a watch may begin before."""
GRACE_S = 30


@dataclass(frozen=True, slots=True, kw_only=True)
class Resource:
    """A kind of object."""

    api: str
    plural: str
    kind: str
    namespaced: bool = True
    scale: bool = False
    status: bool = False
    """Its status is written apart, and only there: a custom resource with that subresource."""

    @property
    def version(self) -> str:
        return self.api.removeprefix("/apis/").removeprefix("/api/")


RESOURCES = (
    Resource(api="/api/v1", plural="pods", kind="Pod"),
    Resource(api="/api/v1", plural="nodes", kind="Node", namespaced=False),
    Resource(api="/api/v1", plural="events", kind="Event"),
    Resource(api="/apis/apps/v1", plural="deployments", kind="Deployment", scale=True),
    Resource(api="/apis/apps/v1", plural="statefulsets", kind="StatefulSet", scale=True),
    Resource(api="/apis/leaderworkerset.x-k8s.io/v1", plural="leaderworkersets", kind="LeaderWorkerSet", scale=True),
    Resource(api="/apis/coordination.k8s.io/v1", plural="leases", kind="Lease"),
    Resource(api="/apis/chiron-serving.io/v1alpha1", plural="chironmodels", kind="ChironModel", status=True),
)


class Refusal(Exception):  # noqa: N818 - it is an answer, as Kubernetes words it.
    """A ``Status`` in place of what was asked for."""

    def __init__(self, code: int, reason: str, message: str) -> None:
        super().__init__(message)
        self.code = code
        self.body = {
            "kind": "Status",
            "apiVersion": "v1",
            "metadata": {},
            "status": "Failure",
            "message": message,
            "reason": reason,
            "code": code,
        }


@dataclass(slots=True)
class _Watcher:
    incoming: Incoming
    resource: Resource
    fits: Callable[[Object], bool]
    namespace: str
    bookmarks: bool


class FakeKubernetes:
    """The server, and the same objects for whoever runs in this process."""

    def __init__(self, *, token: str = "") -> None:
        """``token``: the only one that is let in; empty: everybody is."""
        self.requests: list[tuple[str, str]] = []
        """Method and path of each request, for tests."""
        self.interfere: Callable[[str, str], Refusal | None] = lambda method, path: None
        """Called with method and path before a request is served: what it returns is the answer instead."""
        self.changed: list[Callable[[Resource, str, Object], None]] = []
        """Hear of every change, inside this process: resource, ``ADDED``, ``MODIFIED`` or ``DELETED``, object."""
        self._token = token
        self._objects: dict[tuple[str, str, str], Object] = {}
        """By plural, namespace and name."""
        self._version = 0
        self._history: deque[tuple[int, str, Resource, Object, Object | None]] = deque(maxlen=HISTORY)
        self._oldest = 0
        """Changes up to this version are forgotten."""
        self._watchers: list[_Watcher] = []
        self._pages: dict[str, tuple[list[Object], str]] = {}
        self._server: HttpServer | None = None
        self._timers: set[asyncio.TimerHandle] = set()
        self._port = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._port}"

    async def __aenter__(self) -> FakeKubernetes:
        await self.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.stop()

    async def start(self) -> None:
        """Again after ``stop`` it is at the same address, with all objects and no memory of changes, as when a real one
        restarts."""
        self._server = await serve(self._handle, port=self._port)
        self._port = self._server.port

    async def stop(self) -> None:
        for timer in self._timers:
            timer.cancel()
        self.cut_watches()
        if self._server is not None:
            await shut(self._server)
            self._server = None
        self.expire()

    def cut_watches(self) -> None:
        """Every connection that watches is lost."""
        watchers, self._watchers = self._watchers, []
        for watcher in watchers:
            watcher.incoming.abort()

    def expire(self) -> None:
        """No version before now is known any more."""
        self._history.clear()
        self._oldest = self._version
        self._pages.clear()

    # -- objects, for this process -----------------------------------------------------------------------------------

    def apply(self, item: Mapping[str, Any]) -> Object:
        """Create it, or replace what is there."""
        resource = self._of_kind(str(item["apiVersion"]), str(item["kind"]))
        namespace = str(item["metadata"].get("namespace") or "default") if resource.namespaced else ""
        before = self._objects.get((resource.plural, namespace, str(item["metadata"]["name"])))
        if before is None:
            return self.create(resource, namespace, item)
        return self.update(resource, before, {**item, "metadata": {**before["metadata"], **item["metadata"]}}, "")

    def all(self, plural: str) -> list[Object]:
        """In order of creation."""
        return [copy.deepcopy(item) for (kind, _, _), item in self._objects.items() if kind == plural]

    def get(self, plural: str, name: str, namespace: str = "default") -> Object:
        return copy.deepcopy(self._found(self._resource(plural), namespace, name))

    def patch(
        self, plural: str, name: str, patch: Mapping[str, Any], part: str = "", namespace: str = "default"
    ) -> Object:
        resource = self._resource(plural)
        before = self._found(resource, namespace if resource.namespaced else "", name)
        return self.update(resource, before, _merged(before, patch), part)

    def create(self, resource: Resource, namespace: str, item: Mapping[str, Any]) -> Object:
        made = copy.deepcopy(dict(item))
        meta = made.setdefault("metadata", {})
        if not meta.get("name") and meta.get("generateName"):
            meta["name"] = meta["generateName"] + uuid.uuid4().hex[:5]
        key = (resource.plural, namespace, str(meta["name"]))
        if key in self._objects:
            raise Refusal(409, "AlreadyExists", f'{resource.plural} "{meta["name"]}" already exists')
        made |= {"apiVersion": resource.version, "kind": resource.kind}
        meta |= {"uid": str(uuid.uuid4()), "creationTimestamp": now(), "generation": 1}
        if resource.namespaced:
            meta["namespace"] = namespace
        if resource.status:
            made.pop("status", None)
        if resource.plural == "pods":
            made.setdefault("status", {"phase": "Pending"})
            made.setdefault("spec", {}).setdefault("terminationGracePeriodSeconds", GRACE_S)
        if resource.scale:
            made.setdefault("spec", {}).setdefault("replicas", 1)
            made.setdefault("status", {"replicas": 0})
        self._objects[key] = made
        self._record("ADDED", resource, made)
        return copy.deepcopy(made)

    def update(self, resource: Resource, before: Object, after: Mapping[str, Any], part: str) -> Object:
        """``part``: ``status``, or empty for all but the status. Raises Refusal for one made of an old version."""
        meta = after.get("metadata", {})
        for key in ("resourceVersion", "uid"):
            if meta.get(key) and meta[key] != before["metadata"][key]:
                raise Refusal(
                    409,
                    "Conflict",
                    f'Operation cannot be fulfilled on {resource.plural} "{before["metadata"]["name"]}": '
                    "the object has been modified",
                )
        made = copy.deepcopy(before)
        if part == "status":
            made["status"] = copy.deepcopy(after.get("status", {}))
        else:
            made |= {key: copy.deepcopy(after[key]) for key in after if key not in ("metadata", "status")}
            for key in ("labels", "annotations", "finalizers", "ownerReferences"):
                if key in meta:
                    made["metadata"][key] = copy.deepcopy(meta[key])
                elif "name" in meta:  # The whole object, which has none.
                    made["metadata"].pop(key, None)
            if made.get("spec") != before.get("spec"):
                made["metadata"]["generation"] = before["metadata"].get("generation", 1) + 1
        if made == before:
            return copy.deepcopy(before)
        self._objects[self._key(resource, made)] = made
        self._record("MODIFIED", resource, made, before)
        return copy.deepcopy(made)

    def delete(self, resource: Resource, item: Object, grace_s: int | None = None) -> Object:
        """A pod that runs on a node is only marked, and its kubelet deletes it when it has ended."""
        meta = item["metadata"]
        if resource.plural == "pods" and grace_s != 0 and item.get("spec", {}).get("nodeName"):
            if meta.get("deletionTimestamp"):
                return copy.deepcopy(item)
            seconds = grace_s if grace_s is not None else int(item["spec"]["terminationGracePeriodSeconds"])
            made = copy.deepcopy(item)
            made["metadata"] |= {"deletionTimestamp": now(seconds), "deletionGracePeriodSeconds": seconds}
            self._objects[self._key(resource, made)] = made
            self._record("MODIFIED", resource, made)
            return copy.deepcopy(made)
        self._objects.pop(self._key(resource, item), None)
        self._record("DELETED", resource, copy.deepcopy(item))
        for owned in [each for each in self._objects.values() if _is_owned(each, meta["uid"])]:
            self.delete(self._of_kind(owned["apiVersion"], owned["kind"]), owned)
        return copy.deepcopy(item)

    # -- HTTP --------------------------------------------------------------------------------------------------------

    def _handle(self, incoming: Incoming) -> None:
        method = incoming.method.decode("ascii")
        query = {key: values[-1] for key, values in parse_qs(incoming.query.decode("ascii")).items()}
        self.requests.append((method, incoming.path))
        try:
            refused = self.interfere(method, incoming.path)
            if refused is not None:
                raise refused
            if self._token and incoming.header(b"authorization") != f"Bearer {self._token}".encode():
                raise Refusal(401, "Unauthorized", "Unauthorized")
            if incoming.path in ("/readyz", "/healthz", "/version"):
                incoming.respond(200, orjson.dumps({"major": "1", "minor": "37"}))
                return
            resource, namespace, name, part = self._route(incoming.path)
            if not name and method == "GET" and query.get("watch") in ("true", "1"):
                self._watch(incoming, resource, namespace, query)
                return
            status, answer = self._serve(method, resource, namespace, name, part, query, incoming)
            incoming.respond(status, orjson.dumps(answer))
        except Refusal as refusal:
            incoming.respond(refusal.code, orjson.dumps(refusal.body))
        except (orjson.JSONDecodeError, KeyError, TypeError, ValueError) as error:
            bad = Refusal(400, "BadRequest", f"{type(error).__name__}: {error}")
            incoming.respond(bad.code, orjson.dumps(bad.body))

    def _serve(
        self,
        method: str,
        resource: Resource,
        namespace: str,
        name: str,
        part: str,
        query: Mapping[str, str],
        incoming: Incoming,
    ) -> tuple[int, Object]:
        if not name:
            if method == "GET":
                return 200, self._list(resource, namespace, query)
            if method == "POST":
                return 201, self.create(resource, namespace, orjson.loads(incoming.body))
            raise Refusal(405, "MethodNotAllowed", f"{method} is not allowed")
        before = self._found(resource, namespace, name)
        if method == "DELETE":
            options = orjson.loads(incoming.body) if incoming.body else {}
            wanted = options.get("preconditions") or {}
            if any(wanted.get(key) not in (None, before["metadata"][key]) for key in ("uid", "resourceVersion")):
                raise Refusal(409, "Conflict", f'the precondition does not hold for {resource.plural} "{name}"')
            grace = options.get("gracePeriodSeconds", query.get("gracePeriodSeconds"))
            return 200, self.delete(resource, before, int(grace) if grace is not None else None)
        if part == "scale":
            return 200, self._scale(method, resource, before, incoming)
        if method == "GET":
            return 200, before
        if method == "PUT":
            return 200, self.update(resource, before, orjson.loads(incoming.body), part)
        if method == "PATCH":
            return 200, self.update(resource, before, _merged(before, self._patch_of(incoming)), part)
        raise Refusal(405, "MethodNotAllowed", f"{method} is not allowed")

    def _scale(self, method: str, resource: Resource, before: Object, incoming: Incoming) -> Object:
        if not resource.scale:
            raise Refusal(404, "NotFound", "the server could not find the requested resource")
        scale = _scale_of(before)
        if method == "GET":
            return scale
        wanted = orjson.loads(incoming.body) if method == "PUT" else _merged(scale, self._patch_of(incoming))
        replicas = wanted["spec"].get("replicas", 0)
        if not isinstance(replicas, int) or replicas < 0:
            raise Refusal(422, "Invalid", f"spec.replicas: Invalid value: {replicas}")
        meta = {"resourceVersion": wanted.get("metadata", {}).get("resourceVersion")}
        spec = {**before["spec"], "replicas": replicas}
        return _scale_of(self.update(resource, before, {"metadata": meta, "spec": spec}, ""))

    def _patch_of(self, incoming: Incoming) -> Mapping[str, Any]:
        if incoming.header(b"content-type") != b"application/merge-patch+json":
            raise Refusal(415, "UnsupportedMediaType", "only application/merge-patch+json is understood here")
        patch: Mapping[str, Any] = orjson.loads(incoming.body)
        return patch

    def _list(self, resource: Resource, namespace: str, query: Mapping[str, str]) -> Object:
        if token := query.get("continue"):
            if token not in self._pages:
                raise Refusal(410, "Expired", "The provided continue parameter is too old")
            items, version = self._pages.pop(token)
        else:
            fits = _selection(query)
            items = [item for item in self._objects.values() if self._is_in(item, resource, namespace) and fits(item)]
            version = str(self._version)
        limit = int(query.get("limit") or 0) or len(items)
        head: Object = {"resourceVersion": version}
        if len(items) > limit:
            head["continue"] = uuid.uuid4().hex
            self._pages[head["continue"]] = items[limit:], version
        kind = f"{resource.kind}List"
        return {"kind": kind, "apiVersion": resource.version, "metadata": head, "items": items[:limit]}

    def _watch(self, incoming: Incoming, resource: Resource, namespace: str, query: Mapping[str, str]) -> None:
        begin = query.get("resourceVersion") or "0"
        watcher = _Watcher(
            incoming, resource, _selection(query), namespace, query.get("allowWatchBookmarks") in ("true", "1")
        )
        incoming.start(200, [(b"content-type", b"application/json")])
        if begin not in ("", "0") and int(begin) < self._oldest:
            gone = Refusal(410, "Expired", f"too old resource version: {begin} ({self._oldest})")
            self._tell(watcher, "ERROR", gone.body)
            incoming.finish()
            return
        if begin in ("", "0"):
            for item in list(self._objects.values()):
                self._tell_if_fits(watcher, "ADDED", resource, item)
        else:
            for version, event, of, item, before in self._history:
                if version > int(begin):
                    self._tell_if_fits(watcher, event, of, item, before)
        self._watchers.append(watcher)
        loop = asyncio.get_running_loop()
        timer = loop.call_later(float(query.get("timeoutSeconds") or 1800.0), self._end, watcher)
        self._timers.add(timer)

        def left() -> None:
            timer.cancel()
            self._timers.discard(timer)
            if watcher in self._watchers:
                self._watchers.remove(watcher)

        incoming.on_close = left

    def _end(self, watcher: _Watcher) -> None:
        if watcher in self._watchers:
            self._watchers.remove(watcher)
            if watcher.bookmarks:
                self._tell(watcher, "BOOKMARK", self._bookmark(watcher.resource))
            watcher.incoming.finish()

    def bookmark(self) -> None:
        """Tell every watch how far it is."""
        for watcher in self._watchers:
            if watcher.bookmarks:
                self._tell(watcher, "BOOKMARK", self._bookmark(watcher.resource))

    def _bookmark(self, resource: Resource) -> Object:
        version = {"resourceVersion": str(self._version)}
        return {"kind": resource.kind, "apiVersion": resource.version, "metadata": version}

    # -- the rest ----------------------------------------------------------------------------------------------------

    def _record(self, event: str, resource: Resource, item: Object, before: Object | None = None) -> None:
        self._version += 1
        item["metadata"]["resourceVersion"] = str(self._version)
        if len(self._history) == HISTORY:
            self._oldest = self._history[0][0]
        told = copy.deepcopy(item)
        self._history.append((self._version, event, resource, told, before))
        for watcher in list(self._watchers):
            self._tell_if_fits(watcher, event, resource, told, before)
        for heard in self.changed:
            heard(resource, event, copy.deepcopy(told))

    def _tell_if_fits(
        self, watcher: _Watcher, event: str, resource: Resource, item: Object, before: Object | None = None
    ) -> None:
        """To one that selects, an object that fits no longer is gone, and one that begins to fit is new."""
        if resource is not watcher.resource or not self._is_in(item, resource, watcher.namespace):
            return
        fits = watcher.fits(item)
        if event == "MODIFIED" and before is not None and fits != watcher.fits(before):
            event, fits = "ADDED" if fits else "DELETED", True
        if fits:
            self._tell(watcher, event, item)

    def _tell(self, watcher: _Watcher, event: str, item: Object) -> None:
        watcher.incoming.write(orjson.dumps({"type": event, "object": item}) + b"\n")

    def _is_in(self, item: Object, resource: Resource, namespace: str) -> bool:
        meta = item["metadata"]
        right = item["kind"] == resource.kind and item["apiVersion"] == resource.version
        return right and (not namespace or meta.get("namespace") == namespace)

    def _route(self, path: str) -> tuple[Resource, str, str, str]:
        """Resource, namespace, name and subresource of a path."""
        for resource in RESOURCES:
            if not path.startswith(f"{resource.api}/"):
                continue
            parts = [unquote(part) for part in path.removeprefix(f"{resource.api}/").split("/")]
            namespace = ""
            if resource.namespaced and len(parts) > 2 and parts[0] == "namespaces":
                namespace, parts = parts[1], parts[2:]
            if parts[0] == resource.plural and len(parts) <= 3:
                name, part = [*parts[1:], "", ""][:2]
                if part in ("", "status", "scale"):
                    return resource, namespace, name, part
        raise Refusal(404, "NotFound", "the server could not find the requested resource")

    def _resource(self, plural: str) -> Resource:
        return next(resource for resource in RESOURCES if resource.plural == plural)

    def _of_kind(self, version: str, kind: str) -> Resource:
        return next(each for each in RESOURCES if (each.version, each.kind) == (version, kind))

    def _found(self, resource: Resource, namespace: str, name: str) -> Object:
        found = self._objects.get((resource.plural, namespace if resource.namespaced else "", name))
        if found is None:
            raise Refusal(404, "NotFound", f'{resource.plural} "{name}" not found')
        return found

    def _key(self, resource: Resource, item: Object) -> tuple[str, str, str]:
        meta = item["metadata"]
        return resource.plural, str(meta.get("namespace", "")) if resource.namespaced else "", str(meta["name"])


async def shut(server: HttpServer) -> None:
    """Close it at once. Up to Python 3.11 asyncio leaks a connection that is just being accepted when its listener
    closes, so accepting ends a few turns of the loop before."""
    loop = asyncio.get_running_loop()
    for listening in server.listening():
        loop.remove_reader(listening)
    for _ in range(5):
        await asyncio.sleep(0)
    await server.close(0.0)


def now(later_s: float = 0.0) -> str:
    """As Kubernetes writes times."""
    moment = datetime.datetime.now(datetime.UTC) + datetime.timedelta(seconds=later_s)
    return moment.strftime("%Y-%m-%dT%H:%M:%SZ")


def _scale_of(item: Object) -> Object:
    meta = {key: item["metadata"][key] for key in ("name", "namespace", "uid", "resourceVersion", "creationTimestamp")}
    selector = item["spec"].get("selector", {}).get("matchLabels", {})
    replicas = item["spec"].get("replicas", 0)
    return {
        "kind": "Scale",
        "apiVersion": "autoscaling/v1",
        "metadata": meta,
        "spec": {"replicas": replicas} if replicas else {},  # As the real one: a zero is left out.
        "status": {
            "replicas": item.get("status", {}).get("replicas", 0),
            "selector": ",".join(f"{key}={value}" for key, value in selector.items()),
        },
    }


def _merged(before: Any, patch: Any) -> Any:
    """RFC 7386."""
    if not isinstance(patch, Mapping):
        return copy.deepcopy(patch)
    made = copy.deepcopy(dict(before)) if isinstance(before, Mapping) else {}
    for key, value in patch.items():
        if value is None:
            made.pop(key, None)
        else:
            made[key] = _merged(made.get(key), value)
    # The version of what was patched is no condition unless the patch says so itself.
    if isinstance(made.get("metadata"), dict) and "spec" in made and "resourceVersion" not in patch.get("metadata", {}):
        made["metadata"].pop("resourceVersion", None)
    return made


def _is_owned(item: Object, uid: str) -> bool:
    return any(owner.get("uid") == uid for owner in item["metadata"].get("ownerReferences", ()))


_IN = re.compile(r"\s*(\S+)\s+(in|notin)\s+\(([^)]*)\)\s*")


def _selection(query: Mapping[str, str]) -> Callable[[Object], bool]:
    labels = _terms(query.get("labelSelector", ""))
    fields = _terms(query.get("fieldSelector", ""))

    def fits(item: Object) -> bool:
        own = item["metadata"].get("labels") or {}
        return all(term(own.get) for term in labels) and all(term(lambda path: _field(item, path)) for term in fields)

    return fits


def _terms(selector: str) -> list[Callable[[Callable[[str], Any]], bool]]:
    """Each says whether it holds, given how to look up a label or a field."""
    terms: list[Callable[[Callable[[str], Any]], bool]] = []
    for text in re.split(r",(?![^(]*\))", selector):
        if not text:
            continue
        if found := _IN.fullmatch(text):
            key, how, values = found[1], found[2], {value.strip() for value in found[3].split(",")}
            terms.append(lambda get, key=key, how=how, values=values: (get(key) in values) == (how == "in"))  # type: ignore[misc]
        elif "!=" in text:
            key, _, value = text.partition("!=")
            terms.append(lambda get, key=key, value=value: (get(key) or "") != value)  # type: ignore[misc]
        elif "=" in text:
            key, _, value = text.replace("==", "=").partition("=")
            terms.append(lambda get, key=key, value=value: (get(key) or "") == value)  # type: ignore[misc]
        else:
            key, wanted = text.removeprefix("!"), not text.startswith("!")
            terms.append(lambda get, key=key, wanted=wanted: (get(key) is not None) == wanted)  # type: ignore[misc]
    return terms


def _field(item: Object, path: str) -> Any:
    found: Any = item
    for key in path.split("."):
        found = found.get(key) if isinstance(found, Mapping) else None
    return found
