"""A relay and nothing else, on the gateway's own server and client: the floor under what the gateway can cost.

python bench/gateway_relay.py PORT ENGINE_URL
"""

from __future__ import annotations

import asyncio
import sys

from chiron.net.client import Call, Header, NetError, Origin
from chiron.net.server import Incoming, serve


class Relay:
    def __init__(self, incoming: Incoming) -> None:
        self.incoming = incoming
        self.call: Call | None = None
        self.status = 0
        self.length: int | None = None

    def on_head(self, status: int, headers: list[Header]) -> None:
        self.status = status
        self.length = next((int(value) for name, value in headers if name == b"content-length"), None)
        if self.length is None and self.call is not None:
            self.call.on_chunks = self.on_chunks

    def on_chunks(self, data: bytes) -> None:
        if not self.incoming.started:
            self.incoming.start(self.status, [(b"content-type", b"text/event-stream")])
        self.incoming.write_chunks(data)

    def on_data(self, data: bytes) -> None:
        if not self.incoming.started:
            if self.length == len(data):
                self.incoming.respond(self.status, data)
                return
            self.incoming.start(self.status, [(b"content-type", b"text/event-stream")], self.length)
        self.incoming.write(data)

    def on_end(self) -> None:
        if not self.incoming.started:
            self.incoming.respond(self.status)
        elif not self.incoming.closed:
            self.incoming.finish()

    def on_error(self, error: NetError) -> None:
        self.incoming.abort()


async def main(port: int, url: str) -> None:
    origin = Origin(url, idle_max=1024)
    headers: list[Header] = [(b"content-type", b"application/json")]

    def handle(incoming: Incoming) -> None:
        relay = Relay(incoming)
        relay.call = origin.send(incoming.method, incoming.path.encode(), headers, incoming.body, relay)
        incoming.on_close = relay.call.cancel

    await serve(handle, port=port)
    await asyncio.Event().wait()


if __name__ == "__main__":
    try:
        import uvloop

        uvloop.run(main(int(sys.argv[1]), sys.argv[2]))
    except ModuleNotFoundError:
        asyncio.run(main(int(sys.argv[1]), sys.argv[2]))
