"""The few calls that Chiron makes to a Kubernetes API server, over the HTTP client that it has anyway.

Why no client library: five verbs on four paths, JSON in and out. The usual libraries bring a model class for each of a
thousand types and an HTTP stack of their own, and leave watching, which is the hard part, to their caller.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import Any
from urllib.parse import urlencode

import orjson

from chiron.fleet.kubernetes.access import Access
from chiron.fleet.kubernetes.pods import WORDS_MAX, words
from chiron.net.client import Call, Header, NetError, Origin

log = logging.getLogger("chiron.fleet")

TIMEOUT_S = 15.0
"""Of one request; an API server that takes longer is as good as down."""
BODY_MAX_BYTES = 64 * 1024 * 1024
"""Of one answer: a page of 500 pods of 100 KB."""
LINE_MAX_BYTES = 4 * 1024 * 1024
"""Of one event of a watch; etcd takes objects of up to 1.5 MiB."""


class KubernetesError(Exception):
    """The API server gave no usable answer. The message says why.

    ApiError
    """


class ApiError(KubernetesError):
    """It refused: ``status`` is HTTP's, ``reason`` Kubernetes' own word, such as ``Forbidden``."""

    def __init__(self, status: int, reason: str, message: str) -> None:
        super().__init__(f"{status} {reason}: {message}" if reason else f"{status}: {message}")
        self.status = status
        self.reason = reason


class Client:
    """One API server."""

    def __init__(self, access: Access, *, changes: Callable[[], object] = lambda: None) -> None:
        """``changes`` is called just before anything is asked for but to read, and ends this process if it may not."""
        self.url = access.url
        self._changes = changes
        self._access = access
        self._origin = Origin(access.url, ssl=access.ssl)

    async def get(self, path: str, **query: str) -> dict[str, Any]:
        return await self._ask("GET", path, query)

    async def put(self, path: str, body: Mapping[str, Any]) -> dict[str, Any]:
        return await self._ask("PUT", path, {}, body)

    async def post(self, path: str, body: Mapping[str, Any]) -> dict[str, Any]:
        return await self._ask("POST", path, {}, body)

    async def patch(self, path: str, body: Mapping[str, Any]) -> dict[str, Any]:
        """A merge patch: null removes a field."""
        return await self._ask("PATCH", path, {}, body, "application/merge-patch+json")

    async def delete(self, path: str, body: Mapping[str, Any] | None = None) -> dict[str, Any]:
        return await self._ask("DELETE", path, {}, body)

    def stream(
        self,
        path: str,
        query: Mapping[str, str],
        line: Callable[[bytes], None],
        over: Callable[[Exception | None], None],
    ) -> Call:
        """``line`` hears each line of the answer, then ``over`` once. Raises KubernetesError for want of a token."""
        headers = [(name.encode(), value.encode()) for name, value in self._headers().items()]
        target = f"{path}?{urlencode(query)}"
        return self._origin.send(b"GET", target.encode(), headers, b"", _Lines(line, over))

    async def close(self) -> None:
        await self._origin.close()

    async def _ask(
        self,
        method: str,
        path: str,
        query: Mapping[str, str],
        body: Mapping[str, Any] | None = None,
        content_type: str = "application/json",
    ) -> dict[str, Any]:
        headers = self._headers()
        if method != "GET":
            self._changes()
        if body is not None:
            headers["content-type"] = content_type
        try:
            answer = await self._origin.fetch(
                method,
                f"{path}?{urlencode(query)}" if query else path,
                headers=headers,
                body=orjson.dumps(body) if body is not None else b"",
                timeout_s=TIMEOUT_S,
                body_max=BODY_MAX_BYTES,
            )
        except NetError as error:
            raise KubernetesError(f"the API server gave no answer: {error}") from None
        if answer.status >= 300:
            raise refusal(answer.status, answer.body)
        return _object(answer.body, f"{method} {path}")

    def _headers(self) -> dict[str, str]:
        try:
            own = self._access.headers()
        except (OSError, UnicodeDecodeError) as error:
            raise KubernetesError(f"the token cannot be read: {error}") from None
        return {"accept": "application/json", "user-agent": "chiron", **own}


class _Lines:
    """A receiver that hands on lines."""

    def __init__(self, line: Callable[[bytes], None], over: Callable[[Exception | None], None]) -> None:
        self._line = line
        self._over = over
        self._status = 0
        self._rest = b""
        self._ended = False

    def on_head(self, status: int, headers: list[Header]) -> None:
        self._status = status

    def on_data(self, data: bytes) -> None:
        if self._ended:
            return
        if self._status != 200:
            self._rest += data
            if len(self._rest) > LINE_MAX_BYTES:  # Why it refuses is not worth more.
                self._end(refusal(self._status, self._rest))
            return
        *lines, rest = (self._rest + data).split(b"\n")
        self._rest = rest
        for line in lines:
            if line and not self._ended:
                self._line(line)
        if len(rest) > LINE_MAX_BYTES:
            self._end(KubernetesError(f"an event of more than {LINE_MAX_BYTES} bytes"))

    def on_end(self) -> None:
        self._end(None if self._status == 200 else refusal(self._status, self._rest))

    def on_error(self, error: NetError) -> None:
        self._end(error)

    def _end(self, error: Exception | None) -> None:
        if not self._ended:
            self._ended = True
            self._over(error)


def refusal(status: int, body: bytes) -> ApiError:
    """From the ``Status`` object that a refusal has for a body, if it has one."""
    try:
        said = orjson.loads(body)
    except orjson.JSONDecodeError:
        said = None
    if not isinstance(said, dict):
        return ApiError(status, "", words(body[:WORDS_MAX].decode("utf-8", "replace")))
    return ApiError(status, words(said.get("reason")), words(said.get("message")))


def _object(body: bytes, what: str) -> dict[str, Any]:
    try:
        found = orjson.loads(body)
    except orjson.JSONDecodeError as error:
        raise KubernetesError(f"{what}: the answer is no JSON: {error}") from None
    if not isinstance(found, dict):
        raise KubernetesError(f"{what}: the answer is no object")
    return found
