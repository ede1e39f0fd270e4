"""A gateway on PostgreSQL whose server goes, or is not there at the start: completions go on, files and batches are
refused with the reason and go on once it is back; and its own kill -9 loses and doubles nothing."""

from __future__ import annotations

import asyncio
import json
import signal
import subprocess
import sys
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
from postgres_server import Server, postgres_server, why_not

pytestmark = pytest.mark.slow


def text_of(server: Server, directory: Path) -> str:
    password = directory / "password"
    password.write_text(server.password)
    table = f'[store]\nurl = "{server.url}"\npassword_file = "{password}"\nreconnect_max = "500ms"'
    text = config(started_engines(directory, max_instances=1))
    assert "[store]\nreserve_bytes = 0" in text
    return text.replace("[store]\nreserve_bytes = 0", table)


async def refused(site: FaultSite) -> None:
    async with Api(site.url) as api:
        assert await Answer(api.origin, chat("meanwhile")).end() == "complete"
        upload = await api.origin.fetch("POST", "/v1/files", body=form(jsonl([item("x")])), headers=FORM)
        for answer in (upload, await api.ask("GET", "/v1/batches"), await api.ask("POST", "/v1/batches/b/cancel")):
            assert (answer.status, "retry-after" in answer.headers) == (503, True), answer
            assert "postgresql://127.0.0.1" in json.loads(answer.body)["error"]["message"]
        # Readers may find the server gone while the last process of it still serves the writer.
        while "postgresql" not in (await api.get("/chiron/status"))["store"]["unavailable"]:
            assert (await api.ask("GET", "/v1/batches")).status == 503
            await asyncio.sleep(0.05)


async def runs_a_batch(site: FaultSite, items: int, between: str = "") -> None:
    async with Api(site.url) as api:
        file_id = await api.upload(jsonl([item(f"{number}", 3) for number in range(items)]))
        batch_id = await api.create(file_id)
    if between:
        while True:
            async with Api(site.url) as api:
                if (await api.batch(batch_id))["request_counts"]["completed"] >= items // 10:
                    break
        site.kill()
        site.start()
    async with Api(site.url) as api:
        while (batch := await api.batch(batch_id))["status"] != "completed":
            await asyncio.sleep(0.05)
        assert batch["request_counts"] == {"total": items, "completed": items, "failed": 0}
        output = (await api.ask("GET", f"/v1/files/{batch['output_file_id']}/content")).body.splitlines()
        assert [json.loads(line)["custom_id"] for line in output] == [f"{number}" for number in range(items)]


def test_completions_go_on_while_the_server_is_away(tmp_path: Path) -> None:
    if why := why_not():
        pytest.skip(why)
    with postgres_server() as server, FaultSite(tmp_path, text_of(server, tmp_path)) as site:
        wait_for(lambda: ask(site.url + "/ready").status == 200, "its engine is ready", START_TIMEOUT_S)
        asyncio.run(asyncio.wait_for(runs_a_batch(site, 20), START_TIMEOUT_S))
        server.stop(signal.SIGKILL)
        wait_for(lambda: ask(site.url + "/v1/batches").status == 503, "it is noticed", START_TIMEOUT_S)
        asyncio.run(asyncio.wait_for(refused(site), START_TIMEOUT_S))
        server.start()
        wait_for(lambda: ask(site.url + "/v1/batches").status == 200, "batches are back", START_TIMEOUT_S)
        asyncio.run(asyncio.wait_for(runs_a_batch(site, 60, between="kill -9"), START_TIMEOUT_S))
        site.stop()
        server.stop()
        site.start()  # The server is not there.
        wait_for(lambda: ask(site.url + "/ready").status == 200, "its engine is ready", START_TIMEOUT_S)
        asyncio.run(asyncio.wait_for(refused(site), START_TIMEOUT_S))
        assert "batches and files are not served" in site.log.read_text()
        server.start()
        wait_for(lambda: ask(site.url + "/v1/batches").status == 200, "batches are back", START_TIMEOUT_S)
        asyncio.run(asyncio.wait_for(runs_a_batch(site, 20), START_TIMEOUT_S))


def test_what_waiting_does_not_mend_ends_the_start_and_the_doctor_says_it_too(tmp_path: Path) -> None:
    if why := why_not():
        pytest.skip(why)
    with postgres_server() as server:
        text = text_of(server, tmp_path)
        path = tmp_path / "chiron.toml"
        path.write_text(text)

        def chiron(*words: str) -> subprocess.CompletedProcess[str]:
            command = [sys.executable, "-c", "from chiron.cli import main; main()", *words]
            return subprocess.run(command, capture_output=True, text=True, timeout=START_TIMEOUT_S, check=False)

        sound = chiron("doctor", str(path)).stdout
        assert "PostgreSQL" in sound
        assert "are made at the start" in " ".join(sound.split())
        (tmp_path / "password").write_text("wrong")
        for words in (("serve", str(path), "--port", "0"), ("doctor", str(path))):
            said = chiron(*words)
            assert said.returncode != 0
            shown = " ".join((said.stdout + said.stderr).split())
            assert "password authentication failed" in shown
            assert "Traceback" not in shown
        moved = chiron("store", "migrate", "--from", str(tmp_path / "none"), "--to", server.url)
        assert (moved.returncode, "no store here" in moved.stderr) == (2, True), moved.stderr
        odd = chiron("store", "migrate", "--from", str(tmp_path), "--to", "mysql://a")
        assert (odd.returncode, "--to" in odd.stderr) == (2, True), odd.stderr
