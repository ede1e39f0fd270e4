"""The report: one HTML file that needs nothing else, neither network nor server.

The verdict and the table are plain HTML, readable without scripts; the charts are data that ``report.js`` draws with
the plotly that is written into the page.
"""

from __future__ import annotations

import json
import shlex
from collections import Counter
from collections.abc import Mapping, Sequence
from html import escape
from importlib import resources
from pathlib import Path
from string import Template
from typing import Any

from chiron.telemetry import charts, fleet_charts
from chiron.telemetry.errors import ReportError, need
from chiron.telemetry.marks import figure
from chiron.telemetry.palette import Look, looks
from chiron.telemetry.result import DecisionPoint, Result
from chiron.telemetry.series import POINTS_MAX
from chiron.telemetry.table import table
from chiron.telemetry.verdict import TARGET, Verdict, group, seed_of, seed_order, verdict

DECISIONS_SHOWN = 300
"""Per policy."""
POINTS_TOTAL = 70_000
"""Points that the charts over time share, so that many policies and models still make a file below 6 MB."""
TRACES_PER_VIEW = 20
"""Lines and bands in the charts of one policy and model, roughly."""


def write_report(
    results: Sequence[Result],
    path: str | Path,
    *,
    bounds: Mapping[int, float] | None = None,
    target: float = TARGET,
    command: str | None = None,
    notes: Sequence[str] = (),
) -> Path:
    """Write the report of one scenario's runs and return its path.

    ``bounds``: GPU-hours that full attainment needs at least, by seed; by default those in the summaries.
    ``command``: the command line that made the results; by default one that would. ``notes``: what a reader must know
    before believing the figures; they stand beneath the verdict.
    """
    page = report_html(results, bounds=bounds, target=target, command=command, notes=notes)
    try:
        Path(path).write_text(page, encoding="utf-8")
    except OSError as error:
        raise ReportError(f"cannot write {path}: {error.strerror or error}") from error
    return Path(path)


def report_html(
    results: Sequence[Result],
    *,
    bounds: Mapping[int, float] | None = None,
    target: float = TARGET,
    command: str | None = None,
    notes: Sequence[str] = (),
) -> str:
    """The page as text."""
    judged = verdict(results, target=target)
    order = [p.policy for p in judged.ranking]
    seen = looks(order)
    first = judged.ranking[0].results[0]
    bound = full_bound(results, bounds)
    return Template(asset("report.html")).substitute(
        title=escape(f"Chiron: {first.scenario}"),
        style=asset("report.css"),
        scenario=escape(first.scenario),
        subtitle=escape(subtitle(results)),
        headline=headline(judged, seen),
        notes="".join(f"<li>{escape(line)}</li>" for line in (*judged.notes, *notes)),
        table=table(judged, seen, target=target, bound=bound),
        missed=missed(first),
        command=escape(command or rerun(results)),
        scenario_text=escape(first.scenario_text.strip() or "(no scenario file: made with the Python API)"),
        settings="".join(settings_of(p.results[0]) for p in judged.ranking),
        data=page_data(judged, seen, bound=bound, target=target),
        plotly=need("plotly.offline").get_plotlyjs(),
        script=asset("report.js"),
    )


def page_data(judged: Verdict, seen: dict[str, Look], *, bound: float | None, target: float) -> str:
    """What ``report.js`` draws, as JSON that cannot end its script element."""
    firsts = [p.results[0] for p in judged.ranking]
    views = sum(len(r.models) for r in firsts)
    limit = max(60, min(POINTS_MAX, POINTS_TOTAL // (TRACES_PER_VIEW * views)))
    data = {
        "colours": {name: look.colour for name, look in seen.items()},
        "tradeoff": charts.tradeoff(judged.ranking, seen, bound, target),
        "latencies": charts.latencies(judged.ranking, seen),
        "policies": [r.policy for r in firsts],
        "models": list(firsts[0].models),
        "seed": {r.policy: seed_of(r) for r in firsts},
        "views": {r.policy: {model: view(r, model, limit) for model in r.models} for r in firsts},
        "decisions": {r.policy: decisions(r) for r in firsts},
    }
    return json.dumps(data, allow_nan=False, separators=(",", ":")).replace("</", "<\\/").replace("<!--", "<\\u0021--")


def view(result: Result, model: str, limit: int) -> dict[str, Any]:
    """The charts of one policy and model."""
    points = [p for p in result.fleet if p.model == model]
    end_s = max(result.summary["sim_s"], points[-1].t_s if points else 0.0)
    drawn = {name: chart(points, end_s, limit) for name, chart in fleet_charts.FLEET_CHARTS.items()}
    drawn["batch_sizes"] = fleet_charts.batch_sizes([p for p in result.batch_sizes if p.model == model], end_s, limit)
    return drawn


def decisions(result: Result) -> dict[str, Any]:
    """The decisions worth reading, in order of time, and how often each reason was given."""
    chosen = sorted(range(len(result.decisions)), key=lambda i: (*importance(result.decisions[i]), -i))
    rows = [result.decisions[i] for i in sorted(chosen[:DECISIONS_SHOWN])]
    reasons = Counter((d.kind, d.reason) for d in result.decisions)
    return {
        "rows": [
            [
                round(d.t_s, 1),
                d.kind,
                d.subject,
                figure(d.before),
                figure(d.after),
                d.reason,
                ", ".join(f"{key} {value:.4g}" for key, value in d.numbers.items()),
            ]
            for d in rows
        ],
        "total": len(result.decisions),
        "reasons": [[kind, reason, count] for (kind, reason), count in reasons.most_common()],
    }


def importance(decision: DecisionPoint) -> tuple[int, int]:
    """Least first: what changed the fleet, then the rarer kinds, then batch sizes; what changed nothing last."""
    rank = {"fleet": 0, "role": 1, "reject": 2, "migrate": 3, "batch_size": 4}
    return int(decision.before == decision.after and decision.kind in ("fleet", "batch_size")), rank.get(
        decision.kind, 5
    )


def full_bound(results: Sequence[Result], bounds: Mapping[int, float] | None) -> float | None:
    """Mean over seeds of the GPU-hours that full attainment needs at least; None if unknown."""
    own = {seed_order(r.seed): float(r.summary["gpu_hours_bound_full"] or 0) for r in results}
    by_seed = own | dict(bounds or {})
    known = [by_seed[seed] for seed in sorted(own) if by_seed[seed] > 0]
    return sum(known) / len(known) if known else None


def headline(judged: Verdict, seen: dict[str, Look]) -> str:
    """The verdict, with the winner's name in bold."""
    text = escape(judged.headline)
    name = judged.winner and escape(judged.winner)
    if name and text.startswith(name):
        dot = f'<span class="dot" style="background:{seen[judged.winner or ""].colour}"></span>'
        return f"{dot}<strong>{name}</strong>{text[len(name) :]}"
    return text


def subtitle(results: Sequence[Result]) -> str:
    """What ran, in a line."""
    runs = group(results)
    seeds = seeds_of(results)
    first = runs[0].results[0]
    parts = [
        f"{first.summary['requests']:,} requests",
        f"{span(first.summary['sim_s'])} of traffic",
        counted(len(first.models), "model"),
        counted(len(runs), "policy", "policies"),
    ]
    if seeds:
        parts.append(f"seed {seeds[0]}" if len(seeds) == 1 else f"{len(seeds)} seeds ({', '.join(map(str, seeds))})")
    return " · ".join(parts)


def seeds_of(results: Sequence[Result]) -> list[int]:
    """In order; none of live runs."""
    return sorted({r.seed for r in results if r.seed is not None})


def missed(result: Result) -> str:
    """What attainment counts as missed besides what was late."""
    if result.seed is None:
        return (
            ", and counts rejected and failed requests as missed; those that a client broke off, or that are open"
            " still, only if a promise was broken by then"
        )
    return ", and counts rejected, failed, cancelled and unfinished requests as missed"


def span(seconds: float) -> str:
    """A duration in a unit that shows it."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 3600 else f"{seconds / 3600:.2f} h"


def counted(n: int, one: str, many: str = "") -> str:
    """``1 model``, ``2 models``."""
    return f"{n} {one if n == 1 else many or one + 's'}"


def rerun(results: Sequence[Result]) -> str:
    """A command line that runs the same again, where one can."""
    if not seeds_of(results):
        return "(a live run: no command repeats it)"
    runs = group(results)
    words = ["chiron", "compare" if len(runs) > 1 else "simulate", results[0].scenario]
    for policy in runs:
        words += ["--policy", policy.policy]
    for seed in seeds_of(results):
        words += ["--seed", str(seed)]
    return shlex.join([*words, "--report", "report.html"])


def settings_of(result: Result) -> str:
    """One policy's settings, folded."""
    body = json.dumps(result.settings, indent=2, default=str)
    return f"<details><summary>Settings of {escape(result.policy)}</summary><pre>{escape(body)}</pre></details>"


def asset(name: str) -> str:
    """A part of the page, as shipped."""
    return resources.files("chiron").joinpath("data", "report", name).read_text(encoding="utf-8")
