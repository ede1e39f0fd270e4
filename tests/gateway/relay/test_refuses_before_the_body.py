"""Who has no key is refused before the gateway spends memory on what else it sends."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from chiron.gateway.relay.keys import hash_secret
from chiron.net.server import Incoming
from net_site import peer
from scripted_engine import ScriptedEngine, before, body

KEYS = f'[[keys]]\nname = "a"\nhash = "{hash_secret(b"secret")}"\n'
HEAD = b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\nauthorization: Bearer %b\r\ncontent-length: %d\r\n%b\r\n"


@pytest.mark.parametrize("more", [b"", b"expect: 100-continue\r\n"])
def test_a_wrong_key_is_401_whether_the_body_comes_or_not(tmp_path: Path, more: bytes) -> None:
    async def main() -> None:
        async with before(tmp_path, ScriptedEngine(), extra=KEYS) as (service, _):
            assert service._server is not None
            async with peer(service._server.port) as client:
                client.send(HEAD % (b"wrong", 1_000_000, more))
                (refused,) = await client.answers(1)
                assert (refused.status, refused.headers["connection"]) == (401, "close")

    asyncio.run(main())


def test_with_its_key_a_client_may_go_on_and_keeps_its_connection(tmp_path: Path) -> None:
    def answers(incoming: Incoming) -> None:
        incoming.respond(200, b'{"choices": []}')

    async def main() -> None:
        data = body()
        async with before(tmp_path, ScriptedEngine(answers), extra=KEYS) as (service, _):
            assert service._server is not None
            async with peer(service._server.port) as client:
                client.send(HEAD % (b"secret", len(data), b"expect: 100-continue\r\n"))
                assert [answer.status for answer in await client.answers(1)] == [100]
                client.send(data)
                assert [answer.status for answer in await client.answers(1)] == [200]
                # The second one is not looked at before the first is answered, and is refused all the same.
                both = HEAD % (b"secret", len(data), b"") + data + HEAD % (b"wrong", len(data), b"") + data
                client.send(both)
                assert [answer.status for answer in await client.answers(2)] == [200, 401]

    asyncio.run(main())
