"""What clients that mean harm can hold of a gateway: real sockets, and a client who must be served all the same."""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import pytest

from chiron.gateway.relay.keys import hash_secret
from chiron.gateway.service import Service
from chiron.net.server import Incoming
from net_site import HELLO, Echo, Peer, peer, serving, until
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


async def connected(
    stack: AsyncExitStack, service: Service, count: int, send: bytes = b"", **options: Any
) -> list[Peer]:
    assert service._server is not None
    clients = [await stack.enter_async_context(peer(service._server.port, **options)) for _ in range(count)]
    for client in clients:
        client.send(send)
    return clients


def test_slow_heads_and_idle_connections_give_way_to_who_has_something_to_say(tmp_path: Path) -> None:
    limits = '[limits]\nconnections_max = 20\npeer_share = 1.0\nheader_timeout = "5m"\nidle = "5m"\n'

    async def main() -> None:
        async with (
            before(tmp_path, ScriptedEngine(answers), extra=KEYS + limits) as (service, _),
            AsyncExitStack() as stack,
        ):
            assert service._server is not None
            await connected(stack, service, 10, b"GET /health HTTP/1.1\r\nhost: x\r\nx-slow: ")
            await connected(stack, service, 12)
            await until(lambda: service._server is not None and service._server.open >= 19)
            async with asyncio.timeout(60):
                while await served_or_refused(service) != 200:
                    await asyncio.sleep(0.2)
            assert service._server.shed

    asyncio.run(main())


async def served_or_refused(service: Service) -> int:
    """The status of a completion; 0: closed without one."""
    try:
        return await served(service)
    except (AssertionError, OSError):
        return 0


@pytest.mark.parametrize("chunked", [False, True])
def test_bodies_that_trickle_give_way_to_others_when_memory_is_short(tmp_path: Path, chunked: bool) -> None:
    limits = '[limits]\nbody_max_bytes = "1MiB"\nbodies_max_bytes = "1MiB"\npeer_share = 1.0\nbody_timeout = "5m"\n'

    async def main() -> None:
        engine = ScriptedEngine(answers)
        async with before(tmp_path, engine, extra=KEYS + limits) as (service, _), AsyncExitStack() as stack:
            assert service._server is not None
            start = post(1 << 20, b"secret") + b" " * (100 * KIB)
            if chunked:
                start = start.replace(b"content-length: 1048576", b"transfer-encoding: chunked")
                start = start[: -100 * KIB] + b"19000\r\n" + b" " * (100 * KIB) + b"\r\n1\r\n"
            slow = await connected(stack, service, 10, start)
            await until(lambda: service._server is not None and service._server.held_bytes >= 10 * 100 * KIB)
            large = body()[:-1] + b" " * (200 * KIB) + b"}"
            async with asyncio.timeout(60):
                while True:
                    async with peer(service._server.port) as client:
                        client.send(post(len(large), b"other") + large)
                        answer = (await client.answers(1))[0]
                    if answer.status == 200:
                        break
                    assert answer.status == 503
                    await asyncio.sleep(0.2)
            assert service._server.shed >= 1
            await until(lambda: told(slow))
            assert all(said.startswith(b"HTTP/1.1 503 ") for said in told(slow))
            assert len(told(slow)) < 5

    asyncio.run(main())


def test_one_key_cannot_take_the_memory_of_another(tmp_path: Path) -> None:
    limits = '[limits]\nbody_max_bytes = "256KiB"\nbodies_max_bytes = "2MiB"\n'

    async def main() -> None:
        async with before(tmp_path, ScriptedEngine(), extra=KEYS + limits) as (service, _), AsyncExitStack() as stack:
            server = service._server
            assert server is not None
            held = body()[:-1] + b" " * (200 * KIB) + b"}"
            greedy = await connected(stack, service, 12, post(len(held), b"secret") + held)
            await until(lambda: len(told(greedy)) >= 7)
            for said in told(greedy):
                assert b"requests of API key 'a' that are open hold too much" in said
            await until(lambda: server.held_bytes == (12 - len(told(greedy))) * len(held))
            before_bytes = server.held_bytes
            assert before_bytes <= 1 << 20
            await connected(stack, service, 1, post(len(held), b"other") + held)
            await until(lambda: server.held_bytes == before_bytes + len(held))

    asyncio.run(main())


def test_one_address_cannot_take_all_connections() -> None:
    async def main() -> None:
        limits = {"connections_max": 20, "peer_share": 0.5, "trusted_proxies": ()}
        async with serving(Echo(), limits=limits) as server, AsyncExitStack() as stack:
            many = [await stack.enter_async_context(peer(server.port, local_addr=("127.0.0.66", 0))) for _ in range(15)]
            await until(lambda: len(told(many)) == 5)
            for said in told(many):
                assert b"too many connections of address 127.0.0.66; allowed: 10" in said
            async with peer(server.port) as client:
                client.send(HELLO)
                assert (await client.answers(1))[0].status == 200

    asyncio.run(main())


@pytest.mark.parametrize(
    ("trusted", "forwarded", "who"),
    [
        ((), "10.0.0.1", "address 127.0.0.1"),
        (("127.0.0.0/8",), "", None),
        (("127.0.0.0/8",), "10.0.0.1", "address 10.0.0.1"),
        (("127.0.0.0/8",), "made up, 10.0.0.1:4711", "address 10.0.0.1"),
        (("127.0.0.0/8", "10.0.0.0/8"), "192.0.2.7, 10.0.0.1", "address 192.0.2.7"),
        (("127.0.0.0/8",), "[2001:db8:1:2:3::4]:5", "addresses 2001:db8:1:2::/64"),
        (("127.0.0.0/8",), "::ffff:192.0.2.7", "address 192.0.2.7"),
        (("127.0.0.0/8",), "unknown", "address unknown"),
    ],
)
def test_behind_a_trusted_proxy_a_request_counts_against_whom_the_proxy_names(
    trusted: tuple[str, ...], forwarded: str, who: str | None
) -> None:
    async def main() -> None:
        echo = Echo()
        async with serving(echo, limits={"trusted_proxies": trusted}) as server, peer(server.port) as client:
            line = f"x-forwarded-for: {forwarded}\r\n".encode() if forwarded else b""
            client.send(HELLO[:-2] + line + b"\r\n")
            await client.answers(1)
            assert echo.seen[0].peers == (() if who is None else (who,))

    asyncio.run(main())


def told(clients: list[Peer]) -> list[bytes]:
    """What those were told that were told something."""
    return [bytes(said) for client in clients if (said := client.reader._buffer)]  # type: ignore[attr-defined]
