"""Certificates that are spoilt while a gateway stands by: it leads with those that it has read."""

from __future__ import annotations

import asyncio
import ssl
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

from chiron.config.serve import load_serve
from chiron.gateway.peers.member import Member
from chiron.gateway.peers.wires import RELAY, client_context
from chiron.gateway.processes.start import BrainStart, RelayStart
from chiron.gateway.service import Service
from chiron.gateway.settings import GatewaysSettings
from peer_certificates import Authority

CONFIG = """
[store]
url = "postgresql://nobody@127.0.0.1:1/chiron"

[gateways]
name = "a"
listen = "127.0.0.1:9443"
certificate = "a.pem"
key = "a.key"
ca = "ca.pem"

[models.m]
engine = "openai"
endpoints = ["http://127.0.0.1:9"]
"""


class Greets(asyncio.Protocol):
    def connection_made(self, transport: Any) -> None:
        transport.write(b"hello")
        transport.close()


def test_a_gateway_that_stands_by_leads_with_the_files_of_before(tmp_path: Path) -> None:
    ca = Authority(tmp_path)
    ca.issue("a")
    other = ca.settings("b")
    (tmp_path / "chiron.toml").write_text(CONFIG)
    config = load_serve(tmp_path / "chiron.toml")

    async def main() -> None:
        member = Member(
            config,
            advise=False,
            brain=BrainStart(relays=RelayStart(port=1, folder=tmp_path, relays=1)),
            nonce="0a",
            say=lambda word: None,
            say_at_once=lambda word: None,
            on_ready=lambda url: None,
            relays_ended=asyncio.Event(),
        )
        try:
            (tmp_path / "a.key").write_text("of another certificate")
            files = {name: getattr(member._settings, name) for name in ("certificate", "key", "ca")}
            member._settings = cast(GatewaysSettings, SimpleNamespace(listen_address=("127.0.0.1", 0), **files))
            member._open_door(cast(Service, SimpleNamespace(accept_relay=Greets)))
            assert member._door is not None
            assert member._door._listener is not None
            port = member._door._listener.getsockname()[1]
            context: ssl.SSLContext = client_context(other, RELAY)
            reader, writer = await asyncio.open_connection("127.0.0.1", port, ssl=context)
            async with asyncio.timeout(60.0):
                assert await reader.read() == b"hello"
            writer.close()
            member._door.close()
        finally:
            await member._own_loop.close()

    asyncio.run(main())
