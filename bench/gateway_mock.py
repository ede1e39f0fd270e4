"""The cheapest engine there can be: fixed answers, so that a benchmark measures what stands in front of it.

    python bench/gateway_mock.py PORT [--chunks 200] [--pace 0.010]

A request with ``"stream":true`` gets ``--chunks`` events of some 170 bytes, one every ``--pace`` seconds; any other
gets 400 bytes of JSON. It reads no more of a request than it must.
"""

from __future__ import annotations

import argparse
import asyncio
import json

PAD = "x" * 72


def events(count: int) -> list[bytes]:
    """Of one stream, without framing; the last comes with the stream's end."""
    made = []
    for i in range(count):
        choice = {"index": 0, "delta": {"content": f" word{i % 1000:03d}{PAD[:20]}"}, "finish_reason": None}
        body = {"id": "chatcmpl-0", "object": "chat.completion.chunk", "created": 0, "model": "m", "choices": [choice]}
        made.append(b"data: " + json.dumps(body).encode() + b"\n\n")
    made[-1] += b"data: [DONE]\n\n"
    return made


def chunks(count: int) -> list[bytes]:
    """Each event in its chunk framing; the last with the end of the answer."""
    made = [b"%x\r\n%b\r\n" % (len(data), data) for data in events(count)]
    made[-1] += b"0\r\n\r\n"
    return made


def answer_body() -> bytes:
    message = {"role": "assistant", "content": PAD * 2}
    usage = {"prompt_tokens": 60, "completion_tokens": 16, "total_tokens": 76}
    choices = [{"index": 0, "message": message, "finish_reason": "stop"}]
    whole = {"id": "chatcmpl-0", "object": "chat.completion", "model": "m", "choices": choices, "usage": usage}
    return json.dumps(whole).encode()


def answer() -> bytes:
    data = answer_body()
    return b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n%b" % (len(data), data)


HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
OK = b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n"


class Engine(asyncio.Protocol):
    def __init__(self, stream: list[bytes], whole: bytes, pace_s: float) -> None:
        self.stream, self.whole, self.pace_s = stream, whole, pace_s
        self.buffer = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport
        self.loop = asyncio.get_running_loop()

    def data_received(self, data: bytes) -> None:
        self.buffer += data
        while True:
            head, found, rest = self.buffer.partition(b"\r\n\r\n")
            if not found:
                return
            at = head.lower().find(b"content-length:")
            length = int(head[at + 15 :].split(b"\r\n", 1)[0]) if at >= 0 else 0
            if len(rest) < length:
                return
            body, self.buffer = rest[:length], rest[length:]
            if b"/completions" not in head:
                self.transport.write(OK)
            elif b'"stream":true' in body or b'"stream": true' in body:
                self.transport.write(HEAD)
                self.emit(0, self.loop.time())
            else:
                self.transport.write(self.whole)

    def emit(self, index: int, due_s: float) -> None:
        if self.transport.is_closing():
            return
        self.transport.write(self.stream[index])
        if index + 1 < len(self.stream):
            due_s += self.pace_s
            self.loop.call_at(due_s, self.emit, index + 1, due_s)


async def main(port: int, count: int, pace_s: float) -> None:
    stream, whole = chunks(count), answer()
    loop = asyncio.get_running_loop()
    server = await loop.create_server(lambda: Engine(stream, whole, pace_s), "127.0.0.1", port, backlog=2048)
    await server.serve_forever()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("port", type=int)
    parser.add_argument("--chunks", type=int, default=200)
    parser.add_argument("--pace", type=float, default=0.010)
    given = parser.parse_args()
    try:
        import uvloop

        uvloop.run(main(given.port, given.chunks, given.pace))
    except ModuleNotFoundError:
        asyncio.run(main(given.port, given.chunks, given.pace))
