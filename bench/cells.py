"""Twenty cells of a thousand instances, and one of them is lost.

    python bench/cells.py [--cells 20] [--instances 1000] [--seconds 900] [--lost-at 400]

A cell is one brain with its relays and instances. Cells know nothing of one another: what balances clients' requests
over their relays is in front of them (DNS, a load balancer). So a cell is one simulation, and the loss of another one
is a step in its arrivals. Each cell serves a 70B model on A100s under ``chiron``, prompts of 4,000 tokens and answers
of 1,500 on average (lengths are exponential), with as many instances as ``--instances`` at most. At ``--lost-at`` one
cell is gone, with all that ran there; its clients ask again at once, spread over two seconds, and from then on its
share of the traffic is the others'. Two ways to spread it are compared:

- *over all*: every other cell gets an equal part (a balancer that knows which cells are ready);
- *to one*: the next cell on a ring gets all of it (hashing without virtual nodes, or DNS with a pair each).
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context

import numpy as np

from chiron.core.types import InstanceKind, ModelSpec, RequestClass
from chiron.engines.profile_store import load_profile
from chiron.policies.registry import POLICIES
from chiron.sim.run import simulate
from chiron.sim.setup import Setup
from chiron.workload.types import Workload

PROFILE = "llama-3.1-70b/a100/tp4"
PROMPT_TOKENS, OUTPUT_TOKENS = 4000.0, 1500.0
TTFT_S, ITL_S = 10.0, 0.1
RATE_PER_INSTANCE = 0.35
"""Arrivals/s in a cell over its instances, of the average cell."""
SPREAD = 0.05
"""Cells differ in their share of the traffic by so much, evenly."""
RETRY_S = 2.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """One cell's part of the traffic."""

    seed: int
    instances: int
    """At most."""
    before: float
    """Arrivals/s."""
    after: float
    """The same, from the loss on."""
    retried: int
    """Requests of the lost cell that come again here."""
    lost_s: float
    seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """Of one cell. Shares are of arrivals whose TTFT and ITL were met, by when they came."""

    before: float
    minute: float
    """In the minute after the loss."""
    later: float
    ttft_p99_s: float
    """Of that minute."""
    instances_before: int
    instances_after: int
    requests: int
    cpu_s: float


def arrivals(cell: Cell, generator: np.random.Generator) -> np.ndarray:
    def poisson(rate: float, start_s: float, end_s: float) -> np.ndarray:
        return generator.uniform(start_s, end_s, generator.poisson(rate * (end_s - start_s)))

    parts = [poisson(cell.before, 0.0, cell.lost_s), poisson(cell.after, cell.lost_s, cell.seconds)]
    parts.append(generator.uniform(cell.lost_s, cell.lost_s + RETRY_S, cell.retried))
    return np.sort(np.concatenate(parts))


def setup(cell: Cell) -> Setup:
    generator = np.random.default_rng(cell.seed)
    arrival_s = arrivals(cell, generator)
    count = len(arrival_s)
    profile = load_profile(PROFILE)
    chat = RequestClass(name="chat", kind="interactive", ttft_s=TTFT_S, itl_s=ITL_S)
    kind = InstanceKind(
        name="a100x4",
        gpu="A100",
        gpus=4,
        price_per_gpu_hour=profile.price_per_gpu_hour,
        kv_capacity_tokens=profile.kv_capacity_tokens,
        max_num_seqs=profile.max_num_seqs,
    )
    workload = Workload(
        arrival_s=arrival_s,
        input_tokens=1 + generator.exponential(PROMPT_TOKENS, count).astype(np.int64),
        output_tokens=1 + generator.exponential(OUTPUT_TOKENS, count).astype(np.int64),
        model=np.zeros(count, dtype=np.int64),
        cls=np.zeros(count, dtype=np.int64),
        deadline_s=np.full(count, np.inf),
        models=("70b",),
        classes=(chat,),
    )
    return Setup(
        scenario="cells",
        models=(ModelSpec(name="70b", kinds=(kind,), min_instances=1, max_instances=cell.instances),),
        profiles={"a100x4": profile},
        initial={"70b": round(0.9 * cell.instances)},
        workload=workload,
        policy="chiron",
        settings=POLICIES["chiron"].settings(),
        seed=cell.seed,
    )


def run(cell: Cell) -> Outcome:
    began = time.process_time()
    result = simulate(setup(cell), with_bound=False)
    cpu_s = time.process_time() - began
    rows = result.requests
    ttft_s = np.where(rows.first_token_s >= 0.0, rows.first_token_s - rows.arrival_s, np.inf)
    itl_s = (rows.finish_s - rows.first_token_s) / np.maximum(1, rows.output_tokens - 1)
    met = (ttft_s <= TTFT_S) & ((itl_s <= ITL_S) | (rows.output_tokens <= 1))
    warm_s = 0.25 * cell.lost_s
    when = {
        "before": (rows.arrival_s >= warm_s) & (rows.arrival_s < cell.lost_s),
        "minute": (rows.arrival_s >= cell.lost_s) & (rows.arrival_s < cell.lost_s + 60.0),
        "later": rows.arrival_s >= cell.lost_s + 60.0,
    }
    fleet = [(point.t_s, sum(point.ready.values()) + point.starting) for point in result.fleet]
    last_arrival_s = float(rows.arrival_s[-1])
    return Outcome(
        **{name: float(met[chosen].mean()) for name, chosen in when.items()},
        ttft_p99_s=float(np.quantile(ttft_s[when["minute"]], 0.99)),
        instances_before=[n for t, n in fleet if t <= cell.lost_s][-1],
        instances_after=[n for t, n in fleet if t <= last_arrival_s][-1],
        requests=len(ttft_s),
        cpu_s=cpu_s,
    )


def cells(arguments: argparse.Namespace) -> Iterator[tuple[str, list[Cell]]]:
    """Each way to spread the lost cell's traffic, and the cells that get a part of it. The lost one is the first."""
    count, most = arguments.cells, arguments.instances
    generator = np.random.default_rng(arguments.seed)
    shares = 1.0 + SPREAD * np.linspace(-1.0, 1.0, count)
    generator.shuffle(shares)
    rates = arguments.rate * most * shares
    answer_s = OUTPUT_TOKENS * ITL_S
    ran = rates[0] * answer_s
    """At most so many requests ran in the lost cell (Little's law, at the slowest answers that meet the SLO)."""

    def made(number: int, part: float) -> Cell:
        return Cell(
            seed=arguments.seed + number,
            instances=most,
            before=float(rates[number]),
            after=float(rates[number] + part * rates[0]),
            retried=round(part * ran),
            lost_s=arguments.lost_at,
            seconds=arguments.seconds,
        )

    yield "over all", [made(number, 1.0 / (count - 1)) for number in range(1, count)]
    yield "to one", [made(1, 1.0)]


def row(how: str, outcomes: list[Outcome]) -> list[str]:
    def percent(values: list[float]) -> str:
        return f"{100.0 * min(values):.2f}"

    return [
        how,
        str(len(outcomes)),
        percent([each.before for each in outcomes]),
        percent([each.minute for each in outcomes]),
        percent([each.later for each in outcomes]),
        f"{max(each.ttft_p99_s for each in outcomes):.1f}",
        f"{np.mean([each.instances_before for each in outcomes]):.0f}",
        f"{np.mean([each.instances_after for each in outcomes]):.0f}",
        f"{sum(each.requests for each in outcomes):,}",
    ]


HEAD = [
    "lost cell's traffic",
    "cells",
    "worst cell before, %",
    "in the minute after, %",
    "later, %",
    "p99 TTFT of that minute, s",
    "instances before",
    "after",
    "requests",
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cells", type=int, default=20)
    parser.add_argument("--instances", type=int, default=1000, help="of a cell, at most")
    parser.add_argument("--rate", type=float, default=RATE_PER_INSTANCE, help="arrivals/s over a cell's instances")
    parser.add_argument("--seconds", type=float, default=900.0)
    parser.add_argument("--lost-at", type=float, default=400.0)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--jobs", type=int, default=2)
    arguments = parser.parse_args()
    rows = []
    with ProcessPoolExecutor(arguments.jobs, mp_context=get_context("spawn")) as pool:
        for how, each in cells(arguments):
            outcomes = []
            for outcome in pool.map(run, each):
                outcomes.append(outcome)
                print(f"{how}: {len(outcomes)}/{len(each)} cells, {outcome.cpu_s:.0f} s of CPU", file=sys.stderr)
            rows.append(row(how, outcomes))
    for each in (HEAD, ["---"] * len(HEAD), *rows):
        print(f"| {' | '.join(each)} |")


if __name__ == "__main__":
    main()
