"""One client's connection: what it sends becomes requests, in turn; limits and time-outs hold.

A client that stays sends nearly the same head each time, and often only the length of the body is another one. Such a
request, come in one block while nothing else is under way, is made from what the parser said of the last head.
"""

from __future__ import annotations

import logging
import re
from collections import deque
from collections.abc import Callable
from typing import Any, Protocol

import httptools

from chiron.net.incoming import Incoming, error_body
from chiron.net.limits import ServerLimits
from chiron.net.shares import Proxies, Shares

log = logging.getLogger("chiron.http")

_WRITE_HIGH_BYTES = 256 * 1024
_PIPELINE_MAX = 16
_BODY_RATE_MIN = 1024.0
"""Bytes per second. A body that is late by more than its timeout at this rate is only meant to hold a connection."""
_HOST = re.compile(rb"[^\s/?#@\\<>\"^`{|}\x00-\x20\x7f]*")
_BODY_RATE_FAIR = 65536.0
"""Bytes per second. A body that is later than at this rate goes before others when there is no room for all."""
_READ_RATE_MIN = 1024.0
"""Bytes per second. Who takes less of an answer that waits for it only means to hold it."""
_HEAD_KEPT_BYTES = 2048
"""A longer head is parsed each time."""
_UNLIKE_MAX = 4
"""After so many heads in turn that are not like the one before, as a proxy sends them, none is kept any more."""
_LENGTH = re.compile(rb"\r\ncontent-length:[ \t]*([0-9]{1,9})\r\n", re.IGNORECASE)
_LINGER_S = 2.0
"""How long what a refused client still sends is read and dropped, so that it sees why."""


Handler = Callable[[Incoming], None]
Screen = Callable[[Incoming], Callable[[], None] | None]
"""Sees the head of a request before anything of its body is kept. Returns what answers it if it is refused."""


class Server(Protocol):
    """What a connection reads and changes of the server that accepted it."""

    handle: Handler
    app: Handler | None
    is_app: Callable[[Incoming], bool] | None
    screen: Screen | None
    limits: ServerLimits
    connections: set[Connection]
    closing: bool
    open: int
    """Connections that count against ``limits``."""
    held_bytes: int
    """Bodies of requests that are not answered yet."""
    proxies: Proxies
    connection_shares: Shares
    body_shares: Shares
    now_s: float
    date_line: bytes

    def make_room(self) -> bool: ...
    def free_memory(self) -> bool: ...
    def lacks_files(self, descriptor: int) -> bool: ...
    def left(self, connection: Connection) -> None: ...


class _KnownHead:
    """A head that has been parsed, and found right, all but its length of the body."""

    __slots__ = ("after", "at", "before", "headers", "method", "path", "peers", "query", "version")

    def __init__(self, head: bytes, length: re.Match[bytes], request: Incoming, peers: tuple[str, ...]) -> None:
        self.before = head[: length.start(1)]
        self.after = head[length.end(1) :]
        self.headers = list(request.headers)
        self.at = self.headers.index((b"content-length", length[1]))
        self.method = request.method
        self.path = request.path
        self.query = request.query
        self.version = request.version
        self.peers = peers

    def matches(self, data: bytes) -> tuple[bytes, int] | None:
        """The body's length, and where it begins, if a block begins with such a head."""
        if not data.startswith(self.before):
            return None
        at = len(self.before)
        end = data.find(b"\r", at, at + 10)
        length = data[at:end]
        if end < 0 or not length.isdigit() or not data.startswith(self.after, end):
            return None
        return length, end + len(self.after)

    def request(self, connection: Connection, length: bytes) -> Incoming:
        found = Incoming(connection)
        found.method, found.path, found.query, found.version = self.method, self.path, self.query, self.version
        found.headers = self.headers.copy()
        found.headers[self.at] = (b"content-length", length)
        found.peers = self.peers
        return found


class Connection:
    """One client. A protocol of asyncio's, without its class: see ``net.client``."""

    def __init__(self, server: Server) -> None:
        self.server = server
        self.peer: tuple[str, int] = ("", 0)
        self.secure = False
        self.write_paused = False
        self.deadline_s = 0.0
        """When the sweep acts; inf-like while a handler works."""
        self._transport: Any = None
        self._parser: Any = None
        self._reading: Incoming | None = None
        """The request whose head or body is being read."""
        self._serving: Incoming | None = None
        self._waiting: deque[Incoming] = deque()
        self._head_bytes = 0
        """Received since the last request or the last piece of a body: heads, trailers, framing."""
        self._block_bytes = 0
        self._url = b""
        self._counted: tuple[str, ...] | None = None
        """The peers that this connection counts against; None: it does not count."""
        self._since_s = 0.0
        """When it became idle, or began to send what it is sending."""
        self._read_paused = False
        self._body_paused = False
        """By a handler that has enough of its request's body for now."""
        self._turn_awaited = False
        """What the client sends next is for a request after the one being served: it is read in its turn, so that a
        connection never holds more than one request and what came with its last bytes."""
        self._written_bytes = 0
        self._taken_bytes = 0
        """Of those written, at the last look at a client that does not read."""
        self._deaf = False
        """No further input is looked at; what came before is still answered."""
        self._lingers = False
        self._declining = False
        """The head being read is our own, or its message's end is not the request's."""
        self._lost = False
        self._peers: tuple[str, ...] = ()
        self._known: _KnownHead | None = None
        self._plain: tuple[Incoming, tuple[str, ...]] | None = None
        """A request whose head could become known, and the peers that it names."""
        self._unlike = 0
        """Heads in turn that were not like the one before."""

    # -- asyncio ----------------------------------------------------------------------------------------------

    def connection_made(self, transport: Any) -> None:
        self._transport = transport
        self._transport.set_write_buffer_limits(high=_WRITE_HIGH_BYTES)
        peer = transport.get_extra_info("peername")
        self.peer = (str(peer[0]), int(peer[1])) if isinstance(peer, tuple) else ("", 0)
        self.secure = transport.get_extra_info("sslcontext") is not None
        server = self.server
        server.connections.add(self)
        self._since_s = server.now_s
        peer_name = server.proxies.peer_of(self.peer[0])
        self._peers = (peer_name,) if peer_name else ()
        self._parser = httptools.HttpRequestParser(self)
        self.deadline_s = server.now_s + server.limits.header_timeout_s
        refusal = self._no_place()
        if refusal:
            self._refuse(503, refusal, "service_unavailable")
            self._hang_up(linger=False)
        else:
            self._counted = self._peers
            server.open += 1
            server.connection_shares.add(self._peers, 1)

    def _no_place(self) -> str:
        """Why there is no place for one more connection; "": there is, or somebody slow made one."""
        server = self.server
        if over := server.connection_shares.over(self._peers, 1):
            return f"too many connections of {over}; allowed: {server.connection_shares.each}"
        wire = self._transport.get_extra_info("socket")
        full = server.open >= server.limits.connections_max
        if not full and (wire is None or not server.lacks_files(wire.fileno())):
            return ""
        return "" if server.make_room() else "too many connections" if full else "too few file descriptors are left"

    def _count_off(self) -> None:
        if self._counted is not None:
            self.server.open -= 1
            self.server.connection_shares.add(self._counted, -1)
            self._counted = None

    def data_received(self, data: bytes) -> None:
        if self._deaf:
            return
        begins = self._reading is None
        if begins and self._known is not None and self._take_like_the_last(self._known, data):
            return
        self._block_bytes = len(data)
        self._head_bytes += len(data)
        try:
            self._feed(data)
        except (httptools.HttpParserError, httptools.HttpParserCallbackError) as error:
            cause = error.__context__
            if isinstance(error, httptools.HttpParserCallbackError) and cause is not None:
                log.error("a request handler failed", exc_info=cause)
                self._refuse(500, "internal error", "internal_error")
            else:
                self._refuse(400, "not an HTTP/1.1 request", "bad_request")
        else:
            if self._reading is not None and self._head_bytes > self.server.limits.header_max_bytes:
                self._refuse_head()
            elif self._waiting or (self._reading not in (None, self._serving) and not self._ready):
                self._turn_awaited = True
                self._update_reading()
        if self._plain is not None:
            if begins and not self._deaf:
                self._keep_head(data, *self._plain)
            self._plain = None

    def _take_like_the_last(self, known: _KnownHead, data: bytes) -> bool:
        """A whole request, and nothing else, with the head of the last one. False: it is the parser's after all, which
        also refuses what is to be refused."""
        found = known.matches(data) if self._ready and not self._turn_awaited else None
        if found is None:
            return False
        length, body_at = found
        server, limits = self.server, self.server.limits
        body_bytes = len(data) - body_at
        if not 0 < body_bytes == int(length) <= limits.body_max_bytes or body_at > limits.header_max_bytes:
            return False
        request = known.request(self, length)
        if server.screen is not None and server.screen(request) is not None:
            return False
        if server.held_bytes + body_bytes > limits.bodies_max_bytes or server.body_shares.over(
            request.peers, body_bytes
        ):
            return False
        self._unlike = 0
        self._since_s = request._body_begin_s = server.now_s
        server.held_bytes += body_bytes
        server.body_shares.add(request.peers, body_bytes)
        request._held_bytes = request._body_length = body_bytes
        request.body = data[body_at:]
        request.complete = True
        self._serve(request)
        return True

    def _keep_head(self, data: bytes, request: Incoming, peers: tuple[str, ...]) -> None:
        """The block was this request and nothing else: the next one may have its head."""
        head = data[: data.find(b"\r\n\r\n") + 4]
        lengths = list(_LENGTH.finditer(head)) if len(head) <= _HEAD_KEPT_BYTES else []
        body_bytes = int(lengths[0][1]) if len(lengths) == 1 else 0
        if len(head) + body_bytes > len(data):
            return  # There is more to come of its body.
        self._unlike += 1
        usable = 0 < body_bytes == len(data) - len(head) and self._unlike <= _UNLIKE_MAX
        self._known = _KnownHead(head, lengths[0], request, peers) if usable else None

    def _feed(self, data: bytes) -> None:
        while data:
            try:
                self._parser.feed_data(data)
            except httptools.HttpParserUpgrade as upgrade:
                data = data[upgrade.args[0] :]
                self._decline_upgrade()
            else:
                return

    def _decline_upgrade(self) -> None:
        """Answer as if no switch of protocols had been offered. The parser takes what follows the head for the other
        protocol, a body too; another parser goes on, told how the body is framed and nothing else."""
        self._parser = httptools.HttpRequestParser(self)
        request = self._reading
        if request is None or self._deaf:
            return
        framing = b"transfer-encoding: chunked"
        if request.header(b"transfer-encoding") is None:
            framing = b"content-length: " + (request.header(b"content-length") or b"0")
        self._parser.feed_data(b"POST / HTTP/1.1\r\n" + framing + b"\r\n")
        self._declining = False
        self._parser.feed_data(b"\r\n")

    def eof_received(self) -> bool:
        return False

    def connection_lost(self, exc: Exception | None) -> None:
        self._lost = True
        self.server.connections.discard(self)
        self._count_off()
        leaving = [r for r in (self._serving, self._reading) if r is not None]
        for request in dict.fromkeys((*leaving, *self._waiting)):
            self._let_go(request)
        self._serving = self._reading = None
        self._waiting.clear()
        self._parser = None  # It refers to this connection.
        self._plain = None
        for request in dict.fromkeys(leaving):
            told = None if request.closed else request.on_close
            request.closed = True
            request._forget()
            if told is not None:
                told()
        self.server.left(self)

    def pause_writing(self) -> None:
        self.write_paused = True
        self._taken_bytes = self._written_bytes - self._transport.get_write_buffer_size()
        self.deadline_s = self.server.now_s + self.server.limits.stall_s
        if self._serving is not None and self._serving.on_pause is not None:
            self._serving.on_pause()

    def resume_writing(self) -> None:
        self.write_paused = False
        if self._transport.is_closing():
            return
        self._next_deadline()
        if self._serving is None:
            self._serve_waiting()
        elif self._serving.on_resume is not None:
            self._serving.on_resume()

    # -- httptools --------------------------------------------------------------------------------------------

    def on_message_begin(self) -> None:
        if self._deaf or self._declining:
            return
        self._reading = Incoming(self)
        self._reading.peers = self._peers
        self._since_s = self.server.now_s
        self._url = b""
        self.deadline_s = self.server.now_s + self.server.limits.header_timeout_s

    def on_url(self, url: bytes) -> None:
        if not self._deaf and not self._declining:
            self._url += url

    def on_header(self, name: bytes, value: bytes) -> None:
        # Trailers are dropped: nothing that comes after the body may say whose it is, or what.
        if self._reading is not None and not self._reading.method:
            self._reading.headers.append((name.lower(), value))

    def on_headers_complete(self) -> None:
        request = self._reading
        if request is None or self._deaf or request.method:
            return
        limits = self.server.limits
        parser = self._parser
        # A head is only counted exactly where the block that it came in leaves a doubt.
        many = max(self._head_bytes, self._block_bytes) > limits.header_max_bytes
        if len(request.headers) > limits.headers_max or (many and self._head_length() > limits.header_max_bytes):
            self._refuse_head()
            return
        self._head_bytes = 0
        request.method = parser.get_method()
        request.version = parser.get_http_version()
        if request.version not in ("1.1", "1.0"):
            self._refuse(505, "only HTTP/1.1 and HTTP/1.0 are supported", "http_version_not_supported")
            return
        if request.method == b"CONNECT":
            self._refuse(405, "this is not a proxy", "method_not_allowed")
            return
        hosts = [value for name, value in request.headers if name == b"host"]
        lacking = not hosts and limits.host_required and request.version == "1.1"
        if lacking or len(hosts) > 1 or (hosts and not _HOST.fullmatch(hosts[0])):
            self._refuse(400, "the header Host must be given once, as NAME or NAME:PORT", "bad_request")
            return
        request._keep_alive = parser.should_keep_alive()
        self._declining = parser.should_upgrade()
        path, _, request.query = self._url.partition(b"?")
        if not path.startswith(b"/"):  # An absolute URL, as proxies send it.
            path = b"/" + path.partition(b"://")[2].partition(b"/")[2]
        request.path = path.decode("latin-1")
        request._body_begin_s = self.server.now_s
        self.deadline_s = self.server.now_s + limits.body_timeout_s
        length = request.header(b"content-length")
        if length is None:
            coding = request.header(b"transfer-encoding")
            if coding is not None and (coding.lower() != b"chunked" or request.version == "1.0"):
                self._refuse(501, "the only transfer coding is 'chunked', of HTTP/1.1", "not_implemented")
                return
        is_app = self.server.is_app
        request.streams = is_app is not None and is_app(request)
        if not request.streams and length is not None and int(length) > limits.body_max_bytes:
            self._refuse_body()
            return
        if not self._peers:
            chain = [value for name, value in request.headers if name == b"x-forwarded-for"]
            client = self.server.proxies.forwarded(chain) if chain else ""
            request.peers = (client,) if client else ()
        peers = request.peers
        screen = self.server.screen
        if screen is not None and not request.streams:
            refusal = screen(request)
            if refusal is not None:
                self._decline(request, refusal)
                return
        expect = request.header(b"expect")
        if expect is not None and expect.lower() == b"100-continue" and self._ready and request.version == "1.1":
            self.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        if request.streams:
            self._enqueue(request)
        elif length is not None and expect is None and request._keep_alive and not self._declining:
            self._plain = (request, peers)

    def on_body(self, data: bytes) -> None:
        request = self._reading
        if request is None or self._deaf:
            return
        self._head_bytes = 0
        now_s, limits = self.server.now_s, self.server.limits
        self.deadline_s = now_s + limits.body_timeout_s
        if request.on_body is not None:
            request.on_body(data)
            return
        request._add(data)
        if request.streams:
            return
        server = self.server
        server.held_bytes += len(data)
        request._held_bytes += len(data)
        server.body_shares.add(request.peers, len(data))
        if request._body_length > limits.body_max_bytes:
            self._refuse_body()
            return
        if over := server.body_shares.over(request.peers):
            self._refuse(503, f"the requests of {over} that are open hold too much memory", "service_unavailable")
            return
        # The slowest request goes first; it may be this one.
        if server.held_bytes > limits.bodies_max_bytes and not server.free_memory() and not self._deaf:
            self._refuse(503, "the requests that are open hold too much memory", "service_unavailable")
        if self._deaf:
            return
        due_s = request._body_begin_s + request._body_length / _BODY_RATE_MIN
        self.deadline_s = min(now_s, due_s) + limits.body_timeout_s

    def on_message_complete(self) -> None:
        request = self._reading
        if request is None or self._deaf or self._declining:
            return
        self._reading = None
        self._head_bytes = 0
        request.complete = True
        if request.streams:
            self._next_deadline()
            if request.on_body_end is not None:
                request.on_body_end()
            return
        request._collect()
        self._enqueue(request)

    def _let_go(self, request: Incoming) -> None:
        """Its body is held no longer."""
        request._pieces.clear()
        request._gathered = None
        held_bytes, request._held_bytes = request._held_bytes, 0
        if held_bytes:
            self.server.held_bytes -= held_bytes
            self.server.body_shares.add(request.peers, -held_bytes)

    def _head_length(self) -> int:
        assert self._reading is not None
        return len(self._url) + sum(len(name) + len(value) + 4 for name, value in self._reading.headers)

    # -- requests in turn -------------------------------------------------------------------------------------

    @property
    def _ready(self) -> bool:
        """Nothing is under way, and the client has read enough of what it was answered before."""
        return self._serving is None and not self._waiting and not self.write_paused

    def _enqueue(self, request: Incoming) -> None:
        if self._ready:
            self._serve(request)
            return
        if len(self._waiting) == _PIPELINE_MAX:
            self._deaf = True  # Those before it are answered; it may be sent again on another connection.
            return
        self._waiting.append(request)

    def _decline(self, request: Incoming, refusal: Callable[[], None]) -> None:
        """A head that is refused: its body is dropped. It is answered in its turn, and then the connection ends."""
        request.refusal = refusal
        if self._ready:
            self._serve(request)
        else:
            self._deaf = True
            self._waiting.append(request)

    def _serve_waiting(self) -> None:
        while self._waiting and self._serving is None and not self.write_paused and not self._transport.is_closing():
            self._serve(self._waiting.popleft())
        if self._turn_awaited and self._ready:
            self._turn_awaited = False
            if self._reading is not None:
                self._reading._body_begin_s = self.server.now_s  # Until now it was not the client who was late.
            self._update_reading()

    def _serve(self, request: Incoming) -> None:
        self._serving = request
        self._next_deadline()
        server = self.server
        try:
            if request.refusal is not None:
                request.refusal()
            elif request.streams:
                assert server.app is not None
                server.app(request)
                request._collect()
                early, request.body = request.body, b""
                if request.on_body is not None and early:
                    request.on_body(early)
                if request.complete and request.on_body_end is not None:
                    request.on_body_end()
            else:
                server.handle(request)
        except Exception:
            log.exception("a request handler failed")
            if not request.started:
                request.respond(500, error_body(500, "internal error", "internal_error"))
            else:
                request.abort()

    def answered(self, request: Incoming) -> None:
        """The answer to ``request`` is complete."""
        request._forget()
        if self._serving is request:
            self._serving = None
        if self._lost:
            return
        self._let_go(request)
        self._since_s = self.server.now_s
        if request.streams:
            # What its handler left unread of the body must not keep the next request waiting.
            self.resume_reading()
        last = self._deaf and not self._waiting
        if not request._keep_alive or not request.complete or last or self.server.closing:
            self._hang_up(linger=last or not request.complete)
        else:
            self._next_deadline()
            self._serve_waiting()

    def _hang_up(self, *, linger: bool) -> None:
        """Close when what was written is sent. ``linger``: the client may still be sending; to close on it would
        reset the connection and take the answer with it."""
        self._deaf = True
        self._waiting.clear()
        self._lingers = linger
        self.deadline_s = self.server.now_s + (_LINGER_S if linger else self.server.limits.stall_s)
        if not linger:
            self._transport.close()
        elif not self._transport.is_closing():
            self._body_paused = self._turn_awaited = False
            self._update_reading()
            if self._transport.can_write_eof():
                self._transport.write_eof()

    def _next_deadline(self) -> None:
        """When the sweep should look again, given what the connection does."""
        limits, now_s = self.server.limits, self.server.now_s
        if self.write_paused:
            self.deadline_s = now_s + limits.stall_s
        elif self._deaf and self._serving is None:
            pass  # Hung up already.
        elif self._serving is not None and (self._reading is None or self._read_paused):
            self.deadline_s = now_s + 1e9
        elif self._reading is not None:
            self.deadline_s = now_s + (limits.body_timeout_s if self._reading.method else limits.header_timeout_s)
        else:
            self.deadline_s = now_s + limits.idle_s

    def late_s(self, now_s: float) -> float:
        """For how long the client has had its connection for nothing: idle, or sending slower than it should."""
        if self._serving is not None or self._waiting or self._counted is None or self.write_paused:
            return 0.0
        came = 0 if self._reading is None else self._reading._body_length
        return now_s - self._since_s - came / _BODY_RATE_FAIR

    @property
    def reads_body(self) -> bool:
        return self._reading is not None and self._reading._held_bytes > 0

    def give_way(self) -> None:
        """Others need the room."""
        self._count_off()
        if self._reading is not None:
            self._refuse(503, "the request came too slowly while others waited", "service_unavailable")
        else:
            self._hang_up(linger=False)

    @property
    def idle(self) -> bool:
        return self._serving is None and not self._waiting and (self._reading is None or self._deaf)

    def expire(self) -> None:
        """The sweep: a deadline has passed."""
        unsent_bytes = self._transport.get_write_buffer_size()
        taken_bytes = self._written_bytes - unsent_bytes
        if self._lingers:
            self._hang_up(linger=False)
        elif unsent_bytes and taken_bytes - self._taken_bytes >= _READ_RATE_MIN * self.server.limits.stall_s:
            self._taken_bytes = taken_bytes  # It reads, if slowly.
            self.deadline_s = self.server.now_s + self.server.limits.stall_s
        elif self._transport.is_closing() or self.write_paused:
            self.abort()
        elif self._reading is not None and self._serving is None:
            self._refuse(408, "the request took too long to arrive", "request_timeout")
        elif self._reading is not None and self._serving is self._reading and not self._serving.started:
            self._refuse(408, "the body took too long to arrive", "request_timeout")
        elif self._serving is None:
            self._hang_up(linger=False)
        else:
            self.abort()

    # -- bytes ------------------------------------------------------------------------------------------------

    def write(self, data: bytes) -> None:
        if not self._lost:
            self._written_bytes += len(data)
            self._transport.write(data)

    def abort(self) -> None:
        self._deaf = True
        self._transport.abort()

    def close(self) -> None:
        self._transport.close()

    def pause_reading(self) -> None:
        self._body_paused = True
        self._update_reading()

    def resume_reading(self) -> None:
        self._body_paused = False
        self._update_reading()

    def _update_reading(self) -> None:
        paused = self._body_paused or self._turn_awaited
        if paused == self._read_paused:
            return
        self._read_paused = paused
        if self._transport.is_closing():
            return
        if paused:
            self._transport.pause_reading()
        else:
            self._transport.resume_reading()
        self._next_deadline()  # While the handler does not read, it is not the client who is late.

    def _refuse_head(self) -> None:
        limits = self.server.limits
        allowed = f"at most {limits.header_max_bytes} bytes and {limits.headers_max} headers"
        self._refuse(431, f"the request's head is too large; allowed: {allowed}", "headers_too_large")

    def _refuse_body(self) -> None:
        allowed = self.server.limits.body_max_bytes
        self._refuse(413, f"the request's body is too large; allowed: {allowed} bytes", "request_too_large")

    def _refuse(self, status: int, message: str, code: str) -> None:
        """An answer without the handler, and the end of the connection."""
        if self._deaf:
            return
        self._deaf = True
        request = self._reading or Incoming(self)
        if self._waiting or (self._serving is not None and self._serving is not request):
            return  # Those before it are answered; then the connection closes.
        request.complete = False
        if request.closed or request.started:
            self.abort()
            return
        if request.on_close is not None:
            request.on_close()
        later = ((b"retry-after", b"1"),) if status == 503 else ()
        request.respond(status, error_body(status, message, code), headers=later)
