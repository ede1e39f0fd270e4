"""What a request and a chunk cost a relay in its own code, without sockets, kernel and event loop.

    python bench/relay_code.py [--clients 64] [--rounds 300] [--source FOLDER]

A relay between transports that do nothing: its clients send a small request each, the brain places them, an engine
answers, the brain ends them, each step for all clients before the next one. Then they stream: each round sends all
clients a chunk that goes no further than the connection to the engine, where it is seen to be whole; one that goes on
to the request's count of tokens; and one that goes all the way. CPU of the thread in microseconds a request or a
chunk, by step: of the tenth part of the rounds that took least, the one that took most, so that what else the machine
does hardly shows. ``--source``: the folder of another build, such as ``out/compiled/src``.
"""

from __future__ import annotations

import argparse
import asyncio
import logging
import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

STEPS = ("request", "to the brain", "placement", "answer", "to the brain", "end")
CHUNK_STEPS = ("seen to be whole", "added to the run", "tokens counted, written")
CHUNKS = 10
"""To each client, one after the other, in a step of a round."""
ENGINE = "http://127.0.0.1:9"


class Nowhere:
    """A transport that keeps what is written, and nothing else."""

    def __init__(self) -> None:
        self.written: list[bytes] = []

    def write(self, data: bytes) -> None:
        self.written.append(data)

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        return ("127.0.0.1", 1) if name == "peername" else default

    def set_write_buffer_limits(self, high: int | None = None, low: int | None = None) -> None: ...
    def get_write_buffer_size(self) -> int:
        return 0

    def is_closing(self) -> bool:
        return False

    def pause_reading(self) -> None: ...
    def resume_reading(self) -> None: ...
    def close(self) -> None: ...
    def abort(self) -> None: ...


async def measure(clients: int, rounds: int) -> tuple[list[list[float]], list[list[float]]]:
    """Microseconds a request, and a chunk, of each step, of each round."""
    import msgspec

    from chiron.config.serve import load_serve
    from chiron.gateway.port import messages as m
    from chiron.gateway.processes.relay import RelayServer
    from chiron.gateway.processes.start import RelayStart
    from chiron.gateway.serving import collect_rarely, server_limits
    from chiron.net.client import _Connection
    from chiron.net.server import HttpServer
    from gateway import CONFIG, SMALL, STREAM
    from gateway_mock import HEAD, answer, chunks

    def frame(*messages: m.Message) -> bytes:
        body = msgspec.msgpack.encode(messages)
        return len(body).to_bytes(4, "big") + body

    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "chiron.toml"
        file.write_text(CONFIG.format(port=8000, engine=9))
        config = load_serve(file)
        start = RelayStart(relays=1, port=0, folder=Path(folder))
    made = RelayServer(config, start)
    uplink, front = made.relay.uplink, made.relay.front
    brain = Nowhere()
    uplink.wire.connection_made(brain)
    uplink.wire.data_received(frame(m.Hello()))
    model = config.models[0]
    kind = model.kinds[0].kind.name
    uplink.wire.data_received(frame(m.Shape(model.name, 1_000_000, 0, 4.0), m.InstanceUp(1, model.name, kind, ENGINE)))
    server = HttpServer(
        front.handle, server_limits(config, 1), lambda _: None, lambda each: not front.takes(each), front.screen
    )
    origin = uplink.instances.upstreams[1].origin
    ends, engines = [], []
    for _ in range(clients):
        connection, wire = server.accept(), Nowhere()
        connection.connection_made(wire)
        ends.append((connection, wire))
        engine, wire = _Connection(origin), Nowhere()
        engine.connection_made(wire)
        engine.rest()
        engines.append((engine, wire))
    head = b"POST /v1/chat/completions HTTP/1.1\r\nhost: 127.0.0.1:8000\r\ncontent-type: application/json\r\n"
    request, stream = (head + b"content-length: %d\r\n\r\n" % len(body) + body for body in (SMALL, STREAM))
    whole = answer()
    collect_rarely()
    found = []
    for turn in range(rounds):
        numbers = range(turn * clients + 1, (turn + 1) * clients + 1)
        places = frame(*(m.Place(number, number, 1, 0) for number in numbers))
        over = frame(*(m.End(number, "finished", True, 0) for number in numbers))
        steps: list[Callable[[], Any]] = [
            lambda: [each.data_received(request) for each, _ in ends],
            uplink.wire.flush,
            lambda places=places: uplink.wire.data_received(places),
            lambda: [each.data_received(whole) for each, _ in engines],
            uplink.wire.flush,
            lambda over=over: uplink.wire.data_received(over),
        ]
        took = []
        for step in steps:
            began_ns = time.thread_time_ns()
            step()
            took.append((time.thread_time_ns() - began_ns) / clients / 1e3)
        found.append(took)
        for _, wire in (*ends, *engines):
            assert len(wire.written) == 1, wire.written
            wire.written.clear()
        brain.written.clear()
        await asyncio.sleep(0)
    numbers = range(rounds * clients + 1, (rounds + 1) * clients + 1)
    for connection, _ in ends:
        connection.data_received(stream)
    uplink.wire.flush()
    uplink.wire.data_received(frame(*(m.Place(number, number, 1, 0) for number in numbers)))
    first, second, *events = chunks(200)[:-1]
    for engine, _ in engines:
        for block in (HEAD + first, second):
            engine.data_received(block)
    calls = [engine._call for engine, _ in engines]
    went = [(call, call.on_chunks, call.receiver, call.receiver._take_chunks) for call in calls]

    streamed = []
    for _ in range(rounds):
        took = []
        for reach in range(len(CHUNK_STEPS)):
            for call, on_chunks, run, take in went:
                call.on_chunks = on_chunks if reach else nowhere
                run._take_chunks = take if reach > 1 else one
            for _, wire in ends:
                wire.written.clear()
            began_ns = time.thread_time_ns()
            for data in events[:CHUNKS]:
                for engine, _ in engines:
                    engine.data_received(data)
            took.append((time.thread_time_ns() - began_ns) / clients / CHUNKS / 1e3)
        assert all(len(wire.written) == CHUNKS for _, wire in ends)
        streamed.append([took[0], took[1] - took[0], took[2] - took[1]])
        await asyncio.sleep(0)
    await made.close()
    return found, streamed


def nowhere(data: bytes) -> None: ...
def one(data: bytes) -> int:
    return 1


def say(what: str, names: tuple[str, ...], found: list[list[float]]) -> None:
    least = [sorted(column)[len(column) // 10] for column in zip(*found, strict=True)]
    whole = sorted(map(sum, found))[len(found) // 10]
    steps = "  ".join(f"{name} {us:.2f}" for name, us in zip(names, least, strict=True))
    print(f"{what}: {steps}  sum {whole:.2f} us")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=300)
    parser.add_argument("--source", type=Path, metavar="FOLDER", help="of the build that is measured")
    given = parser.parse_args()
    if given.source is not None:
        sys.path.insert(0, str(given.source))
    logging.disable(logging.WARNING)
    from chiron.net.loop import run_on_loop

    found = run_on_loop(measure(given.clients, given.rounds))
    say("request", STEPS, found[0])
    say("chunk", CHUNK_STEPS, found[1])
    sys.stdout.flush()
    os._exit(0)  # Nothing here is worth closing.


if __name__ == "__main__":
    main()
