"""Every policy at three loads, as a Markdown page: results, figure, table, who beats ``chiron``, each trace::

    python tools/loads_page.py --figure FILE.svg [--reasons FILE.toml] FILE.json ... > docs/loads.md

Each file is what ``chiron compare bench/loads/SCENARIO.toml --loads ... --json`` wrote. ``make loads`` makes them all.
Reasons are written by hand: an array of tables ``reason`` with ``trace``, ``load``, ``why`` and, where it is of one
rival, ``policy``.
"""

from __future__ import annotations

import argparse
import json
import sys
import tomllib
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

TARGET = 0.99
BATCH = "batch"
"""The class of batch work in these scenarios; the others are interactive."""
CLAIRVOYANT = "clairvoyant"
SHOWN = (
    "chiron",
    "clairvoyant",
    "niyama",
    "niyama-tuned",
    "chiron-paper",
    "ray-serve-tuned",
    "llumnix-tuned",
    "static",
)
"""Named in the figure, if they ran: more cannot be told apart. The others are grey."""
OURS = "chiron"
ROOM = 1.5
"""GPUs there are, over those that a fixed fleet needs at load 1."""
LEVEL = 0.01
"""GPU-hours that differ by less than this share are the same."""
BETTER, WORSE = 0.005, 0.001
"""Attainment that is more, and that is less: by so much."""
RIVALS_SHOWN = 3
"""Of those that beat us on a trace at a load."""
INTRODUCTION = """# Every policy at three loads

Every figure on this page was written by `make loads`: {policies} policies, as published and `-tuned`
([fair tuning](policies.md#fair-tuning)), on {scenarios} cut traces ({names}; files in
[bench/loads](../bench/loads)) at {loads} times their rate, seeds {seeds}: {runs:,} runs. {means}
[How to read it](#how-to-read-it) is below."""
DETAILS = """## How to read it

Each file is a window of a packaged scenario with a batch job in proportion, on one and a half times the instances that
its interactive requests need as a fixed fleet (what `initial = "auto"` counts, by no policy). Every policy starts with
that fleet. A window is six to twelve minutes without a past: who learns from the load has learned little by its end,
and a fleet that starts at the right size need not move. Whole traces are in [results.md](results.md).

- **interactive**, **batch**: share within its SLO, of the worst class of that kind; the mean over seeds, then traces.
- **over bound**: GPU-hours over the least with which any scheduler could keep every SLO ([bound.md](bound.md)), the
  mean over traces. The bound is for all SLOs: who misses them can come below it, and below `clairvoyant`. So ratios
  compare only among rows that keep the traces.
- **kept**: traces in which every class has at least 99 % in every seed.
- **runs**: a policy that is more than five points short of 99 % in some class in each of the first two seeds of a trace
  and load runs no third one there (`chiron compare --early-stop`). The rule is the same for all, `chiron` included.
- `clairvoyant` knows the future and pays cold starts and whole instances: an estimate from above of what is possible,
  somebody might find a better schedule. Where it keeps the traces, the least that keeps them lies between the bound
  and it.
- Rows are ordered by traces kept at load 1, then by GPU-hours. Each class of each trace, with confidence intervals and
  differences from `chiron` on the same requests, is in the pages that `make loads` leaves in `out/loads`."""


class PageError(ValueError):
    """What was given is not what the page is made of."""


Cell = Mapping[str, Any]
"""Of a grid's JSON; or the grid itself."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """A policy at a load, over traces and seeds."""

    interactive: float
    batch: float
    over_bound: float
    kept: int
    traces: int
    runs: int


def point(cells: Sequence[Cell]) -> Point | None:
    """None: a run failed."""
    if any(cell["failed"] or not cell["runs"] for cell in cells):
        return None
    return Point(
        interactive=fmean(_mean_worst(cell, batch=False) for cell in cells),
        batch=fmean(_mean_worst(cell, batch=True) for cell in cells),
        over_bound=fmean(cell["gpu_hours"]["mean"] / cell["gpu_hours_bound_full"] for cell in cells),
        kept=sum(cell["attainment_worst"] >= TARGET for cell in cells),
        traces=len(cells),
        runs=sum(len(cell["runs"]) for cell in cells),
    )


def _mean_worst(cell: Cell, *, batch: bool) -> float:
    return fmean(_worst(run, batch=batch) for run in cell["runs"].values())


def _worst(run: Cell, *, batch: bool) -> float:
    return min((share for name, share in run["attainment"].items() if (name == BATCH) == batch), default=1.0)


def points(grids: Sequence[Cell]) -> dict[str, dict[float, Point]]:
    """By policy and load, of policies that ran in every grid; those that keep most at load 1 first."""
    found: dict[str, dict[float, Point]] = {}
    for policy in grids[0]["policies"]:
        for load in grids[0]["loads"]:
            cells = [
                cell for grid in grids for cell in grid["cells"] if (cell["policy"], cell["load"]) == (policy, load)
            ]
            made = point(cells) if len(cells) == len(grids) else None
            if made is not None:
                found.setdefault(policy, {})[load] = made
    middle = sorted(grids[0]["loads"])[len(grids[0]["loads"]) // 2]

    def rank(policy: str) -> tuple[int, float]:
        at = found[policy].get(middle)
        return (-at.kept, at.over_bound) if at is not None else (1, 0.0)

    return {policy: found[policy] for policy in sorted(found, key=rank)}


def table(found: Mapping[str, Mapping[float, Point]], loads: Sequence[float]) -> str:
    head = [f"{load:g}: {what}" for load in loads for what in ("interactive", "batch", "over bound", "kept")]
    rows = [["lower bound", *(["-", "-", "1.00x", "-"] * len(loads)), "-"]]
    for policy, at in found.items():
        runs = sum(one.runs for one in at.values())
        rows.append([f"`{policy}`", *(cell for load in loads for cell in _cells(at.get(load))), str(runs)])
    return markdown(["policy", *head, "runs"], rows)


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]], words: Collection[str] = ("policy",)) -> str:
    """``words``: columns that are not figures."""
    lines = [head, ["---" if column in words else "---:" for column in head], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _cells(at: Point | None) -> list[str]:
    if at is None:
        return ["-"] * 4
    return [_down(at.interactive), _down(at.batch), f"{at.over_bound:.2f}x", f"{at.kept} of {at.traces}"]


def _down(share: float) -> str:
    """Per cent, rounded down: what is below the target never reads as the target."""
    return f"{int(share * 1e3 + 1e-6) / 10:.1f}%"


def verdict(found: Mapping[str, Mapping[float, Point]], loads: Sequence[float]) -> str:
    """Who keeps most at each load, and for how much less than the next."""
    lines = []
    for load in loads:
        at = {name: each[load] for name, each in found.items() if load in each and name != CLAIRVOYANT}
        if not at:
            lines.append(f"- Load {load:g}: no policy has all its runs.")
            continue
        most = max(one.kept for one in at.values())
        ranked = sorted((name for name in at if at[name].kept == most), key=lambda name: at[name].over_bound)
        served = max(at, key=lambda name: (at[name].interactive, at[name].batch))
        words = f"- Load {load:g}: at most {most} of {at[ranked[0]].traces} traces are kept"
        if most:
            words += f", at the least cost by `{ranked[0]}` ({at[ranked[0]].over_bound:.2f}x the bound)"
        if most and len(ranked) > 1:
            words += f", then `{ranked[1]}` ({at[ranked[1]].over_bound:.2f}x)"
        lines.append(f"{words}; most interactive requests are served in time by `{served}`.")
    return "\n".join(lines)


def draw(found: Mapping[str, Mapping[float, Point]], loads: Sequence[float], path: Path) -> None:
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "chiron"
    from matplotlib import pyplot

    figure, grid = pyplot.subplots(
        2, len(loads), figsize=(4 * len(loads), 6), sharey="row", layout="constrained", squeeze=False
    )
    colours = {name: f"C{place}" for place, name in enumerate(SHOWN)}
    for column, load in enumerate(loads):
        for row, what in enumerate(("interactive", "batch")):
            axes = grid[row][column]
            for name, at in found.items():
                if load in at:
                    axes.plot(
                        at[load].over_bound, 100 * getattr(at[load], what), "o" if name in colours else ".",
                        color=colours.get(name, "0.7"), label=name if name in colours else None,
                        zorder=3 if name in colours else 2,
                    )  # fmt: skip
            axes.axvline(1.0, color="0.6", linestyle=":")
            axes.axhline(100 * TARGET, color="0.85")
            axes.grid(alpha=0.3)
            axes.set(xlabel="GPU-hours over the bound", title=f"load {load:g}" if row == 0 else None, xlim=(0, None))
            if column == 0:
                axes.set(ylabel=f"{what} within SLO, %")
    grid[0][-1].legend(frameon=False, fontsize="small")
    figure.savefig(path, metadata={"Date": None})


@dataclass(frozen=True, slots=True, kw_only=True)
class Beaten:
    """A rival that did better than ours on a trace at a load."""

    trace: str
    load: float
    policy: str
    hours: float
    """GPU-hours, its over ours, less 1: the mean over the seeds that both ran."""
    shares: tuple[tuple[str, float, float], ...]
    """(class, its attainment, ours), means over those seeds."""
    keeps: tuple[bool, bool]
    """Whether it, and ours, keeps every class in every seed."""

    @property
    def rank(self) -> tuple[bool, float]:
        return not self.keeps[0], self.hours


def beaten(grid: Cell) -> list[Beaten]:
    """By load, the best rival first. A rival is better if it keeps every SLO and ours does not; or both do, and it
    needs fewer GPU-hours; or neither does, it is behind in no class nor in GPU-hours, and ahead in one of them."""
    found = []
    for load in grid["loads"]:
        cells = {cell["policy"]: cell for cell in grid["cells"] if cell["load"] == load and cell["runs"]}
        if OURS in cells:
            rivals = [cell for name, cell in cells.items() if name not in (OURS, CLAIRVOYANT)]
            pairs = [pair for cell in rivals if (pair := _pair(grid["scenario"], cell, cells[OURS])) is not None]
            found += sorted((pair for pair in pairs if _better(pair)), key=lambda pair: pair.rank)
    return found


def _pair(trace: str, rival: Cell, ours: Cell) -> Beaten | None:
    both = [(rival["runs"][seed], ours["runs"][seed]) for seed in rival["runs"] if seed in ours["runs"]]
    if not both or rival["failed"]:
        return None
    return Beaten(
        trace=trace,
        load=rival["load"],
        policy=rival["policy"],
        hours=fmean(mine["gpu_hours"] / theirs["gpu_hours"] - 1.0 for mine, theirs in both),
        shares=tuple(
            (name, *(fmean(run["attainment"][name] for run in runs) for runs in zip(*both, strict=True)))
            for name in both[0][0]["attainment"]
        ),
        keeps=(rival["attainment_worst"] >= TARGET, ours["attainment_worst"] >= TARGET),
    )


def _better(pair: Beaten) -> bool:
    if pair.keeps[0]:
        return not pair.keeps[1] or pair.hours < -LEVEL
    if pair.keeps[1]:
        return False
    ahead = [mine - theirs for _, mine, theirs in pair.shares]
    behind = min(ahead) < -WORSE or pair.hours > LEVEL
    return not behind and (max(ahead) > BETTER or pair.hours < -LEVEL)


Reasons = Mapping[tuple[str, float, str], str]
"""By trace, load and policy; the policy may be empty."""


def reasons_of(text: str, grids: Sequence[Cell]) -> dict[tuple[str, float, str], str]:
    """Raises PageError, which names the entry, the key and what is allowed."""
    read = tomllib.loads(text)
    if unknown := sorted(read.keys() - {"reason"}):
        raise PageError(f"{unknown[0]}: unknown; allowed is reason")
    entries = read.get("reason", [])
    if not isinstance(entries, list):
        raise PageError(f"reason: {entries!r}; must be tables, [[reason]]")
    traces = [grid["scenario"] for grid in grids]
    allowed = {"trace": traces, "load": grids[0]["loads"], "policy": grids[0]["policies"]}
    found: dict[tuple[str, float, str], str] = {}
    for number, entry in enumerate(entries):
        trace, load, policy, why = _reason(f"reason[{number}]", entry, allowed)
        if (trace, load, policy) in found:
            raise PageError(f"reason[{number}]: a second one of {trace}, load {load:g}, {policy or 'any rival'}")
        found[trace, load, policy] = why
    return found


def _reason(place: str, entry: Any, allowed: Mapping[str, Sequence[Any]]) -> tuple[str, float, str, str]:
    if not isinstance(entry, dict):
        raise PageError(f"{place}: {entry!r}; must be a table, [[reason]]")
    if unknown := sorted(entry.keys() - {*allowed, "why"}):
        raise PageError(f"{place}.{unknown[0]}: unknown; allowed are {', '.join(allowed)} and why")
    if missing := [key for key in ("trace", "load", "why") if key not in entry]:
        raise PageError(f"{place}.{missing[0]}: missing")
    for key, values in allowed.items():
        if key in entry and (isinstance(entry[key], bool) or entry[key] not in values):
            raise PageError(f"{place}.{key}: {entry[key]!r}; must be one of {', '.join(map(str, values))}")
    if not isinstance(entry["why"], str) or not entry["why"].strip():
        raise PageError(f"{place}.why: {entry['why']!r}; must be a sentence")
    return entry["trace"], float(entry["load"]), entry.get("policy", ""), " ".join(entry["why"].split())


def rivals_section(grids: Sequence[Cell], reasons: Reasons) -> str:
    """Who beats ours, where, by how much, and why as far as somebody has said."""
    places = [(grid["scenario"], load) for grid in grids for load in grid["loads"]]
    everyone = [each for grid in grids for each in beaten(grid)]
    where = list(dict.fromkeys((each.trace, each.load) for each in everyone))
    lines = [
        f"## Who beats `{OURS}`, and why",
        f"On {len(places) - len(where)} of {len(places)} pairs of trace and load nobody. A rival is better if it keeps "
        f"99 % of every class in every seed and `{OURS}` does not; if both do, and it needs at least {LEVEL:.0%} fewer "
        f"GPU-hours; or if neither does, it is behind in no class (by {WORSE:.1%}) nor in GPU-hours, and ahead in a "
        f"class by {BETTER:.1%} or in GPU-hours. At most {RIVALS_SHOWN} of each pair, the best first.",
    ]
    if everyone:
        rows = [row for place in where for row in _rows([e for e in everyone if (e.trace, e.load) == place], reasons)]
        head = ["trace", "load", "rival", "in SLO: rival, `chiron`", "GPU-hours", "why"]
        lines.append(markdown(head, rows, words=("trace", "rival", "why")))
    return "\n\n".join(lines)


def _rows(rivals: Sequence[Beaten], reasons: Reasons) -> list[list[str]]:
    rows = []
    for each in rivals[:RIVALS_SHOWN]:
        why = reasons.get((each.trace, each.load, each.policy)) or reasons.get((each.trace, each.load, ""), "")
        shares = "; ".join(f"{name} {_down(mine)}, {_down(theirs)}" for name, mine, theirs in each.shares)
        rows.append([each.trace, f"{each.load:g}", f"`{each.policy}`", shares, f"{100 * each.hours:+.1f} %", why])
    if len(rivals) > RIVALS_SHOWN:
        rows[-1][2] += f" and {len(rivals) - RIVALS_SHOWN} more"
    return rows


def stale(grids: Sequence[Cell], reasons: Reasons) -> list[tuple[str, float, str]]:
    """Reasons of what is no longer so."""
    so = {(each.trace, each.load, name) for grid in grids for each in beaten(grid) for name in (each.policy, "")}
    return [place for place in reasons if place not in so]


def by_trace(grids: Sequence[Cell], order: Sequence[str]) -> str:
    """At each load, policies by traces."""
    parts = [
        "## Each trace",
        "GPU-hours over the bound; in brackets the worst class in the worst seed, where that is below 99 %. In bold "
        f"the least that keeps every SLO, but for `{CLAIRVOYANT}`.",
    ]
    for load in grids[0]["loads"]:
        at = [{cell["policy"]: cell for cell in grid["cells"] if cell["load"] == load} for grid in grids]
        best = [_cheapest(cells.values()) for cells in at]
        rows = [
            [
                f"`{policy}`",
                *(_brief(cells.get(policy), policy == least) for cells, least in zip(at, best, strict=True)),
            ]
            for policy in order
        ]
        parts += [f"### Load {load:g}", markdown(["policy", *(grid["scenario"] for grid in grids)], rows)]
    return "\n\n".join(parts)


def _cheapest(cells: Iterable[Cell]) -> str:
    keeping = [c for c in cells if c["policy"] != CLAIRVOYANT and c["runs"] and c["attainment_worst"] >= TARGET]
    return min(keeping, key=lambda cell: cell["gpu_hours"]["mean"])["policy"] if keeping else ""


def _brief(cell: Cell | None, best: bool) -> str:
    if cell is None or not cell["runs"]:
        return "failed" if cell is not None and cell["failed"] else "-"
    words = f"{cell['gpu_hours']['mean'] / cell['gpu_hours_bound_full']:.2f}x"
    if cell["attainment_worst"] < TARGET:
        words += f" ({_down(cell['attainment_worst'])})"
    return f"**{words}**" if best else words


def failures(grids: Sequence[Cell]) -> str:
    found = [
        f"- `{cell['policy']}` on {grid['scenario']} at load {cell['load']:g}, seed {seed}: {error}"
        for grid in grids
        for cell in grid["cells"]
        for seed, error in cell["failed"].items()
    ]
    return "\n".join(["## Runs that failed", "", *found]) if found else ""


def page(grids: Sequence[Cell], figure: str, reasons: Reasons) -> str:
    loads, seeds = grids[0]["loads"], grids[0]["seeds"]
    found = points(grids)
    introduction = INTRODUCTION.format(
        policies=len(grids[0]["policies"]),
        scenarios=len(grids),
        names=", ".join(f"`{grid['scenario']}`" for grid in grids),
        loads=" and ".join(part for part in (", ".join(f"{load:g}" for load in loads[:-1]), f"{loads[-1]:g}") if part),
        seeds=f"{seeds[0]} to {seeds[-1]}" if len(seeds) > 1 else f"{seeds[0]}",
        runs=sum(len(cell["runs"]) for grid in grids for cell in grid["cells"]),
        means=_means(min(loads), max(loads)),
    )
    picture = f"![Attainment against GPU-hours at each load, interactive above and batch below]({figure})"
    parts = [introduction, verdict(found, loads), picture, table(found, loads), rivals_section(grids, reasons)]
    return "\n\n".join(part for part in [*parts, DETAILS, by_trace(grids, list(found)), failures(grids)] if part) + "\n"


def _means(least: float, most: float) -> str:
    """What the lightest and the heaviest load are."""
    words = ["At load 1 work and GPUs match"]
    if least < 1.0:
        words.append(f"at {least:g} most of the fleet can rest")
    if most > ROOM:
        over = f"a fixed fleet would need {most / ROOM - 1.0:.0%} more GPUs than there are"
        words.append(f"and at {most:g} {over}: what counts there is who is still served")
    return ",\n".join(words) + "."


def main() -> None:
    parser = argparse.ArgumentParser(description="Every policy at three loads as a Markdown page, on stdout.")
    parser.add_argument("files", metavar="FILE.json", nargs="+", type=Path)
    parser.add_argument("--figure", type=Path, required=True)
    parser.add_argument("--reasons", type=Path, help="why a rival is better, by hand")
    given = parser.parse_args()
    grids = [json.loads(path.read_text(encoding="utf-8")) for path in given.files]
    if len({(tuple(grid["loads"]), tuple(grid["seeds"]), tuple(grid["policies"])) for grid in grids}) > 1:
        parser.error("the files are of different loads, seeds or policies")
    try:
        reasons = reasons_of(given.reasons.read_text(encoding="utf-8"), grids) if given.reasons is not None else {}
    except (PageError, tomllib.TOMLDecodeError) as error:
        parser.error(f"{given.reasons}: {error}")
    for trace, load, policy in stale(grids, reasons):
        of = policy or "any rival"
        print(f"{given.reasons}: nothing to explain any more on {trace} at load {load:g} of {of}", file=sys.stderr)
    draw(points(grids), grids[0]["loads"], given.figure)
    sys.stdout.write(page(grids, f"figures/{given.figure.name}", reasons))


if __name__ == "__main__":
    main()
