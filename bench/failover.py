"""How long it takes until another brain leads, of two gateways on one PostgreSQL.

    python bench/failover.py [--kills 30] [--how kill|stop|term] [--lease 3s]

Two gateways with a relay each, two emulated engines, requests from four clients, and a batch. Again and again the brain
that leads is killed (``kill``: its keeper starts another one), stopped (``stop``: SIGSTOP, as when its machine stalls)
or its gateway is told to stop and started again (``term``). Shown as quantiles: until a request that is sent at that
moment, to each gateway, has its whole answer (held, and then placed by the next brain, or after a second by its relay
itself), and until files and batches are served again, which is when another brain leads. At the end: whether each
request had its whole answer, and each item of the batch one line. Needs PostgreSQL (Debian's package) and openssl.
"""

from __future__ import annotations

import argparse
import asyncio
import signal
import statistics
import sys
import tempfile
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path
from typing import Any

sys.path[:0] = [str(path) for path in (Path(__file__).parents[1] / "tests" / "support").iterdir() if path.is_dir()]

from chiron.net.client import NetError  # noqa: E402
from fault_site import Answer, Api, chat, item  # noqa: E402
from gateway_pair import NAMES, Pair, gateways, talk, until_done, until_ready  # noqa: E402
from postgres_server import postgres_server  # noqa: E402

HOW = {"kill": signal.SIGKILL, "stop": signal.SIGSTOP}


async def answered_s(pair: Pair, name: str) -> tuple[float, str]:
    """Of a request that is sent now."""
    began_s = time.monotonic()
    async with Api(pair.sites[name].url) as api:
        verdict = await Answer(api.origin, chat("now", 1, stream=False)).end()
    return time.monotonic() - began_s, verdict


async def served_s(pair: Pair, name: str) -> float:
    """Until the leader's API answers."""
    began_s = time.monotonic()
    async with Api(pair.sites[name].url) as api, asyncio.timeout(60):
        while True:
            with suppress(NetError, TimeoutError):
                async with asyncio.timeout(1.0):
                    if (await api.ask("GET", "/v1/batches?limit=1")).status == 200:
                        return time.monotonic() - began_s
            await asyncio.sleep(0.02)


async def lose_leader(pair: Pair, how: str) -> list[tuple[float, str]]:
    """Times of requests at the gateways that are up; and how long the API was away, as the last one."""
    leader, brain = await asyncio.to_thread(pair.leader)
    other = next(name for name in NAMES if name != leader)
    names = [other] if how == "term" else list(NAMES)
    stopping = None
    if how == "term":
        pair.up[leader] = False
        stopping = asyncio.create_task(asyncio.to_thread(pair.sites[leader].stop))
    else:
        brain.send_signal(HOW[how])
    found = await asyncio.gather(served_s(pair, other), *(answered_s(pair, name) for name in names))
    if stopping is not None:
        await stopping
        await asyncio.to_thread(pair.sites[leader].start)
        await until_ready(pair, leader)
        pair.up[leader] = True
    await asyncio.to_thread(pair.leader, brain)
    for name in NAMES:
        await until_ready(pair, name)
    await asyncio.sleep(2.0)
    return [*found[1:], (found[0], "")]


async def measure(pair: Pair, kills: int, how: str, items: int) -> dict[str, Any]:
    for name in NAMES:
        await until_ready(pair, name)
    verdicts, over = Counter[str](), asyncio.Event()
    async with Api(pair.sites[NAMES[0]].url) as api:
        batch = await api.submit([item(f"i{number}", 200) for number in range(items)])
    talking = [asyncio.create_task(talk(pair, name, verdicts, over)) for name in NAMES for _ in range(2)]
    answered: list[float] = []
    served: list[float] = []
    for _ in range(kills):
        *requests, (away_s, _) = await lose_leader(pair, how)
        answered += [seconds for seconds, _ in requests]
        verdicts.update(verdict for _, verdict in requests)
        served.append(away_s)
    over.set()
    await asyncio.gather(*talking)
    lines = Counter(await until_done(pair, batch))
    return {"answered": answered, "served": served, "verdicts": dict(verdicts), "lines": lines}


def quantiles(values: list[float]) -> str:
    ordered = sorted(values)
    p90 = ordered[min(len(ordered) - 1, round(0.9 * (len(ordered) - 1)))]
    return f"{ordered[0]:.2f} / {statistics.median(ordered):.2f} / {p90:.2f} / {ordered[-1]:.2f}"


def main() -> None:
    assert __doc__ is not None
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--how", choices=[*HOW, "term"], default="kill")
    parser.add_argument("--lease", default="3s")
    parser.add_argument("--items", type=int, default=2000)
    given = parser.parse_args()
    with (
        tempfile.TemporaryDirectory() as directory,
        postgres_server() as server,
        gateways(Path(directory), server, lease=given.lease) as pair,
    ):
        found = asyncio.run(measure(pair, given.kills, given.how, given.items))
    print(f"{given.kills} x {given.how}, lease {given.lease}; seconds as least / median / p90 / most")
    print(f"  a request sent then has its answer: {quantiles(found['answered'])}")
    print(f"  files and batches are served again: {quantiles(found['served'])}")
    print(f"  interactive answers: {found['verdicts']}")
    twice = sum(count != 1 for count in found["lines"].values())
    print(f"  batch: {len(found['lines'])} of {given.items} items have a line, {twice} more than one")


if __name__ == "__main__":
    main()
