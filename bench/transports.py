"""What one hop costs by the frames of stages, by ZeroMQ and by gRPC: one message there and one back.

    pip install pyzmq grpcio
    python bench/transports.py --messages 2000

A client and a server process on this machine, one message under way at a time, with bodies of 1, 16 and 256 rows of
hidden states of 4096 in bfloat16. Headers are those of a step, packed by msgspec for all three, and all run on the loop
that stages have. Time of a round trip (median), and CPU time of both processes, which other work on the machine changes
least. What is not installed is left out.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from importlib.util import find_spec
from typing import Any

import msgspec
import psutil

from chiron.engines.staged.messages import VERSION, FromHead, FromStage, HeadHello, Result, StageHello, Step, StepEntry
from chiron.engines.staged.wire import FrameWire
from chiron.net.loop import run_on_loop

ROWS = (1, 16, 256)
ROW_BYTES = 8192
OPTIONS = [("grpc.max_send_message_length", -1), ("grpc.max_receive_message_length", -1)]
RESULT = Result(1, [], [], 0.001, 0.0, 1000)
METHOD = "/stage/steps"
Exchange = Callable[[Step, bytes], Awaitable[int]]


def hello(kind: type[HeadHello] | type[StageHello]) -> Any:
    given = (VERSION, "m", 0, 1, "bfloat16")
    return HeadHello(*given) if kind is HeadHello else StageHello(*given, 1000, 1000, 64, False, 8192)


# -- the frames of stages ----------------------------------------------------------------------------------------------


async def serve_frames(port: int) -> None:
    def accept() -> FrameWire:
        wire: FrameWire

        def received(message: Any, body: memoryview) -> None:
            if isinstance(message, HeadHello):
                wire.send(hello(StageHello))
            else:
                wire.send(RESULT, body)

        wire = FrameWire(FromHead, opened=_ignore, received=received, closed=_ignore, speaks_first=False)
        return wire

    server = await asyncio.get_running_loop().create_server(accept, "127.0.0.1", port)
    print("ready", flush=True)
    await server.serve_forever()


@asynccontextmanager
async def frames(port: int) -> AsyncIterator[Exchange]:
    answers: asyncio.Queue[int] = asyncio.Queue()
    wire = FrameWire(
        FromStage,
        opened=lambda wire: wire.send(hello(HeadHello)),
        received=lambda message, body: answers.put_nowait(len(body)),
        closed=_ignore,
        speaks_first=True,
    )
    await asyncio.get_running_loop().create_connection(lambda: wire, "127.0.0.1", port)
    await answers.get()

    async def exchange(step: Step, body: bytes) -> int:
        wire.send(step, body)
        return await answers.get()

    yield exchange
    wire.close()


def _ignore(*given: Any) -> None:
    """What opens or closes says nothing here."""


# -- ZeroMQ ------------------------------------------------------------------------------------------------------------


async def serve_zeromq(port: int) -> None:
    import zmq
    import zmq.asyncio

    peer = zmq.asyncio.Context().socket(zmq.PAIR)
    peer.bind(f"tcp://127.0.0.1:{port}")
    encoder, decoder = msgspec.msgpack.Encoder(), msgspec.msgpack.Decoder(FromHead)
    print("ready", flush=True)
    while True:
        header, body = await peer.recv_multipart(copy=False)
        decoder.decode(header.buffer)
        await peer.send_multipart([encoder.encode(RESULT), body.buffer], copy=False)


@asynccontextmanager
async def zeromq(port: int) -> AsyncIterator[Exchange]:
    import zmq
    import zmq.asyncio

    context = zmq.asyncio.Context()
    peer = context.socket(zmq.PAIR)
    peer.connect(f"tcp://127.0.0.1:{port}")
    encoder, decoder = msgspec.msgpack.Encoder(), msgspec.msgpack.Decoder(FromStage)

    async def exchange(step: Step, body: bytes) -> int:
        await peer.send_multipart([encoder.encode(step), body], copy=False)
        header, answer = await peer.recv_multipart(copy=False)
        decoder.decode(header.buffer)
        return len(answer.buffer)

    yield exchange
    context.destroy(linger=0)


# -- gRPC, one stream of messages each way -----------------------------------------------------------------------------


def packed(header: bytes, body: Any) -> bytes:
    return b"".join((len(header).to_bytes(4, "little"), header, body))


def unpacked(frame: bytes) -> tuple[memoryview, memoryview]:
    view, end = memoryview(frame), 4 + int.from_bytes(frame[:4], "little")
    return view[4:end], view[end:]


async def serve_grpc(port: int) -> None:
    import grpc

    encoder, decoder = msgspec.msgpack.Encoder(), msgspec.msgpack.Decoder(FromHead)

    async def steps(requests: AsyncIterator[bytes], context: Any) -> AsyncIterator[bytes]:
        async for request in requests:
            header, body = unpacked(request)
            decoder.decode(header)
            yield packed(encoder.encode(RESULT), body)

    server = grpc.aio.server(options=OPTIONS)
    handler = grpc.stream_stream_rpc_method_handler(steps)
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("stage", {"steps": handler}),))
    server.add_insecure_port(f"127.0.0.1:{port}")
    await server.start()
    print("ready", flush=True)
    await server.wait_for_termination()


@asynccontextmanager
async def over_grpc(port: int) -> AsyncIterator[Exchange]:
    import grpc

    encoder, decoder = msgspec.msgpack.Encoder(), msgspec.msgpack.Decoder(FromStage)
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}", options=OPTIONS) as channel:
        stream = channel.stream_stream(METHOD)()

        async def exchange(step: Step, body: bytes) -> int:
            await stream.write(packed(encoder.encode(step), body))
            header, answer = unpacked(await stream.read())
            decoder.decode(header)
            return len(answer)

        yield exchange
        stream.cancel()


TRANSPORTS: dict[str, tuple[str, Any, Any]] = {
    "frames": ("msgspec", serve_frames, frames),
    "zeromq": ("zmq", serve_zeromq, zeromq),
    "grpc": ("grpc", serve_grpc, over_grpc),
}
"""Name: module that it needs, server, client."""


async def measured(client: Any, port: int, server: psutil.Process, messages: int) -> list[str]:
    found = []
    async with client(port) as exchange:
        for rows in ROWS:
            body, entries = bytes(rows * ROW_BYTES), [StepEntry(i, 100, 1, 0) for i in range(rows)]
            count = max(50, messages // max(1, rows // 16))
            for _ in range(20):
                assert await exchange(Step(1, entries), body) == len(body)
            began_s, times_s = _cpu_s(server), []
            for number in range(count):
                at_s = time.perf_counter()
                await exchange(Step(number, entries), body)
                times_s.append(time.perf_counter() - at_s)
            used_s = _cpu_s(server) - began_s
            found.append(f"{1e6 * statistics.median(times_s):.0f} / {1e6 * used_s / count:.0f}")
    return found


def _cpu_s(server: psutil.Process) -> float:
    return time.process_time() + sum(server.cpu_times()[:2])


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--messages", type=int, default=2000, help="of up to 16 rows; fewer of more")
    parser.add_argument("--serve", nargs=2, metavar=("NAME", "PORT"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        name, port = options.serve
        run_on_loop(TRANSPORTS[name][1](int(port)))
        return
    print(f"{os.cpu_count()} cores, load average before {os.getloadavg()[0]:.1f}; microseconds, round trip / CPU\n")
    print(f"| | {' | '.join(f'{rows} rows' for rows in ROWS)} |\n|---|{'---|' * len(ROWS)}")
    for name, (module, _, client) in TRANSPORTS.items():
        if find_spec(module) is None:
            continue
        with socket.create_server(("127.0.0.1", 0)) as probe:
            port = probe.getsockname()[1]
        command = [sys.executable, __file__, "--serve", name, str(port)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            try:
                assert process.stdout is not None
                assert process.stdout.readline().strip() == "ready"
                figures = run_on_loop(measured(client, port, psutil.Process(process.pid), options.messages))
            finally:
                process.kill()
        print(f"| {name} | {' | '.join(figures)} |", flush=True)


if __name__ == "__main__":
    main()
