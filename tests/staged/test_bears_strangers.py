"""Who has not said hello as a head does gets little memory of a stage, and no place among its heads for long."""

from __future__ import annotations

import asyncio
import struct

import pytest

from staged_models import need_torch, tiny

need_torch()

from chiron.engines.staged import service as stage_service  # noqa: E402
from chiron.engines.staged.messages import MAGIC  # noqa: E402
from staged_site import staged_site, until  # noqa: E402

WAIT_S = 60.0


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
