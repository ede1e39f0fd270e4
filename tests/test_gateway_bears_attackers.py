"""What clients that mean harm can hold of a gateway: real sockets, and a client who must be served all the same."""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack
from pathlib import Path

import pytest

from chiron.gateway.keys import hash_secret
from chiron.gateway.service import Service
from chiron.net.server import Incoming
from net_site import Peer, peer
from scripted_engine import ScriptedEngine, before, body

KIB = 1024
SECRETS = {"a": b"secret", "b": b"other"}
KEYS = "".join(f'[[keys]]\nname = "{name}"\nhash = "{hash_secret(secret)}"\n' for name, secret in SECRETS.items())
POST = b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\n%bcontent-length: %d\r\n\r\n"
GET = b"GET /health HTTP/1.1\r\nhost: x\r\n\r\n"


def answers(incoming: Incoming) -> None:
    incoming.respond(200, b'{"choices": []}')


def post(length: int, secret: bytes = b"") -> bytes:
    return POST % (b"authorization: Bearer %b\r\n" % secret if secret else b"", length)


async def served(service: Service, secret: bytes = b"secret") -> int:
    """The status that a client with a key gets, on a connection of its own."""
    assert service._server is not None
    async with peer(service._server.port) as client:
        client.send(post(len(body()), secret) + body())
        return (await client.answers(1))[0].status


def test_34_connections_without_a_key_cannot_stop_a_gateway_with_keys(tmp_path: Path) -> None:
    limits = '[limits]\nbody_max_bytes = "256KiB"\nbodies_max_bytes = "8MiB"\n'

    async def main() -> None:
        engine = ScriptedEngine(answers)
        async with before(tmp_path, engine, extra=KEYS + limits) as (service, _), AsyncExitStack() as stack:
            assert service._server is not None
            attackers: list[Peer] = []
            for _ in range(34):
                attacker = await stack.enter_async_context(peer(service._server.port))
                attacker.send(GET + post(256 * KIB) + b"x" * (255 * KIB))
                attackers.append(attacker)
            for attacker in attackers:
                statuses = [answer.status for answer in await attacker.answers(2)]
                assert statuses == [200, 401]
            assert service._server.held_bytes == 0
            assert await served(service) == 200
            assert len(engine.seen) == 1

    asyncio.run(main())


def test_each_pipelined_head_needs_its_key(tmp_path: Path) -> None:
    async def main() -> None:
        engine = ScriptedEngine(answers)
        data = body()
        good, bad = post(len(data), b"secret") + data, post(len(data)) + data
        async with before(tmp_path, engine, extra=KEYS) as (service, _):
            assert service._server is not None
            async with peer(service._server.port) as client:
                client.send(good + GET + good + bad + good)
                assert [answer.status for answer in await client.answers(4)] == [200, 200, 200, 401]
                assert b"HTTP/" not in await client.rest()
            assert len(engine.seen) == 2

    asyncio.run(main())


def test_a_connection_holds_one_request_and_not_what_is_pipelined_behind_it(tmp_path: Path) -> None:
    async def main() -> None:
        engine = ScriptedEngine()
        async with before(tmp_path, engine, extra=KEYS) as (service, _):
            assert service._server is not None
            async with peer(service._server.port) as client:
                client.send(post(len(body()), b"secret") + body() + post(8 << 20, b"secret"))
                for _ in range(64):
                    client.send(b"x" * (128 * KIB))
                async with asyncio.timeout(60):
                    while not (engine.seen and client.writer.transport.get_write_buffer_size()):
                        await asyncio.sleep(0.01)
                most = 0
                for _ in range(50):
                    most = max(most, service._server.held_bytes)
                    await asyncio.sleep(0.01)
                assert most < 1 << 20
                engine.seen[0].respond(200, b"{}")
                # In its turn it is read whole, and is no JSON.
                assert [answer.status for answer in await client.answers(2)] == [200, 400]

    asyncio.run(main())


@pytest.mark.parametrize(
    ("host", "status"),
    [
        (b"host: x\r\n", 200),
        (b"host:\r\n", 200),
        (b"", 400),
        (b"host: x\r\nhost: x\r\n", 400),
        (b"host: x\r\nHost: y\r\n", 400),
        (b"host: a b\r\n", 400),
        (b"host: user@x\r\n", 400),
        (b"host: http://x/\r\n", 400),
    ],
)
def test_a_request_names_its_host_once(tmp_path: Path, host: bytes, status: int) -> None:
    async def main() -> None:
        async with before(tmp_path, ScriptedEngine()) as (service, _):
            assert service._server is not None
            async with peer(service._server.port) as client:
                client.send(GET.replace(b"host: x\r\n", host))
                assert [answer.status for answer in await client.answers(1)] == [status]
            async with peer(service._server.port) as client:
                client.send(GET.replace(b"host: x\r\n", b"").replace(b"1.1", b"1.0"))
                assert [answer.status for answer in await client.answers(1)] == [200]

    asyncio.run(main())
