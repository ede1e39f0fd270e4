"""``chiron explain``: why did the fleet change at that moment? Read from what a run left behind."""

from __future__ import annotations

import json
import sys
import zipfile
from collections import Counter
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from chiron.cli.explain.moment import RunClock
from chiron.cli.explain.source import RunHistory, load_history
from chiron.config.read import ConfigError, suggest
from chiron.telemetry.decision_text import quantity, words
from chiron.telemetry.event_log import read_event_log
from chiron.telemetry.run_data import DecisionPoint

DAMAGE_SHOWN = 5
"""Damaged lines of a log that are named."""
LISTED = 5
"""Changes that the overview lists."""


def explain(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="What --save or --events wrote.")],
    at: Annotated[
        str | None,
        typer.Option(
            "--at",
            metavar="TIME",
            help="Time of day (UTC) in a live run: 12:41; or since the start: 41:00, 1:02:03, 41m.",
        ),
    ] = None,
    model: Annotated[str | None, typer.Option("--model", help="One model; default: all of them.")] = None,
    events: Annotated[
        bool,
        typer.Option("--events", help="Print the events of a log instead, each as a line of JSON, for other tools."),
    ] = False,
) -> None:
    """Explain in words why the fleet scaled up or down.

    Without --at: every reason with its count, and the largest changes. With --at: the decision in force at that
    moment, the numbers behind it, the fleet and the queue then, and the decisions before and after. A saved result
    also shows backpressure and batch groups.

    Examples:

    - `chiron simulate azure --save run.chiron && chiron explain run.chiron --at 12:30`

    - `chiron explain chiron-data/events.jsonl --at 12:41`

    - `chiron explain chiron-data/events.jsonl --events | jq 'select(.event == "ended")'`
    """
    if events:
        for option, given in (("--at", at), ("--model", model)):
            if given is not None:
                raise ConfigError(f"--events prints all events; {option} does not go with it")
        print_events(file)
        return
    history = load_history(file)
    asked = None if at is None else history.clock.read(at)
    console = Console(highlight=False, markup=False)
    models = _models(history, model)
    console.print(history.title, style="bold", soft_wrap=True)
    for words_of in history.damage[:DAMAGE_SHOWN]:
        console.print(f"Passed over: {words_of}.", style="red", soft_wrap=True)
    if len(history.damage) > DAMAGE_SHOWN:
        console.print(f"And {len(history.damage) - DAMAGE_SHOWN} more damaged lines.", style="red")
    if not models:
        console.print("Nothing is in it yet: no request, no instance, no decision.")
    if history.note:
        console.print(history.note, soft_wrap=True)
        return
    if asked is not None and asked.note:
        console.print(asked.note, soft_wrap=True, markup=False)
    for name in models:
        if asked is None:
            _print_overview(console, history, name)
        else:
            for line in moment(history, name, asked.at_s):
                console.print(line, soft_wrap=True, markup=False)


def parse_moment(text: str, began: datetime | None = None, ends_s: float = 0.0) -> float:
    """Seconds from the start of a run that began and lasted so, as ``RunClock`` reads them."""
    return RunClock(ends_s=ends_s, began=began).read(text).at_s


def moment(history: RunHistory, model: str, at_s: float) -> Iterator[str]:
    """One model around one moment, line by line."""
    changes = [d for d in history.decisions if d.subject == model and d.before != d.after]
    # Moments are shown to the second, so a whole second has what is shown with it.
    whole = at_s == round(at_s)
    earlier = [d for d in changes if (round(d.t_s) if whole else d.t_s) <= at_s]
    later = changes[len(earlier) :]
    clock = history.clock
    yield f"\n{model} at {clock.show(at_s)} ({at_s:,.0f} s)"
    if at_s > history.ends_s:
        yield f"  The run ended at {clock.show(history.ends_s)}; this is how it stood then."
    if earlier:
        yield from _tell(earlier[-1], at_s, clock)
    else:
        yield "  The plan had not changed since the start."
    for line in history.state(model, max(at_s, earlier[-1].t_s) if earlier else at_s):
        yield f"  {line}"
    if len(earlier) > 1:
        yield f"  Before it: {_brief(earlier[-2], clock)}"
    yield f"  Next: {_brief(later[0], clock)}" if later else "  No change followed."


def _tell(decision: DecisionPoint, at_s: float, clock: RunClock) -> Iterator[str]:
    ago = max(0, round(at_s - decision.t_s))
    when = f"at {clock.show(decision.t_s)}" + (f", {ago:,} s before" if ago else "")
    verb = "grew" if decision.after > decision.before else "shrank"
    yield f"  The plan {verb} from {decision.before:g} to {decision.after:g} instances {when}."
    yield f"  Why: {words(decision.reason)} ({decision.reason})."
    if decision.numbers:
        yield "  Numbers: " + ", ".join(quantity(name, value) for name, value in decision.numbers.items())


def _brief(decision: DecisionPoint, clock: RunClock) -> str:
    return f"{clock.show(decision.t_s)}, {decision.before:g} -> {decision.after:g}: {words(decision.reason)}."


def _print_overview(console: Console, history: RunHistory, model: str) -> None:
    changes = [d for d in history.decisions if d.subject == model and d.before != d.after]
    console.print(f"\n{model}: {len(changes)} change{'s' if len(changes) != 1 else ''} of the plan")
    table = Table("why", "grew", "shrank", box=None, pad_edge=False, header_style="bold")
    grew = Counter(d.reason for d in changes if d.after > d.before)
    shrank = Counter(d.reason for d in changes if d.after < d.before)
    for reason, _ in (grew + shrank).most_common():
        table.add_row(words(reason), str(grew[reason]), str(shrank[reason]))
    if not changes:
        return
    console.print(table)
    largest = sorted(changes, key=lambda d: (-abs(d.after - d.before), d.t_s))[:LISTED]
    console.print("\nThe largest:")
    for decision in sorted(largest, key=lambda d: d.t_s):
        console.print(f"  {_brief(decision, history.clock)}", soft_wrap=True)
    console.print(f"More about one of them: --at {history.clock.option(largest[0].t_s)}")


def print_events(file: Path) -> None:
    """Whatever their form in the log is. Lines that are damaged are named, and passed over."""
    if zipfile.is_zipfile(file):
        raise ConfigError(f"{file} is a saved result, which has no events; name an event log")
    for event in read_event_log(file, damaged=lambda what: print(f"Passed over: {what}.", file=sys.stderr)):
        print(json.dumps(event))


def _models(history: RunHistory, model: str | None) -> tuple[str, ...]:
    if model is None:
        return history.models
    if model not in history.models:
        raise ConfigError(f"--model {model!r}: {suggest(model, history.models)}")
    return (model,)
