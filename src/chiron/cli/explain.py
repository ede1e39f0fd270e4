"""``chiron explain``: why did the fleet change at that moment? Read from what a run left behind."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from math import isfinite
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from chiron.config import ConfigError
from chiron.config.read import suggest
from chiron.core.units import parse_duration
from chiron.telemetry.result import DecisionPoint, FleetPoint, Result
from chiron.telemetry.store import load_result

LISTED = 5
"""Changes that the overview lists."""


def explain(
    file: Annotated[Path, typer.Argument(metavar="FILE.chiron", help="A result saved with --save.")],
    at: Annotated[
        str | None,
        typer.Option("--at", metavar="TIME", help="Since the start: 41:00, 1:02:03, 2460s, 41m. Default: overview."),
    ] = None,
    model: Annotated[str | None, typer.Option("--model", help="One model; default: all of them.")] = None,
) -> None:
    """Say in words why the fleet grew or shrank.

    Without --at: every reason with its count, and the largest changes. With --at: the decision in force at that
    moment, the numbers behind it, the fleet and the queue then, and the decisions before and after.

    Example: `chiron simulate demo --save run.chiron && chiron explain run.chiron --at 12:30`
    """
    at_s = None if at is None else parse_moment(at)
    result = load_result(file)
    models = _models(result, model)
    console = Console(highlight=False)
    console.print(f"{result.scenario}, policy {result.policy}, seed {result.seed}", style="bold")
    for name in models:
        decisions = [d for d in result.decisions if d.kind == "fleet" and d.subject == name]
        fleet = [p for p in result.fleet if p.model == name]
        if at_s is None:
            _print_overview(console, name, decisions)
        else:
            for line in moment(name, decisions, fleet, at_s):
                console.print(line, soft_wrap=True)


def parse_moment(text: str) -> float:
    """Seconds from the start: ``41:00`` is minutes and seconds, ``1:02:03`` has hours; else a duration."""
    clock = re.fullmatch(r"(?:(\d+):)?(\d+):(\d{2})", text.strip())
    if clock is None:
        return parse_duration(text)
    hours, minutes, seconds = (int(part or 0) for part in clock.groups())
    return 3600.0 * hours + 60.0 * minutes + seconds


def show_moment(t_s: float) -> str:
    minutes, seconds = divmod(round(t_s), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


def moment(model: str, decisions: Sequence[DecisionPoint], fleet: Sequence[FleetPoint], at_s: float) -> Iterable[str]:
    """The story of one model around one moment, line by line."""
    changes = [d for d in decisions if d.before != d.after]
    earlier = [d for d in changes if d.t_s <= at_s]
    later = [d for d in changes if d.t_s > at_s]
    yield ""
    yield f"{model} at {show_moment(at_s)} ({at_s:,.0f} s)"
    ends_s = max((p.t_s for p in fleet), default=0.0)
    if at_s > ends_s:
        yield f"  The run ended at {show_moment(ends_s)}; this is how it stood then."
    if earlier:
        yield from _tell(earlier[-1], at_s)
    else:
        yield "  The plan had not changed since the start."
    state = [p for p in fleet if p.t_s <= at_s][-1:]
    for point in state:
        yield from _tell_state(point)
    if len(earlier) > 1:
        yield f"  Before it: {_brief(earlier[-2])}"
    if later:
        yield f"  Next: {_brief(later[0])}"
    else:
        yield "  No change followed."


def words(reason: str) -> str:
    """A reason as logged, as words."""
    return reason.replace("_", " ").replace("-", " ")


def _tell(decision: DecisionPoint, at_s: float) -> Iterable[str]:
    ago = round(at_s - decision.t_s)
    when = f"at {show_moment(decision.t_s)}" + (f", {ago:,} s before" if ago else "")
    yield f"  The plan {_verb(decision)} from {decision.before:g} to {decision.after:g} instances {when}."
    yield f"  Why: {words(decision.reason)}."
    if decision.numbers:
        yield "  Numbers: " + ", ".join(f"{words(name)} {_number(value)}" for name, value in decision.numbers.items())


def _tell_state(point: FleetPoint) -> Iterable[str]:
    roles = ", ".join(f"{count} {role}" for role, count in point.ready.items() if count) or "none"
    yield (
        f"  Fleet: {sum(point.ready.values())} ready ({roles}), {point.starting} starting, {point.draining} draining; "
        f"{point.gpus} GPUs billed, {point.planned} instances planned."
    )
    yield (
        f"  Work: {point.running_interactive:,} interactive and {point.running_batch:,} batch requests running, "
        f"{point.waiting_interactive:,} and {point.waiting_batch:,} waiting."
    )
    if isfinite(point.ibp):
        target = f" (target {point.ibp_target:.2f})" if isfinite(point.ibp_target) else ""
        yield f"  Interactive backpressure (busy / interactive and mixed instances): {point.ibp:.2f}{target}."
    if isfinite(point.bbp):
        yield f"  Batch backpressure (groups that would be late): {point.bbp:g}."
    for deadline_s, requests in point.groups:
        due = f"due at {show_moment(deadline_s)}" if isfinite(deadline_s) else "without a deadline"
        yield f"  Queued batch group: {requests:,} requests {due}."


def _brief(decision: DecisionPoint) -> str:
    return f"{show_moment(decision.t_s)}, {decision.before:g} -> {decision.after:g}, {words(decision.reason)}."


def _verb(decision: DecisionPoint) -> str:
    return "grew" if decision.after > decision.before else "shrank"


def _number(value: float) -> str:
    return f"{value:,.0f}" if value == round(value) and abs(value) < 1e15 else f"{value:,.3g}"


def _print_overview(console: Console, model: str, decisions: Sequence[DecisionPoint]) -> None:
    changes = [d for d in decisions if d.before != d.after]
    console.print(f"\n{model}: {len(changes)} changes of the plan in {len(decisions)} logged fleet decisions")
    table = Table("why", "grew", "shrank", box=None, pad_edge=False, header_style="bold")
    grew = Counter(d.reason for d in changes if d.after > d.before)
    shrank = Counter(d.reason for d in changes if d.after < d.before)
    for reason, _ in (grew + shrank).most_common():
        table.add_row(words(reason), str(grew[reason]), str(shrank[reason]))
    if changes:
        console.print(table)
    largest = sorted(changes, key=lambda d: (-abs(d.after - d.before), d.t_s))[:LISTED]
    for decision in sorted(largest, key=lambda d: d.t_s):
        console.print(f"  {_brief(decision)}")
    if largest:
        console.print(f"More about one: --at {show_moment(largest[0].t_s)}")


def _models(result: Result, model: str | None) -> tuple[str, ...]:
    if model is None:
        return result.models
    if model not in result.models:
        raise ConfigError(f"--model {model!r}: {suggest(model, result.models)}")
    return (model,)
