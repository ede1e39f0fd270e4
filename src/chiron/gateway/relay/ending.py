"""The error that a client gets when its request ends without an answer: the same for every kind of call.

What the gateway itself decided (a time-out) comes first, then the engine's own words, then what is known of the tries.
"""

from __future__ import annotations

from dataclasses import dataclass

from chiron.core.types import Request
from chiron.gateway.relay.errors import (
    ApiError,
    Headers,
    internal,
    invalid,
    retry_after,
    timed_out,
    too_many,
    unavailable,
)
from chiron.gateway.relay.upstream import OF_CDNS, UpstreamFailure
from chiron.net.server import Incoming

_RETRY_AFTER_S = 1.0
"""When a client may ask again for what no engine would take."""


@dataclass(frozen=True, slots=True)
class Answer:
    """A whole one."""

    status: int
    body: bytes
    headers: Headers = ()
    content_type: bytes = b"application/json"

    def event(self) -> bytes:
        """As a server-sent event, for a stream that has begun."""
        return b"data: " + self.body.replace(b"\n", b" ") + b"\n\n"

    def send(self, incoming: Incoming, request_id: str) -> None:
        named = ((b"x-request-id", request_id.encode()),) if request_id else ()
        incoming.respond(self.status, self.body, self.content_type, (*self.headers, *named))


def last_word(
    request: Request, refusal: ApiError | None, engine: Answer | None, failure: UpstreamFailure | None
) -> Answer:
    """Of a request that the control plane ended. ``refusal``: why the gateway itself ended it. ``engine``: what the
    engine said, if that can be passed on. ``failure``: the last try's."""
    if refusal is None and engine is not None:
        return engine
    return _answer(refusal or _reason(request, failure))


def passed_on(failure: UpstreamFailure | None) -> Answer | None:
    """An engine's own answer to the last try, if it gave one. A CDN's page is none, and names the engine's host."""
    if failure is None or failure.status < 400 or failure.status in OF_CDNS or not failure.body:
        return None
    later = retry_after(_RETRY_AFTER_S) if failure.status in (429, 503) else ()
    return Answer(failure.status, failure.body, later, failure.content_type or b"application/json")


def wordless(status: int) -> bytes:
    """The error object of an engine that refused with this status and no body."""
    kind = "invalid_request_error" if status < 500 else "server_error"
    return ApiError(status, f"The engine answered {status} without a message.", type=kind, code="engine_error").body()


def refuse(incoming: Incoming, error: ApiError, request_id: str = "") -> None:
    """Answer with an error object."""
    _answer(error).send(incoming, request_id)


def _answer(error: ApiError) -> Answer:
    return Answer(error.status, error.body(), error.headers)


def _reason(request: Request, failure: UpstreamFailure | None) -> ApiError:
    """What is known of a request that neither the gateway nor an engine has said anything about."""
    if request.outcome == "rejected" and request.dispatch_s >= 0.0:
        return invalid("The engine refused the request without a reason.")
    if request.outcome == "rejected":
        return invalid(
            f"The prompt of about {request.input_tokens} tokens is longer than any instance can hold.",
            code="context_length_exceeded",
        )
    if request.outcome == "shed":
        return too_many(
            "The fleet cannot serve all requests in time now, and this one would be late.",
            max(_RETRY_AFTER_S, request.retry_after_s),
        )
    if failure is None:
        return internal(getattr(request.payload, "request_id", ""))
    tries = request.retries
    if failure.status in (429, 503):
        return unavailable(f"No engine would take the request after {tries} tries: {failure.message}.", _RETRY_AFTER_S)
    if failure.status == 504:
        return timed_out(f"The engine did not answer in time ({tries} tries).")
    if failure.status == 0 and request.payload.visible:
        return ApiError(
            502, "The engine was lost in the middle of its answer.", type="server_error", code="engine_lost"
        )
    return ApiError(
        502, f"No engine answered after {tries} tries: {failure.message}.", type="server_error", code="bad_gateway"
    )
