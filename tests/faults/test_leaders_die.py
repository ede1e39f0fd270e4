"""Two gateways on one PostgreSQL, under interactive requests and a batch, while whoever leads is killed, stopped
(SIGSTOP) and told to stop: each request has its whole answer, each item one line, and somebody leads again."""

from __future__ import annotations

import asyncio
import signal
import time
from collections import Counter
from datetime import datetime
from pathlib import Path

import psutil
import pytest

from chiron.gateway.port.messages import VERSION
from chiron.telemetry.event_log import read_event_log
from fault_site import Api, item
from gateway_pair import NAMES, Pair, gateways, talk, until_done, until_ready
from kubernetes_site import cluster, every_cluster
from postgres_server import Server, postgres_server, why_not

pytestmark = [pytest.mark.slow, pytest.mark.skipif(bool(why_not()), reason=why_not())]
ITEMS = 120
LEASE_S = 6.0
"""Of those that Kubernetes elects."""


async def longest_stall_s(for_s: float) -> float:
    """How long this machine has done nothing at a stretch, about."""
    now_s = asyncio.get_running_loop().time
    until_s, last_s, longest_s = now_s() + for_s, now_s(), 0.0
    while last_s < until_s:
        await asyncio.sleep(0.05)
        longest_s = max(longest_s, now_s() - last_s)
        last_s = now_s()
    return longest_s


def test_all_answers_are_whole_and_each_item_has_one_line(tmp_path: Path) -> None:
    async def main(pair: Pair) -> None:
        for name in NAMES:
            await until_ready(pair, name)
        verdicts, over = Counter[str](), asyncio.Event()
        async with Api(pair.sites[NAMES[0]].url) as api:
            batch = await api.submit([item(f"i{number}", 200) for number in range(ITEMS)])
        talking = [asyncio.create_task(talk(pair, name, verdicts, over)) for name in NAMES for _ in range(2)]
        brain: psutil.Process | None = None
        for number in (signal.SIGKILL, signal.SIGSTOP, signal.SIGKILL):
            brain = await asyncio.to_thread(pair.strike, number, brain)
            leader, _ = await asyncio.to_thread(pair.leader, brain)
            await until_ready(pair, leader)
        for _ in range(2):  # A rolling restart: whoever leads first, and then the one that follows it.
            await pair.send_elsewhere(leader)
            stopped = pair.sites[leader]
            assert await asyncio.to_thread(stopped.stop) == 0
            await asyncio.to_thread(stopped.start)
            await until_ready(pair, leader)
            pair.up[leader] = True
            leader, _ = await asyncio.to_thread(pair.leader)
        over.set()
        await asyncio.gather(*talking)
        assert set(verdicts) == {"complete"}, verdicts
        assert Counter(await until_done(pair, batch)) == Counter(f"i{number}" for number in range(ITEMS))
        logs = "".join(path.read_text() for site in pair.sites.values() for path in site.directory.glob("*.log"))
        assert "has led for longer than it may and is killed" in logs
        assert "Traceback" not in logs

    with postgres_server() as server, gateways(tmp_path, server) as pair:
        asyncio.run(main(pair))


def events(pair: Pair, name: str) -> list[tuple[float, str]]:
    """When what happened to requests was decided there, as its brains' logs have it; Unix time."""
    found: list[tuple[float, str]] = []
    for path in pair.sites[name].directory.glob("**/events.jsonl"):
        origin_s = 0.0
        for line in read_event_log(path):
            if line["event"] == "log":
                origin_s = datetime.fromisoformat(line["run"]).timestamp()
            elif line["event"] == "dispatch":
                found.append((origin_s + line["t"], line["event"]))
    return found


def test_a_leader_whose_machine_slept_decides_nothing_more_and_nothing_is_lost(tmp_path: Path) -> None:
    """Keeper and brain, for longer than the lease: nobody is there to kill the brain when it is over."""

    async def main(pair: Pair) -> None:
        for name in NAMES:
            await until_ready(pair, name)
        verdicts, over = Counter[str](), asyncio.Event()
        async with Api(pair.sites[NAMES[0]].url) as api:
            batch = await api.submit([item(f"i{number}", 200) for number in range(ITEMS)])
        talking = [asyncio.create_task(talk(pair, name, verdicts, over)) for name in NAMES for _ in range(2)]
        slept, brain = await asyncio.to_thread(pair.leader)
        async with asyncio.timeout(60):
            while not events(pair, slept):
                await asyncio.sleep(0.1)
        keeper = pair.sites[slept].process
        assert keeper is not None
        for number in (signal.SIGSTOP, signal.SIGCONT):
            for process in (psutil.Process(keeper.pid), brain):
                process.send_signal(number)
            if number == signal.SIGSTOP:
                stopped_s = time.time()
                await asyncio.sleep(10.0)
                other = next(name for name in NAMES if name != slept)
                await until_ready(pair, other)
                woke_s = time.time()
        await until_ready(pair, slept)
        over.set()
        await asyncio.gather(*talking)
        assert set(verdicts) == {"complete"}, verdicts
        assert Counter(await until_done(pair, batch)) == Counter(f"i{number}" for number in range(ITEMS))
        async with Api(pair.sites[slept].url) as api:
            status = await api.get("/chiron/status")
        assert (status["leader"]["gateway"], status["leader"]["term"]) == (other, 2)
        assert any(when_s > woke_s for when_s, _ in events(pair, other))
        assert max(when_s for when_s, _ in events(pair, slept)) <= stopped_s + 0.1

    with postgres_server() as server, gateways(tmp_path, server) as pair:
        asyncio.run(main(pair))


def test_gateways_that_are_far_apart_place_by_one_brain_and_follow_it_when_it_dies(tmp_path: Path) -> None:
    async def fallbacks(name: str) -> int:
        async with Api(name) as api:
            return int((await api.get("/chiron/status"))["leader"]["fallback_placements"])

    async def main(pair: Pair) -> None:
        for name in NAMES:
            await until_ready(pair, name)
        verdicts, over = Counter[str](), asyncio.Event()
        async with Api(pair.sites[NAMES[0]].url) as api:
            batch = await api.submit([item(f"i{number}", 200) for number in range(ITEMS)])
        talking = [asyncio.create_task(talk(pair, name, verdicts, over)) for name in NAMES for _ in range(2)]
        _, brain = await asyncio.to_thread(pair.leader)
        async with asyncio.timeout(60):
            while verdicts.total() < 40:
                await asyncio.sleep(0.1)
        for name in NAMES:
            assert await fallbacks(pair.sites[name].url) == 0, "a brain that is far is no brain that is silent"
        await asyncio.to_thread(pair.strike, signal.SIGKILL, None)
        await asyncio.to_thread(pair.leader, brain)
        for name in NAMES:
            await until_ready(pair, name)
        over.set()
        await asyncio.gather(*talking)
        assert set(verdicts) == {"complete"}, verdicts
        assert Counter(await until_done(pair, batch)) == Counter(f"i{number}" for number in range(ITEMS))

    with postgres_server() as server, gateways(tmp_path, server, delay_s=0.05) as pair:
        asyncio.run(main(pair))


def test_gateways_are_replaced_by_those_of_a_newer_version_without_a_failed_request(tmp_path: Path) -> None:
    """The older ones speak the released version of the relays' protocol, the newer ones this one."""

    async def versions(pair: Pair) -> dict[str, int]:
        async with Api(next(site.url for name, site in pair.sites.items() if pair.up[name])) as api:
            return {relay["gateway"]: relay["protocol"] for relay in (await api.get("/chiron/status"))["relays"]}

    async def main(pair: Pair) -> None:
        for name in NAMES:
            await until_ready(pair, name)
        assert set((await versions(pair)).values()) == {VERSION - 1}
        verdicts, over = Counter[str](), asyncio.Event()
        async with Api(pair.sites[NAMES[0]].url) as api:
            batch = await api.submit([item(f"i{number}", 200) for number in range(ITEMS)])
        talking = [asyncio.create_task(talk(pair, name, verdicts, over)) for name in NAMES for _ in range(2)]
        leader, _ = await asyncio.to_thread(pair.leader)
        for name in (next(name for name in NAMES if name != leader), leader):
            await pair.send_elsewhere(name)
            site = pair.sites[name]
            assert await asyncio.to_thread(site.stop) == 0
            site.options = ()
            await asyncio.to_thread(site.start)
            await until_ready(pair, name)
            pair.up[name] = True
            async with asyncio.timeout(60):
                while len(await versions(pair)) < 2:
                    await asyncio.sleep(0.1)
        assert await versions(pair) == dict.fromkeys(NAMES, VERSION)
        over.set()
        await asyncio.gather(*talking)
        assert set(verdicts) == {"complete"}, verdicts
        assert Counter(await until_done(pair, batch)) == Counter(f"i{number}" for number in range(ITEMS))

    older = ("--set", f"relays.protocol={VERSION - 1}")
    with postgres_server() as server, gateways(tmp_path, server, options=older) as pair:
        asyncio.run(main(pair))


@every_cluster
def test_one_that_kubernetes_elected_is_followed_when_it_dies_also_while_the_database_restarts(
    what: str, tmp_path: Path
) -> None:
    async def kill_twice(pair: Pair, server: Server) -> None:
        for name in NAMES:
            await until_ready(pair, name)
        stays = False
        while not stays:
            before = await asyncio.to_thread(pair.leader)
            watching = asyncio.create_task(longest_stall_s(10.0))
            await asyncio.to_thread(server.stop, signal.SIGKILL)
            stalled_s = await watching  # For longer than the lease lasts: it leads all the same.
            stays = await asyncio.to_thread(pair.leader) == before
            await asyncio.to_thread(server.start)
            assert stays or stalled_s > LEASE_S / 4, "only a machine that stalls may cost it the lease"
        first = before[1]
        verdicts, over = Counter[str](), asyncio.Event()
        async with Api(pair.sites[NAMES[0]].url) as api, asyncio.timeout(60):
            while (await api.ask("GET", "/v1/batches?limit=1")).status != 200:
                await asyncio.sleep(0.1)
            batch = await api.submit([item(f"i{number}", 200) for number in range(ITEMS)])
        talking = [asyncio.create_task(talk(pair, name, verdicts, over)) for name in NAMES]
        brain = first
        for _ in range(2):
            brain = await asyncio.to_thread(pair.strike, signal.SIGKILL, brain if brain is not first else None)
            leader, _ = await asyncio.to_thread(pair.leader, brain)
            await until_ready(pair, leader)
        over.set()
        await asyncio.gather(*talking)
        assert set(verdicts) == {"complete"}, verdicts
        assert Counter(await until_done(pair, batch)) == Counter(f"i{number}" for number in range(ITEMS))

    def run(kubeconfig: Path) -> None:
        extra = f'elect = "kubernetes"\nkubeconfig = "{kubeconfig}"'
        with (
            postgres_server(settings=()) as server,
            gateways(tmp_path, server, lease=f"{LEASE_S:g}s", extra=extra) as pair,
        ):
            asyncio.run(kill_twice(pair, server))

    async def main() -> None:
        async with cluster(what, tmp_path / "cluster", nodes=0) as here:
            await asyncio.to_thread(run, here.kubeconfig)

    (tmp_path / "cluster").mkdir()
    asyncio.run(main())
