"""The claims of the Chiron paper (arXiv 2501.08090) that public sources state, run again. Writes docs/paper.md.

    make paper          (or: python bench/paper.py --out docs/paper.md [--only attainment,queues] [--seeds 3])

Each claim is a section: what is claimed and where that can be read, our setting, what came out with the spread over
seeds, and a verdict by a rule that the section states. The paper's full text, traces and code are not public, so every
setting is ours. ``chiron-paper`` is the published design as far as public sources describe it, ``chiron`` is ours;
``llumnix`` has the thresholds of its published experiment ("untuned"), ``llumnix-tuned`` those that the fair tuning of
this project found on other traffic. Runs use all cores.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from functools import cache
from hashlib import sha256
from inspect import getsource
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np

from chiron.config.build import setups
from chiron.config.scenario import parse_scenario
from chiron.engines.profile import Profile
from chiron.engines.profile_store import load_profile
from chiron.sim.run import simulate
from chiron.sim.setup import Setup
from chiron.studies.journal import Journal
from chiron.studies.trial import trial as simulation
from chiron.workload.load import load_lengths

POLICIES = ("chiron-paper", "llumnix", "llumnix-tuned", "chiron")
GPUS = 50
"""A100s, as in the paper."""
EIGHT, SEVENTY = "8B", "70B"
PROFILES = {EIGHT: "llama-3.1-8b/a100/tp1", SEVENTY: "llama-3.1-70b/a100/tp4"}
FLEETS = {EIGHT: 50, SEVENTY: 12}
"""Instances at most: 50 GPUs, or 12 times four."""
LENGTHS = "sharegpt-300"
"""ShareGPT's, as the paper has; a packaged sample of 300 conversations."""
ENOUGH = 0.99


@dataclass(frozen=True, slots=True, kw_only=True)
class Trial:
    """One run: a scenario's text, a policy of it, a seed, and a factor on all step times."""

    text: str
    policy: str
    seed: int
    step_time: float = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Figures:
    """What is kept of a run."""

    summary: Mapping[str, Any]
    met: Mapping[str, float]
    """Share of each class with its SLOs met, of requests that had ended or were late by the end."""
    batch_sizes: tuple[tuple[float, int], ...]
    """(time, max batch size) of the first instance."""
    waits_s: tuple[float, ...]
    """From arrival to first token, of every request in order."""

    @property
    def attained(self) -> float:
        return float(self.summary["attainment_all"] or 0.0)

    @property
    def chat(self) -> float:
        return self.met.get("chat", 1.0)

    @property
    def batch(self) -> float:
        return self.met.get("batch", 1.0)

    @property
    def gpu_hours(self) -> float:
        return float(self.summary["gpu_hours"])


def setup_of(trial: Trial) -> Setup:
    scenario = parse_scenario(trial.text, directory=Path())
    (setup,) = setups(scenario, policies=[trial.policy], seeds=[trial.seed])
    return setup if trial.step_time == 1.0 else _slower(setup, trial.step_time)


def run(trial: Trial) -> Figures:
    result = simulate(setup_of(trial), with_bound=False)
    table = result.requests
    judged = table.judged(result.classes, now_s=float(result.summary["sim_s"]))
    attained = table.attained(result.classes)
    members = {each.name: judged & (table.cls == number) for number, each in enumerate(result.classes)}
    first = min((point.instance_id for point in result.batch_sizes), default=0)
    return Figures(
        summary=result.summary,
        met={name: float(attained[mine].mean()) for name, mine in members.items() if mine.any()},
        batch_sizes=tuple(
            (point.t_s, point.max_batch_size) for point in result.batch_sizes if point.instance_id == first
        ),
        waits_s=tuple(result.requests.ttft_s().tolist()) if len(result.requests.arrival_s) <= 10_000 else (),
    )


def _slower(setup: Setup, factor: float) -> Setup:
    def scaled(profile: Profile) -> Profile:
        names = ("h_ms", "w0_ms", "f_ms_per_token", "c_ms_per_context_token", "q_ms_per_token_squared")
        return replace(profile, **{name: factor * getattr(profile, name) for name in names})

    return replace(setup, profiles={name: scaled(profile) for name, profile in setup.profiles.items()})


@cache
def key_of(trial: Trial) -> str:
    """Of all that its figures depend on: what it simulates, with profiles, requests and what tunings found, the code
    that does, and what is kept of it."""
    known = [simulation(setup_of(trial)).key, getsource(run)]
    return sha256(" ".join(known).encode()).hexdigest()[:32]


def restored(kept: Mapping[str, Any]) -> Figures:
    """From the journal, whose tuples are lists."""
    pairs = tuple((float(time_s), int(size)) for time_s, size in kept["batch_sizes"])
    return Figures(
        summary=kept["summary"], met=kept["met"], batch_sizes=pairs, waits_s=tuple(map(float, kept["waits_s"]))
    )


class Bench:
    """Runs trials on all cores; equal trials once, and never again what the journal has."""

    def __init__(self, seeds: Sequence[int], jobs: int, journal: Path | None = None) -> None:
        self.seeds = seeds
        self._pool = ProcessPoolExecutor(jobs, mp_context=get_context("spawn"))
        self._journal = Journal(journal)
        self._done: dict[Trial, Figures] = {}

    @property
    def runs(self) -> int:
        return len(self._done)

    def close(self) -> None:
        self._pool.shutdown(cancel_futures=True)

    def figures(self, trials: Iterable[Trial]) -> dict[Trial, Figures]:
        wanted = list(dict.fromkeys(trials))
        missing = []
        for trial in wanted:
            known = self._journal.get(key_of(trial))
            if known is not None:
                self._done[trial] = restored(known)
            elif trial not in self._done:
                missing.append(trial)
        for number, (trial, found) in enumerate(zip(missing, self._pool.map(run, missing), strict=True), 1):
            self._journal.add(key_of(trial), f"{trial.policy}, seed {trial.seed}", asdict(found))
            self._done[trial] = found
            print(f"\r  {number}/{len(missing)} runs", end="", file=sys.stderr, flush=True)
        if missing:
            print(file=sys.stderr)
        return {trial: self._done[trial] for trial in wanted}

    def over_seeds(self, texts: Mapping[Any, tuple[str, str]], step_time: float = 1.0) -> dict[Any, list[Figures]]:
        """Of each (text, policy), one run per seed."""
        trials = {
            (key, seed): Trial(text=text, policy=policy, seed=seed, step_time=step_time)
            for key, (text, policy) in texts.items()
            for seed in self.seeds
        }
        found = self.figures(trials.values())
        return {key: [found[trials[key, seed]] for seed in self.seeds] for key in texts}


@dataclass(frozen=True, slots=True, kw_only=True)
class Section:
    """One claim, checked."""

    title: str
    claim: str
    source: str
    setting: str
    head: tuple[str, ...]
    rows: list[tuple[str, ...]]
    verdict: str
    """Begins with "holds", "partly" or "does not hold"."""
    why: str = ""
    """Why not more than that; shown where it does not hold, where there must be one."""

    def __post_init__(self) -> None:
        assert self.holds or self.why, f"{self.title}: a claim that does not hold as it is needs its why"

    @property
    def holds(self) -> bool:
        return self.verdict.startswith("holds")


def scenario(
    model: str,
    *,
    rate: float = 0.0,
    minutes: float = 10.0,
    cv: float = 1.0,
    spikes: float = 1.0,
    ttft_s: float = 5.0,
    itl_ms: float = 200.0,
    jobs: Sequence[tuple[float, int]] = (),
    deadline_m: float = 30.0,
    instances: tuple[int, int] | None = None,
    initial: int | None = None,
    max_num_seqs: int | None = None,
    extra: str = "",
) -> str:
    """A scenario: one model, chat at a rate (gamma arrivals, or spikes of so many times it), and batch jobs, each
    (minute, requests). ``instances``: bounds."""
    low, high = instances or (1, FLEETS[model])
    kind = f"profile = '{PROFILES[model]}'" + (f", max_num_seqs = {max_num_seqs}" if max_num_seqs else "")
    arrivals = f"kind = 'gamma', rate = {rate}, cv = {cv}"
    if spikes > 1.0:
        arrivals = f"kind = 'spikes', rate = {rate}, factor = {spikes}, length = '60s', period = '5m', cv = {cv}"
    parts = [
        f"[classes.chat]\nkind = 'interactive'\nttft = '{ttft_s}s'\nitl = '{itl_ms}ms'",
        f"[classes.batch]\nkind = 'batch'\ndeadline = '{deadline_m}m'",
        f"[models.m]\ninstances = [{{ {kind} }}]\nmin_instances = {low}\nmax_instances = {high}",
        *([f"initial = {initial}"] if initial is not None else []),
        extra,
    ]
    if rate:
        parts.append(
            f"[[workload]]\nmodel = 'm'\nclass = 'chat'\n"
            f"generate = {{ {arrivals}, duration = '{minutes}m', lengths = '{LENGTHS}' }}"
        )
    for minute, count in jobs:
        parts.append(
            f"[[batch_job]]\nmodel = 'm'\nclass = 'batch'\nat = '{minute}m'\nrequests = {count}\nlengths = '{LENGTHS}'"
        )
    return "\n".join(part for part in parts if part) + "\n"


def spread(values: Iterable[float], form: Callable[[float], str]) -> str:
    """Mean, and least and most where they differ."""
    seen = list(values)
    low, high = form(min(seen)), form(max(seen))
    mean = form(float(np.mean(seen)))
    return mean if low == high else f"{mean} ({low} to {high})"


def percent(share: float) -> str:
    return f"{100.0 * share:.1f} %"


def hours(value: float) -> str:
    return f"{value:.1f}"


def mean(values: Iterable[float]) -> float:
    return float(np.mean(list(values)))


def full_step_ms(model: str) -> float:
    """Of a step that has nothing but prefill, as much as the token budget allows."""
    profile = load_profile(PROFILES[model])
    return 1000.0 * profile.step_s(decoding=0, context_tokens=0.0, prefill_tokens=profile.max_num_batched_tokens)


def kv_blocks(model: str) -> int:
    return load_profile(PROFILES[model]).kv_capacity_tokens // 16


def gpus(figures: Iterable[Figures]) -> str:
    """In the mean of a run and of its seeds."""
    return f"{mean(3600.0 * each.gpu_hours / float(each.summary['sim_s']) for each in figures):.0f}"


def seconds(figures: Iterable[Figures], measure: str, part: str) -> float:
    """Of chat's TTFT or ITL, in the mean of the seeds."""
    return mean(float(each.summary[measure]["chat"][part]) for each in figures)


HALVING = (
    "A request that has been sent to an engine waits inside it where the batch size is halved before its prefill, and "
    "the next growth is a `local_period` of 5 s away (ours; the paper's is not public)"
)
"""Seen in single runs: those late by TTFT had been dispatched at once, and most had their first token after 5.2 to
5.7 s."""

# -- the claims ----------------------------------------------------------------------------------------------------

RATES = {EIGHT: (50.0, 100.0, 200.0, 300.0), SEVENTY: (5.0, 10.0, 20.0, 30.0)}
"""Requests a second: from a light load to more than 50 GPUs carry under any policy."""


def attainment(bench: Bench) -> Section:
    keys = [(model, rate, policy) for model in RATES for rate in RATES[model] for policy in POLICIES]
    found = bench.over_seeds({key: (scenario(key[0], rate=key[1], cv=2.0), key[2]) for key in keys})
    rows = []
    gains: dict[tuple[str, float], float] = {}
    for model in RATES:
        for rate in RATES[model]:
            met = {policy: [each.chat for each in found[model, rate, policy]] for policy in POLICIES}
            gains[model, rate] = mean(met["chiron-paper"]) - mean(met["llumnix"])
            rows.append((model, f"{rate:g}/s", *(spread(met[policy], percent) for policy in POLICIES)))
    best = max(gains.values())
    at_best = found[(*max(gains, key=lambda key: gains[key]), "llumnix")]
    paper = [found[SEVENTY, rate, "chiron-paper"] for rate in RATES[SEVENTY]]
    large = [mean(each.chat for each in figures) for figures in paper]
    last_s = max(seconds(figures, "ttft_s", "p99") for figures in paper)
    word = "holds" if best >= 0.8 else "partly" if best > 0.05 else "does not hold"
    return Section(
        title="SLO attainment against the arrival rate",
        claim="up to 90 % higher SLO attainment than existing systems, depending on the arrival rate; 8B and 70B "
        "models "
        "on up to 50 A100",
        source="abstract; secondary sources name models, GPUs and Llumnix",
        setting="chat of ShareGPT lengths, gamma arrivals with a CV of 2 for ten minutes, TTFT 5 s and ITL 200 ms; at "
        "most 50 GPUs, a fleet at the start for the mean load",
        head=("model", "rate", *POLICIES),
        rows=rows,
        verdict=f"{word}: at its best `chiron-paper` meets the SLOs of {100.0 * best:.0f} points more of the requests "
        f"than `llumnix`, at its worst of {100.0 * min(gains.values()):.0f} points. The rule: 80 points or more hold, "
        "5 are a part.",
        why=f"even at best `llumnix` meets {percent(mean(each.chat for each in at_best))}, so there is no more to "
        "gain than the rest, and at 300/s `chiron-paper` is late with all 50 GPUs as well. On the 70B model it meets "
        f"{spread(large, percent)} for itself, likely by its local loop: a step full of prefill takes "
        f"{full_step_ms(SEVENTY):.0f} ms there, over the ITL SLO, and halves the batch size. {HALVING}: 99 % of first "
        f"tokens are there within {last_s:.1f} s at most, for an SLO of 5 s, and with a fixed batch size more are in "
        "time (ablation, below). What the gap is made of is thresholds: `llumnix` scales up below 10 free KV blocks a "
        f"request, and an instance has {kv_blocks(EIGHT):,} of them here (8B), those of its experiment under a "
        "thousand; so it grows when instances are nearly full. With thresholds for these GPUs, `llumnix-tuned`, it "
        "misses next to nothing where 50 GPUs are enough.",
    )


MIXED = {EIGHT: (60.0, 60_000), SEVENTY: (6.0, 6_000)}
"""Chat a second between spikes, and requests of a batch job."""


def mixed(model: str, **changes: Any) -> str:
    rate, count = MIXED[model]
    given = {"rate": rate, "minutes": 40.0, "spikes": 3.0, "jobs": [(2.0, count)], "deadline_m": 35.0} | changes
    return scenario(model, **given)


def _than(saved: float) -> str:
    return f"{percent(abs(saved))} {'fewer' if saved >= 0 else 'more'} GPU-hours than"


def gpu_hours(bench: Bench) -> Section:
    keys = [(model, policy) for model in MIXED for policy in POLICIES]
    found = bench.over_seeds({key: (mixed(key[0]), key[1]) for key in keys})
    rows: list[tuple[str, ...]] = []
    saved: dict[str, list[float]] = {"llumnix": [], "llumnix-tuned": []}
    late: list[str] = []
    for model in MIXED:
        for policy in POLICIES:
            figures = found[model, policy]
            rows.append(
                (
                    model,
                    policy,
                    spread((each.chat for each in figures), percent),
                    spread((each.batch for each in figures), percent),
                    spread((each.gpu_hours for each in figures), hours),
                )
            )
        paper = found[model, "chiron-paper"]
        if min(mean(each.chat for each in paper), mean(each.batch for each in paper)) < ENOUGH:
            late.append(model)
            continue
        for rival, shares in saved.items():
            theirs = mean(each.gpu_hours for each in found[model, rival])
            shares.append(1.0 - mean(each.gpu_hours for each in paper) / theirs)
    untuned, tuned = (max(saved[rival], default=-1.0) for rival in ("llumnix", "llumnix-tuned"))
    word = "holds" if untuned >= 0.6 else "partly" if max(untuned, tuned) > 0.05 else "does not hold"
    missed = f" Not counted, as `chiron-paper` misses SLOs there itself: {' and '.join(late)}." if late else ""
    if len(late) == len(MIXED):
        found_best = "`chiron-paper` meets 99 % of each class for neither model, so nothing is saved with all SLOs met."
    else:
        found_best = (
            f"at its best {_than(untuned)} `llumnix` and {_than(tuned)} `llumnix-tuned`, whatever those miss.{missed}"
        )
    return Section(
        title="GPU-hours on a mixed workload",
        claim="60 % fewer GPU-hours than Llumnix with all SLOs met on one mixed workload; up to 70 % fewer GPUs",
        source="abstract; a secondary source names the 60 %",
        setting="chat with threefold spikes of a minute every five minutes for forty minutes, and a batch job after "
        "two "
        "minutes that is due 35 minutes later; ShareGPT lengths, at most 50 GPUs",
        head=("model", "policy", "chat met", "batch in time", "GPU-hours"),
        rows=rows,
        verdict=f"{word}: {found_best} The rule: 60 % against the untuned one hold, 5 % against either are a part, "
        "where `chiron-paper` meets 99 % of each class.",
        why=_why_gpu_hours(found),
    )


def _why_gpu_hours(found: Mapping[tuple[str, str], Sequence[Figures]]) -> str:
    paper, untuned, tuned, ours = (found[EIGHT, policy] for policy in POLICIES)
    late = 1.0 - mean(each.chat for each in untuned)
    return (
        "`chiron-paper` keeps two instances in reserve for each that runs chat (Theta of a third, the paper's example, "
        f"for spikes of three times the load): of the 8B model {gpus(paper)} of {GPUS} GPUs in the mean. `llumnix` has "
        f"{gpus(untuned)}, because it reserves nothing and lets chat wait: {percent(late)} of it is late, and 90 % of "
        f"first tokens are there within {seconds(untuned, 'ttft_s', 'p90'):.0f} s, for an SLO of 5 s. So its "
        f"GPU-hours are no measure of a fleet that keeps the SLOs; of `llumnix-tuned`, with {gpus(tuned)}, "
        f"{percent(1.0 - mean(each.chat for each in tuned))} is late. Nor does the local loop save any: a "
        "fixed batch size of 256 does as much here (ablation, below). "
        f"`chiron`, which finds its reserve by a backtest, has {gpus(ours)}. On the 70B model `chiron-paper` is late "
        f"by its local loop, likely: a step full of prefill takes {full_step_ms(SEVENTY):.0f} ms, over the ITL SLO, "
        f"and halves the batch size. {HALVING}; 99 % of first tokens are there within "
        f"{seconds(found[SEVENTY, 'chiron-paper'], 'ttft_s', 'p99'):.1f} s."
    )


STATIC_SIZES = (64, 256, 1024, 4096)


def throughput(bench: Bench) -> Section:
    rows: list[tuple[str, ...]] = []
    gains: dict[str, float] = {}
    statics: list[float] = []
    sizes = "\n".join(f"[policies.static-{size}]\npolicy = 'static'\nmax_num_seqs = {size}" for size in STATIC_SIZES)
    for model, rate, count, fixed in ((EIGHT, 10.0, 120_000, 6), (SEVENTY, 1.0, 8_000, 3)):
        for what, chat in (("batch work alone", 0.0), ("with a little chat", rate)):
            text = "horizon = '10m'\n" + scenario(
                model,
                rate=chat,
                jobs=[(0.0, count)],
                deadline_m=600.0,
                instances=(fixed, fixed),
                initial=fixed,
                max_num_seqs=4096,
                extra=sizes,
            )
            policies = (*POLICIES, *(f"static-{size}" for size in STATIC_SIZES if not chat))
            found = bench.over_seeds({policy: (text, policy) for policy in policies})
            base = mean(_done_per_s(each) for each in found["llumnix"])
            for policy, figures in found.items():
                ratio = mean(_done_per_s(each) for each in figures) / base
                if policy == "chiron-paper":
                    gains[f"{model}, {what}"] = ratio
                if policy.startswith("static"):
                    statics.append(ratio)
                rows.append(
                    (
                        model,
                        what,
                        policy,
                        spread((_done_per_s(each) for each in figures), lambda v: f"{v:.1f}/s"),
                        f"{ratio:.2f}",
                        spread((each.chat for each in figures), percent) if chat else "",
                    )
                )
    best = max(gains.values())
    word = "holds" if best >= 2.5 else "partly" if best > 1.05 else "does not hold"
    return Section(
        title="Throughput",
        claim="up to 300 % higher request throughput",
        source="secondary sources",
        setting="a fleet of fixed size (six instances of the 8B, three of the 70B model) for ten minutes and more "
        "batch work than it can do, alone or beside a little chat; engines that take up to 4,096 sequences; done are "
        "requests that finished with their SLOs met, and `static-N` has a fixed batch size of N",
        head=("model", "", "policy", "done", "over llumnix", "chat met"),
        rows=rows,
        verdict=f"{word}: `chiron-paper` does {best:.2f} times the requests of `llumnix` at its best, whose static "
        "batch size is vLLM's 256. The rule: 2.5 times hold, 1.05 are a part.",
        why="in this engine model (fitted to "
        f"measured kernels) batch sizes of {STATIC_SIZES[0]} to {STATIC_SIZES[-1]:,} do {min(statics):.2f} to "
        f"{max(statics):.2f} times what 256 does, because KV or compute is full before; there is no more than that to "
        "gain by the size.",
    )


def _done_per_s(figures: Figures) -> float:
    """Requests that finished with their SLOs met, a second of the run."""
    return figures.attained * float(figures.summary["requests"]) / float(figures.summary["sim_s"])


QUEUES = {EIGHT: 700_000, SEVENTY: 80_000}


def queues(bench: Bench) -> Section:
    rows, late = [], []
    for model, count in QUEUES.items():
        text = scenario(model, jobs=[(0.0, count)], deadline_m=120.0, initial=1)
        trials = {policy: Trial(text=text, policy=policy, seed=bench.seeds[0]) for policy in ("chiron-paper", "chiron")}
        found = bench.figures(trials.values())
        for policy, trial in trials.items():
            each = found[trial]
            if policy == "chiron-paper":
                late.append(1.0 - each.batch)
            rows.append(
                (
                    model,
                    f"{count:,}",
                    policy,
                    percent(each.batch),
                    hours(each.gpu_hours),
                    str(each.summary["gpus_peak"]),
                )
            )
    word = "holds" if max(late) <= 1.0 - ENOUGH else "partly" if min(late) <= 1.0 - ENOUGH else "does not hold"
    return Section(
        title="Batch queues of 700,000 and 80,000 requests",
        claim="batch queues of 700,000 requests (8B) and 80,000 (70B)",
        source="a secondary source; what had to be met is not said",
        setting="all at once on an empty fleet of one instance, due two hours later, at most 50 GPUs; one seed",
        head=("model", "queue", "policy", "in time", "GPU-hours", "GPUs at most"),
        rows=rows,
        verdict=f"{word}: the rule is 99 % in time for both.",
    )


def convergence(bench: Bench) -> Section:
    rows: list[tuple[str, ...]] = []
    times: dict[tuple[str, str], list[float]] = {}
    kept: dict[str, list[Figures]] = {}
    for model, rate in ((EIGHT, 40.0), (SEVENTY, 6.0)):
        text = scenario(model, rate=rate, minutes=10.0, ttft_s=600.0, instances=(1, 1), initial=1, max_num_seqs=4096)
        text = f"horizon = '10m'\n{text}"
        found = bench.over_seeds({policy: (text, policy) for policy in ("chiron-paper", "chiron")})
        kept[model] = found["chiron"]
        for policy, figures in found.items():
            times[model, policy] = [settles_s(each.batch_sizes) for each in figures]
            rows.append(
                (
                    model,
                    policy,
                    spread(times[model, policy], lambda v: f"{v:.0f} s"),
                    spread((_final(each) for each in figures), lambda v: f"{v:.0f}"),
                )
            )
    eight, seventy = (max(times[model, "chiron-paper"]) for model in (EIGHT, SEVENTY))
    word = "holds" if eight <= 150.0 and seventy <= 300.0 else "partly" if eight <= 150.0 else "does not hold"
    ours = " and ".join(f"{max(times[model, 'chiron']):.0f} s ({model})" for model in (EIGHT, SEVENTY))
    return Section(
        title="Convergence of the local loop",
        claim="the max batch size converges within a few minutes, for the 8B model in 150 s at most",
        source="a secondary source",
        setting="one instance with more chat than it can serve, ITL SLO 200 ms; settled is the time after which the "
        "max "
        "batch size stays within a quarter of its median over the last five minutes (Algorithm 1 halves on every "
        "violation, so it swings)",
        head=("model", "policy", "settled after", "max batch size then"),
        rows=rows,
        verdict=f"{word}: the rule is 150 s for the 8B model and five minutes for the other, in every run. `chiron` "
        f"computes the size and settles after {ours} at most (our aim: 15 s).",
        why=f"a step full of prefill takes {full_step_ms(EIGHT):.0f} ms (8B) and {full_step_ms(SEVENTY):.0f} ms (70B). "
        "The first is within the ITL SLO of 200 ms, which nothing violates, so the size grows until KV is what binds, "
        "and stays. The second is over it by itself, whatever the batch size: each growth lets prompts in, their steps "
        "violate the SLO, and the size is halved; at half, steps without prefill take a fraction of the SLO, and it "
        "grows again. So it swings by a factor of two or more for as long as there is load, and the time in the table "
        "is how long was looked. What limits `chiron` is that it computes the size from the lengths of answers that "
        f"have ended. A mean one of {mean(load_lengths(LENGTHS).output_tokens):,.0f} tokens takes "
        f"{_answer_s(kept[EIGHT]):.0f} s (8B) and {_answer_s(kept[SEVENTY]):.0f} s (70B) here, the first that end are "
        "the short ones, and until the others have ended prefill seems a larger part of the work than it is, and the "
        "size is too small; after that it swings with what each scrape has measured. The aim of 15 s is shorter than "
        "an answer.",
    )


def _answer_s(figures: Sequence[Figures]) -> float:
    """What a mean answer takes at the ITL that was seen."""
    return mean(load_lengths(LENGTHS).output_tokens) * seconds(figures, "itl_s", "mean")


def settles_s(sizes: Sequence[tuple[float, int]], horizon_s: float = 600.0) -> float:
    """When the size last was more than a quarter away from its median of the last five minutes."""
    ends = [at_s for at_s, _ in sizes[1:]] + [horizon_s]
    pieces = [(at_s, end_s, size) for (at_s, size), end_s in zip(sizes, ends, strict=True) if size > 0]
    final = _median([(start, end, size) for start, end, size in pieces if end > horizon_s - 300.0], horizon_s - 300.0)
    outside = [end for _, end, size in pieces if abs(size - final) > 0.25 * final]
    return max(outside, default=0.0)


def _final(figures: Figures) -> float:
    ends = [at_s for at_s, _ in figures.batch_sizes[1:]] + [600.0]
    pieces = [(at_s, end, size) for (at_s, size), end in zip(figures.batch_sizes, ends, strict=True) if size > 0]
    return _median(pieces, 300.0)


def _median(pieces: Sequence[tuple[float, float, int]], since_s: float) -> float:
    """Weighted by time."""
    weighted = sorted((size, end - max(start, since_s)) for start, end, size in pieces if end > since_s)
    half = 0.5 * sum(weight for _, weight in weighted)
    for size, weight in weighted:
        half -= weight
        if half <= 0.0:
            return float(size)
    return float(weighted[-1][0])


STATIC_LOCAL = "[policies.static-batch]\npolicy = 'chiron-paper'\ninitial_max_batch_size = 256\nlocal_period = '1000h'"


def ablation(bench: Bench) -> Section:
    rows, losses, fleets = [], [], []
    for model in MIXED:
        full = bench.over_seeds({"full": (mixed(model), "chiron-paper")})["full"]
        peak = max(int(each.summary["instances_peak"]) for each in full)
        most = max(int(each.summary["gpus_peak"]) for each in full)
        fleets.append(f"{gpus(full)} of the {most} GPUs of its peak ({model})")
        others = bench.over_seeds(
            {
                "static batch size (256)": (mixed(model, extra=STATIC_LOCAL), "static-batch"),
                "fixed fleet (the full one's peak)": (
                    mixed(model, instances=(peak, peak), initial=peak),
                    "chiron-paper",
                ),
            }
        )
        whole = mean(_useful(each) for each in full)
        for name, figures in {"full": full, **others}.items():
            share = mean(_useful(each) for each in figures) / whole
            if name != "full":
                losses.append(1.0 - share)
            rows.append(
                (
                    model,
                    name,
                    spread((_useful(each) for each in figures), lambda v: f"{v:,.0f}"),
                    f"{share:.2f}",
                    spread((each.chat for each in figures), percent),
                    spread((each.batch for each in figures), percent),
                )
            )
    low, high = min(losses), max(losses)
    word = "holds" if low >= 0.25 else "partly" if high >= 0.1 else "does not hold"
    return Section(
        title="Ablation: the local and the global loop",
        claim="each of the two loops gives about 30 to 60 % of the throughput",
        source="a secondary source; its ablation of the local loop takes static batch sizes",
        setting="the mixed workload above under `chiron-paper`, without its local loop (256, vLLM's default) and "
        "without "
        "its global one (a fleet as large as it was at its peak); useful is what met its SLO per GPU-hour",
        head=("model", "", "useful requests per GPU-hour", "over full", "chat met", "batch in time"),
        rows=rows,
        verdict=f"{word}: without one of them {percent(low)} to {percent(high)} less. The rule: 25 % in every case "
        f"hold, "
        "10 % in one are a part.",
        why="the local loop has little to gain, because a batch size of 256 already does what these engines can "
        "(Throughput, above); on the 70B model it costs, because the size swings (Convergence, above). The global loop "
        "has little to gain on a fixed fleet of its peak, because with Theta of a third its own is never far from "
        f"that: it has {' and '.join(fleets)} in the mean.",
    )


def _useful(figures: Figures) -> float:
    return figures.attained * float(figures.summary["requests"]) / figures.gpu_hours


QUEUE_LENGTHS = (30, 100, 300, 1000, 2000, 4000)
DRAWS = 24


def estimator(bench: Bench) -> Section:
    """Waiting time of the last of n queued requests: n mu / (N T) against what happened."""
    rows, fits, short_s, moved = [], {}, [], {}
    instances, batch = 2, 64
    base: dict[str, Any] = {"deadline_m": 600.0, "instances": (instances, instances), "initial": instances}
    extra = f"[policies.fixed]\npolicy = 'static'\ninstances = {instances}\nmax_num_seqs = {batch}"

    def queue(count: int, seed: int) -> Trial:
        text = scenario(EIGHT, jobs=[(0.0, count)], extra=extra, **base)
        return Trial(text=text, policy="fixed", seed=seed)

    calibration = bench.figures([queue(6000, 1000)])
    (usual,) = calibration.values()
    mu = float(np.mean(load_lengths(LENGTHS).output_tokens))
    waits = np.sort(np.array(usual.waits_s))
    # Tokens a second of the fleet while it is full: from starts in the middle of the drain.
    start, end = int(0.2 * len(waits)), int(0.8 * len(waits))
    per_s = (end - start) * mu / (waits[end] - waits[start])
    for length in QUEUE_LENGTHS:
        random = np.random.default_rng(length)
        counts = [int(count) for count in random.integers(max(2, length // 2), 3 * length // 2 + 1, DRAWS)]
        trials = [queue(instances * batch + count, 1 + number) for number, count in enumerate(counts)]
        found = bench.figures(trials)
        real = np.array([np.nanmax(found[trial].waits_s) for trial in trials])
        estimate = np.array(counts) * mu / per_s
        fits[length] = _fit(real, estimate)
        short_s.append(float(np.mean(real - estimate)))
        moved[length] = _fit(real, estimate + short_s[-1])
        error = float(np.mean(np.abs(estimate - real) / np.maximum(real, 1e-9)))
        rows.append((f"{length:,}", f"{fits[length]:.3f}", percent(error)))
    good = fits[2000] >= 0.98 and fits[30] < fits[2000]
    return Section(
        title="Estimate of the waiting time against the queue's length",
        claim="R² of about 0.99 near 2,000 queued requests, less stable in small queues",
        source="secondary sources; the estimate is QLM's",
        setting=f"queues of half to one and a half times the length ({DRAWS} draws each) behind two full instances "
        f"of the "
        "8B model with a batch size of 64; estimate: requests ahead x mean answer / tokens a second, both from other "
        "draws; real: the last one's time to its first token",
        head=("queue", "R²", "mean error"),
        rows=rows,
        verdict=f"{'holds' if good else 'partly' if fits[2000] > 0.9 else 'does not hold'}: R² is {fits[2000]:.3f} at "
        f"2,000 and {fits[30]:.3f} at 30. The rule: 0.98 at 2,000, and less at 30.",
        why=f"the estimate is {min(short_s):.0f} to {max(short_s):.0f} s short at every length. What runs in the two "
        "instances has begun at the same moment, so for a while none of it ends and nobody who waits moves up (likely; "
        "also, the last one's own prefill is no part of the estimate); n mu / (N T) counts on places that come free "
        "evenly from the start. Beside a wait of minutes that is little, beside one of seconds it is all. With the "
        f"mean of what it is short taken off, R² would be {moved[2000]:.3f} at 2,000 and {moved[30]:.3f} at 30.",
    )


def _fit(real: np.ndarray, estimate: np.ndarray) -> float:
    """R²."""
    return 1.0 - float(((real - estimate) ** 2).sum() / ((real - real.mean()) ** 2).sum())


def sensitivity(bench: Bench) -> Section:
    rivals = ("chiron-paper", "llumnix-tuned", "chiron")
    cases = {
        "CV 1": {"cv": 1.0},
        "CV 4": {"cv": 4.0},
        "CV 8": {"cv": 8.0},
        "SLOs x 0.5": {"cv": 2.0, "ttft_s": 2.5, "itl_ms": 100.0},
        "SLOs x 2": {"cv": 2.0, "ttft_s": 10.0, "itl_ms": 400.0},
    }
    texts = {
        (case, policy): (scenario(EIGHT, rate=100.0, **given), policy)
        for case, given in cases.items()
        for policy in rivals
    }
    found = bench.over_seeds(texts)
    rows, ahead = [], []
    for case in cases:
        met = {policy: mean(each.chat for each in found[case, policy]) for policy in rivals}
        ahead.append(met["chiron-paper"] >= met["llumnix-tuned"] - 0.005)
        rows.append(
            (
                case,
                *(
                    f"{spread((each.chat for each in found[case, policy]), percent)} at "
                    f"{spread((each.gpu_hours for each in found[case, policy]), hours)} h"
                    for policy in rivals
                ),
            )
        )
    word = "holds" if all(ahead) else "partly" if any(ahead) else "does not hold"
    return Section(
        title="Burstiness and other SLOs",
        claim="robust against bursty arrivals and other SLO values",
        source="a secondary source; no figures",
        setting="chat for the 8B model at 100/s for ten minutes",
        head=("", *rivals),
        rows=rows,
        verdict=f"{word}: the rule is no less attainment than `llumnix-tuned`, in {sum(ahead)} of {len(ahead)} cases.",
        why="; ".join(f"at {case}, {_why_behind(case)}" for case, kept in zip(cases, ahead, strict=True) if not kept)
        + ".",
    )


def _why_behind(case: str) -> str:
    if case != "SLOs x 0.5":
        return "which was not looked into"
    return (
        f"where the ITL SLO is 100 ms: a step full of prefill takes {full_step_ms(EIGHT):.0f} ms and halves the batch "
        f"size. {HALVING}, which is twice the TTFT SLO"
    )


def hysteresis(bench: Bench) -> Section:
    sizes = (500, 9_000, 1_000, 4_000, 12_000)
    jobs = [(0.5 * number, sizes[number % len(sizes)]) for number in range(40)]
    rows, counts = [], {}
    for name, span in (("groups of 5 minutes", "300s"), ("no groups (a second)", "1s")):
        extra = f"[policies.grouped]\npolicy = 'chiron-paper'\ngroup_span = '{span}'"
        text = scenario(EIGHT, rate=30.0, minutes=25.0, jobs=jobs, deadline_m=6.0, extra=extra)
        figures = bench.over_seeds({name: (text, "grouped")})[name]
        counts[name] = mean(each.summary["scaling_actions"] for each in figures)
        rows.append(
            (
                name,
                spread((each.summary["scaling_actions"] for each in figures), lambda v: f"{v:.0f}"),
                spread((each.summary["reversals"] for each in figures), lambda v: f"{v:.0f}"),
                spread((each.batch for each in figures), percent),
                spread((each.gpu_hours for each in figures), hours),
            )
        )
    grouped, single = counts.values()
    word = "holds" if grouped <= 0.8 * single else "partly" if grouped < single else "does not hold"
    return Section(
        title="Request groups against hysteresis",
        claim="request groups leave slack in decisions, and so prevent scaling back and forth",
        source="a secondary source; no figures",
        setting="chat at 30/s and a batch job of 500 to 12,000 requests every half minute for twenty minutes, each "
        "due after six; `chiron-paper`",
        head=("", "scaling actions", "reversals", "batch in time", "GPU-hours"),
        rows=rows,
        verdict=f"{word}: {grouped:.0f} actions with groups and {single:.0f} without. The rule: a fifth fewer hold.",
        why="likely because another rule of the same design does most of it: batch instances stay until no batch "
        "request is queued (`chiron-paper` adds while a group would be late, and removes all at the end of the "
        "queue), so a group that comes or goes takes none away. The other changes follow chat, which has no groups.",
    )


def bands(bench: Bench) -> Section:
    rows, kept = [], []
    for model in MIXED:
        for factor in (0.85, 1.0, 1.15):
            found = bench.over_seeds({policy: (mixed(model), policy) for policy in POLICIES}, step_time=factor)
            hours_of = {policy: mean(each.gpu_hours for each in found[policy]) for policy in POLICIES}
            kept.append(hours_of["chiron-paper"] / hours_of["llumnix"])
            rows.append(
                (
                    model,
                    f"x {factor:g}",
                    *(
                        f"{hours_of[policy]:.1f} ({percent(mean(each.attained for each in found[policy]))})"
                        for policy in POLICIES
                    ),
                )
            )
    low, high = min(kept), max(kept)
    word = "holds" if high - low <= 0.3 else "partly" if high - low <= 1.0 else "does not hold"
    return Section(
        title="If step times were 15 % off",
        claim="(ours, not the paper's: how much of the above hangs on the step-time model)",
        source="profiles are fitted to measured kernels with errors of a few percent; engines differ by more",
        setting="the mixed workload with all step times multiplied",
        head=("model", "step times", *(f"{policy}: GPU-hours (met)" for policy in POLICIES)),
        rows=rows,
        verdict=f"{word}: GPU-hours of `chiron-paper` over `llumnix` lie between {low:.2f} and {high:.2f} over models "
        "and factors.",
    )


CLAIMS: dict[str, Callable[[Bench], Section]] = {
    "attainment": attainment,
    "gpu-hours": gpu_hours,
    "throughput": throughput,
    "queues": queues,
    "convergence": convergence,
    "ablation": ablation,
    "estimator": estimator,
    "sensitivity": sensitivity,
    "hysteresis": hysteresis,
    "bands": bands,
}

# -- writing -------------------------------------------------------------------------------------------------------

PREFACE = """# The paper's claims, run again

What public sources say of the evaluation in "Hierarchical Autoscaling for Large Language Model Serving with Chiron"
(arXiv 2501.08090), each as a simulation under the same policies, engine model and profiles as everywhere here. The
paper's traces, settings and code are not public; where a setting is not known it is ours and is named. `chiron-paper`
is the published design as far as it is public, `chiron` is ours, and `llumnix` and `llumnix-tuned` are described in
[policies.md](policies.md).

Made by `make paper`, which writes this page; figures are means over {seeds} seeds, with the least and the most of them.

| claim | verdict |
|---|---|
"""


def page(sections: Sequence[Section], *, seeds: int, runs: int) -> str:
    lines = [PREFACE.format(seeds=seeds)]
    lines[0] += "".join(
        f"| [{each.title}](#{_anchor(each.title)}) | {each.verdict.partition(':')[0]} |\n" for each in sections
    )
    for each in sections:
        lines.append(f"## {each.title}\n")
        lines.append(f"**Claim**: {each.claim}. **Source**: {each.source}.\n")
        lines.append(f"**Setting**: {each.setting}.\n")
        table = [each.head, ("---",) * len(each.head), *each.rows]
        lines.append("\n".join(f"| {' | '.join(row)} |" for row in table) + "\n")
        lines.append(f"**Verdict**: {each.verdict}\n")
        if not each.holds:
            lines.append(f"**Why**: {each.why}\n")
    lines.append(f"*{runs} runs.*\n")
    return "\n".join(lines)


def _anchor(title: str) -> str:
    kept = "".join(letter for letter in title.lower() if letter.isalnum() or letter in " -")
    return kept.replace(" ", "-")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="write the page here; else it is printed")
    parser.add_argument("--json", type=Path, help="write the tables here")
    parser.add_argument("--only", default="", help=f"of these claims, by comma: {', '.join(CLAIMS)}")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--jobs", type=int, default=2, help="runs at once")
    parser.add_argument("--journal", type=Path, help="what has been simulated; default: nothing is kept")
    arguments = parser.parse_args()
    names = [name for name in arguments.only.split(",") if name] or list(CLAIMS)
    unknown = [name for name in names if name not in CLAIMS]
    if unknown:
        parser.error(f"--only names {unknown[0]!r}; there are: {', '.join(CLAIMS)}")
    for name in ("seeds", "jobs"):
        if getattr(arguments, name) < 1:
            parser.error(f"--{name} is {getattr(arguments, name)}; it must be 1 or more")
    bench = Bench(range(1, arguments.seeds + 1), arguments.jobs, arguments.journal)
    sections, failed = [], []
    try:
        for number, name in enumerate(names, 1):
            print(f"{name}, claim {number} of {len(names)}", file=sys.stderr)
            began = time.monotonic()
            try:
                sections.append(CLAIMS[name](bench))
            except Exception as error:  # What is known of the other claims is not lost with it.
                traceback.print_exc()
                failed.append(f"{name}: {type(error).__name__}: {error}")
                continue
            print(f"  {time.monotonic() - began:.0f} s: {sections[-1].verdict}", file=sys.stderr)
    finally:
        bench.close()
    if failed:
        print("\n".join(["no page is written, because of:", *failed]), file=sys.stderr)
        return 1
    text = page(sections, seeds=arguments.seeds, runs=bench.runs)
    if arguments.json:
        tables = {each.title: {"head": each.head, "rows": each.rows, "verdict": each.verdict} for each in sections}
        arguments.json.write_text(json.dumps(tables, indent=1) + "\n", encoding="utf-8")
    if arguments.out:
        arguments.out.write_text(text, encoding="utf-8")
    else:
        print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
