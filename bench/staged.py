"""Staging in simulation: where it saves, where it costs, and the paper's claims. Writes docs/staged.md and its figures.

    make docs-staged

Every comparison runs on the packaged scenario ``staged`` with a few values changed, so each can be run by hand; every
run is one seed of a short trace, to stay within minutes. All policies get the same information: arrivals, lengths of
finished requests, what engines reported. Nothing was tuned on these runs but for the rivals' own tuned variants.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from chiron.config.build import setups
from chiron.config.scenario import load_scenario
from chiron.sim.run import simulate
from chiron.telemetry.series import gpus_over_time

MODE = ("whole-hpa", "whole-hpa-tuned", "whole-chiron", "stage-hpa", "stage-queue", "stage-balance", "stage-petals")
BASE = (
    "duration=15m",
    "policies.whole-hpa-tuned={policy='hpa-queue-tuned'}",
    "policies.stage-queue={policy='static', stages={policy='stage-hpa', metric='queue', target=5}}",
    # No mean of shares is a thousand times the target, so it keeps the replicas that it finds.
    "policies.stage-fixed={policy='static', stages={policy='stage-hpa', tolerance=1000}}",
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
TRACES = {
    "azure-2023-conv": "",
    "azure-2023-code": "",
    "servegen-m-small": ", rate_scale=0.008",
}
"""Packaged traces, with what makes them fit 24 GPUs."""
HOPS = ("0.05ms", "0.2ms", "1ms", "5ms")
LINKS = ("1", "10", "100", "400")
STARTS = ("whole-hpa-tuned", "whole-chiron", "stage-balance")
MTBF = ("30m", "10m")
"""Between failures of one GPU."""


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
    cpu_s: float
    ttft_p50_s: float = 0.0
    itl_p50_ms: float = 0.0
    gpus: tuple[tuple[float, float], ...] = ()
    """(time, GPUs billed)."""
    replicas: Mapping[str, tuple[tuple[float, float], ...]] | None = None
    """(time, replicas planned) of each stage that was scaled."""


Job = tuple[str, tuple[str, ...]]
"""A policy, and the values of the scenario that are changed."""


def run(policy: str, changes: Sequence[str] = ()) -> Row:
    """One policy on the scenario with these values changed."""
    started = time.process_time()
    (setup,) = setups(load_scenario("staged", [*BASE, *changes]), [policy])
    result = simulate(setup, with_bound=False)
    summary, name = result.summary, setup.workload.classes[0].name
    ttft, itl = summary["ttft_s"][name], summary["itl_s"][name]
    times, gpus = gpus_over_time(result, 300)
    replicas: dict[str, list[tuple[float, float]]] = {}
    for each in result.decisions:
        if each.kind == "stage":
            replicas.setdefault(each.subject.split("/")[1], [(0.0, each.before)]).append((each.t_s, each.after))
    return Row(
        policy=policy,
        attained=summary["attainment_all"],
        gpu_hours=summary["gpu_hours"],
        ttft_s=ttft["p99"],
        itl_ms=1000.0 * itl["p99"],
        tokens_per_s=summary["throughput_tokens_per_s"],
        cold_starts=summary["cold_starts"],
        gpus_peak=summary["gpus_peak"],
        cpu_s=time.process_time() - started,
        ttft_p50_s=ttft["p50"],
        itl_p50_ms=1000.0 * itl["p50"],
        gpus=tuple(zip(times.tolist(), gpus.tolist(), strict=True)),
        replicas={stage: tuple(points) for stage, points in replicas.items()},
    )


class Runs:
    """Runs that were asked for, made on all cores, each once."""

    def __init__(self, pool: ProcessPoolExecutor) -> None:
        self._pool = pool
        self._made: dict[Job, Any] = {}

    def ask(self, policy: str, changes: Sequence[str] = ()) -> None:
        job = policy, tuple(changes)
        if job not in self._made:
            self._made[job] = self._pool.submit(run, *job)

    def row(self, policy: str, changes: Sequence[str] = ()) -> Row:
        self.ask(policy, changes)
        row: Row = self._made[policy, tuple(changes)].result()
        print(f"{time.strftime('%H:%M:%S')} {policy} {' '.join(changes)[:150]} {row.cpu_s:.1f} s", file=sys.stderr)
        return row

    @property
    def cpu_s(self) -> float:
        return float(sum(each.result().cpu_s for each in self._made.values()))


HEAD = (
    "| policy | SLOs met | GPU-hours | TTFT p50, p99, s | ITL p50, p99, ms | tokens/s | cold starts | peak GPUs |\n"
    "|---|---:|---:|---:|---:|---:|---:|---:|"
)


def line(row: Row, name: str = "") -> str:
    return (
        f"| {name or row.policy} | {row.attained:.1%} | {row.gpu_hours:.2f} | {row.ttft_p50_s:.2f}, {row.ttft_s:.2f} "
        f"| {row.itl_p50_ms:.0f}, {row.itl_ms:.0f} | {row.tokens_per_s:.0f} | {row.cold_starts} | {row.gpus_peak} |"
    )


def table(runs: Runs, changes: Sequence[str] = (), policies: Sequence[str] = MODE) -> tuple[str, dict[str, Row]]:
    rows = {policy: runs.row(policy, changes) for policy in policies}
    return "\n".join([HEAD, *map(line, rows.values())]), rows


def sweep(runs: Runs, key: str, values: Sequence[str], unit: str) -> tuple[str, dict[str, Row]]:
    """``stage-balance`` by one key of the stages."""
    rows = {value: runs.row("stage-balance", network_changes(key, value)) for value in values}
    return "\n".join([HEAD.replace("| policy", f"| {unit}"), *(line(row, value) for value, row in rows.items())]), rows


def trace_changes(name: str) -> list[str]:
    """The scenario's stream of requests replaced by a packaged trace."""
    return [f"workload.0={{model='llama-2-13b', class='chat', trace='{name}', duration='15m'{TRACES[name]}}}"]


def network_changes(key: str, value: str) -> list[str]:
    return [f"{SPLIT}{key}={value if value.isdecimal() else repr(value)}"]


def start_changes(policy: str, rate: str) -> list[str]:
    """From eight GPUs, so that something has to start, with weights that come at this rate."""
    initial = 2 if policy.startswith("stage") else 8
    return [f"cold_start.weights_gb_per_s={rate}", f"models.llama-2-13b.initial={initial}"]


def failure_changes(policy: str, mtbf: str) -> list[str]:
    """Each GPU fails as often, whatever it holds."""
    return [f"failures.{'replica_mtbf' if policy.startswith('stage') else 'mtbf'}='{mtbf}'"]


def saved(rows: dict[str, Row], policy: str, than: str) -> str:
    """In words: GPU-hours of one against another, and what they attain."""
    one, other = rows[policy], rows[than]
    change = one.gpu_hours / other.gpu_hours - 1.0
    return (
        f"`{policy}` takes {abs(change):.0%} {'fewer' if change < 0 else 'more'} GPU-hours than `{than}` and meets the "
        f"SLOs of {one.attained:.1%} against {other.attained:.1%} of the requests."
    )


def least(workloads: Mapping[str, Mapping[str, Row]]) -> str:
    """The cheapest way of each kind that meets the SLOs of 99 % of the requests, by workload."""
    lines = ["| workload | whole models | stages | stages take |", "|---|---|---|---:|"]
    for name, rows in workloads.items():
        best = [_cheapest([row for row in rows.values() if row.policy.startswith(kind)]) for kind in ("whole", "stage")]
        shown = [f"{row.gpu_hours:.2f} (`{row.policy}`)" if row else "none met them" for row in best]
        whole, stage = best
        change = f"{stage.gpu_hours / whole.gpu_hours - 1.0:+.0%}" if whole and stage else ""
        lines.append(f"| {name} | {shown[0]} | {shown[1]} | {change} |")
    return "\n".join(lines)


def weak(rows: Mapping[str, Row]) -> str:
    """Where ours meets the SLOs of fewer than 99 %."""
    short = ", ".join(f"{name} {row.attained:.1%}" for name, row in rows.items() if row.attained < 0.99)
    return (
        f"`stage-balance` is weak where it meets the SLOs of fewer than 99 %: {short or 'nowhere here'}. It plans for "
        "means and does not see that a long prompt holds up a whole round, above all on a slow link; the replicas that "
        "it starts for what waits come when that is late."
    )


def _cheapest(rows: Sequence[Row]) -> Row | None:
    return min((row for row in rows if row.attained >= 0.99), key=lambda row: row.gpu_hours, default=None)


def claim(name: str, holds: bool | None, why: str) -> str:
    verdict = "depends" if holds is None else "holds here" if holds else "does not hold here"
    return f"| {name} | **{verdict}** | {why} |"


def claims(main: dict[str, Row], uneven: dict[str, Row], fixed: Row) -> str:
    """The paper's, one by one, against its own rival: the whole model under an HPA. ``fixed``: uneven stages that are
    not scaled."""
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
    one, ours = uneven["stage-hpa"], uneven["stage-balance"]
    rows.append(
        claim(
            "the HPA relieves the bottleneck stage",
            relieves(one, fixed, ours),
            f"uneven stages: `stage-hpa` meets {one.attained:.1%} with {one.gpu_hours:.2f} GPU-hours, the same "
            f"replicas of each stage all the time {fixed.attained:.1%} with {fixed.gpu_hours:.2f}, `stage-balance` "
            f"{ours.attained:.1%} with {ours.gpu_hours:.2f}; it holds if at most half as many requests miss their SLOs "
            "as without scaling, and depends if `stage-balance` meets as many with a tenth fewer GPU-hours",
        )
    )
    return "\n".join(["| claim of arXiv 2507.18007 | verdict | measured |", "|---|---|---|", *rows])


def relieves(one: Row, fixed: Row, ours: Row) -> bool | None:
    """By what scaling changes, and not by a share of SLOs met that no stage policy may reach there. None: it does, at a
    price that is not needed."""
    if 1.0 - one.attained > 0.5 * (1.0 - fixed.attained):
        return False
    beaten = ours.attained >= one.attained and ours.gpu_hours <= 0.9 * one.gpu_hours
    return None if beaten else True


TEXT = """# Staged models, simulated

What a model as a pipeline of stages with replicas of their own is good for, and what it costs, against whole models:
by `make docs-staged`, which wrote this page and its figures ({runs} runs, {cpu_minutes:.0f} minutes of CPU time).
Every run is the packaged scenario `staged` ([scenario.md](scenario.md)) with the values named, 15 simulated minutes,
one seed: differences of a few percent mean nothing. All policies see the same: arrivals, lengths of requests that
ended, what engines reported a second ago.

- `whole-hpa`: whole models on one A100 each, Kubernetes' HPA on waiting requests (target 5); `whole-hpa-tuned`: with
  the values of the fair tuning; `whole-chiron`: the same models under `chiron`.
- `stage-hpa`: four stages of ten layers, one GPU for each replica, an HPA on each stage's utilisation (target 0.7);
  `stage-queue`: on the sequences that wait for it (target 5).
- `stage-balance`: ours, the fewest replicas with which a queue model of the pipeline keeps the SLOs.
- `stage-petals`: as many replicas as at time 0, each at the layers where the pipeline is weakest, and sequences routed
  by least delay, as Petals has it. Nothing grows, and all hops take the same time, so that each stage's first replica
  is filled before its second; Petals' own clients measure their round trips and seldom tie. Spread evenly
  (`max_throughput`), its median ITL under the first load below is less than half
  ([policies/stages.md](policies/stages.md)).

`chiron compare staged` prints such a table, and `--report` draws the replicas of each stage.

The least GPU-hours with which the SLOs of 99 % of the requests were met, as whole models and as stages:

{least}

{weak}

## LLaMA-2-13B under a load that rises and falls

{main}

{main_words}

![GPUs billed over time, by policy](figures/staged-gpus.svg)

## On packaged traces

Fifteen minutes each; `servegen-m-small` at {scale} of its rate.

{traces}

![SLOs met against GPU-hours, by workload](figures/staged-tradeoff.svg)

## Where it saves, and where it costs

**Light load** (0.5 requests per second on average):

{light}

{light_words} A pipeline cannot have less than one GPU for each stage, a whole model can have one in all.

**Uneven stages** (8, 8, 16 and 8 layers):

{uneven}

{uneven_words}

![Replicas of each stage, uneven stages](figures/staged-replicas.svg)

**A model that fits no single GPU** (Llama 3.1 70B, 1 request per second on average; whole: TP 4, so four GPUs at a
time; stages: 20 layers on each GPU):

{seventy}

{seventy_words} The whole model's step has all-reduces and a quarter of the weights for each GPU to read at the same
time; a pipeline's ITL is the sum of its stages.

**Slow starts** (from eight GPUs; weights at 2 and at 0.5 GB/s, which is 13 and 52 s for the whole model, a quarter of
that for a stage):

{slow}

{slow_words}

**Failures** (every GPU fails every 30, or every 10, minutes on average; what is lost starts elsewhere):

{failures}

{failures_words} A whole model that fails takes its own requests with it; a replica that fails takes those whose path
leads through it, and in a pipeline that has one replica of a stage these are all.

## Sensitivity to the network, which the paper left out

`stage-balance` by latency of one hop (100 Gb/s):

{latency}

By bandwidth of a replica's link (0.2 ms):

{bandwidth}

![GPU-hours and latency by hop latency and bandwidth](figures/staged-network.svg)

## The paper's claims, one by one

Against its own rival, the whole model under an HPA with default values (`whole-hpa`), on the load that rises and falls.

{claims}

No figure of the paper's own could be confirmed, so none was a target.

## What the model is, and what it is not

- A round in which every running sequence gets a token takes as long as one micro-batch's way through all stages and
  hops, or as the busiest replica or link; KV lies on the replicas of a sequence's path; a replica that is added gets
  new sequences only. With one stage and free hops it equals the engine model to the bit, and step by step it equals
  its closed form (`tests/engines/test_pipeline_is_an_engine.py`, `tests/laws/test_pipelines_keep_the_laws.py`).
- All sequences advance in step, at the pace of the busiest replica. After a replica was added this is slower than a
  real pipeline, until the answers that run have ended.
- A replica that dies is noticed at the end of the round; its sequences are prefilled again through all stages, where a
  real head sends them through those up to the lost one only.
- Not modelled: sequences that are moved between replicas that live, jitter of hops, several replicas that share a link,
  work of the head process beyond `request_overhead`.
- Profiles by layer are sums of kernel times. Against whole steps of models that have them such sums are off by 3 to 6 %
  on average on one GPU (Llama 3.1 8B), 8 to 15 % with all-reduces (70B on four and eight GPUs), 18 to 39 % at worst;
  the fit to the sums is off by 4 to 7 % on average and 25 to 44 % at worst. So the 70B comparison, whose whole model
  has the packaged profile, is within that error.
- Cost of a simulation: an event costs O(replicas of all stages), a round without events nothing.
"""


def ask_all(runs: Runs) -> None:
    """The longest first, so that no core is idle at the end."""
    for changes in ([], [UNEVEN], *map(trace_changes, TRACES), [*SEVENTY, RATE + "1"], [RATE + "0.5"]):
        for policy in MODE:
            runs.ask(policy, changes)
    runs.ask("stage-fixed", [UNEVEN])
    for policy in STARTS:
        for rate in ("2", "0.5"):
            runs.ask(policy, start_changes(policy, rate))
        for mtbf in MTBF:
            runs.ask(policy, failure_changes(policy, mtbf))
    for key, values in (("hop_latency", HOPS), ("hop_gbit_per_s", LINKS)):
        for value in values:
            runs.ask("stage-balance", network_changes(key, value))


def page(runs: Runs, figures: Path) -> str:
    """The page's text; figures are written."""
    ask_all(runs)
    main, main_rows = table(runs)
    light, light_rows = table(runs, [RATE + "0.5"])
    uneven, uneven_rows = table(runs, [UNEVEN])
    seventy, seventy_rows = table(runs, [*SEVENTY, RATE + "1"])
    slow, slow_words = slow_starts(runs)
    latency, by_hop = sweep(runs, "hop_latency", HOPS, "hop")
    bandwidth, by_link = sweep(runs, "hop_gbit_per_s", LINKS, "Gb/s")
    traces = {name: table(runs, trace_changes(name)) for name in TRACES}
    failed, failed_words = failing(runs)
    changes = {f"weights at {rate} GB/s": start_changes("stage-balance", rate) for rate in ("2", "0.5")}
    changes |= {f"failures every {mtbf}": failure_changes("stage-balance", mtbf) for mtbf in MTBF}
    ours = {name: runs.row("stage-balance", each) for name, each in changes.items()}
    ours |= {f"links of {value} Gb/s": row for value, row in by_link.items()}
    workloads = {"rises and falls": main_rows, **{name: rows for name, (_, rows) in traces.items()}}
    draw(figures, workloads, uneven_rows, by_hop, by_link)
    workloads |= {"light load": light_rows, "uneven stages": uneven_rows, "70B": seventy_rows}
    return TEXT.format(
        cpu_minutes=runs.cpu_s / 60.0,
        runs=len(runs._made),
        least=least(workloads),
        weak=weak({**{name: rows["stage-balance"] for name, rows in workloads.items()}, **ours}),
        main=main,
        main_words=words(main_rows),
        scale=TRACES["servegen-m-small"].rpartition("=")[2],
        traces="\n\n".join(f"**{name}**\n\n{text}\n\n{words(rows)}" for name, (text, rows) in traces.items()),
        light=light,
        light_words=words(light_rows),
        uneven=uneven,
        uneven_words=saved(uneven_rows, "stage-balance", "stage-hpa"),
        seventy=seventy,
        seventy_words=words(seventy_rows),
        slow=slow,
        slow_words=slow_words,
        failures=failed,
        failures_words=failed_words,
        latency=latency,
        bandwidth=bandwidth,
        claims=claims(main_rows, uneven_rows, runs.row("stage-fixed", [UNEVEN])),
    )


def slow_starts(runs: Runs) -> tuple[str, str]:
    rows = {(policy, rate): runs.row(policy, start_changes(policy, rate)) for rate in ("2", "0.5") for policy in STARTS}
    lost = ", ".join(
        f"`{policy}` {100 * (rows[policy, '2'].attained - rows[policy, '0.5'].attained):+.1f}" for policy in STARTS
    )
    lines = [line(row, f"{policy}, {rate} GB/s") for (policy, rate), row in rows.items()]
    return "\n".join([HEAD, *lines]), f"Percentage points of the requests that slow weights cost: {lost}."


def failing(runs: Runs) -> tuple[str, str]:
    rows = {(policy, mtbf): runs.row(policy, failure_changes(policy, mtbf)) for mtbf in MTBF for policy in STARTS}
    lines = [line(row, f"{policy}, every {mtbf}") for (policy, mtbf), row in rows.items()]
    lost = ", ".join(
        f"`{policy}` {100 * (runs.row(policy).attained - rows[policy, MTBF[1]].attained):+.1f}" for policy in STARTS
    )
    return "\n".join([HEAD, *lines]), f"Percentage points that a failure every {MTBF[1]} costs: {lost}."


def words(rows: dict[str, Row]) -> str:
    return " ".join(saved(rows, "stage-balance", than) for than in ("whole-chiron", "whole-hpa-tuned"))


# -- figures -----------------------------------------------------------------------------------------------------------


def draw(
    directory: Path,
    workloads: Mapping[str, Mapping[str, Row]],
    uneven: Mapping[str, Row],
    by_hop: Mapping[str, Row],
    by_link: Mapping[str, Row],
) -> None:
    """Needs the extra ``report``."""
    import matplotlib as mpl

    from chiron.telemetry.figures import STYLE

    style: dict[Any, Any] = dict(STYLE)

    mpl.use("svg")
    with mpl.rc_context(style):
        for name, canvas in (
            ("tradeoff", tradeoff(workloads)),
            ("gpus", fleets(workloads["rises and falls"])),
            ("replicas", replicas({p: uneven[p] for p in ("stage-hpa", "stage-balance")})),
            ("network", network(by_hop, by_link)),
        ):
            canvas.savefig(directory / f"staged-{name}.svg", metadata={"Date": None})


def canvas_of(width: float, height: float) -> Any:
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def tradeoff(workloads: Mapping[str, Mapping[str, Row]]) -> Any:
    """A panel for each workload: up and to the left is better. The share that misses is on a log scale."""
    from chiron.telemetry.palette import looks

    canvas, seen = canvas_of(11, 3.4), looks(MODE)
    panels = canvas.subplots(1, len(workloads), sharey=True)
    for ax, (name, rows) in zip(panels, workloads.items(), strict=True):
        for policy, row in rows.items():
            look = seen[policy]
            missed = max(1.0 - row.attained, 0.0005)
            ax.scatter(row.gpu_hours, missed, color=look.colour, marker=look.matplotlib_marker, s=80, label=policy)
        ax.axhline(0.01, color="#d0402f", linestyle="--", linewidth=1)
        ax.set(title=name, xlabel="GPU-hours", yscale="log", ylim=(1.0, 0.0004))
        ax.set_xlim(0.0, 1.12 * max(row.gpu_hours for row in rows.values()))
    panels[0].set_yticks([1.0, 0.1, 0.01, 0.001], ["0 %", "90 %", "99 %", "99.9 %"])
    panels[0].set_yticks([], minor=True)
    panels[0].set_ylabel("SLOs met")
    canvas.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=len(MODE))
    return canvas


def fleets(rows: Mapping[str, Row]) -> Any:
    from chiron.telemetry.palette import looks

    canvas, seen = canvas_of(9, 3.6), looks(MODE)
    ax = canvas.subplots()
    for policy, row in rows.items():
        times, gpus = zip(*row.gpus, strict=True)
        ax.step([t / 60.0 for t in times], gpus, where="post", color=seen[policy].colour, label=policy, linewidth=1.6)
    ax.set(title="GPUs billed", xlabel="time, minutes", ylabel="GPUs", ylim=(0, None), xlim=(0, 15))
    canvas.legend(loc="outside lower center", ncols=3)
    return canvas


def replicas(rows: Mapping[str, Row]) -> Any:
    canvas = canvas_of(11, 3.4)
    for ax, (policy, row) in zip(canvas.subplots(1, len(rows), sharey=True), rows.items(), strict=True):
        stages = sorted((row.replicas or {}).items(), key=lambda item: int(item[0].split("-")[0]))
        for number, (stage, points) in enumerate(stages):
            times, counts = zip(*points, (900.0, points[-1][1]), strict=True)
            # The narrower on top: most of the time they lie on one another.
            x, width = [t / 60.0 for t in times], 6.0 - 1.4 * number
            ax.step(x, counts, where="post", label=f"layers {stage}", linewidth=width)
        ax.set(title=policy, xlabel="time, minutes", ylabel="replicas planned", ylim=(0, None), xlim=(0, 15))
        ax.legend()
    return canvas


def network(by_hop: Mapping[str, Row], by_link: Mapping[str, Row]) -> Any:
    """GPU-hours and p99 of TTFT and ITL under ``stage-balance``."""
    canvas = canvas_of(11, 5.2)
    grid = canvas.subplots(2, 3, sharey="col")
    sides = (("latency of a hop, ms", by_hop, "ms"), ("bandwidth of a link, Gb/s", by_link, ""))
    for panels, (title, rows, unit) in zip(grid, sides, strict=True):
        x = [float(value.removesuffix(unit)) for value in rows]
        for ax, figure in zip(panels, ("gpu_hours", "ttft_s", "itl_ms"), strict=True):
            ax.plot(x, [getattr(row, figure) for row in rows.values()], marker="o", color="#2f7fc1")
            ax.set(xscale="log", xlabel=title)
            ax.set_ylim(0, 1.08 * max(getattr(row, figure) for row in (*by_hop.values(), *by_link.values())))
            ax.set_xticks(x, [f"{each:g}" for each in x])
            ax.set_xticks([], minor=True)
    for ax, title in zip(grid[0], ("GPU-hours", "p99 TTFT, s", "p99 ITL, ms"), strict=True):
        ax.set_title(title)
    return canvas


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("docs/staged.md"))
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    args = parser.parse_args()
    began_s = time.perf_counter()
    figures = args.out.parent / "figures"
    figures.mkdir(exist_ok=True)
    with ProcessPoolExecutor(args.jobs) as pool:
        text = page(Runs(pool), figures)
    args.out.write_text(text, encoding="utf-8")
    print(f"{args.out}: {time.perf_counter() - began_s:.0f} s with {args.jobs} jobs", file=sys.stderr)
