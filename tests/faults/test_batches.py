"""What can go wrong on the way of a batch: cut uploads and downloads, kills in between, bad lines, deadlines,
cancellation, a full disk."""

from __future__ import annotations

import asyncio
import contextlib
import json
import resource
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from chiron.net.client import NetError, Origin
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

SLOW_ITEM = 2000
"""Tokens that take more than four seconds."""


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[FaultSite]:
    """A gateway that stays up, for tests that do not kill it."""
    directory = tmp_path_factory.mktemp("site")
    with FaultSite(directory, config(started_engines(directory, max_instances=1))) as running:
        wait_for(lambda: ask(running.url + "/ready").status == 200, "its engine is ready", START_TIMEOUT_S)
        yield running


async def reach(
    api: Api, batch_id: str, goal: Callable[[dict[str, Any]], bool], timeout_s: float = 90.0
) -> dict[str, Any]:
    until_s = time.monotonic() + timeout_s
    while not goal(batch := await api.batch(batch_id)):
        assert time.monotonic() < until_s, batch
        await asyncio.sleep(0.02)
    return batch


def is_in(*states: str) -> Callable[[dict[str, Any]], bool]:
    return lambda batch: batch["status"] in states


async def both_files(api: Api, batch: dict[str, Any]) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Lines of output and errors, after a check that together they hold each item once."""
    output, errors = await api.lines(batch, "output_file_id"), await api.lines(batch, "error_file_id")
    ids = sorted(int(line["custom_id"][1:]) for line in output + errors)
    assert ids == list(range(batch["request_counts"]["total"]))
    assert (len(output), len(errors)) == (batch["request_counts"]["completed"], batch["request_counts"]["failed"])
    return output, errors


class Raw:
    """A connection on which half a request can be sent, or half an answer read."""

    def __init__(self, site: FaultSite) -> None:
        self._port = site.port

    async def __aenter__(self) -> Raw:
        self.reader, self.writer = await asyncio.open_connection("127.0.0.1", self._port)
        return self

    async def __aexit__(self, *_: object) -> None:
        self.writer.close()
        with contextlib.suppress(ConnectionError):
            await self.writer.wait_closed()

    async def send_half_an_upload(self, body: bytes) -> None:
        head = f"POST /v1/files HTTP/1.1\r\nhost: x\r\ncontent-length: {len(body)}\r\n"
        head += f"content-type: {FORM['content-type']}\r\n\r\n"
        self.writer.write(head.encode() + body[: len(body) // 2])
        await self.writer.drain()


def stored(site: FaultSite) -> list[Path]:
    return list((site.directory / "chiron-data" / "files").iterdir())


# -- uploads ---------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_an_upload_that_is_cut_leaves_nothing(site: FaultSite) -> None:
    async def run() -> None:
        async with Api(site.url) as api:
            before = set(stored(site))
            files = await api.get("/v1/files")
            async with Raw(site) as raw:
                await raw.send_half_an_upload(form(jsonl(item(f"c{i}") for i in range(20_000))))
                await asyncio.to_thread(wait_for, lambda: set(stored(site)) - before, "the upload has begun")
            await asyncio.to_thread(wait_for, lambda: set(stored(site)) == before, "its part is gone")
            assert await api.get("/v1/files") == files

    asyncio.run(run())


@pytest.mark.slow
def test_a_gateway_killed_during_uploads_validation_and_download_loses_nothing(tmp_path: Path) -> None:
    # None of them ends before it is cancelled. With such ids their lines fill the buffers between the gateway and a
    # client that does not read: the gateway is killed with a part of the answer unsent.
    many = jsonl(item(f"c{i:0200}", SLOW_ITEM) for i in range(16_000))

    async def submit_and_kill(site: FaultSite) -> str:
        async with Api(site.url) as api, Raw(site) as raw:
            batch_id = await api.create(await api.upload(many))
            before = len(stored(site))
            await raw.send_half_an_upload(form(many))
            await asyncio.to_thread(wait_for, lambda: len(stored(site)) > before, "the upload has begun")
            site.kill()
            return batch_id

    async def validate(site: FaultSite, batch_id: str) -> str:
        async with Api(site.url) as api:
            batch = await reach(api, batch_id, is_in("in_progress"))
            assert batch["request_counts"]["total"] == 16_000
            assert len((await api.get("/v1/files"))["data"]) == 1
            await api.ask("POST", f"/v1/batches/{batch_id}/cancel")
            batch = await reach(api, batch_id, is_in("cancelled"))
            await both_files(api, batch)
            return str(batch["error_file_id"])

    async def download_and_kill(site: FaultSite, file_id: str) -> None:
        async with Raw(site) as raw:
            raw.writer.write(f"GET /v1/files/{file_id}/content HTTP/1.1\r\nhost: x\r\n\r\n".encode())
            part = await raw.reader.readexactly(1000)
            assert part.startswith(b"HTTP/1.1 200 ")
            site.kill()
            with contextlib.suppress(ConnectionError):
                part += await raw.reader.read()
            assert not part.endswith(b"0\r\n\r\n"), "a part must not look like the whole"

    async def download(site: FaultSite, batch_id: str) -> None:
        async with Api(site.url) as api:
            await both_files(api, await api.batch(batch_id))

    with FaultSite(tmp_path, config(started_engines(tmp_path, max_instances=1))) as site:
        batch_id = asyncio.run(submit_and_kill(site))
        assert site.await_nobody() == []
        site.start()
        file_id = asyncio.run(validate(site, batch_id))
        assert len(stored(site)) == 1, "the part of the second upload is gone"
        asyncio.run(download_and_kill(site, file_id))
        assert site.await_nobody() == []
        site.start()
        asyncio.run(download(site, batch_id))


@pytest.mark.slow
def test_a_corrupt_line_is_answered_with_its_number(site: FaultSite) -> None:
    async def run() -> None:
        async with Api(site.url) as api:
            content = jsonl([item("c0"), item("c1")]) + b'{"custom_id": "c2", "meth\xff\x00\n' + jsonl([item("c3")])
            batch = await reach(api, await api.create(await api.upload(content)), is_in("failed"))
            assert [error["line"] for error in batch["errors"]["data"]] == [3]
            assert batch["errors"]["data"][0]["message"]
            assert batch["request_counts"]["completed"] == 0

    asyncio.run(run())


# -- ends before the end ---------------------------------------------------------------------------------------


@pytest.mark.slow
def test_what_is_done_at_the_deadline_is_kept(site: FaultSite) -> None:
    async def expired(api: Api, window_s: int) -> int:
        """Items that were seen done before the deadline of a batch that takes three times as long."""
        seen = 0

        def over(batch: dict[str, Any]) -> bool:
            nonlocal seen
            seen = max(seen, batch["request_counts"]["completed"])
            return bool(batch["status"] == "expired")

        lines = [item(f"c{i}", 5 if i < 10 else SLOW_ITEM) for i in range(10 + 10 * window_s)]
        batch = await reach(api, await api.submit(lines, f"{window_s}s"), over)
        output, errors = await both_files(api, batch)
        assert len(output) >= seen
        assert {line["error"]["code"] for line in errors} == {"batch_expired"}
        return seen

    async def run() -> None:
        async with Api(site.url) as api:
            # A machine that is held up may get to nothing within a short one.
            assert await expired(api, 5) or await expired(api, 15) or await expired(api, 45)

    asyncio.run(run())


@pytest.mark.slow
def test_cancelling_keeps_what_is_done(site: FaultSite) -> None:
    async def run() -> None:
        async with Api(site.url) as api:
            lines = [item(f"c{i}", 5 if i < 10 else SLOW_ITEM) for i in range(300)]
            batch_id = await api.submit(lines)
            await reach(api, batch_id, lambda batch: batch["request_counts"]["completed"] >= 10)
            assert (await api.ask("POST", f"/v1/batches/{batch_id}/cancel")).status == 200
            output, errors = await both_files(api, await reach(api, batch_id, is_in("cancelled")))
            assert len(output) >= 10
            assert len(errors) > 0
            answer = Answer(api.origin, chat("after"))
            assert await answer.end() == "complete"

    asyncio.run(run())


# -- a full disk -----------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_full_disk_holds_a_batch_up_and_loses_nothing(tmp_path: Path) -> None:
    """A limit on the size of files, which also root cannot exceed, stands for the disk."""

    def limit(site: FaultSite, size: int) -> None:
        assert site.process is not None
        resource.prlimit(site.process.pid, resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))

    async def paused(api: Api) -> str:
        return str((await api.get("/chiron/status"))["batch_runner"]["paused"])

    async def run(site: FaultSite) -> None:
        async with Api(site.url) as api:
            batch_id = await api.submit([item(f"c{i}", 60, "" if i < 100 else "<hold>") for i in range(400)])
            await reach(api, batch_id, lambda batch: batch["request_counts"]["completed"] == 100)
            limit(site, 1)
            (site.directory / "go").touch()
            until_s = time.monotonic() + 60.0
            while not (why := await paused(api)):
                assert time.monotonic() < until_s
                await asyncio.sleep(0.05)
            assert "no room" in why
            # Interactive requests need no disk, and reads none either; uploads are refused in as many words.
            assert await Answer(api.origin, chat("meanwhile")).end() == "complete"
            stuck = (await api.batch(batch_id))["request_counts"]["completed"]
            assert stuck == 100
            refused = await api.origin.fetch("POST", "/v1/files", body=form(jsonl([item("x")])), headers=FORM)
            assert (refused.status, "retry-after" in refused.headers) == (503, True)
            assert "no room" in json.loads(refused.body)["error"]["message"]
            limit(site, resource.RLIM_INFINITY)
            batch = await reach(api, batch_id, is_in("completed"))
            output, _ = await both_files(api, batch)
            assert len(output) == 400
            assert await paused(api) == ""

    with FaultSite(tmp_path, config(started_engines(tmp_path, max_instances=1))) as site:
        asyncio.run(run(site))
        limit(site, 1)
        assert site.stop() == 0, "also where it cannot write its log"
        finishes = site.diary().counts["finish"]
        assert max(count for id, count in finishes.items() if id.startswith("batch_")) == 1, "results wait in memory"


@pytest.mark.slow
def test_a_client_of_a_gateway_that_is_gone_gets_an_error_and_no_silence(tmp_path: Path) -> None:
    async def run(site: FaultSite) -> None:
        origin = Origin(site.url)
        streamed, whole = Answer(origin, chat("a", 5000)), Answer(origin, chat("b", 5000, stream=False))
        await streamed.first.wait()
        site.kill()
        assert [await streamed.end(), await whole.end()] == ["broken", "broken"]
        with pytest.raises(NetError, match="cannot connect"):
            await origin.fetch("GET", "/v1/models")
        await origin.close()

    with FaultSite(tmp_path, config(started_engines(tmp_path, max_instances=1))) as site:
        asyncio.run(run(site))
