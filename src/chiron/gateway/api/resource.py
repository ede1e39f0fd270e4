"""Between HTTP and endpoints: methods, errors, JSON in and out."""

from __future__ import annotations

import asyncio
import logging
import re
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from secrets import token_hex
from typing import Any

import orjson
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import Message, Receive, Scope, Send

from chiron.gateway.relay.errors import (
    ApiError,
    Headers,
    damaged,
    internal,
    invalid,
    method_not_allowed,
    not_found,
    timed_out,
    too_large,
    unavailable,
)
from chiron.store.port import (
    Conflict,
    NotFound,
    StoreClosed,
    StoreCorrupt,
    StoreDamaged,
    StoreError,
    StoreFull,
    StoreUnavailable,
    TooLarge,
)

log = logging.getLogger("chiron.api")

Endpoint = Callable[[Request], Awaitable[Response]]

STORE_RETRY_S = 10.0
"""Retry-After when the store has no room: somebody must make some first."""
_NUMBER = re.compile(r"[0-9]{1,9}")


@dataclass(frozen=True, slots=True)
class Resource:
    """A path's endpoints by method, as an ASGI application. HEAD is GET without the body."""

    endpoints: Mapping[str, Endpoint]
    otherwise: Endpoint | None = None
    """Answers every other method; None: 405."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        request = Request(scope, receive)
        id = f"api-{token_hex(8)}"
        try:
            response = await self._answer(request)
        except ClientDisconnect:
            return
        except ApiError as error:
            response = error_response(error)
        except StoreError as error:
            response = error_response(_of_store(error))
        except Exception:
            log.exception("%s: %s %s failed", id, request.method, request.url.path)
            response = error_response(internal(id))
        response.headers["x-request-id"] = id
        # From here on an exception can only cut the connection; whoever hosts the application does.
        await response(scope, receive, _without_body(send) if request.method == "HEAD" else send)

    async def _answer(self, request: Request) -> Response:
        endpoint = self.endpoints.get("GET" if request.method == "HEAD" else request.method) or self.otherwise
        if endpoint is None:
            allowed = [*self.endpoints, *(["HEAD"] if "GET" in self.endpoints else [])]
            raise method_not_allowed(request.method, allowed)
        return await endpoint(request)


_ROUTES = frozenset({"chat", "completions", "models", "files", "batches"})
"""What comes after ``/v1/``."""
_PATH_SHOWN = 200


async def unknown_path(request: Request) -> Response:
    path = request.url.path
    hint = _path_hint(path) or "GET /openapi.json describes the API."
    raise not_found(f"Unknown path {request.method} {path[:_PATH_SHOWN]}. {hint}")


def _path_hint(path: str) -> str:
    """Of clients whose base URL lacks the ``/v1``, or has it twice, what to do."""
    parts = [part for part in path.split("/") if part and part != "v1"]
    if not parts or parts[0] not in _ROUTES:
        return ""
    meant = "/v1/" + "/".join(parts)
    if meant == path:
        return ""
    return f"Did you mean {meant[:_PATH_SHOWN]}? A client's base URL ends in /v1, once: http://HOST:PORT/v1."


def json_response(value: Any, status: int = 200, headers: Headers = ()) -> Response:
    return _response(orjson.dumps(value, option=orjson.OPT_NON_STR_KEYS), status, headers)


def error_response(error: ApiError) -> Response:
    return _response(error.body(), error.status, error.headers)


def _response(body: bytes, status: int, headers: Headers) -> Response:
    return Response(body, status, {name.decode(): value.decode() for name, value in headers}, "application/json")


async def json_object(request: Request, bytes_max: int, timeout_s: float) -> dict[str, Any]:
    """The body, a JSON object. Raises ApiError 400, 408 or 413."""
    body = bytearray()
    try:
        async with asyncio.timeout(timeout_s):
            async for piece in request.stream():
                body += piece
                if len(body) > bytes_max:
                    raise too_large("The request body", bytes_max)
    except TimeoutError:
        raise timed_out(f"The body took longer than {timeout_s:g} s.", status=408) from None
    try:
        value = orjson.loads(body)
    except orjson.JSONDecodeError as error:
        raise invalid(f"The request body is not valid JSON: {error}.") from None
    if not isinstance(value, dict):
        raise invalid("The request body must be a JSON object.")
    return value


def known_fields(value: Mapping[str, Any], allowed: tuple[str, ...]) -> None:
    """Raise ApiError 400 for a field that nobody reads: it is a slip more often than not."""
    for name in value:
        if name not in allowed:
            raise invalid(
                f"Unknown parameter {name[:100]!r}. Allowed: {', '.join(allowed)}.",
                param=name,
                code="unknown_parameter",
            )


def page_limit(request: Request, default: int, most: int) -> int:
    """The query parameter ``limit``: 1 to ``most``."""
    text = request.query_params.get("limit")
    if text is None:
        return default
    limit = int(text) if _NUMBER.fullmatch(text) else 0
    if not 1 <= limit <= most:
        raise invalid(f"limit is {text[:100]!r}; it must be an integer from 1 to {most}.", param="limit")
    return limit


def page(items: list[dict[str, Any]], limit: int) -> Response:
    """A page of a list, of which one item more than ``limit`` was asked for."""
    data = items[:limit]
    return json_response(
        {
            "object": "list",
            "data": data,
            "first_id": data[0]["id"] if data else None,
            "last_id": data[-1]["id"] if data else None,
            "has_more": len(items) > limit,
        }
    )


def _of_store(error: StoreError) -> ApiError:
    match error:
        case NotFound():
            return not_found(str(error))
        case Conflict():
            return invalid(str(error), status=409, code="conflict")
        case TooLarge():
            return invalid(str(error), status=413, code="request_too_large")
        case StoreFull():
            return unavailable(f"The server's disk is full: {error}", STORE_RETRY_S)
        case StoreDamaged():
            return damaged(str(error))
        case StoreCorrupt():
            log.error("the store failed: %s", error)
            return damaged("The server's store of files and batches is damaged where this was asked for.")
        case StoreUnavailable():
            return unavailable(str(error), STORE_RETRY_S)
        case StoreClosed():
            return unavailable("The server is stopping.", 1.0)
        case _:
            log.error("the store failed: %s", error)
            return internal()


def _without_body(send: Send) -> Send:
    async def send_head(message: Message) -> None:
        if message["type"] == "http.response.body":
            message = {**message, "body": b""}
        await send(message)

    return send_head
