"""How long it takes until another brain leads, of two gateways on one PostgreSQL; and what is lost.

    python bench/failover.py [--kills 30] [--how kill|stop|term|gateway|relay|postgres] [--lease 1500ms]

Two gateways with a relay each, two emulated engines, requests from four clients, and a batch. Again and again something
is lost:

- ``kill``: the brain that leads (SIGKILL); its keeper starts another one
- ``stop``: the brain that leads is stopped (SIGSTOP), as when its machine stalls
- ``term``: the gateway that leads is told to stop, and started again
- ``gateway``: all processes of the gateway that leads are killed at once, and it is started again
- ``relay``: a relay, of each gateway in turn
- ``postgres``: the database server, all its processes, and it is started again at once

Shown as quantiles: until a request that is sent at that moment, to each gateway that is to be up, has its whole answer
(it is sent again if it is refused or cut off), and until files and batches are served again: then another brain leads.
At the end: whether each request had its whole answer, the text of those compared with the engine's own, byte for byte,
and each item of the batch one line. Needs PostgreSQL (Debian's package) and openssl.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import signal
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from contextlib import nullcontext, suppress
from pathlib import Path
from random import Random
from typing import Any

import psutil

sys.path[:0] = [str(path) for path in (Path(__file__).parents[1] / "tests" / "support").iterdir() if path.is_dir()]

from chiron.net.client import NetError  # noqa: E402
from fault_site import Answer, Api, FaultSite, chat, item, wait_for  # noqa: E402
from gateway_pair import NAMES, Pair, gateways, until_done, until_ready  # noqa: E402
from postgres_server import Server, postgres_server  # noqa: E402

BRAINS = {"kill": signal.SIGKILL, "stop": signal.SIGSTOP}
WAYS = (*BRAINS, "term", "gateway", "relay", "postgres")
PROMPTS = tuple(f"question {number}" for number in range(8))
TOKENS = (30, 400)
"""Of short answers, and of those of which some run at each loss."""
PAUSE_S = (1.0, 3.0)
"""From when all is well again to the next loss."""
WAIT_S = 60.0


def text_of(answer: Answer) -> str:
    """What a client has read of an answer, complete or not."""
    if answer.text.startswith(b"{"):
        return str(json.loads(answer.text)["choices"][0]["message"]["content"])
    events = [part.removeprefix(b"data: ") for part in answer.text.split(b"\n\n")[:-1]]
    chunks = [json.loads(event) for event in events if event.startswith(b"{")]
    return "".join(chunk["choices"][0]["delta"].get("content") or "" for chunk in chunks if chunk.get("choices"))


async def texts_of(engine: str) -> dict[tuple[str, int], str]:
    """Of each answer, from the engine itself: its text follows from the prompt."""
    found = {}
    async with Api(engine) as api:
        for prompt in PROMPTS:
            for tokens in TOKENS:
                answer = Answer(api.origin, chat(prompt, tokens))
                assert await answer.end() == "complete"
                found[prompt, tokens] = text_of(answer)
    return found


class Clients:
    """Four, each of which asks again and again; every second one reads long streams."""

    def __init__(self, pair: Pair, texts: dict[tuple[str, int], str]) -> None:
        self.pair = pair
        self.texts = texts
        self.verdicts = {"streams": Counter[str](), "others": Counter[str]()}
        self.lived = 0
        """Streams that ran when something was lost, and ended whole."""
        self.losses = 0
        self.over = asyncio.Event()

    async def talk(self, name: str, which: int) -> None:
        number = 0
        async with Api(self.pair.sites[name].url) as api:
            while not self.over.is_set():
                if self.pair.up[name]:
                    number += 1
                    await self.ask(api, name, PROMPTS[number % len(PROMPTS)], TOKENS[which % 2], bool(number % 3))
                await asyncio.sleep(0.05)

    async def ask(self, api: Api, name: str, prompt: str, tokens: int, stream: bool) -> None:
        losses, answer = self.losses, await self.pair.ask(api, name, chat(prompt, tokens, stream))
        verdict, began = answer.verdict, answer.status == 200
        whole = self.texts[prompt, tokens]
        if verdict == "complete" and text_of(answer) != whole:
            verdict = "another text"
        elif verdict != "complete" and began and stream and not whole.startswith(text_of(answer)):
            verdict += ", and another text before it"
        if verdict == "broken":
            verdict = "cut off" if answer.text else "no answer"
        self.lived += stream and verdict == "complete" and losses != self.losses
        self.verdicts["streams" if stream else "others"][verdict] += 1


async def answered_s(pair: Pair, name: str) -> float:
    """Of a request that is sent now, and again where it is refused or cut off."""
    began_s = time.monotonic()
    async with Api(pair.sites[name].url) as api, asyncio.timeout(WAIT_S):
        while await Answer(api.origin, chat("now", 1, stream=False)).end() != "complete":
            await asyncio.sleep(0.01)
    return time.monotonic() - began_s


async def served_s(pair: Pair, name: str) -> float:
    """Until the leader's API answers."""
    began_s = time.monotonic()
    async with Api(pair.sites[name].url) as api, asyncio.timeout(WAIT_S):
        while True:
            with suppress(NetError, TimeoutError):
                async with asyncio.timeout(1.0):
                    if (await api.ask("GET", "/v1/batches?limit=1")).status == 200:
                        return time.monotonic() - began_s
            await asyncio.sleep(0.02)


def relay_of(site: FaultSite) -> psutil.Process:
    """The process that listens on its port."""

    def found() -> psutil.Process | None:
        assert site.process is not None
        for child in psutil.Process(site.process.pid).children():
            with suppress(psutil.Error):
                ports = {each.laddr.port for each in child.net_connections("tcp") if each.status == psutil.CONN_LISTEN}
                if site.port in ports:
                    return child
        return None

    relay: psutil.Process = wait_for(found, "a relay listens")
    return relay


class Losses:
    """What is lost, again and again."""

    def __init__(self, pair: Pair, server: Server, how: str) -> None:
        self.pair = pair
        self.server = server
        self.how = how
        self.count = 0
        self.mending: list[asyncio.Task[None]] = []

    async def lose(self) -> tuple[str, list[str]]:
        """Returns the gateway that is asked for its API, and those that are up, or are to be up again at once."""
        pair, how = self.pair, self.how
        self.count += 1
        if how == "relay":
            name = NAMES[self.count % len(NAMES)]
            (await asyncio.to_thread(relay_of, pair.sites[name])).kill()
            return name, list(NAMES)
        if how == "postgres":
            await asyncio.to_thread(self.server.stop, signal.SIGKILL)
            self.mend(self.server.start)
            return NAMES[0], list(NAMES)
        leader, brain = await asyncio.to_thread(pair.leader)
        other = next(name for name in NAMES if name != leader)
        if how in BRAINS:
            brain.send_signal(BRAINS[how])
            return other, list(NAMES)
        if how == "term":
            await pair.send_elsewhere(leader)
            self.mend(lambda: self.restart(leader))
        else:
            pair.up[leader] = False
            for process in pair.sites[leader].processes():
                process.kill()
            pair.sites[leader].kill()
            self.mend(lambda: self.restart(leader))
        return other, [other]

    def restart(self, name: str) -> None:
        site = self.pair.sites[name]
        if self.how == "term":
            site.stop()
        site.start()

    def mend(self, work: Callable[[], None]) -> None:
        self.mending.append(asyncio.create_task(asyncio.to_thread(work)))

    async def until_well(self, brain: psutil.Process) -> None:
        while self.mending:
            await self.mending.pop()
        if self.how in (*BRAINS, "term", "gateway"):
            await asyncio.to_thread(self.pair.leader, brain)
        for name in NAMES:
            await until_ready(self.pair, name)
            self.pair.up[name] = True


async def measure(pair: Pair, server: Server, engine: str, kills: int, how: str, items: int) -> dict[str, Any]:
    for name in NAMES:
        await until_ready(pair, name)
    clients, losses, random = Clients(pair, await texts_of(engine)), Losses(pair, server, how), Random(how)
    async with Api(pair.sites[NAMES[0]].url) as api:
        batch = await api.submit([item(f"i{number}", 200) for number in range(items)])
    talking = [asyncio.create_task(clients.talk(name, which)) for name in NAMES for which in range(2)]
    answered: list[float] = []
    served: list[float] = []
    for _ in range(kills):
        _, brain = await asyncio.to_thread(pair.leader)
        clients.losses += 1
        asked, up = await losses.lose()
        away_s, *each_s = await asyncio.gather(served_s(pair, asked), *(answered_s(pair, name) for name in up))
        served.append(away_s)
        answered += each_s
        await losses.until_well(brain)
        await asyncio.sleep(random.uniform(*PAUSE_S))
    clients.over.set()
    await asyncio.gather(*talking)
    lines = Counter(await until_done(pair, batch))
    return {"answered": answered, "served": served, "clients": clients, "lines": lines}


def quantiles(values: list[float]) -> str:
    ordered = sorted(values)
    p90 = ordered[min(len(ordered) - 1, round(0.9 * (len(ordered) - 1)))]
    return f"{ordered[0]:.2f} / {statistics.median(ordered):.2f} / {p90:.2f} / {ordered[-1]:.2f}"


def main() -> None:
    assert __doc__ is not None
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--how", choices=WAYS, default="kill")
    parser.add_argument("--lease", default="1500ms")
    parser.add_argument("--items", type=int, default=2000)
    parser.add_argument("--directory", type=Path, help="an empty one, to keep the gateways' logs")
    given = parser.parse_args()
    with (
        nullcontext(given.directory) if given.directory else tempfile.TemporaryDirectory() as directory,
        postgres_server(settings=()) as server,  # What it has acknowledged must be there after a kill.
        gateways(Path(directory), server, lease=given.lease) as pair,
    ):
        found = asyncio.run(measure(pair, server, pair.engines[0], given.kills, given.how, given.items))
    clients: Clients = found["clients"]
    print(f"{given.kills} x {given.how}, lease {given.lease}; seconds as least / median / p90 / most")
    print(f"  a request sent then has its answer: {quantiles(found['answered'])}")
    print(f"  files and batches are served again: {quantiles(found['served'])}")
    for what, verdicts in clients.verdicts.items():
        print(f"  {what}: {dict(verdicts)}")
    print(f"  streams that ran when something was lost and ended whole: {clients.lived}")
    twice = sum(count != 1 for count in found["lines"].values())
    print(f"  batch: {len(found['lines'])} of {given.items} items have a line, {twice} more than one")


if __name__ == "__main__":
    main()
