"""Two gateways on one PostgreSQL in front of emulated engines, as processes, and clients of both."""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil

from chiron.net.client import NetError
from delaying_proxy import delaying_proxy
from fault_site import Answer, Api, FaultSite, chat, wait_for
from peer_certificates import Authority
from ports import free_port
from postgres_server import Server
from serve_trial import PROFILE, emulated_fleet

NAMES = ("gw-a", "gw-b")


class Pair:
    """Two gateways."""

    def __init__(self, sites: dict[str, FaultSite], engines: Sequence[str] = ()) -> None:
        self.sites = sites
        self.engines = engines
        """URLs."""
        self.up = dict.fromkeys(sites, True)
        """Those that clients are sent to."""
        self.unanswered = Counter[str]()
        """Requests that have nothing of their answers yet, by gateway."""

    async def send_elsewhere(self, name: str) -> None:
        """As a load balancer does before a gateway is stopped; streams go on there."""
        self.up[name] = False
        async with asyncio.timeout(60):
            while self.unanswered[name]:
                await asyncio.sleep(0.01)

    async def ask(self, api: Api, name: str, body: dict[str, Any]) -> Answer:
        """The whole answer."""
        self.unanswered[name] += 1
        answer = Answer(api.origin, body)
        try:
            async with asyncio.timeout(60):
                await answer.first.wait()
        finally:
            self.unanswered[name] -= 1
        await answer.end()
        return answer

    def leader(self, but: psutil.Process | None = None) -> tuple[str, psutil.Process]:
        """The gateway that leads, and its brain, once that is another one: it writes the event log."""
        found: tuple[str, psutil.Process] = wait_for(lambda: self._leader(but), "a gateway leads")
        return found

    def strike(self, number: int, but: psutil.Process | None) -> psutil.Process:
        """Send the brain that leads a signal; which that was. On a machine that stalls it may have ended just now.
        ``but``: one that was stopped before is there still."""
        while True:
            _, brain = self.leader(but)
            with suppress(psutil.NoSuchProcess):
                brain.send_signal(number)
                return brain

    def _leader(self, but: psutil.Process | None) -> tuple[str, psutil.Process] | None:
        for name, site in self.sites.items():
            if not site.alive:
                continue
            assert site.process is not None
            for child in psutil.Process(site.process.pid).children():
                with suppress(psutil.NoSuchProcess):
                    files = [file.path for file in child.open_files()]
                    if child != but and any(path.endswith("events.jsonl") for path in files):
                        return name, child
        return None


@contextmanager
def gateways(
    directory: Path,
    server: Server,
    *,
    lease: str = "3s",
    extra: str = "",
    options: Sequence[str] = (),
    delay_s: float = 0.0,
) -> Iterator[Pair]:
    """``extra``: keys of ``[gateways]``; ``options`` of ``chiron serve``; ``delay_s``: what a message takes from one
    gateway to the other."""
    ca = Authority(directory / "certificates")
    password = directory / "password"
    password.write_text(server.password)
    with ExitStack() as stack:
        urls = stack.enter_context(emulated_fleet(2, "--speedup", "4"))
        sites = {}
        for name in NAMES:
            certificate, key = ca.issue(name)
            (directory / name).mkdir()
            port = free_port()
            seen = stack.enter_context(delaying_proxy(port, delay_s)) if delay_s else port
            text = f"""
[server]
grace = "20s"
[store]
url = "{server.url}"
password_file = "{password}"
[gateways]
name = "{name}"
listen = "127.0.0.1:{port}"
advertise = "127.0.0.1:{seen}"
certificate = "{certificate}"
key = "{key}"
ca = "{ca.ca}"
lease = "{lease}"
{extra}
[models.m]
engine = "emulated"
endpoints = {json.dumps(urls)}
profile = "{PROFILE}"
max_num_seqs = 16
"""
            sites[name] = stack.enter_context(FaultSite(directory / name, text, *options))
        yield Pair(sites, urls)


async def talk(pair: Pair, name: str, verdicts: Counter[str], over: asyncio.Event) -> None:
    async with Api(pair.sites[name].url) as api:
        number = 0
        while not over.is_set():
            if pair.up[name]:
                number += 1
                answer = await pair.ask(api, name, chat(f"{name} {number}", 30, stream=bool(number % 3)))
                verdicts[answer.verdict] += 1
            await asyncio.sleep(0.05)


async def until_ready(pair: Pair, name: str) -> None:
    """Its relays have found whoever leads, and an engine is ready."""
    async with Api(pair.sites[name].url) as api, asyncio.timeout(60):
        while True:
            with suppress(NetError):
                if (await api.ask("GET", "/ready")).status == 200:
                    return
            await asyncio.sleep(0.1)


async def until_done(pair: Pair, batch: str) -> list[str]:
    """Ids of the batch's items, one for each line of its output."""
    async with Api(next(iter(pair.sites.values())).url) as api, asyncio.timeout(120):
        while True:
            answer = await api.ask("GET", f"/v1/batches/{batch}")
            found = json.loads(answer.body) if answer.status == 200 else {}
            if found.get("status") == "completed":
                assert not found["error_file_id"]
                return [line["custom_id"] for line in await api.lines(found, "output_file_id")]
            await asyncio.sleep(0.2)
