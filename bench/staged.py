"""Staging in simulation: where it saves, where it costs, and the paper's claims. Writes docs/staged.md.

    make docs-staged

Every comparison runs on the packaged scenario ``staged`` with a few values changed, so each can be run by hand; every
run is one seed of a short trace, to stay within minutes. All policies get the same information: arrivals, lengths of
finished requests, what engines report. Nothing was tuned on these runs but for the rivals' own tuned variants.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from chiron.config.build import setups
from chiron.config.scenario import load_scenario
from chiron.sim.run import Simulation

MODE = ("whole-hpa", "whole-chiron", "stage-hpa", "stage-queue", "stage-balance")
BASE = (
    "duration=15m",
    "policies.whole-hpa={policy='hpa-queue-tuned'}",
    "policies.stage-queue={policy='static', stages={policy='stage-hpa', metric='queue', target=5}}",
)
SPLIT = "models.llama-2-13b.stages."
RATE = "workload.0.generate.rate="
SEVENTY = (
    "models={m={instances=[{profile='llama-3.1-70b/a100/tp4'}], max_instances=8, "
    "stages={profile='llama-3.1-70b/a100', split=4, max=8}}}",
    "workload.0.model=m",
)
UNEVEN = (
    SPLIT.removesuffix(".") + "={profile='llama-2-13b/a100', stage=[{layers='0-7', max=12}, {layers='8-15', max=12}, "
    "{layers='16-31', max=12}, {layers='32-39', max=12}]}"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One run."""

    policy: str
    attained: float
    gpu_hours: float
    ttft_s: float
    itl_ms: float
    tokens_per_s: float
    cold_starts: int
    gpus_peak: int
    wall_s: float


def run(policy: str, changes: Sequence[str] = ()) -> Row:
    """One policy on the scenario with these values changed."""
    started = time.perf_counter()
    (setup,) = setups(load_scenario("staged", [*BASE, *changes]), [policy])
    simulation = Simulation(setup)
    simulation.run()
    result = simulation.result(wall_s=0.0, with_bound=False)
    table, (cls,) = result.requests, setup.workload.classes
    done = table.outcome == 0
    first_s = (table.first_token_s - table.arrival_s)[done]
    gaps = np.maximum(1, table.output_tokens - 1)[done]
    itl_s = (table.finish_s - table.first_token_s)[done] / gaps
    met = (first_s <= cls.ttft_s) & (itl_s <= cls.itl_s)
    bill = simulation.fleet.bill
    return Row(
        policy=policy,
        attained=float(met.sum() / len(table.outcome)),
        gpu_hours=sum(bill.gpu_seconds.values()) / 3600.0,
        ttft_s=float(np.quantile(first_s, 0.99)),
        itl_ms=1000.0 * float(np.quantile(itl_s, 0.99)),
        tokens_per_s=float(table.output_tokens[done].sum() / simulation.clock.now_s),
        cold_starts=bill.cold_starts,
        gpus_peak=bill.gpus_peak,
        wall_s=time.perf_counter() - started,
    )


HEAD = (
    "| policy | SLOs met | GPU-hours | p99 TTFT, s | p99 ITL, ms | tokens/s | cold starts | peak GPUs |\n"
    "|---|---:|---:|---:|---:|---:|---:|---:|"
)


def line(row: Row, name: str = "") -> str:
    return (
        f"| {name or row.policy} | {row.attained:.1%} | {row.gpu_hours:.2f} | {row.ttft_s:.2f} | {row.itl_ms:.0f} "
        f"| {row.tokens_per_s:.0f} | {row.cold_starts} | {row.gpus_peak} |"
    )


def table(changes: Sequence[str] = (), policies: Sequence[str] = MODE) -> tuple[str, dict[str, Row]]:
    rows = {}
    for policy in policies:
        rows[policy] = run(policy, changes)
        print(policy, *changes, rows[policy], file=sys.stderr)
    return "\n".join([HEAD, *map(line, rows.values())]), rows


def sweep(key: str, values: Sequence[str], unit: str) -> str:
    """``stage-balance`` by one key of the stages."""
    lines = [HEAD.replace("| policy", f"| {unit}")]
    for value in values:
        row = run("stage-balance", [f"{SPLIT}{key}={value}"])
        print(key, value, row, file=sys.stderr)
        lines.append(line(row, value.strip("'")))
    return "\n".join(lines)


def saved(rows: dict[str, Row], policy: str, than: str) -> str:
    """In words: GPU-hours of one against another, and what they attain."""
    one, other = rows[policy], rows[than]
    change = one.gpu_hours / other.gpu_hours - 1.0
    return (
        f"`{policy}` takes {abs(change):.0%} {'fewer' if change < 0 else 'more'} GPU-hours than `{than}` and meets the "
        f"SLOs of {one.attained:.1%} against {other.attained:.1%} of the requests."
    )


def claim(name: str, holds: bool | None, why: str) -> str:
    verdict = "depends" if holds is None else "holds here" if holds else "does not hold here"
    return f"| {name} | **{verdict}** | {why} |"


def claims(main: dict[str, Row], steady: dict[str, Row]) -> str:
    """The paper's, one by one, against its own rival: the whole model under an HPA."""
    hpa, rows = main["whole-hpa"], []
    for stage in ("stage-hpa", "stage-queue"):
        one = main[stage]
        ttft, itl = one.ttft_s < hpa.ttft_s, one.itl_ms < hpa.itl_ms
        rows.append(
            claim(
                f"lower latency under changing load than the whole model under the HPA (`{stage}`)",
                (ttft and itl) if ttft == itl else None,
                f"p99 TTFT {one.ttft_s:.2f} s against {hpa.ttft_s:.2f} s, p99 ITL {one.itl_ms:.0f} against "
                f"{hpa.itl_ms:.0f} ms, at {one.gpu_hours:.2f} against {hpa.gpu_hours:.2f} GPU-hours",
            )
        )
        per = one.tokens_per_s / one.gpu_hours, hpa.tokens_per_s / hpa.gpu_hours
        rows.append(
            claim(
                f"higher throughput under changing load (`{stage}`)",
                one.tokens_per_s > 1.01 * hpa.tokens_per_s and per[0] > per[1],
                f"{one.tokens_per_s:.0f} against {hpa.tokens_per_s:.0f} tokens/s: the arrivals set it; by GPU-hour "
                f"{per[0]:.0f} against {per[1]:.0f}",
            )
        )
    one, ours = steady["stage-hpa"], steady["stage-balance"]
    rows.append(
        claim(
            "the HPA relieves the bottleneck stage",
            one.attained >= 0.99 and one.gpu_hours <= 1.1 * ours.gpu_hours,
            f"uneven stages: `stage-hpa` meets {one.attained:.1%} with {one.gpu_hours:.2f} GPU-hours, `stage-balance` "
            f"{ours.attained:.1%} with {ours.gpu_hours:.2f}; it holds if 99 % are met with at most a tenth more",
        )
    )
    return "\n".join(["| claim of arXiv 2507.18007 | verdict | measured |", "|---|---|---|", *rows])


TEXT = """# Staged models, simulated

What a model as a pipeline of stages with replicas of their own is good for, and what it costs, against whole models:
by `make docs-staged` ({minutes:.0f} minutes on one core), which wrote this page. Every run is the packaged scenario
`staged` ([scenario.md](scenario.md)) with the values named, 15 simulated minutes, one seed: differences of a few
percent mean nothing. All policies see the same: arrivals, lengths of requests that ended, what engines reported a
second ago.

- `whole-hpa`: whole models on one A100 each, Kubernetes' HPA on waiting requests, with the values of the fair tuning;
  `whole-chiron`: the same under `chiron`.
- `stage-hpa`: four stages of ten layers, one GPU for each replica, an HPA on each stage's utilisation (target 0.7);
  `stage-queue`: on the sequences that wait for it (target 5).
- `stage-balance`: ours, the fewest replicas with which a queue model of the pipeline keeps the SLOs.

## LLaMA-2-13B under a load that rises and falls

{main}

{main_words}

## Where it saves, and where it costs

**Light load** (0.5 requests per second on average):

{light}

{light_words} A pipeline cannot have less than one GPU for each stage, a whole model can have one in all.

**Uneven stages** (8, 8, 16 and 8 layers):

{uneven}

{uneven_words}

**A model that fits no single GPU** (Llama 3.1 70B, 1 request per second on average; whole: TP 4, so four GPUs at a
time; stages: 20 layers on each GPU):

{seventy}

{seventy_words} The whole model's step has all-reduces and a quarter of the weights for each GPU to read at the same
time; a pipeline's ITL is the sum of its stages.

**Slow starts** (from eight GPUs; weights at 2 and at 0.5 GB/s, which is 13 and 52 s for the whole model, a quarter of
that for a stage):

{slow}

{slow_words}

## Sensitivity to the network, which the paper left out

`stage-balance` by latency of one hop (100 Gb/s):

{latency}

By bandwidth of a replica's link (0.2 ms):

{bandwidth}

## The paper's claims, one by one

{claims}

No figure of the paper's own could be confirmed, so none was a target.

## What the model is, and what it is not

- A round in which every running sequence gets a token takes as long as one micro-batch's way through all stages and
  hops, or as the busiest replica or link; KV lies on the replicas of a sequence's path; a replica that is added gets
  new sequences only. With one stage and free hops it equals the engine model to the bit, and step by step it equals
  its closed form (`tests/engines/test_pipeline_is_an_engine.py`, `tests/laws/test_pipelines_keep_the_laws.py`).
- All sequences advance in step, at the pace of the busiest replica. After a replica was added this is slower than a
  real pipeline, until the answers that run have ended.
- Not modelled: replicas that fail one by one, sequences that are moved between replicas, jitter of hops, several
  replicas that share a link, work of the head process beyond `request_overhead`.
- Profiles by layer are sums of kernel times. Against whole steps of models that have them such sums are off by 3 to 6 %
  on average on one GPU (Llama 3.1 8B), 8 to 15 % with all-reduces (70B on four and eight GPUs), 18 to 39 % at worst;
  the fit to the sums is off by 4 to 7 % on average and 25 to 44 % at worst. So the 70B comparison, whose whole model
  has the packaged profile, is within that error.
- Cost of a simulation: an event costs O(replicas of all stages), a round without events nothing.
"""


def page() -> str:
    started = time.perf_counter()
    main, main_rows = table()
    light, light_rows = table([RATE + "0.5"])
    uneven, uneven_rows = table([UNEVEN])
    seventy, seventy_rows = table([*SEVENTY, RATE + "1"])
    slow, slow_words = slow_starts()
    latency = sweep("hop_latency", ["'0.05ms'", "'0.2ms'", "'1ms'", "'5ms'"], "hop")
    bandwidth = sweep("hop_gbit_per_s", ["1", "10", "100", "400"], "Gb/s")
    return TEXT.format(
        minutes=(time.perf_counter() - started) / 60.0,
        main=main,
        main_words=words(main_rows),
        light=light,
        light_words=words(light_rows),
        uneven=uneven,
        uneven_words=saved(uneven_rows, "stage-balance", "stage-hpa"),
        seventy=seventy,
        seventy_words=words(seventy_rows),
        slow=slow,
        slow_words=slow_words,
        latency=latency,
        bandwidth=bandwidth,
        claims=claims(main_rows, uneven_rows),
    )


def slow_starts() -> tuple[str, str]:
    """From eight GPUs, so that something has to start, with weights that come quickly and slowly."""
    lines, met = [HEAD], {}
    for rate in ("2", "0.5"):
        for policy in ("whole-hpa", "whole-chiron", "stage-balance"):
            initial = 2 if policy.startswith("stage") else 8
            row = run(policy, [f"cold_start.weights_gb_per_s={rate}", f"models.llama-2-13b.initial={initial}"])
            print("slow", rate, row, file=sys.stderr)
            lines.append(line(row, f"{policy}, {rate} GB/s"))
            met[policy, rate] = row.attained
    lost = ", ".join(
        f"`{policy}` {100 * (met[policy, '2'] - met[policy, '0.5']):+.1f}"
        for policy in ("whole-hpa", "whole-chiron", "stage-balance")
    )
    return "\n".join(lines), f"Percentage points of the requests that slow weights cost: {lost}."


def words(rows: dict[str, Row]) -> str:
    return " ".join(saved(rows, "stage-balance", than) for than in ("whole-chiron", "whole-hpa"))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("docs/staged.md"))
    args = parser.parse_args()
    args.out.write_text(page(), encoding="utf-8")
