"""A number that an engine is told: its max batch size, the token budget of its steps."""

from __future__ import annotations

from chiron.engines.rows import LimitRequest
from chiron.net.client import Call, Header, NetError, Origin


class EngineSetting:
    """One message at a time; the next says what holds then."""

    def __init__(self, origin: Origin, lines: bytes, request: LimitRequest | None) -> None:
        """``lines``: of each request's head. ``request``: None for an engine that has no such thing."""
        self.sent = 0
        self.call: Call | None = None
        self._origin = origin
        self._lines = lines
        self._request = request
        self._wanted = 0
        self._closed = False

    def set(self, value: int) -> None:
        self._wanted = value
        if self.call is None:
            self._send()

    def again(self) -> None:
        """If the last message did not get through."""
        if self.call is None and self.sent != self._wanted:
            self._send()

    def close(self) -> None:
        self._closed = True
        if self.call is not None:
            self.call.cancel()

    def answered(self, status: int) -> None:
        self.call = None
        if status in (404, 405):
            self._request = None  # This engine has no such thing.
        elif status != 200:
            self.sent = 0
        elif self.sent != self._wanted:
            self._send()

    def _send(self) -> None:
        request = self._request
        if request is None or self._closed:
            return
        method, path, body = request.method.encode(), request.path.encode(), request.message(self._wanted)
        self.sent = self._wanted
        self.call = self._origin.send(method, path, (), body, _Answer(self), lines=self._lines)


class _Answer:
    """Receiver of the answer."""

    def __init__(self, setting: EngineSetting) -> None:
        self._setting = setting
        self._status = 0

    def on_head(self, status: int, headers: list[Header]) -> None:
        self._status = status

    def on_data(self, data: bytes) -> None:
        pass

    def on_end(self) -> None:
        self._setting.answered(self._status)

    def on_error(self, error: NetError) -> None:
        self._setting.answered(0)
