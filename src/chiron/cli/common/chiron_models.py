"""``chiron serve`` with the models of a Kubernetes namespace: read before anything starts, then followed."""

from __future__ import annotations

import asyncio
import logging
import time
import zlib
from collections.abc import Coroutine
from pathlib import Path
from typing import TYPE_CHECKING, Any

from chiron.config.chiron_models import ResourceReader
from chiron.config.read import ConfigError
from chiron.fleet.kubernetes.access import AccessError
from chiron.fleet.kubernetes.client import Client
from chiron.gateway.chiron_models.follower import Follower, access_of, read_first
from chiron.gateway.chiron_models.kept import FILE, FILE_MAX_BYTES, read_content, read_kept, write_kept
from chiron.gateway.peers.shared_models import IN_FORCE
from chiron.store.directory import make_directory

if TYPE_CHECKING:
    from chiron.gateway.service import Service
    from chiron.gateway.settings import ServeConfig

log = logging.getLogger("chiron.gateway")


class FollowedModels:
    """In the first process, and in each that it forks."""

    def __init__(self, config: ServeConfig, directory: Path, policy: str | None) -> None:
        """``directory``: of the config file. Raises ConfigError for credentials that cannot be used."""
        assert config.kubernetes is not None
        self.changed = False
        """Other models than those that this process serves are in force."""
        self._settings = config.kubernetes
        self._data = config.data
        self._reader = ResourceReader(config.text, directory=directory, policy=policy)
        self._read: bytes | None = None
        """Of the file, as this process knows it."""
        self._shared = config.gateways is not None
        self._follower: Follower | None = None
        try:
            access_of(self._settings)
        except AccessError as error:
            raise ConfigError(f"kubernetes: {error}") from None

    def first(self) -> ServeConfig:
        """The config with the models to begin with. Waits for the API server."""
        make_directory(self._data)
        reading = asyncio.run(read_first(self._settings, self._reader, self._data))
        self._read = self._bytes()
        return reading.config

    def renewed(self) -> ServeConfig | None:
        """The config with the models in force, if they are others than the last time that this process asked."""
        found = self._bytes()
        if found is None or found == self._read:
            return None
        self._read = found
        resources = read_kept(self._data / FILE)
        return self._reader.read(resources).config if resources is not None else None

    def lead(self, service: Service) -> None:
        """Its figures are the status of the resources from now on, and it says what is in force."""

        async def save(content: bytes) -> None:
            await service.store.save_learned(IN_FORCE, await asyncio.to_thread(zlib.compress, content, 1))

        if self._follower is not None:
            self._follower.lead(service, save if self._shared else None)

    def take(self, saved: bytes) -> None:
        """What the leader of several gateways has said to be in force; see ``renewed``."""
        unpacking = zlib.decompressobj()
        try:
            content = unpacking.decompress(saved, FILE_MAX_BYTES)
            read_content(content)
            if content != self._bytes():
                write_kept(self._data / FILE, content)
        except (zlib.error, ValueError, OSError) as error:
            log.error("ChironModels of the gateway that leads cannot be taken in: %s", error)

    async def follow(self, serving: Coroutine[Any, Any, None]) -> None:
        """Serve until this is cancelled, or until other models are in force: then ``changed`` is set."""
        access, namespace = access_of(self._settings)
        task = asyncio.get_running_loop().create_task(serving)

        def change() -> None:
            self.changed = True
            task.cancel()

        client = Client(access)
        follower = self._follower = Follower(
            client=client,
            namespace=namespace,
            reader=self._reader,
            kept=self._data / FILE,
            changed=change,
            wall_s=time.time,
            shared=self._shared,
        )
        following = asyncio.get_running_loop().create_task(follower.run())
        following.add_done_callback(_report_end)
        try:
            await task
        except asyncio.CancelledError:
            if not self.changed or not task.done():
                task.cancel()
                await asyncio.gather(task, return_exceptions=True)
                raise
        finally:
            following.cancel()
            await asyncio.gather(following, return_exceptions=True)
            await client.close()

    def _bytes(self) -> bytes | None:
        try:
            return (self._data / FILE).read_bytes()
        except OSError:
            return None


def _report_end(task: asyncio.Task[None]) -> None:
    if not task.cancelled() and (error := task.exception()) is not None:
        task.get_loop().call_exception_handler({"message": "ChironModels are no longer followed", "exception": error})
