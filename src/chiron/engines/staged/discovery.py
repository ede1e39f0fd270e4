"""Replicas of stages that are found by name: each address of a name is one, as with a headless Service of Kubernetes.

Names are resolved again and again. An answer replaces what was known of its stage: an address that is missing is
drained, and one that is back before it has gone serves on. Without an answer nothing changes: a name server that is
away takes no replica out, and one that is dead is noticed by its connection.
"""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import Awaitable, Callable, Sequence

from chiron.engines.staged.replica import read_address

log = logging.getLogger("chiron.staged")

ADDRESSES_MAX = 1024
"""Of one stage; more are left out."""

Resolve = Callable[[str, int], Awaitable[Sequence[str]]]
"""Addresses of a host. Raises OSError, or UnicodeError for what is no host name."""


async def resolve(host: str, port: int) -> list[str]:
    """By the machine's own resolver."""
    found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return [str(info[4][0]) for info in found]


class Discovery:
    """Used on the loop's thread."""

    def __init__(
        self,
        names: Sequence[Sequence[str]],
        tell: Callable[[Sequence[Sequence[str]]], None],
        *,
        every_s: float,
        resolve: Resolve = resolve,
    ) -> None:
        """``names``: HOST:PORT, of each stage. ``tell`` hears the addresses of all stages when some change. Raises
        StagedModelError."""
        self._names = [[read_address(name) for name in stage] for stage in names]
        self._tell = tell
        self._every_s = every_s
        self._resolve = resolve
        self._found: list[list[str]] = [[] for _ in names]
        self._trouble = [""] * len(names)
        self._tasks: list[asyncio.Task[None]] = []

    def start(self) -> None:
        """Each stage by itself: a name that takes long to resolve holds up no other."""
        loop = asyncio.get_running_loop()
        self._tasks = [loop.create_task(self._keep(stage)) for stage in range(len(self._names))]

    async def close(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _keep(self, stage: int) -> None:
        while True:
            try:
                await self._look(stage)
            except Exception as error:  # Faulty once, it would otherwise never look again.
                self._say(stage, f"{type(error).__name__}: {error}; its replicas stay as they are")
            await asyncio.sleep(self._every_s)

    async def _look(self, stage: int) -> None:
        found: list[str] = []
        try:
            for host, port in self._names[stage]:
                found += [_address(host, each, port) for each in await self._resolve(host, port)]
        except (OSError, UnicodeError) as error:  # A part of a name may be too long.
            self._say(stage, f"{error}; its replicas stay as they are")
            return
        known = sorted(set(found))
        many = f"{len(known)} addresses; {ADDRESSES_MAX} are used" if len(known) > ADDRESSES_MAX else ""
        known = known[:ADDRESSES_MAX]
        if known != self._found[stage]:
            told = [known if number == stage else each for number, each in enumerate(self._found)]
            self._tell(told)
            self._found = told
        self._say(stage, many)

    def _say(self, stage: int, trouble: str) -> None:
        if trouble and trouble != self._trouble[stage]:
            log.warning("stage %d, %s: %s", stage, ", ".join(host for host, _ in self._names[stage]), trouble)
        self._trouble[stage] = trouble


def _address(host: str, address: str, port: int) -> str:
    """With the name that a certificate has to have."""
    return f"{host}@[{address}]:{port}" if ":" in address else f"{host}@{address}:{port}"
