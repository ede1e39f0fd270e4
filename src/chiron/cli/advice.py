"""``chiron advice``: what a gateway in advise mode would have done, and saved."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from chiron.telemetry.advice import Advice, Judged, read_advice
from chiron.telemetry.decision_text import words
from chiron.telemetry.event_log import read_event_log

REASONS_SHOWN = 3


def advice(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="The event log: chiron-data/events.jsonl.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print the numbers as JSON.")] = False,
) -> None:
    """Say what `chiron serve --advise` would have done, and saved.

    Reads the event log with all of its rotated files, also while the gateway runs: instances that ran beside those
    that were advised, and how many SLOs were met while more were advised than ran.

    Example:

    - `chiron advice chiron-data/events.jsonl`
    """
    damage: list[str] = []
    found = read_advice(read_event_log(file, damaged=damage.append))
    if as_json:
        typer.echo(json.dumps([asdict(each) | {"saved": each.saved} for each in found], indent=1))
        return
    console = Console(highlight=False, markup=False)
    if damage:
        console.print(f"Passed over: {len(damage)} damaged lines.", style="red")
    for each in found:
        _print(console, each)
    console.print("\nAn estimate: the advice was not carried out.", soft_wrap=True)


def _print(console: Console, found: Advice) -> None:
    hours = found.seconds / 3600.0
    console.print(f"\n{found.model}: {_time(found.seconds)} with advice", style="bold")
    table = Table("", "ran", "advised", box=None, pad_edge=False, header_style="bold")
    for column in table.columns[1:]:
        column.justify = "right"
    table.add_row("instances, mean", f"{found.ran_mean:.2f}", f"{found.advised_mean:.2f}")
    table.add_row("instances, most", str(found.ran_most), str(found.advised_most))
    table.add_row("instance-hours", *(_figure(mean * hours) for mean in (found.ran_mean, found.advised_mean)))
    if found.price_per_hour:
        costs = [mean * hours * found.price_per_hour for mean in (found.ran_mean, found.advised_mean)]
        table.add_row("cost", *map(_cost, costs))
    console.print(table)
    for line in _tell(found):
        console.print(line, soft_wrap=True)


def _tell(found: Advice) -> Iterator[str]:
    if (saved := found.saved) is not None:
        cost = f", {_cost(abs(found.saved_cost))} of cost" if found.price_per_hour else ""
        yield f"{abs(saved):.1%} {'fewer' if saved >= 0 else 'more'} instance-hours{cost}."
    if found.short_s:
        then, otherwise = _share(found.when_short), _share(found.otherwise)
        yield f"More were advised than ran for {_time(found.short_s)}: {then} then, {otherwise} otherwise."
    else:
        yield f"More were never advised than ran: {_share(found.otherwise)}."
    yield f"Fewer were advised than ran for {_time(found.spare_s)}."
    why = ", ".join(f"{words(reason)} ({count:,})" for reason, count in [*found.reasons.items()][:REASONS_SHOWN])
    if not found.changes:
        yield "The advice never changed."
        return
    changed = "once" if found.changes == 1 else f"{found.changes:,} times"
    yield f"The advice changed {changed}: {why}."


def _share(judged: Judged) -> str:
    """How many met their SLOs."""
    return "no request ended" if judged.share is None else f"{judged.share:.1%} of requests met their SLOs"


def _figure(value: float) -> str:
    """Hours: a short trial has few of them."""
    return f"{value:,.1f}" if value >= 10.0 else f"{value:.3f}"


def _cost(value: float) -> str:
    return f"{value:,.2f}" if value >= 1.0 else f"{value:.4f}"


def _time(seconds: float) -> str:
    if seconds < 90.0:
        return f"{seconds:.0f} s"
    minutes, hours = divmod(round(seconds / 60.0), 60)[::-1]
    days, hours = divmod(hours, 24)
    parts = [f"{days} d"] * bool(days) + [f"{hours} h"] * bool(hours) + [f"{minutes} min"] * (not days)
    return " ".join(parts)
