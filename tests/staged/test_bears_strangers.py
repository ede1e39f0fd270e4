"""Who has not said hello as a head does gets little memory of a stage, and no place among its heads for long."""

from __future__ import annotations

import asyncio
import struct
import threading
from contextlib import suppress

import msgspec
import pytest

from staged_models import need_torch, tiny

need_torch()

from chiron.engines.staged import service as stage_service  # noqa: E402
from chiron.engines.staged.messages import (  # noqa: E402
    MAGIC,
    VERSION,
    Fetch,
    HeadHello,
    Keep,
    Step,
    StepEntry,
)

#: E402
from staged_site import staged_site, until  # noqa: E402

WAIT_S = 60.0


def frame(message: msgspec.Struct, body: bytes = b"") -> bytes:
    header = msgspec.msgpack.encode(message)
    return struct.pack("<II", len(header), len(body)) + header + body


def steps(count: int, tokens: int) -> bytes:
    """Of the first stage."""
    entries = [StepEntry(1, 0, tokens, 1)]
    return b"".join(frame(Step(number, entries), bytes(4 * tokens)) for number in range(count))


@pytest.mark.parametrize("lengths", [(100, 1 << 30), (1 << 20, 0)])
def test_a_stranger_that_announces_a_long_frame_is_cut_off_at_once(lengths: tuple[int, int]) -> None:
    async def main() -> None:
        async with staged_site(tiny(), ("0-3",)) as site:
            host, _, port = site.replicas[0][0].address.rpartition(":")
            reader, writer = await asyncio.open_connection(host, int(port))
            writer.write(MAGIC + struct.pack("<II", *lengths))
            async with asyncio.timeout(WAIT_S):
                assert await reader.read() == b""
            writer.close()
            assert site.replicas[0][0].service.heads == 1

    asyncio.run(main())


def test_there_are_only_so_many_heads_and_silent_ones_make_room(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stage_service, "HELLO_S", 2.0)

    async def main() -> None:
        async with staged_site(tiny(), ("0-3",)) as site:
            host, _, port = site.replicas[0][0].address.rpartition(":")
            strangers = [await asyncio.open_connection(host, int(port)) for _ in range(stage_service.HEADS_MAX + 8)]
            async with asyncio.timeout(WAIT_S):
                assert [await reader.read() for reader, _ in strangers] == [b""] * len(strangers), "all are cut off"
            await until(lambda: site.replicas[0][0].service.heads == 1)
            assert len(await site.complete([1, 2, 3], 4)) == 4
            for _, writer in strangers:
                writer.close()

    asyncio.run(main())


@pytest.mark.parametrize(
    "sent",
    [
        pytest.param(steps(1, 17), id="more tokens than one step may have"),
        pytest.param(struct.pack("<II", 40, 1 << 20), id="a longer body than any step has"),
        pytest.param(steps(6, 16), id="more bytes than may wait"),
        pytest.param(frame(Fetch(1, 1, 5, 5)), id="KV of no positions"),
        pytest.param(frame(Keep(1, 1, 0, 2), bytes(9)), id="KV of another size"),
    ],
)
def test_a_head_that_sends_too_much_is_cut_off(monkeypatch: pytest.MonkeyPatch, sent: bytes) -> None:
    monkeypatch.setattr(stage_service, "QUEUED_MAX_BYTES", 256)
    monkeypatch.setattr(stage_service, "MOVE_BYTES", 4096)

    async def main() -> None:
        async with staged_site(tiny(), ("0-3",), tokens_max=16) as site:
            service = site.replicas[0][0].service
            release = threading.Event()
            service._thread.submit(release.wait)
            host, _, port = site.replicas[0][0].address.rpartition(":")
            reader, writer = await asyncio.open_connection(host, int(port))
            writer.write(MAGIC + frame(HeadHello(VERSION, site.files.fingerprint, 0, 4, "float32")) + sent)
            async with asyncio.timeout(WAIT_S):
                with suppress(ConnectionError):
                    await reader.read()
            writer.close()
            await until(lambda: service.heads == 1 and service._queued_bytes == 0)
            release.set()
            # The head's own steps are cut to what the stage takes.
            assert await site.complete([1] * 40, 2) == await site.complete([1] * 40, 2)
            assert site.engine.pipeline.losses == 0

    asyncio.run(main())
