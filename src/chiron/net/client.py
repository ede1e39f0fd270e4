"""HTTP/1.1 connections to one server, pooled, for relaying: a request is bytes, an answer is calls on a receiver.

Chunks of an answer that is only passed on keep their framing: where a block that the socket gave is whole chunks, it is
handed over as it is (``Call.on_chunks``), and neither taken apart by the parser nor framed again. The parser sees all
else, and has always seen all up to the beginning of a chunk before one is handed over.

The pool gives out the connection used last, so that those beyond the need grow old and close. A reused connection that
the server had closed meanwhile shows as lost before any answer; such a request is sent once more on a new connection,
because nothing of it has been delivered. All other failures are for the receiver to judge.
"""

from __future__ import annotations

import asyncio
import logging
import re
import ssl as ssl_module
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import urlsplit

import httptools

from chiron.net.memory import MemoryNetwork
from chiron.net.reasons import reason_of

log = logging.getLogger("chiron.http")

Header = tuple[bytes, bytes]

BODY_MAX_BYTES = 64 * 1024 * 1024
_HEAD_MAX_BYTES = 256 * 1024
_SIZE = re.compile(rb"([0-9A-Fa-f]{1,7})\r\n")
"""The line before a chunk. One with an extension is the parser's."""


def _line_of_one(length: int) -> bytes:
    """With which a block of so many bytes begins that is one chunk; where there is none, what no such block has."""
    for digits in range(1, 8):
        line = b"%x\r\n" % max(0, length - digits - 4)
        if len(line) == digits + 2 and length > digits + 4:
            return line
    return bytes(length + 1)


_LINES_OF_ONE = tuple(map(_line_of_one, range(2048)))
"""By length of the block: most are one chunk each, and so they are seen to be by what they begin and end with."""


class NetError(Exception):
    """A request got no complete answer. The message says of which server, and why.

    ConnectError | ConnectionLostError | TimedOutError | AnswerError
    """


class ConnectError(NetError):
    """No connection: the server is not there, or refuses."""


class ConnectionLostError(NetError):
    """The server closed before its answer was complete."""


class TimedOutError(NetError):
    """No answer in time."""


class AnswerError(NetError):
    """Not HTTP, or larger than allowed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Response:
    """A whole answer. Header names are lower-case."""

    status: int
    headers: Mapping[str, str]
    body: bytes


class Receiver(Protocol):
    """Hears the answer to one request. After ``on_end`` or ``on_error`` nothing comes."""

    def on_head(self, status: int, headers: list[Header]) -> None: ...

    def on_data(self, data: bytes) -> None:
        """A part of the body, without its chunk framing; at most one call per block that the socket gave."""

    def on_end(self) -> None: ...
    def on_error(self, error: NetError) -> None: ...


class Call:
    """A request under way."""

    __slots__ = (
        "_connection",
        "_head_only",
        "_message",
        "_origin",
        "_paused",
        "_reused",
        "on_chunks",
        "over",
        "receiver",
    )

    def __init__(self, origin: Origin, message: bytes, receiver: Receiver, *, head_only: bool = False) -> None:
        self.receiver = receiver
        self.on_chunks: Callable[[bytes], None] | None = None
        """Gets whole chunks of the body with their framing, which has been checked, from whenever the receiver sets it
        on. What is no whole chunk, and the end, goes to the receiver all the same."""
        self.over = False
        self._head_only = head_only
        self._origin = origin
        self._message = message
        self._connection: _Connection | None = None
        self._reused = False
        self._paused = False

    def cancel(self) -> None:
        """Close its connection, so that the server knows; the receiver hears nothing more."""
        if self.over:
            return
        self.over = True
        if self._connection is not None:
            self._connection.close()

    def pause(self) -> None:
        """Read no more of the answer for now."""
        self._paused = True
        if self._connection is not None and not self.over:
            self._connection.pause()

    def resume(self) -> None:
        self._paused = False
        if self._connection is not None and not self.over:
            self._connection.resume()

    def _fail(self, error: NetError) -> None:
        if not self.over:
            self.over = True
            self.receiver.on_error(error)


class Asked:
    """A request that has been sent, for a caller that wants its whole answer."""

    __slots__ = ("_call", "_receiver", "_url")

    def __init__(self, call: Call, receiver: _Gather, url: str) -> None:
        self._call = call
        self._receiver = receiver
        self._url = url

    async def answer(self, timeout_s: float) -> Response:
        """Waits at most so many seconds from now. Raises NetError."""
        try:
            # Not wait_for: before Python 3.12 it swallows a cancellation that comes together with the answer.
            async with asyncio.timeout(timeout_s):
                return await self._receiver.future
        except TimeoutError:
            raise TimedOutError(f"{self._url}: no answer within {timeout_s:g} s") from None
        finally:
            self._call.cancel()


class Origin:
    """One server, such as ``http://127.0.0.1:8001`` or ``unix:/run/engine.sock``; a path after the host prefixes
    the path of every request. ``memory:NAME`` is a server of this process, by its name in ``network``. Raises
    ValueError for another form of URL."""

    def __init__(
        self,
        url: str,
        *,
        connect_timeout_s: float = 5.0,
        idle_max: int = 64,
        idle_s: float = 30.0,
        keepalive: bool = True,
        verify: bool = True,
        cacert: Path | None = None,
        ssl: ssl_module.SSLContext | None = None,
        network: MemoryNetwork | None = None,
    ) -> None:
        """``ssl``: how an https server is met, in place of ``verify`` and ``cacert``."""
        self.url = url.rstrip("/")
        self._network = network
        self._unix_path: str | None = None
        self._ssl: ssl_module.SSLContext | None = None
        self._prefix = b""
        if url.startswith("unix:"):
            self._unix_path, self._host, self._port = url.removeprefix("unix:"), "localhost", 0
        elif network is not None:
            self._host, self._port = url.removeprefix("memory:"), 80
        else:
            parts = urlsplit(url)
            if parts.scheme not in ("http", "https") or not parts.hostname:
                raise ValueError(f"{url!r}: expected http://HOST[:PORT], https://HOST[:PORT] or unix:/PATH")
            self._host = parts.hostname
            self._port = parts.port or (443 if parts.scheme == "https" else 80)
            self._prefix = parts.path.rstrip("/").encode()
            if parts.scheme == "https":
                self._ssl = ssl or ssl_module.create_default_context(cafile=cacert)
                if not verify:
                    self._ssl.check_hostname = False
                    self._ssl.verify_mode = ssl_module.CERT_NONE
        name = f"[{self._host}]" if ":" in self._host else self._host
        default = self._unix_path is not None or self._port == (443 if self._ssl else 80)
        self._host_line = f"host: {name if default else f'{name}:{self._port}'}\r\n".encode()
        self._connect_timeout_s = connect_timeout_s
        self._idle_max = idle_max if keepalive else 0
        self._idle_s = idle_s
        self._idle: list[_Connection] = []
        self._connecting: dict[asyncio.Task[None], Call] = {}
        self._open: set[_Connection] = set()
        self._closed = False

    def send(
        self,
        method: bytes,
        path: bytes,
        headers: Sequence[Header],
        body: bytes,
        receiver: Receiver,
        *,
        lines: bytes = b"",
    ) -> Call:
        """Send a request. ``host``, ``content-length`` and ``connection`` are added here. ``lines`` are more headers
        in the form of the wire, each with its line end, for what never changes."""
        parts = [method, b" ", self._prefix, path, b" HTTP/1.1\r\n", self._host_line, lines]
        for name, value in headers:
            parts += (name, b": ", value, b"\r\n")
        if body or method not in (b"GET", b"HEAD"):
            parts.append(b"content-length: %d\r\n" % len(body))
        if not self._idle_max:
            parts.append(b"connection: close\r\n")
        parts += (b"\r\n", body)
        call = Call(self, b"".join(parts), receiver, head_only=method == b"HEAD")
        if self._closed:
            closed = ConnectError(f"{self.url}: closed")
            asyncio.get_running_loop().call_soon(call._fail, closed)
        else:
            self._dispatch(call)
        return call

    async def fetch(
        self,
        method: str,
        path: str,
        *,
        body: bytes = b"",
        headers: Mapping[str, str] | None = None,
        timeout_s: float = 10.0,
        body_max: int = BODY_MAX_BYTES,
    ) -> Response:
        """A whole answer in ``timeout_s``. Raises NetError, or ValueError for a line break in what is to be sent."""
        return await self.ask(method, path, body=body, headers=headers, body_max=body_max).answer(timeout_s)

    def ask(
        self,
        method: str,
        path: str,
        *,
        body: bytes = b"",
        headers: Mapping[str, str] | None = None,
        body_max: int = BODY_MAX_BYTES,
    ) -> Asked:
        """Send a request now, for an answer that is awaited. Raises ValueError as ``fetch`` does."""
        for text in (method, path, *(part for header in (headers or {}).items() for part in header)):
            if "\r" in text or "\n" in text:
                raise ValueError(f"{text!r}: a line break would start another header")
        receiver = _Gather(body_max)
        lines = [(name.encode(), value.encode()) for name, value in (headers or {}).items()]
        return Asked(self.send(method.encode(), path.encode(), lines, body, receiver), receiver, f"{self.url}{path}")

    async def close(self) -> None:
        """Close every connection; calls in flight are reported as lost."""
        self._closed = True
        connecting = dict(self._connecting)
        for task in connecting:
            task.cancel()
        if connecting:
            await asyncio.wait(connecting, timeout=1.0)
        for call in connecting.values():  # A task that never ran has reported nothing.
            call._fail(ConnectError(f"{self.url}: closed"))
        for connection in list(self._open):
            connection.cut(f"{self.url}: closed")
        await asyncio.sleep(0)

    def _dispatch(self, call: Call, *, fresh: bool = False) -> None:
        idle = self._idle
        while idle and not fresh:
            connection = idle.pop()
            if connection.usable():
                call._reused = True
                connection.carry(call)
                return
        call._reused = False
        if self._network is not None:
            self._join(self._network, call)
            return
        task = asyncio.get_running_loop().create_task(self._connect(call))
        self._connecting[task] = call
        task.add_done_callback(self._connecting.pop)

    def _join(self, network: MemoryNetwork, call: Call) -> None:
        connection = _Connection(self)
        try:
            network.connect(self._host, lambda: connection)
        except ConnectionRefusedError as error:
            failure = ConnectError(f"{self.url}: cannot connect: {error}")
            asyncio.get_running_loop().call_soon(call._fail, failure)
        else:
            connection.carry(call)

    async def _connect(self, call: Call) -> None:
        loop = asyncio.get_running_loop()

        def make() -> Any:
            return _Connection(self)

        try:
            async with asyncio.timeout(self._connect_timeout_s):
                if self._unix_path is not None:
                    _, connection = await loop.create_unix_connection(make, self._unix_path)
                else:
                    _, connection = await loop.create_connection(make, self._host, self._port, ssl=self._ssl)
        except TimeoutError:
            call._fail(ConnectError(f"{self.url}: no connection within {self._connect_timeout_s:g} s"))
        except (OSError, UnicodeError) as error:  # The latter for a host that cannot be a name.
            failure = ConnectError(f"{self.url}: cannot connect: {reason_of(error)}")
            failure.__cause__ = error.with_traceback(None)  # Else this frame, with the request, refers to itself.
            call._fail(failure)
        except asyncio.CancelledError:
            call._fail(ConnectError(f"{self.url}: closed"))
        else:
            if call.over:
                connection.rest()
            else:
                connection.carry(call)

    def _done(self, connection: _Connection) -> None:
        """A connection is free again."""
        if self._closed or len(self._idle) >= self._idle_max:
            connection.close()
        else:
            idle = self._idle
            idle.append(connection)
            # The last one in is the next one out: those below it would stay for ever after a burst.
            if not idle[0].usable():
                del idle[0]

    def _lost(self, connection: _Connection) -> None:
        self._open.discard(connection)
        if connection in self._idle:
            self._idle.remove(connection)


class _Connection:
    """One connection; carries one call at a time. A protocol of asyncio's; not derived from its class, which would keep
    the compiled build from knowing its fields."""

    def __init__(self, origin: Origin) -> None:
        self._origin = origin
        self._transport: Any = None
        self._parser: Any = None
        self._call: Call | None = None
        self._headers: list[Header] = []
        self._pieces: list[bytes] = []
        self._head_seen = False
        self._head_bytes = 0
        """Of heads, trailers and framing, since the last piece of a body."""
        self._any = False
        self._ended = False
        self._keep = False
        self._closed = False
        self._paused = False
        self._rest_bytes = -1
        """Until the next chunk begins; -1: that is not known, and the parser gets all that comes."""
        self._idle_since_s = 0.0

    def connection_made(self, transport: Any) -> None:
        self._transport = transport
        self._time = asyncio.get_running_loop().time
        self._origin._open.add(self)

    def eof_received(self) -> bool:
        return False

    def pause_writing(self) -> None:
        """The server's limits bound what is sent."""

    def resume_writing(self) -> None: ...

    def usable(self) -> bool:
        if self._closed or self._transport.is_closing():
            return False
        if self._time() - self._idle_since_s > self._origin._idle_s:
            self.close()
            return False
        return True

    def carry(self, call: Call) -> None:
        self._call = call
        call._connection = self
        if self._parser is None:
            self._parser = httptools.HttpResponseParser(self)
        self._headers = []
        self._pieces = []
        self._head_bytes = 0
        self._rest_bytes = -1
        self._head_seen = self._any = self._ended = False
        if call._paused:
            self.pause()
        self._transport.write(call._message)

    def rest(self) -> None:
        """Wait for the next call."""
        self._idle_since_s = self._time()
        self._origin._done(self)

    def close(self) -> None:
        self._closed = True
        self._call = None
        self._transport.abort()

    def cut(self, why: str) -> None:
        """Close; a call in flight is reported as lost."""
        call = self._call
        self.close()
        if call is not None:
            call._fail(ConnectionLostError(why))

    def pause(self) -> None:
        if not self._paused and not self._closed:
            self._paused = True
            self._transport.pause_reading()

    def resume(self) -> None:
        if self._paused and not self._closed:
            self._paused = False
            self._transport.resume_reading()

    def data_received(self, data: bytes) -> None:
        call = self._call
        if call is None:
            self.close()  # Bytes without a request.
            return
        if not self._rest_bytes and call.on_chunks is not None:
            length = len(data)
            one = length < 2048 and data.startswith(_LINES_OF_ONE[length]) and data.endswith(b"\r\n")
            end = length if one else self._whole_chunks(data, 0)
            if end == length:
                call.on_chunks(data)
                return
            if end:
                call.on_chunks(data[:end])
                if call.over:
                    return
                data = data[end:]
        elif self._rest_bytes > 0:
            self._skip(data)
        begins = not self._any
        self._any = True
        self._head_bytes += len(data)
        try:
            self._parser.feed_data(data)
        except (
            httptools.HttpParserError,
            httptools.HttpParserCallbackError,
            httptools.HttpParserUpgrade,  # Not a HttpParserError; no other protocol was requested.
        ) as error:
            cause = error.__context__
            if isinstance(error, httptools.HttpParserCallbackError) and cause is not None:
                log.error("%s: the receiver of an answer failed", self._origin.url, exc_info=cause)
                self._give_up(call, AnswerError(f"{self._origin.url}: the answer could not be processed"))
                return
            if not self._ended:
                self._give_up(call, AnswerError(f"{self._origin.url}: not an HTTP/1.1 answer: {error}"))
                return
            self._keep = False  # The answer is complete; what follows it is not one.
        if call.over:
            return
        pieces = self._pieces
        if pieces:
            self._pieces = []
            call.receiver.on_data(pieces[0] if len(pieces) == 1 else b"".join(pieces))
        if call.over:
            return  # Cancelled by who heard it.
        if self._ended:
            self._finish(call)
        elif self._head_bytes > _HEAD_MAX_BYTES:
            self._give_up(call, AnswerError(f"{self._origin.url}: an answer's head of over {_HEAD_MAX_BYTES} bytes"))
        elif begins and call.on_chunks is not None and (b"transfer-encoding", b"chunked") in self._headers:
            self._whole_chunks(data, data.find(b"\r\n\r\n") + 4)

    def _whole_chunks(self, data: bytes, at: int) -> int:
        """A chunk begins here: where the last one ends that is whole. The last of the answer is left to the parser."""
        length = len(data)
        self._rest_bytes = 0
        while at < length:
            line = _SIZE.match(data, at)
            size = int(line[1], 16) if line is not None else 0
            if line is None or not size:
                self._rest_bytes = -1
                break
            end = line.end() + size + 2
            if end > length:
                self._rest_bytes = end - length
                break
            if not data.startswith(b"\r\n", end - 2):
                self._rest_bytes = -1
                break
            at = end
        return at

    def _skip(self, data: bytes) -> None:
        """The parser gets more of a chunk of which it has had the beginning."""
        if len(data) < self._rest_bytes:
            self._rest_bytes -= len(data)
        else:
            self._whole_chunks(data, self._rest_bytes)

    def connection_lost(self, exc: Exception | None) -> None:
        self._closed = True
        self._parser = None  # It refers to this connection.
        origin = self._origin
        origin._lost(self)
        call, self._call = self._call, None
        if call is None or call.over:
            return
        if call._reused and not self._any and not origin._closed:
            origin._dispatch(call, fresh=True)
            return
        if self._head_seen and exc is None and self._until_close():
            call.over = True
            call.receiver.on_end()
            return
        when = "in the middle of its answer" if self._any else "before its answer"
        call._fail(ConnectionLostError(f"{origin.url}: the connection was lost {when}"))

    def on_message_begin(self) -> None:
        if self._ended:
            self._keep = False  # An answer to no question.

    def on_header(self, name: bytes, value: bytes) -> None:
        if not self._head_seen:  # Trailers are dropped.
            self._headers.append((name.lower(), value))

    def on_headers_complete(self) -> None:
        call = self._call
        status = self._parser.get_status_code()
        if status < 200 or call is None or call.over or self._ended:
            return
        self._head_seen = True
        self._head_bytes = 0
        if call._head_only:
            self._keep = self._parser.should_keep_alive()
            self._ended = True
        call.receiver.on_head(status, self._headers)

    def on_body(self, data: bytes) -> None:
        if not self._ended:
            self._head_bytes = 0
            self._pieces.append(data)
        else:
            self._keep = False

    def on_message_complete(self) -> None:
        if self._ended:
            return
        if self._parser.get_status_code() < 200:
            self._headers = []
            return
        self._ended = True
        # Asked here, because the parser forgets it when it is ready for the next message.
        self._keep = self._parser.should_keep_alive()

    def _finish(self, call: Call) -> None:
        call.over = True
        self._call = None
        if call._head_only:
            self._parser = None  # It cannot know that no body follows: the next call gets a new one.
        if self._keep and not self._closed:
            self.resume()
            self.rest()
        else:
            self.close()
        call.receiver.on_end()

    def _until_close(self) -> bool:
        """Whether the body's end is the connection's."""
        names = {name for name, _ in self._headers}
        return b"content-length" not in names and b"transfer-encoding" not in names

    def _give_up(self, call: Call, error: NetError) -> None:
        self.close()
        call._fail(error)


class _Gather:
    """A receiver that collects the whole answer."""

    def __init__(self, body_max: int) -> None:
        self.future: asyncio.Future[Response] = asyncio.get_running_loop().create_future()
        self._body_max = body_max
        self._status = 0
        self._headers: list[Header] = []
        self._pieces: list[bytes] = []
        self._length = 0

    def on_head(self, status: int, headers: list[Header]) -> None:
        self._status, self._headers = status, headers

    def on_data(self, data: bytes) -> None:
        self._length += len(data)
        if self._length > self._body_max:
            self.on_error(AnswerError(f"an answer of more than {self._body_max} bytes"))
        else:
            self._pieces.append(data)

    def on_end(self) -> None:
        if not self.future.done():
            headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in self._headers}
            self.future.set_result(Response(status=self._status, headers=headers, body=b"".join(self._pieces)))

    def on_error(self, error: NetError) -> None:
        if not self.future.done():
            self.future.set_exception(error)
