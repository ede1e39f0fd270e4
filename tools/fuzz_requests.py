"""Requests for ``fuzz_gateway``: valid ones of every route, and mutations of their JSON, heads, framing and bytes.

All are drawn from one generator, so a seed and a number name a request. ``Wire`` is what goes over the socket, in
pieces: a client may send a request cut anywhere.
"""

from __future__ import annotations

import json
import re
from copy import deepcopy
from dataclasses import dataclass, field
from random import Random
from typing import Any

ODD: tuple[Any, ...] = (
    *(None, True, False, 0, -1, 1, 2**31, 2**53, 2**63, 2**64, -(2**63) - 1, 10**40, 0.5, 1e308, -1e308, 1e-308),
    *("", " ", "x" * 5000, "\u0000", "\ud800", "\ufeff", "\u202e", "💥" * 50, "null", "../../etc/passwd", "%00"),
    *("a\r\nx-evil: 1", "NaN", "1e999", "file-" + "0" * 32, "batch_" + "f" * 32, [], {}, [[]], [None], {"": None}),
)
"""Stand where any value should."""
_NUMBERS = (b"1e999", b"-1e999", b"NaN", b"Infinity", b"0" * 400, b"9" * 400, b"1" + b"0" * 4000, b"-", b"0x10", b"1.")
"""What JSON does not have, or hardly."""
_METHODS = (b"GET", b"POST", b"PUT", b"DELETE", b"HEAD", b"OPTIONS", b"PATCH", b"TRACE", b"CONNECT", b"QUERY", b"PRI")
_PATHS = (
    *(b"/", b"//", b"*", b"", b"/v1", b"/v1/", b"/v1//models", b"/v1/../v1/models", b"/v1/models/%00", b"/%ff%fe"),
    *(
        b"/v1/models/" + b"a" * 4000,
        b"http://evil.example/v1/models",
        b"/v1/files/%2e%2e/content",
        b"/chat/completions",
    ),
    *(b"/v1/v1/models", b"/v1/models?limit=1&limit=2", b"/v1/files?limit=-1", b"/v1/files?after=%00", b"/ready?model="),
    *(
        b"/ready?model=%ff",
        b"/ready?model=" + b"m" * 3000,
        b"/v1/batches?after=x&limit=9999",
        b"/health#x",
        b"/\xf0\x9f\x92\xa5",
    ),
)
_HEADERS = (
    (b"host", b""),
    (b"host", b"evil.example"),
    (b"host", b"a" * 3000),
    (b"content-length", b"-1"),
    (b"content-length", b"0"),
    (b"content-length", b"99999999999999999999"),
    (b"content-length", b"5, 5"),
    (b"content-length", b"+5"),
    (b"transfer-encoding", b"gzip"),
    (b"transfer-encoding", b"chunked, chunked"),
    (b"transfer-encoding", b"identity"),
    (b"connection", b"close"),
    (b"connection", b"upgrade, keep-alive"),
    (b"upgrade", b"h2c"),
    (b"upgrade", b"websocket"),
    (b"expect", b"100-continue"),
    (b"expect", b"200-ok"),
    (b"authorization", b""),
    (b"authorization", b"Bearer"),
    (b"authorization", b"Bearer \xff\xfe"),
    (b"authorization", b"Basic eDp5"),
    (b"authorization", b"Bearer " + b"x" * 5000),
    (b"content-type", b"multipart/form-data"),
    (b"content-type", b"multipart/form-data; boundary=" + b"b" * 300),
    (b"content-type", b"text/plain; charset=utf-7"),
    (b"content-encoding", b"gzip"),
    (b"accept-encoding", b"*;q=0"),
    (b"x-chiron-class", b"gold"),
    (b"x-chiron-class", b"batch"),
    (b"x-chiron-class", b"\xe2\x82\xac"),
    (b"x-slo-ttft-ms", b"nan"),
    (b"x-slo-ttft-ms", b"1e309"),
    (b"x-slo-tpot-ms", b"-5"),
    (b"x-slo-tpot-ms", b"0.0000001"),
    (b"x-request-id", b"\x01\x02"),
    (b"prefer", b"wait=0"),
    (b"prefer", b"wait=999999999999"),
    (b"prefer", b"wait=-1, ,;;=;"),
    (b"sec-fetch-site", b"cross-site"),
    (b"range", b"bytes=0-0,-1"),
    (b"cookie", b"a=b" * 200),
    (b"x" * 300, b"y"),
    (b"x-long", b"z" * 70_000),
)


@dataclass(slots=True)
class Message:
    """A request before it is framed."""

    method: bytes
    path: bytes
    headers: list[tuple[bytes, bytes]] = field(default_factory=list)
    body: bytes = b""
    value: Any = None
    """The body before it was JSON; None: it is none."""


@dataclass(frozen=True, slots=True)
class Wire:
    """What is sent."""

    pieces: tuple[bytes, ...]
    what: str
    """Which mutations."""

    @property
    def data(self) -> bytes:
        return b"".join(self.pieces)


def request(seed: int, number: int, *, model: str = "m", keys: tuple[str, ...] = ()) -> Wire:
    """The request of this number. ``keys``: API keys, one of which it mostly has."""
    draw = Random(f"{seed}:{number}")
    message = draw.choice(_VALID)(draw, model)
    message.headers += [(b"host", b"127.0.0.1"), (b"user-agent", b"fuzz")]
    if keys and draw.random() < 0.97:
        message.headers.append((b"authorization", b"Bearer " + draw.choice(keys).encode()))
    what = []
    for _ in range(draw.choice((0, 1, 1, 1, 2, 3))):
        mutate = draw.choice(_OF_MESSAGES)
        mutate(draw, message)
        what.append(mutate.__name__.removeprefix("_"))
    if message.value is not None and not message.body:
        message.body = _json(message.value)
    data = _framed(draw, message, what)
    if draw.random() < 0.15:
        data = _bytes_changed(draw, data)
        what.append("bytes")
    return Wire(_cut(draw, data), "+".join(what) or "valid")


# -- valid requests ---------------------------------------------------------------------------------------------------


def _chat(draw: Random, model: str) -> Message:
    value: dict[str, Any] = {"model": model, "messages": [{"role": "user", "content": "hello"}]}
    value["max_tokens"] = draw.randint(1, 5)
    extra = draw.choice(
        (
            {},
            {"stream": True},
            {"stream": True, "stream_options": {"include_usage": True}},
            {"service_tier": "flex"},
            {"service_tier": "flex", "stream": True},
            {"temperature": 0.5, "top_p": 0.9, "stop": ["x"], "seed": 7, "user": "u"},
            {"messages": [{"role": "user", "content": [{"type": "text", "text": "hi"}]}]},
            {"tools": [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}]},
            {"response_format": {"type": "json_object"}, "n": 2, "logprobs": True},
        )
    )
    return _posted(b"/v1/chat/completions", value | extra)


def _completion(draw: Random, model: str) -> Message:
    prompt = draw.choice(("hello", [1, 2, 3], ["a", "b"], [[1, 2], [3]]))
    return _posted(
        b"/v1/completions", {"model": model, "prompt": prompt, "max_tokens": 3, "stream": draw.random() < 0.5}
    )


def _upload(draw: Random, model: str) -> Message:
    line = {"custom_id": "1", "method": "POST", "url": "/v1/chat/completions"}
    line["body"] = {"model": model, "messages": [{"role": "user", "content": "x"}], "max_tokens": 2}  # type: ignore[assignment]
    body = (
        b'--fuzz\r\ncontent-disposition: form-data; name="purpose"\r\n\r\nbatch\r\n--fuzz\r\n'
        b'content-disposition: form-data; name="file"; filename="a.jsonl"\r\n\r\n' + _json(line) + b"\n\r\n--fuzz--\r\n"
    )
    return Message(b"POST", b"/v1/files", [(b"content-type", b"multipart/form-data; boundary=fuzz")], body)


def _batch(draw: Random, model: str) -> Message:
    value = {"input_file_id": f"file-{draw.getrandbits(128):032x}", "endpoint": "/v1/chat/completions"}
    value["completion_window"] = draw.choice(("24h", "1h", "60s"))
    more = {"metadata": {"a": "b"}, "output_expires_after": {"anchor": "created_at", "seconds": 3600}}
    return _posted(b"/v1/batches", value | (more if draw.random() < 0.5 else {}))


def _page(draw: Random, model: str) -> Message:
    file, batch = b"file-%032x" % draw.getrandbits(128), b"batch_%032x" % draw.getrandbits(128)
    name = model.encode()
    paths = (
        *(b"/v1/models", b"/v1/models/" + name, b"/v1/files", b"/v1/files/" + file, b"/v1/files/" + file + b"/content"),
        *(b"/v1/batches", b"/v1/batches/" + batch, b"/v1/batches?limit=2&after=" + batch, b"/v1/files?purpose=batch"),
        *(b"/health", b"/ready", b"/ready?model=" + name, b"/openapi.json", b"/metrics", b"/chiron/status"),
    )
    return Message(draw.choice((b"GET", b"GET", b"GET", b"HEAD")), draw.choice(paths))


def _action(draw: Random, model: str) -> Message:
    file, batch = b"file-%032x" % draw.getrandbits(128), b"batch_%032x" % draw.getrandbits(128)
    if draw.random() < 0.5:
        return Message(b"DELETE", b"/v1/files/" + file)
    return Message(b"POST", b"/v1/batches/" + batch + b"/cancel")


_VALID = (_chat, _chat, _chat, _completion, _upload, _batch, _page, _page, _action)


def _posted(path: bytes, value: Any) -> Message:
    return Message(b"POST", path, [(b"content-type", b"application/json")], value=value)


# -- mutations --------------------------------------------------------------------------------------------------------


def _json_value(draw: Random, message: Message) -> None:
    """One value somewhere in it is another."""
    if message.value is None:
        return
    places = list(_places(message.value))
    if not places or draw.random() < 0.05:
        message.value = _odd(draw)
        return
    holder, key = draw.choice(places)
    turn = draw.random()
    if turn < 0.15:
        del holder[key]
    elif turn < 0.3 and isinstance(holder, dict):
        holder[draw.choice(("", "model", "stream", "prompt", "n", "x" * 1000, "\ud800"))] = holder[key]
    elif turn < 0.4 and isinstance(holder, list):
        holder.extend([holder[key]] * draw.choice((1, 50, 3000)))
    else:
        holder[key] = _odd(draw)


def _odd(draw: Random) -> Any:
    return deepcopy(draw.choice(ODD))  # The next mutation may change it.


def _json_text(draw: Random, message: Message) -> None:
    """Its text is no JSON, or a kind that no writer makes."""
    if message.value is None:
        return
    text = _json(message.value)
    depth = draw.choice((5, 100, 249, 251, 990, 5000, 50_000))
    nested = b"[" * depth + b"1" + b"]" * depth if draw.random() < 0.5 else b'{"a":' * depth + b"1" + b"}" * depth
    wraps = (
        text[: draw.randrange(len(text) + 1)],
        b"\xef\xbb\xbf" + text,
        text.decode("latin-1").encode("utf-16"),
        text[:-1] + b',"metadata":' + nested + b"}",
        _with_value(draw, text, nested),
        _with_value(draw, text, draw.choice(_NUMBERS)),
        text[:-1] + b',"max_tokens":' + draw.choice(_NUMBERS) + b"}",
        text[:-1] + b',"model":"m","model":5}',
        text[:-1] + b",}",
        text + text,
        b" " * 3000 + text + b"\n" * 3000,
        nested,
        text.replace(b'"', b"'"),
        text.replace(b"hello", bytes(draw.randrange(256) for _ in range(30))),
        text.replace(b"hello", b"\\ud800\\u0000\\uffff"),
        text.replace(b"hello", b"h" * draw.choice((10_000, 300_000))),
    )
    message.body = draw.choice(wraps) or b" "


def _with_value(draw: Random, text: bytes, value: bytes) -> bytes:
    """With this in place of one of its texts."""
    places = list(re.finditer(rb': "[^"]*"', text))
    if not places:
        return value
    place = draw.choice(places)
    return text[: place.start()] + b": " + value + text[place.end() :]


def _header(draw: Random, message: Message) -> None:
    for _ in range(draw.choice((1, 1, 2, 150))):
        message.headers.insert(draw.randint(0, len(message.headers)), draw.choice(_HEADERS))


def _header_gone(draw: Random, message: Message) -> None:
    if message.headers:
        del message.headers[draw.randrange(len(message.headers))]


def _header_twice(draw: Random, message: Message) -> None:
    if message.headers:
        message.headers.append(draw.choice(message.headers))


def _method(draw: Random, message: Message) -> None:
    message.method = draw.choice((*_METHODS, message.method.lower(), b"X" * 500, b""))


def _path(draw: Random, message: Message) -> None:
    path = message.path
    if path.startswith(b"/chiron"):
        return
    at = draw.randint(0, len(path))
    odd = draw.choice((b"%", b"%00", b"%2f", b"//", b"/..", b"?", b"&=", b"\xff", b"#", b";", b"%e2%82", b" "))
    message.path = draw.choice((*_PATHS, path[:at] + odd + path[at:], path + b"/", path.upper(), path + b"?a=b&a"))


def _body(draw: Random, message: Message) -> None:
    """A body where there should be none, none where there should be one, or another form."""
    file = b"--fuzz\r\ncontent-disposition: form-data; name=file; filename=x\r\n\r\n"
    message.value = None
    message.body = draw.choice(
        (b"", b"{}", b"\x00" * 100, b"--fuzz--\r\n", file, file * 40, b"x" * 100_000, message.body[:-9])
    )


_OF_MESSAGES = (
    _json_value,
    _json_value,
    _json_value,
    _json_text,
    _header,
    _header_gone,
    _header_twice,
    _method,
    _path,
    _body,
)


def _framed(draw: Random, message: Message, what: list[str]) -> bytes:
    version = b"HTTP/1.1"
    if draw.random() < 0.04:
        version = draw.choice((b"HTTP/1.0", b"HTTP/1.1 ", b"HTTP/0.9", b"HTTP/2.0", b"HTTP/3", b"http/1.1", b""))
        what.append("version")
    body, headers = message.body, list(message.headers)
    turn = draw.random()
    if turn < 0.2 and body:
        headers.append((b"transfer-encoding", b"chunked"))
        body = _chunked(draw, body)
        what.append("chunked")
    elif turn < 0.23:
        headers.append((b"content-length", b"%d" % max(0, len(body) + draw.choice((-3, -1, 1, 50)))))
        what.append("length")
    elif body or message.method == b"POST":
        headers.append((b"content-length", b"%d" % len(body)))
    head = b"".join(b"%b: %b\r\n" % header for header in headers)
    return b"%b %b %b\r\n%b\r\n%b" % (message.method, message.path, version, head, body)


def _chunked(draw: Random, body: bytes) -> bytes:
    framed = b""
    while body:
        size = draw.choice((1, 7, 64, 4096, 1 << 20))
        piece, body = body[:size], body[size:]
        said = b"%x" % len(piece)
        turn = draw.random()
        if turn < 0.02:
            said = draw.choice((b"-1", b"ffffffffffffffff", b"zz", b"", b"0x5", said + b";a=b", said + b" "))
        framed += said + b"\r\n" + piece + (b"\r\n" if draw.random() > 0.01 else b"")
        if len(framed) > 64 * 1024:
            framed += b"%x\r\n%b\r\n" % (len(body), body) if body else b""
            break
    return framed + draw.choice(
        (b"0\r\n\r\n", b"0\r\n\r\n", b"0\r\n\r\n", b"0\r\nx-trailer: 1\r\n\r\n", b"0;a\r\n\r\n", b"")
    )


def _bytes_changed(draw: Random, data: bytes) -> bytes:
    changed = bytearray(data)
    for _ in range(draw.choice((1, 1, 2, 8))):
        at = draw.randrange(len(changed) + 1)
        turn = draw.random()
        if turn < 0.4 and at < len(changed):
            changed[at] = draw.randrange(256)
        elif turn < 0.6:
            changed[at:at] = bytes(draw.randrange(256) for _ in range(draw.choice((1, 2, 100))))
        elif turn < 0.8:
            del changed[at : at + draw.choice((1, 2, 20))]
        else:
            changed[at:at] = changed[at : at + 40]
    return bytes(changed)


def _cut(draw: Random, data: bytes) -> tuple[bytes, ...]:
    if draw.random() < 0.9 or len(data) < 2:
        return (data,)
    cuts = sorted(draw.randrange(1, len(data)) for _ in range(draw.choice((1, 3, 10))))
    return tuple(data[a:b] for a, b in zip((0, *cuts), (*cuts, len(data)), strict=True) if a < b)


def _places(value: Any) -> list[tuple[Any, Any]]:
    """Every value inside, as its holder and its key there."""
    keys: Any = value.keys() if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ()
    found = []
    for key in list(keys):
        found.append((value, key))
        found += _places(value[key])
    return found


def _json(value: Any) -> bytes:
    return json.dumps(value).encode()
