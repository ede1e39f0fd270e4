"""A gateway that starts on a full disk serves interactive requests, says why batches wait, and takes them up when there
is room. A limit on the size of files, which also root cannot exceed, stands for the disk."""

from __future__ import annotations

import asyncio
import json
import resource
from pathlib import Path

import pytest

from edge_site import ask
from fault_site import (
    FORM,
    START_TIMEOUT_S,
    Answer,
    Api,
    FaultSite,
    chat,
    config,
    form,
    item,
    jsonl,
    started_engines,
    wait_for,
)

FULL_BYTES = 16 << 10
"""Enough for what engines of these tests write down, too little for a database."""


def fill_disk() -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (FULL_BYTES, resource.RLIM_INFINITY))


@pytest.mark.slow
def test_a_start_on_a_full_disk_serves_interactive_requests(tmp_path: Path) -> None:
    async def fill(site: FaultSite) -> str:
        async with Api(site.url) as api:
            return await api.upload(jsonl([item("a", 3), item("b", 3)]))

    async def full(site: FaultSite, file_id: str) -> None:
        async with Api(site.url) as api:
            assert await Answer(api.origin, chat("meanwhile")).end() == "complete"
            upload = await api.origin.fetch("POST", "/v1/files", body=form(jsonl([item("x")])), headers=FORM)
            for answer in (
                upload,
                await api.ask("GET", "/v1/batches"),
                await api.ask("GET", f"/v1/files/{file_id}/content"),
                await api.ask("POST", "/v1/batches/batch_x/cancel"),
            ):
                assert (answer.status, "retry-after" in answer.headers) == (503, True), answer
                assert "no room" in json.loads(answer.body)["error"]["message"]
            assert "no room" in (await api.get("/chiron/status"))["store"]["unavailable"]

    async def room(site: FaultSite, file_id: str) -> None:
        async with Api(site.url) as api:
            await asyncio.to_thread(wait_for, lambda: ask(site.url + "/v1/batches").status == 200, "batches are back")
            batch_id = await api.create(file_id)
            while (batch := await api.batch(batch_id))["status"] != "completed":
                await asyncio.sleep(0.05)
            assert batch["request_counts"]["completed"] == 2
            assert (await api.get("/chiron/status"))["store"]["unavailable"] == ""

    text = config(started_engines(tmp_path, max_instances=1))
    with FaultSite(tmp_path, text) as site:
        file_id = asyncio.run(fill(site))
        site.stop()
        site.start(preexec=fill_disk)
        wait_for(lambda: ask(site.url + "/ready").status == 200, "its engine is ready", START_TIMEOUT_S)
        asyncio.run(asyncio.wait_for(full(site, file_id), START_TIMEOUT_S))
        assert "batches and files are not served" in site.log.read_text()
        assert site.process is not None
        resource.prlimit(site.process.pid, resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        asyncio.run(asyncio.wait_for(room(site, file_id), START_TIMEOUT_S))
