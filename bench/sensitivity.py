"""What the comparison hangs on: cold starts, bursts, SLOs, step times, telemetry, failures::

    make sensitivity    (or: python bench/sensitivity.py [--out docs/sensitivity.md] [--only starts slos] [--seeds 3])

One generated workload on one model; each table changes one thing of it. Every simulation is kept in the journal
(``--journal``), so a policy or a case that is new costs its own runs.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean

from chiron.cli.studies.common import running
from chiron.config.build import setups
from chiron.config.scenario import Scenario, parse_scenario
from chiron.engines.profile import Profile
from chiron.sim.setup import Setup
from chiron.studies.executors import local_workers
from chiron.studies.objective import worst_class
from chiron.studies.runner import Runner
from chiron.studies.trial import Outcome, Summary, trial

POLICIES = ("chiron", "chiron-paper", "ray-serve-tuned", "llumnix-tuned", "hpa-queue-tuned", "static")
"""Ours, the paper's, the best of the rivals that scale, and a fixed fleet."""
TARGET = 0.99

BASE = """
name = "sensitivity"

[classes.chat]
kind = "interactive"
ttft = "5s"
itl = "200ms"

[classes.batch]
kind = "batch"
deadline = "12m"

[models.m]
instances = [{ profile = "llama-3.1-8b/a100/tp1" }]
max_instances = 40

[gpus]
a100 = 40

[[workload]]
model = "m"
class = "chat"

[workload.generate]
kind = "diurnal"
rate = 25
peak_to_trough = 3
period = "10m"
noise = 0.2
noise_s = 45
cv = 1.5
duration = "20m"
lengths = { input = { p50 = 900, p99 = 6000 }, output = { p50 = 220, p99 = 1000 } }

[[batch_job]]
model = "m"
class = "batch"
at = "4m"
requests = 4_000
lengths = { input = { p50 = 500, p99 = 3000 }, output = { p50 = 200, p99 = 900 } }
"""
WEEKS = """
name = "weeks"

[classes.chat]
kind = "interactive"
ttft = "10s"
itl = "200ms"

[models.m]
instances = [{ profile = "llama-3.1-70b/a100/tp4" }]
max_instances = 10

[[workload]]
model = "m"
class = "chat"

# A large model and long requests: a fleet that follows the day at a rate that two weeks of it can be simulated at.
[workload.generate]
kind = "diurnal"
rate = 0.4
peak_to_trough = 10
period = "24h"
noise = 0.3
noise_s = 600
cv = 2
duration = "336h"
lengths = { input = { p50 = 6000, p99 = 40000 }, output = { p50 = 500, p99 = 2500 } }
"""


CAPTURED = f"models.m.instances.0.captured_sizes={[1, 2, 4, *range(8, 257, 8), *range(272, 513, 16)]}"
ADMISSION = 'models.m.instances.0.admission="3.85ms"'


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """A row: what is changed."""

    name: str
    overrides: tuple[str, ...] = ()
    step_time: float = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """A table: one thing, changed in several ways."""

    title: str
    about: str
    cases: tuple[Case, ...]
    base: str = BASE
    seeds_max: int = 1000
    policies: tuple[str, ...] = POLICIES


def _set(*pairs: tuple[str, str], path: str) -> tuple[Case, ...]:
    """Cases by name, each with a value of its own at this path of the scenario."""
    return tuple(Case(name=name, overrides=(f"{path}={value}",)) for name, value in pairs)


def _starts(name: str, load_s: float) -> Case:
    found = {"node_start": 0.0, "model_load": load_s, "warm_load": load_s}
    return Case(name=name, overrides=tuple(f"cold_start.{key}={value}" for key, value in found.items()))


def _slos(factor: float) -> Case:
    found = (f"classes.chat.ttft={5.0 * factor}", f"classes.chat.itl={0.2 * factor}")
    return Case(name=f"SLOs x {factor:g}", overrides=found)


def _seen(period_s: float, delay_s: float) -> Case:
    found = (f"telemetry.scrape_period={period_s}", f"telemetry.scrape_delay={delay_s}")
    return Case(name=f"every {period_s:g} s, {delay_s:g} s old", overrides=found)


GROUPS: Mapping[str, Group] = {
    "starts": Group(
        title="Cold start",
        about="From the decision to an instance that serves.",
        cases=tuple(
            _starts(name, s) for name, s in (("10 s", 10), ("30 s", 30), ("1 min", 60), ("3 min", 180), ("10 min", 600))
        ),
    ),
    "bursts": Group(
        title="Burstiness",
        about="Coefficient of variation of the gaps between arrivals; 1 is Poisson.",
        cases=_set(*((f"CV {cv}", str(cv)) for cv in (1, 2, 4, 8)), path="workload.0.generate.cv"),
    ),
    "slos": Group(
        title="SLOs",
        about="TTFT of 5 s and ITL of 200 ms, times a factor.",
        cases=tuple(_slos(factor) for factor in (0.5, 1.0, 2.0)),
    ),
    "steps": Group(
        title="Step times",
        about="All step times of the engines times a factor: what if profiles are wrong by so much?",
        cases=tuple(Case(name=f"x {factor:g}", step_time=factor) for factor in (0.85, 1.0, 1.15)),
    ),
    "engine": Group(
        title="How a step's time grows",
        about="Steps as the packaged profiles have them, smooth in the number of tokens; padded to vLLM's default "
        "sizes of captured graphs (1, 2, 4, every 8 to 256, every 16 to 512), a staircase; with 3.85 ms a prompt in "
        "the step in which its prefill begins, as measured in public (vLLM 0.26, one RTX 5090, 2026); and with both.",
        cases=(
            Case(name="smooth"),
            Case(name="staircase", overrides=(CAPTURED,)),
            Case(name="admissions", overrides=(ADMISSION,)),
            Case(name="both", overrides=(CAPTURED, ADMISSION)),
        ),
    ),
    "telemetry": Group(
        title="Age of what is known",
        about="How often engines are scraped, and how old a sample is when it is read.",
        cases=(_seen(1, 0.2), _seen(5, 1), _seen(15, 5), _seen(30, 15)),
    ),
    "failures": Group(
        title="Failures",
        about="Mean time between failures of one instance; what it ran starts again.",
        cases=_set(
            ("none", "inf"), ("2 h", '"2h"'), ("30 min", '"30m"'), ("10 min", '"10m"'), path="failures.mtbf"
        ),
    ),
    "weeks": Group(
        title="Two weeks of days and nights",
        about="Long chats with a 70B model, 0.4 requests/s on average, ten times as many at the peak as in the trough.",
        cases=(Case(name="two weeks"),),
        base=WEEKS,
        seeds_max=1,
        policies=("chiron", "ray-serve-tuned", "hpa-queue-tuned", "static"),
    ),
}  # fmt: skip

INTRODUCTION = """# What the comparison hangs on

Every figure on this page was written by `make sensitivity`. One workload, generated: chat for an 8B model on A100s
whose rate swings threefold within ten minutes, and a batch job beside it, at most 40 GPUs. Each table changes one
thing. A cell is the share within its SLO of the worst class, the mean over the seeds (1 to {seeds}), and GPU-hours over
those of `chiron` in the same row; bold where all seeds keep 99 % of every class.
"""


def made(group: Group, case: Case, seeds: Sequence[int]) -> list[Setup]:
    scenario: Scenario = parse_scenario(group.base, directory=Path(), name="sensitivity")
    found = setups(scenario.with_overrides(*case.overrides), policies=group.policies, seeds=seeds[: group.seeds_max])
    return [slower(setup, case.step_time) for setup in found]


def slower(setup: Setup, factor: float) -> Setup:
    """With all step times multiplied, after fleets were sized: nobody knows that profiles are wrong."""

    def scaled(profile: Profile) -> Profile:
        names = ("h_ms", "w0_ms", "f_ms_per_token", "c_ms_per_context_token", "q_ms_per_token_squared")
        return replace(profile, **{name: factor * getattr(profile, name) for name in names})

    if factor == 1.0:
        return setup
    return replace(setup, profiles={name: scaled(profile) for name, profile in setup.profiles.items()})


def measure(groups: Sequence[Group], seeds: Sequence[int], runner: Runner) -> dict[tuple[str, str, str], list[Outcome]]:
    """Outcomes by table, row and policy; all in one go, so that no core waits for the end of a table."""
    asked = [
        ((group.title, case.name, setup.policy), setup)
        for group in groups
        for case in group.cases
        for setup in made(group, case, seeds)
    ]
    ended = runner.run([trial(setup, name=" ".join(key)) for key, setup in asked])
    found: dict[tuple[str, str, str], list[Outcome]] = {}
    for (key, _), outcome in zip(asked, ended, strict=True):
        found.setdefault(key, []).append(outcome)
    return found


def section(group: Group, found: Mapping[tuple[str, str, str], Sequence[Outcome]]) -> str:
    lines = [f"## {group.title}", "", f"{group.about} {verdict(group, found)}", ""]
    lines += ["| | " + " | ".join(f"`{name}`" for name in group.policies) + " |"]
    lines += ["| --- |" + " ---: |" * len(group.policies)]
    for case in group.cases:
        runs = {name: found[group.title, case.name, name] for name in group.policies}
        base = _hours(runs[group.policies[0]])
        lines.append(f"| {case.name} | " + " | ".join(cell(runs[name], base) for name in group.policies) + " |")
    return "\n".join(lines)


def verdict(group: Group, found: Mapping[tuple[str, str, str], Sequence[Outcome]]) -> str:
    """In how many rows ours keeps every class, and who of those that do is cheaper."""
    ours, *rivals = group.policies
    kept, beaten = 0, []
    for case in group.cases:
        runs = {name: found[group.title, case.name, name] for name in group.policies}
        hours = _hours(runs[ours]) if keeps(runs[ours]) else None
        kept += hours is not None
        for name in rivals:
            theirs = _hours(runs[name])
            if keeps(runs[name]) and theirs is not None and (hours is None or theirs < hours):
                beaten.append(f"`{name}` at {case.name}")
    words = f"`{ours}` keeps 99 % of every class in {kept} of {len(group.cases)} rows"
    if not beaten:
        return f"{words}, and no other that does so needs fewer GPU-hours."
    return f"{words}; with fewer GPU-hours, or where it does not: {', '.join(beaten)}."


def keeps(outcomes: Sequence[Outcome]) -> bool:
    summaries = _summaries(outcomes)
    return summaries is not None and all(worst_class(summary) >= TARGET for summary in summaries)


def cell(outcomes: Sequence[Outcome], base: float | None) -> str:
    summaries = _summaries(outcomes)
    hours = _hours(outcomes)
    if summaries is None or hours is None:
        return "failed"
    shares = [worst_class(summary) for summary in summaries]
    words = f"{int(1e3 * fmean(shares) + 1e-6) / 10:.1f}%"
    if keeps(outcomes):
        words = f"**{words}**"
    return words if not base else f"{words}, {hours / base:.2f}x"


def _summaries(outcomes: Sequence[Outcome]) -> list[Summary] | None:
    """None: one failed."""
    found = [outcome.summary for outcome in outcomes if outcome.summary is not None]
    return found if len(found) == len(outcomes) else None


def _hours(outcomes: Sequence[Outcome]) -> float | None:
    summaries = _summaries(outcomes)
    return None if summaries is None else fmean(float(summary["gpu_hours"]) for summary in summaries)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="the page; default: stdout")
    parser.add_argument("--only", nargs="+", choices=list(GROUPS), default=list(GROUPS), help="tables")
    parser.add_argument("--seeds", type=int, default=3, help="how many")
    parser.add_argument("--journal", type=Path, help="what has been simulated; default: nothing is kept")
    parser.add_argument("--jobs", type=int, help="simulations at a time; default: the cores")
    given = parser.parse_args()
    groups = [GROUPS[name] for name in given.only]
    seeds = list(range(1, given.seeds + 1))
    with running(local_workers(given.jobs), given.journal, "sensitivity") as runner:
        found = measure(groups, seeds, runner)
    text = "\n\n".join([INTRODUCTION.format(seeds=given.seeds).rstrip(), *(section(each, found) for each in groups)])
    if given.out is None:
        print(text)
    else:
        given.out.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
