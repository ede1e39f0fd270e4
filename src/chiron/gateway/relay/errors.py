"""Errors as OpenAI's API words them, whatever part of the gateway finds them.

One exception carries everything a client gets: status, headers and the error object. The functions below it are
the only places that choose types and codes, so that equal mistakes get equal answers on every path.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from math import ceil
from reprlib import Repr

Headers = tuple[tuple[bytes, bytes], ...]


class ApiError(Exception):
    """An answer other than success. ``type`` and ``code`` are OpenAI's words; ``param`` names the field at fault."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        type: str,
        code: str | None = None,
        param: str | None = None,
        headers: Headers = (),
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.type = type
        self.code = code
        self.param = param
        self.headers = headers

    def value(self) -> dict[str, dict[str, str | None]]:
        """The error object as a value."""
        return {"error": {"message": self.message, "type": self.type, "param": self.param, "code": self.code}}

    def body(self) -> bytes:
        """The error object as JSON. ASCII only: a message may quote what a client sent, even half a character."""
        return json.dumps(self.value()).encode()


SHOWN_MAX = 100
"""Characters of a client's value in a message."""
_REPR = Repr()
_REPR.maxlevel, _REPR.maxstring, _REPR.maxother = 4, SHOWN_MAX, SHOWN_MAX


def shown(value: object) -> str:
    """A client's value for a message: short, and at no more cost than that, however deep or large the value is."""
    return "missing" if value is None else _REPR.repr(value)[:SHOWN_MAX]


def invalid(message: str, *, param: str | None = None, code: str | None = None, status: int = 400) -> ApiError:
    """The request is wrong and stays wrong."""
    return ApiError(status, message, type="invalid_request_error", code=code, param=param)


def unauthenticated(message: str) -> ApiError:
    """No key, or an unknown one."""
    return ApiError(
        401, message, type="authentication_error", code="invalid_api_key", headers=((b"www-authenticate", b"Bearer"),)
    )


def forbidden(message: str, *, param: str | None = None) -> ApiError:
    """The key is good, but not for this."""
    return ApiError(403, message, type="permission_error", code="permission_denied", param=param)


def not_found(message: str, *, param: str | None = None) -> ApiError:
    return ApiError(404, message, type="not_found_error", code="not_found", param=param)


NO_MODEL = "model_not_found"


def model_not_found(model: str, known: Iterable[str] = ()) -> ApiError:
    """``known`` are names the client may use; it learns them from the message."""
    names = ", ".join(sorted(known))
    hint = f" Models served here: {names}." if names else ""
    return ApiError(
        404,
        f"The model {model!r} does not exist or you do not have access to it.{hint}",
        type="not_found_error",
        code=NO_MODEL,
        param="model",
    )


def method_not_allowed(method: str, allowed: Iterable[str]) -> ApiError:
    names = ", ".join(sorted(allowed))
    return ApiError(
        405,
        f"Method {method} is not allowed here. Allowed: {names}.",
        type="invalid_request_error",
        code="method_not_allowed",
        headers=((b"allow", names.encode()),),
    )


def too_large(what: str, bytes_max: int) -> ApiError:
    """``what`` starts the sentence: "The request body"."""
    return ApiError(
        413, f"{what} is larger than {bytes_max} bytes.", type="invalid_request_error", code="request_too_large"
    )


def too_many(message: str, retry_after_s: float) -> ApiError:
    """A limit of the client's key or of the queue is reached; later it will do."""
    return ApiError(
        429, message, type="rate_limit_error", code="rate_limit_exceeded", headers=retry_after(retry_after_s)
    )


def unavailable(message: str, retry_after_s: float) -> ApiError:
    """Nothing can serve this now; later it may do."""
    return ApiError(503, message, type="server_error", code="service_unavailable", headers=retry_after(retry_after_s))


def timed_out(message: str, *, status: int = 504) -> ApiError:
    """504: an engine was too slow. 408: the client was."""
    return ApiError(status, message, type="timeout_error", code="timeout")


def internal(request_id: str = "") -> ApiError:
    """A fault of ours. What it was stands in the log under ``request_id``, never in the answer."""
    where = f" Request id: {request_id}." if request_id else ""
    return ApiError(
        500, f"The server failed to process this request.{where}", type="server_error", code="internal_error"
    )


def damaged(message: str) -> ApiError:
    """What was asked for is damaged on the server's disk; ``message`` names it. It stays so until somebody mends it."""
    return ApiError(500, message, type="server_error", code="data_damaged")


def retry_after(seconds: float) -> Headers:
    """Whole seconds as HTTP has it, and milliseconds as the ``openai`` client prefers."""
    return (
        (b"retry-after", str(max(1, ceil(seconds))).encode()),
        (b"retry-after-ms", str(max(1, ceil(seconds * 1000.0))).encode()),
    )
