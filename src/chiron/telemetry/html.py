"""The report: one HTML file that needs nothing else, neither network nor server.

All of it is HTML and SVG, made here, and readable without scripts; ``report.js`` picks policies, filters decisions, and
reads values where a pointer is. Text from users and servers (policies, models, keys, errors) is escaped where it is
written.
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

from chiron.telemetry import charts, fleet_charts, traffic
from chiron.telemetry.decision_text import kind_words, quantity, show_moment, tell, words
from chiron.telemetry.drawing import draw
from chiron.telemetry.errors import ReportError
from chiron.telemetry.format import counted, listed, span
from chiron.telemetry.marks import Chart
from chiron.telemetry.palette import Look, looks
from chiron.telemetry.run_data import BLAMELESS, EXCUSED, OUTCOMES, DecisionPoint, RunData
from chiron.telemetry.table import class_table, table
from chiron.telemetry.verdict import TARGET, Verdict, group, seed_of, seed_order, verdict

DECISIONS_SHOWN = 300
"""Per policy."""
DECISIONS_TOTAL = 1500
"""In a page of many policies; each has ``DECISIONS_MIN`` at least."""
DECISIONS_MIN = 40
POINTS_PER_LINE = 600
"""A line of a chart has no more: two for each pixel that it is wide would not be seen."""
POINTS_TOTAL = 30_000
"""Points that the charts over time share, so that a page of many policies and models stays small."""
LINES_PER_VIEW = 16
"""Lines and layers in the charts of one policy and model, roughly."""


def write_report(
    results: Sequence[RunData],
    path: str | Path,
    *,
    bounds: Mapping[int, float] | None = None,
    target: float = TARGET,
    command: str | None = None,
    notes: Sequence[str] = (),
    errors: Mapping[str, tuple[int, str]] | None = None,
) -> Path:
    """Write the report of one scenario's runs and return its path.

    ``bounds``: GPU-hours that full attainment needs at least, by seed; by default those in the summaries.
    ``command``: the command line that made the results; by default one that would. ``notes``: what a reader must know
    before believing the figures; they stand beneath the verdict. ``errors``: of a client's run, how often each kind of
    error came, and the words of the first.
    """
    page = report_html(results, bounds=bounds, target=target, command=command, notes=notes, errors=errors)
    try:
        Path(path).write_text(page, encoding="utf-8")
    except OSError as error:
        raise ReportError(f"cannot write {path}: {error.strerror or error}") from error
    return Path(path)


def report_html(
    results: Sequence[RunData],
    *,
    bounds: Mapping[int, float] | None = None,
    target: float = TARGET,
    command: str | None = None,
    notes: Sequence[str] = (),
    errors: Mapping[str, tuple[int, str]] | None = None,
) -> str:
    """The page as text."""
    judged = verdict(results, target=target)
    seen = looks([p.policy for p in judged.ranking])
    firsts = [p.results[0] for p in judged.ranking]
    bound = full_bound(results, bounds)
    parts = {
        "title": escape(f"Chiron: {firsts[0].scenario}"),
        "style": asset("report.css"),
        "scenario": escape(firsts[0].scenario),
        "subtitle": escape(subtitle(results)),
        "headline": headline(judged, seen),
        "notes": "".join(f"<li>{escape(line)}</li>" for line in (*judged.notes, *notes)),
        "table": table(judged, seen, target=target, bound=bound),
        "classes": class_table(judged.ranking, seen, target=target),
        "classes_open": " open" if len(firsts) == 1 else "",
        "missed": missed(firsts[0]),
        "errors": error_section(errors or {}),
        "compared": section("", compared(judged, seen, bound, target)),
        "views": view_section(firsts, seen),
        "latencies": section("Latency", charts.latencies(judged.ranking, seen), LATENCY_CAPTION, many=True),
        "decisions": decision_section(firsts, seen),
        "command": escape(command or rerun(results)),
        "scenario_text": escape(firsts[0].scenario_text.strip() or "(no scenario file: made with the Python API)"),
        "settings": "".join(settings_of(result) for result in firsts),
        "script": asset("report.js"),
    }
    return Template(asset("report.html")).substitute(parts)


def compared(judged: Verdict, seen: dict[str, Look], bound: float | None, target: float) -> list[Chart | None]:
    """Charts of all policies. Of a single run one point is no comparison unless there is a bound to compare it with,
    and its fleet is shown by role anyway."""
    firsts = [p.results[0] for p in judged.ranking]
    several = sum(len(p.results) for p in judged.ranking) > 1
    return [
        charts.tradeoff(judged.ranking, seen, bound, target) if several or bound else None,
        charts.fleets(judged.ranking, seen, POINTS_PER_LINE) if len(firsts) > 1 or len(firsts[0].models) > 1 else None,
    ]


LATENCY_CAPTION = (
    "Share of requests that were at least this fast; equal steps upwards are ten times fewer slower ones each. The "
    "dashed line is the SLO; a curve that ends below 100 % has requests that never got there."
)


def section(title: str, drawn: Sequence[Chart | None], caption: str = "", *, many: bool = False) -> str:
    """Charts under a heading; nothing if there are none."""
    figures = "".join(draw(chart) for chart in drawn if chart is not None)
    if not figures:
        return ""
    head = f"<h2>{escape(title)}</h2>" if title else ""
    about = f'<p class="caption">{escape(caption)}</p>' if caption else ""
    return f'<section>{head}{about}<div class="{"grid" if many else "stack"}">{figures}</div></section>'


def view_section(firsts: Sequence[RunData], seen: dict[str, Look]) -> str:
    """Charts over time of each policy and model, of which the script shows one at a time."""
    limit = max(40, min(POINTS_PER_LINE, POINTS_TOTAL // (LINES_PER_VIEW * sum(len(r.models) for r in firsts))))
    views = []
    for number, result in enumerate(firsts):
        for place, model in enumerate(result.models):
            figures = "".join(draw(chart) for chart in view(result, model, limit) if chart is not None)
            if figures:
                name = (
                    f"{result.policy}, {model}{seed_of(result)}" if len(firsts) > 1 or len(result.models) > 1 else model
                )
                views.append(
                    f'<div class="view" data-policy="{number}" data-model="{place}">'
                    f'<p class="caption">{escape(name)}</p><div class="stack">{figures}</div></div>'
                )
    if not views:
        return ""
    models = firsts[0].models
    options = "".join(f'<option value="{place}">{escape(model)}</option>' for place, model in enumerate(models))
    pick = f'<label>Model <select id="models">{options}</select></label>' if len(models) > 1 else ""
    title = "One policy over time" if len(firsts) > 1 else "Over time"
    return (
        f'<section id="views"><h2>{title}</h2><div class="pick">{policy_buttons(firsts, seen)}{pick}</div>'
        f"{''.join(views)}</section>"
    )


def policy_buttons(firsts: Sequence[RunData], seen: dict[str, Look]) -> str:
    """One per policy; none where there is nothing to choose."""
    if len(firsts) < 2:
        return ""
    buttons = "".join(
        f'<button type="button" data-policy="{number}" aria-pressed="{"true" if number == 0 else "false"}">'
        f'<span class="dot" style="background:{seen[r.policy].colour}"></span>{escape(r.policy)}</button>'
        for number, r in enumerate(firsts)
    )
    return f'<div class="policies" role="group" aria-label="Policy">{buttons}</div>'


def view(result: RunData, model: str, limit: int) -> list[Chart | None]:
    """The charts over time of one policy and model."""
    points = [p for p in result.fleet if p.model == model]
    end_s = max(float(result.summary["sim_s"]), points[-1].t_s if points else 0.0)
    sizes = [p for p in result.batch_sizes if p.model == model]
    parts = fleet_charts.Parts(fleet=points, batch_sizes=sizes, end_s=end_s)
    first, *others = fleet_charts.all_charts(parts, limit)
    stages = fleet_charts.stages(result.decisions, model, end_s)
    return [first, stages, *others, *traffic.charts(result, model, end_s, limit)]


def error_section(errors: Mapping[str, tuple[int, str]]) -> str:
    """What a client's requests failed with."""
    if not errors:
        return ""
    ranked = sorted(errors.items(), key=lambda item: (-item[1][0], item[0]))
    rows = "".join(error_row(kind, count, first) for kind, (count, first) in ranked)
    head = "".join(f'<th scope="col" role="columnheader">{title}</th>' for title in ("error", *ERROR_LABELS))
    return (
        '<section><h2>Errors</h2><div class="scroll"><table role="table" class="cards errors">'
        f'<thead role="rowgroup"><tr role="row">{head}</tr></thead><tbody role="rowgroup">{rows}</tbody></table></div>'
        "</section>"
    )


ERROR_LABELS = ("times", "first message")


def error_row(kind: str, count: int, first: str) -> str:
    times, said = ERROR_LABELS
    return (
        f'<tr role="row"><th scope="row" role="rowheader">{escape(kind)}</th>'
        f'<td role="cell" data-label="{times}">{count:,}</td>'
        f'<td role="cell" data-label="{said}" class="words">{escape(first)}</td></tr>'
    )


def decision_section(firsts: Sequence[RunData], seen: dict[str, Look]) -> str:
    """Decisions in sentences, of one policy at a time; nothing where none was taken."""
    if not any(result.decisions for result in firsts):
        return ""
    limit = max(DECISIONS_MIN, min(DECISIONS_SHOWN, DECISIONS_TOTAL // len(firsts)))
    data = [decisions(result, limit) for result in firsts]
    return Template(asset("decisions.html")).substitute(
        pick=policy_buttons(firsts, seen), data=embedded(data), policy=escape(firsts[0].policy)
    )


def embedded(data: Any) -> str:
    """JSON that cannot end its script element."""
    text = json.dumps(data, allow_nan=False, separators=(",", ":"), ensure_ascii=False)
    return text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")


def decisions(result: RunData, limit: int = DECISIONS_SHOWN) -> dict[str, Any]:
    """The decisions worth reading, in order of time, and how often each reason was given."""
    chosen = sorted(range(len(result.decisions)), key=lambda i: (*importance(result.decisions[i]), -i))
    rows = [result.decisions[i] for i in sorted(chosen[:limit])]
    reasons = Counter((d.kind, d.reason) for d in result.decisions)
    return {
        "policy": result.policy,
        "rows": [
            [
                show_moment(d.t_s, hours=True),
                kind_words(d.kind),
                sentence(d),
                ", ".join(quantity(name, value) for name, value in d.numbers.items()),
            ]
            for d in rows
        ],
        "total": len(result.decisions),
        "reasons": [[kind_words(kind), words(reason), count] for (kind, reason), count in reasons.most_common()],
    }


def sentence(d: DecisionPoint) -> str:
    return tell(d.kind, d.subject, d.before, d.after, d.reason, d.numbers)


def importance(decision: DecisionPoint) -> tuple[int, int]:
    """Least first: what changed the fleet, then the rarer kinds, then batch sizes; what changed nothing last."""
    rank = {"fleet": 0, "role": 1, "stage": 1, "reject": 2, "migrate": 3, "token_budget": 4, "batch_size": 5}
    return int(decision.before == decision.after and decision.kind in ("fleet", "batch_size")), rank.get(
        decision.kind, 6
    )


def full_bound(results: Sequence[RunData], bounds: Mapping[int, float] | None) -> float | None:
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


def subtitle(results: Sequence[RunData]) -> str:
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


def seeds_of(results: Sequence[RunData]) -> list[int]:
    """In order; none of live runs."""
    return sorted({r.seed for r in results if r.seed is not None})


def missed(result: RunData) -> str:
    """What attainment counts as missed besides what was late."""
    if result.seed is None:
        certain = [name for name in OUTCOMES[1:] if name not in (*EXCUSED, *BLAMELESS)]
        return (
            f", and counts {listed(certain)} requests as missed; those that a client cancelled, or that are open"
            " still, only if they had missed an SLO by then; rejected ones (client errors) not at all"
        )
    counted = [name for name in OUTCOMES[1:] if name not in BLAMELESS]
    return f", and counts {listed(counted)} requests as missed; rejected ones, which nobody could serve, not at all"


def rerun(results: Sequence[RunData]) -> str:
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


def settings_of(result: RunData) -> str:
    """One policy's settings, folded."""
    body = json.dumps(result.settings, indent=2, default=str)
    return f"<details><summary>Settings of {escape(result.policy)}</summary><pre>{escape(body)}</pre></details>"


def asset(name: str) -> str:
    """A part of the page, as shipped."""
    return resources.files("chiron").joinpath("data", "report", name).read_text(encoding="utf-8")
