"""Relays of a gateway that stands by reach the leader over TLS with certificates on both ends, and nobody else does."""

from __future__ import annotations

import asyncio
import logging
import socket
import ssl
import tempfile
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from chiron.gateway.peers.door import Door, ListenError
from chiron.gateway.peers.leadership import Peer
from chiron.gateway.peers.standby import Standby
from chiron.gateway.peers.wires import API, RELAY, PipeEnd, client_context, renewing_client, renewing_server
from chiron.gateway.processes.start import RelayStart
from chiron.gateway.settings import GatewaysSettings
from chiron.net.loop import run_on_loop
from net_site import until
from peer_certificates import Authority

WAIT_S = 60.0
LONG = bytes(range(256)) * 8192
"""More than both ends and the kernel keep of what is not read."""


TALKING: list[asyncio.BaseTransport] = []


class Echo(asyncio.Protocol):
    """Stands for a brain, or for the leader's HTTP server: says what it is, and then what it hears."""

    def __init__(self, greeting: bytes) -> None:
        self.greeting = greeting

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport
        TALKING.append(transport)
        transport.write(self.greeting)  # type: ignore[attr-defined]

    def data_received(self, data: bytes) -> None:
        self.transport.write(data)  # type: ignore[attr-defined]


@dataclass
class Site:
    """A leader, and a gateway that stands by."""

    door: Door
    port: int
    standby: Standby
    folder: Path
    lost: list[None]
    leader: list[Peer]
    """The last of them leads."""
    api: Callable[[], Echo] = lambda: Echo(b"api: ")

    async def talk(self, path: str, said: bytes) -> bytes:
        """What a relay of the other gateway hears: a greeting, and what it said."""
        reader, writer = await asyncio.open_unix_connection(self.folder / "b" / path)
        writer.write(said)
        try:
            async with asyncio.timeout(WAIT_S):
                return await reader.readexactly(5 + len(said))
        except (asyncio.IncompleteReadError, ConnectionError) as error:
            return error.partial if isinstance(error, asyncio.IncompleteReadError) else b""
        finally:
            writer.close()


@asynccontextmanager
async def site(leader: GatewaysSettings, other: GatewaysSettings, port: int | None = None) -> AsyncIterator[Site]:
    with tempfile.TemporaryDirectory(prefix="chiron-") as name:
        folder = Path(name)
        for each in "ab":
            (folder / each).mkdir()
        loop = asyncio.get_running_loop()
        api = await loop.create_unix_server(lambda: there.api(), folder / "a" / "api")
        door = Door(
            context=renewing_server(leader),
            relay=lambda: Echo(b"hello"),
            api_path=folder / "a" / "api",
            handshake_s=WAIT_S,
        )
        found = door.open("127.0.0.1", 0)
        lost: list[None] = []
        leaders = [Peer(name="a", host="127.0.0.1", port=port or found)]
        standby = Standby(
            start=RelayStart(port=1, folder=folder / "b", relays=1),
            contexts={purpose: renewing_client(other, purpose) for purpose in (RELAY, API)},
            leader=lambda: leaders[-1],
            lost=lambda: lost.append(None),
            handshake_s=WAIT_S,
            look_s=0.05,
        )
        await standby.open()
        try:
            there = Site(door, found, standby, folder, lost, leaders)
            yield there
        finally:
            await standby.close()
            door.close()
            api.close()
            while TALKING:
                TALKING.pop().abort()  # type: ignore[attr-defined]
            # What was closed is gone some turns of the loop later: the sockets, and TLS on top of them.
            await until(lambda: not (door._tasks or standby._tasks or standby._near))
            selector = getattr(asyncio.get_running_loop(), "_selector", None)  # uvloop has none.
            for _ in range(10):
                await asyncio.sleep(0.01)
                await until(lambda: selector is None or len(selector.get_map()) <= 1)


@pytest.mark.parametrize("run", [asyncio.run, run_on_loop], ids=["asyncio", "as served"])
def test_relays_and_requests_reach_it_whole(tmp_path: Path, run: Callable[[Coroutine[Any, Any, None]], None]) -> None:
    ca = Authority(tmp_path)

    async def main() -> None:
        async with site(ca.settings("a"), ca.settings("b")) as there:
            for _ in range(2):
                assert await there.talk("brain", LONG) == b"hello" + LONG
                assert await there.talk("api", LONG) == b"api: " + LONG
            assert there.door.refused == 0

    run(main())


def test_certificates_that_are_renewed_count_from_the_next_connection_on(tmp_path: Path) -> None:
    ca, other = Authority(tmp_path / "one"), Authority(tmp_path / "another")
    leader, standby = ca.settings("a"), ca.settings("b")

    def renew(settings: GatewaysSettings) -> None:
        """By another authority, so that one end alone cannot go on."""
        new = other.settings(settings.name)
        for key in ("certificate", "key", "ca"):
            Path(getattr(new, key)).with_suffix(".new").write_bytes(Path(getattr(new, key)).read_bytes())
            Path(getattr(new, key)).with_suffix(".new").replace(getattr(settings, key))

    async def main() -> None:
        async with site(leader, standby) as there:
            reader, writer = await asyncio.open_unix_connection(there.folder / "b" / "brain")
            assert await reader.readexactly(5) == b"hello"
            Path(leader.key).write_text("what a disk is full of")
            assert await there.talk("brain", LONG) == b"hello" + LONG, "as before, while its files are of no use"
            renew(leader)
            assert await there.talk("brain", LONG) == b"", "the other end has the authority of before"
            renew(standby)
            for path, greeting in (("brain", b"hello"), ("api", b"api: ")):
                assert await there.talk(path, LONG) == greeting + LONG
            writer.write(b"still there")
            async with asyncio.timeout(WAIT_S):
                assert await reader.readexactly(11) == b"still there"
            writer.close()

    asyncio.run(main())


def test_relays_are_cut_off_to_come_again_and_requests_are_not(tmp_path: Path) -> None:
    ca = Authority(tmp_path)

    async def main() -> None:
        async with site(ca.settings("a"), ca.settings("b")) as there:
            ends = {}
            for path, greeting in (("brain", b"hello"), ("api", b"api: ")):
                reader, writer = ends[path] = await asyncio.open_unix_connection(there.folder / "b" / path)
                assert await reader.readexactly(5) == greeting
            there.standby.cut_relays()
            async with asyncio.timeout(WAIT_S):
                assert await ends["brain"][0].read() == b""
                reader, writer = ends["api"]
                writer.write(b"more")
                assert await reader.readexactly(4) == b"more"
            assert await there.talk("brain", LONG) == b"hello" + LONG
            for _, writer in ends.values():
                writer.close()

    asyncio.run(main())


class Recorded(asyncio.Transport):
    """What a connection is told to do."""

    def __init__(self) -> None:
        self.told: list[object] = []

    def write(self, data: bytes) -> None:  # type: ignore[override]
        self.told.append(data)

    def pause_reading(self) -> None:
        self.told.append("pause")

    def resume_reading(self) -> None:
        self.told.append("resume")

    def is_closing(self) -> bool:
        return False

    def set_write_buffer_limits(self, high: int | None = None, low: int | None = None) -> None:
        """No matter."""

    def close(self) -> None:
        self.told.append("close")


def test_an_end_reads_no_faster_than_the_other_one_writes() -> None:
    """Else a slow client of a download would cost memory in three processes."""

    async def main() -> None:
        near, far, near_wire, far_wire = PipeEnd(), PipeEnd(), Recorded(), Recorded()
        near.connection_made(near_wire)
        await asyncio.sleep(0)
        near.data_received(b"early")
        far.connection_made(far_wire)
        near.join(far)
        near.data_received(b"late")
        near.pause_writing()
        near.resume_writing()
        near.connection_lost(None)
        assert near_wire.told == ["pause", "resume"]
        assert far_wire.told == [b"early", "resume", b"late", "pause", "resume", "close"]

    asyncio.run(main())


def test_an_end_that_has_read_too_much_before_it_is_joined_waits_as_well() -> None:
    class Full(Recorded):
        def write(self, data: bytes) -> None:  # type: ignore[override]
            super().write(data)
            far.pause_writing()

    near, far, near_wire = PipeEnd(), PipeEnd(), Recorded()

    async def main() -> None:
        near.connection_made(near_wire)
        await asyncio.sleep(0)
        near.data_received(b"early")
        far.connection_made(Full())
        near.join(far)
        assert "resume" not in near_wire.told
        far.resume_writing()
        assert near_wire.told[-1] == "resume"

    asyncio.run(main())


Change = Callable[[Authority, Authority, GatewaysSettings], GatewaysSettings]


def with_pair(settings: GatewaysSettings, pair: tuple[Path, Path]) -> GatewaysSettings:
    return replace(settings, certificate=str(pair[0]), key=str(pair[1]))


CLIENTS: dict[str, Change] = {
    "signed by another authority": lambda ca, other, it: with_pair(it, other.issue("b")),
    "expired": lambda ca, other, it: with_pair(it, ca.issue("expired", days=-1)),
}
SERVERS: dict[str, Change] = {
    **CLIENTS,
    "for another host": lambda ca, other, it: with_pair(it, ca.issue("elsewhere", host="DNS:elsewhere.example")),
}


@pytest.mark.parametrize("change", CLIENTS.values(), ids=CLIENTS.keys())
def test_a_gateway_without_a_good_certificate_is_refused(
    tmp_path: Path, change: Change, caplog: pytest.LogCaptureFixture
) -> None:
    ca, other = Authority(tmp_path / "one"), Authority(tmp_path / "other")

    async def main() -> None:
        async with site(ca.settings("a"), change(ca, other, ca.settings("b"))) as there:
            assert await there.talk("brain", b"?") == b""
            await until(lambda: there.door.refused == 1)
            assert "to gateways.listen is refused: [SSL: CERTIFICATE_VERIFY_FAILED]" in caplog.text

    asyncio.run(main())


@pytest.mark.parametrize("change", SERVERS.values(), ids=SERVERS.keys())
def test_a_leader_without_a_good_certificate_hears_nothing(
    tmp_path: Path, change: Change, caplog: pytest.LogCaptureFixture
) -> None:
    ca, other = Authority(tmp_path / "one"), Authority(tmp_path / "other")

    async def main() -> None:
        async with site(change(ca, other, ca.settings("a")), ca.settings("b")) as there:
            assert await there.talk("brain", b"?") == b""
            assert there.lost == [None]
            assert "a, which leads, cannot be reached" in caplog.text
            assert "CERTIFICATE_VERIFY_FAILED" in caplog.text

    asyncio.run(main())


def test_who_shows_no_certificate_or_speaks_no_tls_is_refused(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    ca = Authority(tmp_path)

    async def main() -> None:
        async with site(ca.settings("a"), ca.settings("b")) as there:
            context = ssl.create_default_context(cafile=ca.ca)
            context.set_alpn_protocols([RELAY])
            try:
                reader, writer = await asyncio.open_connection("127.0.0.1", there.port, ssl=context)
                TALKING.append(writer.transport)
                writer.write(b"?")
                heard = await reader.read(5)
            except (ssl.SSLError, ConnectionError):
                heard = b""
            assert heard == b""
            await until(lambda: there.door.refused == 1)
            assert "PEER_DID_NOT_RETURN_A_CERTIFICATE" in caplog.text
            reader, writer = await asyncio.open_connection("127.0.0.1", there.port)
            TALKING.append(writer.transport)
            writer.write(b"GET / HTTP/1.1\r\n\r\n")
            assert b"hello" not in await reader.read()
            await until(lambda: there.door.refused == 2)
            assert await there.talk("brain", b"!") == b"hello!"

    asyncio.run(main())


def test_one_that_does_not_say_what_for_is_refused(tmp_path: Path) -> None:
    ca = Authority(tmp_path)
    settings = ca.settings("b")

    async def main() -> None:
        async with site(ca.settings("a"), settings) as there:
            context = client_context(settings, "http/1.1")
            reader, writer = await asyncio.open_connection("127.0.0.1", there.port, ssl=context)
            TALKING.append(writer.transport)
            assert await reader.read() == b""
            await until(lambda: there.door.refused == 1)

    asyncio.run(main())


def test_connections_end_that_lead_to_one_that_leads_no_more(tmp_path: Path) -> None:
    """Its machine is gone, so that it neither says anything nor closes."""
    ca = Authority(tmp_path)

    async def main() -> None:
        async with site(ca.settings("a"), ca.settings("b")) as there:
            reader, writer = await asyncio.open_unix_connection(there.folder / "b" / "api")
            assert await reader.readexactly(5) == b"api: "
            there.leader.append(Peer(name="b", host="127.0.0.1", port=1))
            async with asyncio.timeout(WAIT_S):
                assert await reader.read() == b""
            writer.close()

    asyncio.run(main())


def test_an_address_that_cannot_be_listened_on_is_named(tmp_path: Path) -> None:
    ca = Authority(tmp_path)

    async def main() -> None:
        async with site(ca.settings("a"), ca.settings("b")) as there:
            second = Door(context=renewing_server(ca.settings("c")), relay=asyncio.Protocol, api_path=tmp_path)
            with pytest.raises(ListenError, match=f"gateways.listen: cannot .* 127.0.0.1, port {there.port}: .* use"):
                second.open("127.0.0.1", there.port)

    asyncio.run(main())


def test_without_a_leader_a_relay_hears_so_at_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    ca = Authority(tmp_path)
    caplog.set_level(logging.INFO)
    with socket.create_server(("127.0.0.1", 0)) as nobody:
        port = nobody.getsockname()[1]

    async def main() -> None:
        async with site(ca.settings("a"), ca.settings("b"), port) as there:
            assert await there.talk("brain", b"?") == b""
            assert there.lost == [None]
            assert f"cannot be reached at 127.0.0.1:{port}" in caplog.text

    asyncio.run(main())
