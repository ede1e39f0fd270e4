"""llm-d's public co-serving test, repeated in shape: bursts of chat beside batch jobs on two replicas::

    python bench/co_serving.py [--live] [--cycles 3] [--policies chiron static ...] [--json FILE]

The test (llm-d-batch-gateway, issue 491 and benchmarks/README.md): three cycles of 90 s at 1 request/s and 90 s at 15,
three batch jobs of 1,000 requests before that, due in 30 minutes, 2 hours and 24 hours, on two replicas. Its best
published run keeps p99 TTFT at 1.36 times that of interactive traffic alone and the whole batch, at 2.2 times the p95
of the time per token. Those are the bounds here; "alone" is the least that any of the policies has without the batch.

Simulated: the packaged scenario ``co-serving``, seconds a run. ``--live``: two paced engines behind ``chiron serve``,
the same requests from ``chiron load``, the jobs through ``/v1/batches``; engines at half the speed, requests at half
the rate and SLOs twice as long (``--slower``), which is the same test on a longer scale of time, so that two cores show
the engines' time and not their own. One cycle with its third of the batch, unless ``--cycles`` says more: three minutes
without the batch and some five with it, for each policy. Below the table it says for how long the machine kept the
gateway and this process waiting: where that is as long as the TTFTs that miss their bound, they are the machine's.

The simulation is of engines that are told and heard of in no time, ``--network-ms`` of such behind a wire, as a
gateway's are (``engines.remote``).
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import fmean

import numpy as np

import chiron
from chiron.cli.demo.gateway import Gateway
from chiron.config.build import setups
from chiron.config.scenario import Scenario, load_scenario
from chiron.engines.profile_store import PACKAGED
from chiron.engines.remote import Wire
from chiron.sim.run import simulate

SCENARIO = "co-serving"
CYCLE_S = 180.0
CYCLES = 3
TTFT_OVER_ALONE, ITL_OVER_ALONE = 1.36, 2.2
"""The most: what the best published run has."""
POLICIES = ("chiron", "chiron-paper", "dynamo-batch", "qlm", "llumnix", "niyama", "static")
LIVE_POLICIES = ("chiron", "static")
ALONE = "[]"
"""For ``batch_job``: none."""
SLOWER = 2
"""Of live engines."""
PACE = "llama-3.1-8b/a100/tp1"
NAP_S = 0.01
ASK_S = 5.0
"""The gateway tells its event loop's worst lag of ten seconds."""
_LAG = re.compile(r"^chiron_event_loop_lag_seconds(?:\{[^}]*\})? (\S+)$", re.MULTILINE)
PUBLISHED = (
    "| llm-d, interactive alone | 37 / 71 / 73 | | 13 | | | |",
    "| llm-d, no protection | 48 / 83 / 91 | 1.25x | | | | |",
    "| llm-d, flow control | 60 / 3,698 / 3,871 | 53x | | | 90% | |",
    "| llm-d, admission control and AIMD | 56 / 92 / 99 | 1.36x | 29 | 2.2x | 100% | about 600 |",
)
HEADINGS = (
    "TTFT p50 / p95 / p99 ms", "p99 over alone", "time per token p95 ms", "over alone", "batch in time", "done after s",
)  # fmt: skip
CONFIG = """
policy = "{policy}"

[classes.chat]
kind = "interactive"
ttft = "{ttft_s}s"
itl = "{itl_s}s"

[classes.batch]
kind = "batch"
deadline = "30m"

[models.m]
engine = "emulated"
profile = "pace.json"
min_instances = 2
max_instances = 2

[server]
port = 0
data = "data"
grace = "1s"
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Figures:
    """Of one run, or means over several."""

    ttft_s: tuple[float, float, float]
    """p50, p95 and p99 of interactive requests."""
    itl_s: float
    """p95 of their mean time per token."""
    answered: float
    """Share of them that finished."""
    in_time: float | None = None
    """Share of batch requests that finished by their deadline; None: there were none."""
    done_s: float | None = None
    """When the last of them had finished."""
    stalls_s: tuple[float, float] | None = None
    """Live: the longest that a process that only sleeps woke late, and that the gateway's event loop was late."""


def figures(result: chiron.Result) -> Figures:
    table = result.requests
    batch = np.array([cls.kind == "batch" for cls in result.classes])[table.cls]
    chat = ~batch
    finished = table.finish_s >= 0
    ttft_s = np.where(table.first_token_s >= 0, table.first_token_s - table.arrival_s, np.inf)[chat]
    p50, p95, p99 = (float(np.quantile(ttft_s, share, method="higher")) for share in (0.5, 0.95, 0.99))
    itl_s = float(np.nanquantile(table.itl_s()[chat], 0.95))
    met = table.attained(result.classes)
    return Figures(
        ttft_s=(p50, p95, p99),
        itl_s=itl_s,
        answered=float(finished[chat].mean()),
        in_time=float(met[batch].mean()) if batch.any() else None,
        done_s=float(table.finish_s[batch].max()) if batch.any() else None,
    )


def mean(runs: Sequence[Figures]) -> Figures:
    """Over seeds."""
    done = [run.done_s for run in runs if run.done_s is not None]
    in_time = [run.in_time for run in runs if run.in_time is not None]
    p50, p95, p99 = (fmean(run.ttft_s[place] for run in runs) for place in range(3))
    return Figures(
        ttft_s=(p50, p95, p99),
        itl_s=fmean(run.itl_s for run in runs),
        answered=fmean(run.answered for run in runs),
        in_time=fmean(in_time) if in_time else None,
        done_s=fmean(done) if done else None,
    )


def simulated(
    scenario: Scenario, policies: Sequence[str], seeds: Sequence[int], network_s: float | None = None
) -> tuple[dict[str, Figures], ...]:
    """By policy: without the batch, and with it. ``network_s``: one way between gateway and engines."""
    found = []
    for case in (scenario.with_overrides(f"batch_job={ALONE}"), scenario):
        if network_s is None:
            results = chiron.compare(case, policies, seeds)
        else:
            wire = Wire(network_s=network_s)
            asked = setups(case, policies=policies, seeds=seeds)
            results = [simulate(replace(setup, wire=wire), with_bound=False) for setup in asked]
        found.append({name: mean([figures(r) for r in results if r.policy == name]) for name in policies})
    return tuple(found)


def shape(cycles: int, slower: float = 1.0) -> list[str]:
    """Overrides for that many of the test's cycles, with engines that are so much slower."""
    chat = load_scenario(SCENARIO).classes["chat"]
    requests = round(1000 * cycles / CYCLES / slower)
    return [
        f"workload.0.generate.duration={CYCLE_S * cycles}",
        f"workload.0.rate_scale={1 / slower}",
        f"classes.chat.ttft={chat.ttft_s * slower}",
        f"classes.chat.itl={chat.itl_s * slower}",
        *(f"batch_job.{number}.requests={requests}" for number in range(3)),
    ]


def live(policies: Sequence[str], seed: int, cycles: int, slower: float) -> tuple[dict[str, Figures], ...]:
    """Likewise, in real time."""
    found: tuple[dict[str, Figures], ...] = ({}, {})
    asked = shape(cycles, slower)
    with tempfile.TemporaryDirectory() as folder:
        for policy in policies:
            for case, extra in zip(found, ([f"batch_job={ALONE}"], []), strict=True):
                words = "beside the batch" if case is found[1] else "alone"
                print(f"{policy} {words}: about {CYCLE_S * cycles / 60:.0f} minutes or more", file=sys.stderr)
                work = Path(folder) / f"{policy} {words}"
                work.mkdir()
                result, stalls_s = _one_live(work, policy, seed, slower, [*asked, *extra])
                case[policy] = replace(figures(result), stalls_s=stalls_s)
    return found


class Stalls:
    """For how long nothing ran that ought to have, at the worst, as a context: in this process, which does nothing but
    sleep, and in the gateway's event loop, as it says itself."""

    def __init__(self, url: str) -> None:
        self.worst = (0.0, 0.0)
        self._url = f"{url}/metrics"
        self._over = threading.Event()
        self._threads = [threading.Thread(target=each, daemon=True) for each in (self._sleep, self._ask)]

    def __enter__(self) -> Stalls:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        for thread in self._threads:
            thread.join()

    def _sleep(self) -> None:
        while not self._over.is_set():
            began_s = time.monotonic()
            time.sleep(NAP_S)
            self.worst = (max(self.worst[0], time.monotonic() - began_s - NAP_S), self.worst[1])

    def _ask(self) -> None:
        while not self._over.wait(ASK_S):
            with urllib.request.urlopen(self._url, timeout=60) as answer:
                lag_s = loop_lag_s(answer.read().decode())
            self.worst = (self.worst[0], max(self.worst[1], lag_s))


def loop_lag_s(metrics: str) -> float:
    found = _LAG.search(metrics)
    return float(found[1]) if found else 0.0


def _one_live(
    work: Path, policy: str, seed: int, slower: float, asked: Sequence[str]
) -> tuple[chiron.Result, tuple[float, float]]:
    chat = load_scenario(SCENARIO, asked).classes["chat"]
    (work / "pace.json").write_text(paced(slower), encoding="utf-8")
    config = CONFIG.format(policy=policy, ttft_s=chat.ttft_s, itl_s=chat.itl_s)
    (work / "chiron.toml").write_text(config, encoding="utf-8")
    with Gateway(work) as gateway, Stalls(gateway.url) as stalls:
        command = [sys.executable, "-m", "chiron", "load", "--url", gateway.url, "--scenario", SCENARIO]
        command += [word for one in asked for word in ("--set", one)]
        command += ["--seed", str(seed), "--save", str(work / "run.chiron")]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return chiron.load_result(work / "run.chiron"), stalls.worst


def paced(slower: float) -> str:
    """The profile, its steps so much longer."""
    profile = json.loads((PACKAGED / f"{PACE}.json").read_text(encoding="utf-8"))
    return json.dumps({key: value * slower if "_ms" in key else value for key, value in profile.items()})


def table(alone: dict[str, Figures], beside: dict[str, Figures]) -> str:
    """Markdown, best first: those that keep the bounds, by the end of the batch."""
    ttft_s = min(one.ttft_s[2] for one in alone.values())
    itl_s = min(one.itl_s for one in alone.values())
    lines = [
        "| | " + " | ".join(HEADINGS) + " |",
        "| --- |" + " ---: |" * len(HEADINGS),
    ]
    lines += [_row(f"`{name}`, interactive alone", one, ttft_s, itl_s) for name, one in alone.items()]
    kept = {name: keeps(one, ttft_s, itl_s) for name, one in beside.items()}
    for name, one in sorted(beside.items(), key=lambda item: (not kept[item[0]], item[1].ttft_s[2])):
        lines.append(_row(f"`{name}`: {'keeps the bounds' if kept[name] else 'misses them'}", one, ttft_s, itl_s))
    return "\n".join([*lines, *PUBLISHED])


def stalls(alone: dict[str, Figures], beside: dict[str, Figures]) -> list[str]:
    """A line for each live run."""
    lines = []
    for words, found in (("alone", alone), ("beside the batch", beside)):
        for name, one in found.items():
            if one.stalls_s is not None:
                sleeper, gateway = (f"{1000 * value:,.0f} ms" for value in one.stalls_s)
                lines.append(
                    f"`{name}` {words}: at the worst a process that only sleeps woke {sleeper} late, "
                    f"the gateway's event loop was {gateway} late"
                )
    return lines


def keeps(beside: Figures, ttft_alone_s: float, itl_alone_s: float) -> bool:
    """Whether a run is at least as good as the best that is published."""
    return (
        beside.answered == 1.0
        and beside.in_time == 1.0
        and beside.ttft_s[2] <= TTFT_OVER_ALONE * ttft_alone_s
        and beside.itl_s < ITL_OVER_ALONE * itl_alone_s
    )


def _row(name: str, one: Figures, ttft_alone_s: float, itl_alone_s: float) -> str:
    ttft = " / ".join(f"{1000 * value:,.0f}" for value in one.ttft_s)
    in_time = "" if one.in_time is None else f"{int(1000 * one.in_time) / 10:g}%"
    done = "" if one.done_s is None else f"{one.done_s:,.0f}"
    cells = [name, ttft, f"{one.ttft_s[2] / ttft_alone_s:.2f}x", f"{1000 * one.itl_s:.0f}"]
    return "| " + " | ".join([*cells, f"{one.itl_s / itl_alone_s:.2f}x", in_time, done]) + " |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--live", action="store_true", help="in real time, with engines that are paced")
    parser.add_argument("--slower", type=float, default=SLOWER, help="live: engines, rates and SLOs, by this factor")
    parser.add_argument("--cycles", type=int, choices=range(1, CYCLES + 1), help=f"default: {CYCLES}; live 1")
    parser.add_argument("--policies", nargs="+", help=f"default: {' '.join(POLICIES)}; live {' '.join(LIVE_POLICIES)}")
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3], help="live, the first")
    parser.add_argument("--json", type=Path, help="write the figures here")
    parser.add_argument("--network-ms", type=float, help="simulated: engines behind a wire, one way (default: none)")
    given = parser.parse_args()
    cycles = given.cycles or (1 if given.live else CYCLES)
    policies = given.policies or (LIVE_POLICIES if given.live else POLICIES)
    if given.live:
        alone, beside = live(policies, given.seeds[0], cycles, given.slower)
    else:
        network_s = None if given.network_ms is None else given.network_ms / 1000
        alone, beside = simulated(load_scenario(SCENARIO, shape(cycles)), policies, given.seeds, network_s)
    print("\n".join([table(alone, beside), *("\n" + line for line in stalls(alone, beside))]))
    if given.json:
        rows = {"alone": alone, "beside": beside}
        text = {case: {name: asdict(one) for name, one in found.items()} for case, found in rows.items()}
        given.json.write_text(json.dumps(text, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
