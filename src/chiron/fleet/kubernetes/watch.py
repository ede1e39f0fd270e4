"""A set of objects as the API server has it, kept up to date: listed once, then watched.

Between two objects of a watch any time may pass, and a connection that is dead looks like one on which nothing
happens. So the server is asked to end each watch after a while, and one that outlives that is cut. A version that the
server no longer knows (410), or cannot read, means: list anew, and whatever is missing from the list has gone
meanwhile.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import orjson

from chiron.core.backoff import doubled_s
from chiron.fleet.health import require_positive
from chiron.fleet.kubernetes.client import ApiError, Client, KubernetesError, refusal
from chiron.fleet.waiting import pause
from chiron.net.client import NetError

log = logging.getLogger("chiron.fleet")

GONE = 410
VERSION_REFUSED = (400, GONE, 422)
"""Statuses of a watch that begins at a version that the server cannot use."""
OBJECTS_MAX = 10_000
"""In one set: more than a fleet has."""
PAGES_MAX = 1_000
"""Of one list: a server that always names a next page would be asked for ever."""


@dataclass(frozen=True, slots=True, kw_only=True)
class WatchSettings:
    watch_s: float = 240.0
    """The server ends a watch after so many seconds, and the next one begins where it ended."""
    late_s: float = 15.0
    """A watch that is not ended then counts as dead after so many more."""
    page: int = 500
    """Objects of one page of a list."""
    backoff_first_s: float = 0.1
    """Pause after a failure; it doubles with each further one."""
    backoff_max_s: float = 10.0
    """Longest pause: an API server that restarts is back in seconds."""
    settle_s: float = 15.0
    """So long after all pods are known, those that run have been taken over, and the policy has seen them."""

    def __post_init__(self) -> None:
        require_positive(self)


class WatchExpiredError(Exception):
    """The server does not know the version any more."""


class Watch:
    """Calls ``changed(object)``, ``gone(uid)`` and, after each complete list, ``listed()``."""

    def __init__(
        self,
        client: Client,
        path: str,
        query: Mapping[str, str],
        *,
        changed: Callable[[Mapping[str, Any]], None],
        gone: Callable[[str], None],
        listed: Callable[[], None] = lambda: None,
        troubled: Callable[[str], None] = lambda reason: None,
        settings: WatchSettings | None = None,
    ) -> None:
        """``troubled`` hears why the server cannot be watched, and "" once it can."""
        self._client = client
        self._path = path
        self._query = dict(query)
        self._changed = changed
        self._gone = gone
        self._listed = listed
        self._troubled = troubled
        self._settings = settings or WatchSettings()
        self._uids: set[str] = set()
        self._version = ""

    async def run(self) -> None:
        """Until cancelled."""
        settings, failures = self._settings, 0
        loop = asyncio.get_running_loop()
        while True:
            began_s = loop.time()
            try:
                if not self._version:
                    await self._list()
                    self._troubled("")
                await self._watch()
                # One that ends at once without an error would be asked for again without a pause.
                failures = 0 if loop.time() - began_s > settings.backoff_first_s else failures + 1
            except WatchExpiredError:
                self._version = ""
                failures += 1
            except (KubernetesError, NetError) as error:
                if isinstance(error, ApiError) and error.status in VERSION_REFUSED:
                    self._version = ""
                failures += 1
                self._troubled(str(error))
            if failures:
                await pause(doubled_s(settings.backoff_first_s, settings.backoff_max_s, failures - 1))

    async def _list(self) -> None:
        found: dict[str, Mapping[str, Any]] = {}
        query = {**self._query, "limit": str(self._settings.page)}
        for _ in range(PAGES_MAX):
            page = await self._client.get(self._path, **query)
            items, head = page.get("items"), page.get("metadata")
            if (not isinstance(items, list) and items is not None) or not isinstance(head, Mapping):
                raise KubernetesError(f"{self._path}: the answer is no list")
            for item in items or ():
                found[_uid(item)] = item
            if len(found) > OBJECTS_MAX:
                raise KubernetesError(f"{self._path}: more than {OBJECTS_MAX} objects")
            if not head.get("continue"):
                break
            query["continue"] = str(head["continue"])
        else:
            raise KubernetesError(f"{self._path}: more than {PAGES_MAX} pages")
        version = head.get("resourceVersion")
        if not isinstance(version, str) or not version:
            raise KubernetesError(f"{self._path}: the list has no resourceVersion")
        for uid in sorted(self._uids - found.keys()):
            self._gone(uid)
        self._uids = set(found)
        for item in found.values():
            self._changed(item)
        self._version = version
        self._listed()

    async def _watch(self) -> None:
        """Until the server ends it."""
        settings = self._settings
        over: asyncio.Future[None] = asyncio.get_running_loop().create_future()

        def ended(error: Exception | None) -> None:
            if not over.done():
                over.set_result(None) if error is None else over.set_exception(error)

        def line(text: bytes) -> None:
            try:
                self._event(text)
            except (KubernetesError, WatchExpiredError) as error:
                ended(error)

        query = {
            **self._query,
            "watch": "true",
            "allowWatchBookmarks": "true",
            "resourceVersion": self._version,
            "timeoutSeconds": str(int(max(1.0, settings.watch_s))),
        }
        call = self._client.stream(self._path, query, line, ended)
        try:
            async with asyncio.timeout(settings.watch_s + settings.late_s):
                await over
        except TimeoutError:
            raise KubernetesError(f"{self._path}: a watch of {settings.watch_s:g} s was not ended in time") from None
        finally:
            call.cancel()

    def _event(self, text: bytes) -> None:
        try:
            event = orjson.loads(text)
            kind, item = event["type"], event["object"]
            if kind == "ERROR":
                if item.get("code") == GONE:
                    raise WatchExpiredError
                raise refusal(int(item.get("code") or 500), orjson.dumps(item))
            version = item["metadata"]["resourceVersion"]
            if not isinstance(version, str) or not version:
                raise KeyError("resourceVersion")
        except (orjson.JSONDecodeError, LookupError, TypeError, AttributeError, ValueError) as error:
            raise KubernetesError(f"{self._path}: an event that makes no sense: {error}") from None
        if kind in ("ADDED", "MODIFIED"):
            uid = _uid(item)
            if uid not in self._uids and len(self._uids) >= OBJECTS_MAX:
                raise KubernetesError(f"{self._path}: more than {OBJECTS_MAX} objects")
            self._uids.add(uid)
            self._changed(item)
        elif kind == "DELETED":
            uid = _uid(item)
            self._uids.discard(uid)
            self._gone(uid)
        # A bookmark only says how far this is; other kinds of events do not exist.
        self._version = version
        self._troubled("")


def _uid(item: object) -> str:
    head = item.get("metadata") if isinstance(item, Mapping) else None
    uid = head.get("uid") if isinstance(head, Mapping) else None
    if not isinstance(uid, str) or not uid:
        raise KubernetesError("an object without a uid")
    return uid
