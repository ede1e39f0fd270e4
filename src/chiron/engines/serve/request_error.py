"""The error that a client gets for a request that is not served."""

from __future__ import annotations

import json
from typing import Any


class RequestError(Exception):
    """A request that cannot be served, as an HTTP status and OpenAI's error object."""

    def __init__(
        self,
        message: str,
        *,
        status: int = 400,
        type: str = "invalid_request_error",
        code: str | None = None,
        param: str | None = None,
        retry_after_s: int | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.status = status
        self.type = type
        self.code = code
        self.param = param
        self.retry_after_s = retry_after_s
        """Seconds for the Retry-After header; None: no such header."""

    def body(self) -> bytes:
        error = {"message": self.message, "type": self.type, "param": self.param, "code": self.code}
        return json.dumps({"error": error}).encode()


def shown(value: Any) -> str:
    """A value in an error message: as JSON, shortened."""
    text = json.dumps(value, ensure_ascii=False) if not isinstance(value, (list, dict)) or len(value) < 20 else ""
    if not text:
        return f"a list of {len(value)}" if isinstance(value, list) else f"an object of {len(value)} fields"
    return text if len(text) <= 80 else text[:77] + "..."
