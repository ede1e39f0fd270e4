"""``chiron explain``: why did the fleet change at that moment? Read from what a run left behind."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from chiron.cli.story import Story, load_story
from chiron.cli.words import show_moment, words
from chiron.config.read import ConfigError, suggest
from chiron.core.units import DurationError, parse_duration
from chiron.telemetry.result import DecisionPoint

LISTED = 5
"""Changes that the overview lists."""


def explain(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="What --save or --events wrote.")],
    at: Annotated[
        str | None,
        typer.Option(
            "--at", metavar="TIME", help="Since the start: 41:00, 1:02:03, 41m; or, of a live log, 2026-01-31T12:41Z."
        ),
    ] = None,
    model: Annotated[str | None, typer.Option("--model", help="One model; default: all of them.")] = None,
) -> None:
    """Say in words why the fleet grew or shrank.

    Without --at: every reason with its count, and the largest changes. With --at: the decision in force at that
    moment, the numbers behind it, the fleet and the queue then, and the decisions before and after. A saved result
    also tells backpressure and batch groups.

    Example: `chiron simulate azure --save run.chiron && chiron explain run.chiron --at 12:30`
    """
    story = load_story(file)
    at_s = None if at is None else parse_moment(at, story.began)
    console = Console(highlight=False)
    models = _models(story, model)
    console.print(story.title, style="bold", soft_wrap=True)
    if not models:
        console.print("Nothing is in it yet: no request, no instance, no decision.")
    if story.note:
        console.print(story.note, soft_wrap=True)
        return
    for name in models:
        if at_s is None:
            _print_overview(console, name, [d for d in story.decisions if d.subject == name])
        else:
            for line in moment(story, name, at_s):
                console.print(line, soft_wrap=True, markup=False)


def parse_moment(text: str, began: datetime | None = None) -> float:
    """Seconds from the start: ``41:00`` is minutes and seconds, ``1:02:03`` has hours; else a duration, or, if it is
    known when the run ``began``, a date and time."""
    if re.match(r"\s*\d{4}-\d\d-\d\d", text):
        return _since(text, began)
    clock = re.fullmatch(r"(?:(\d+):)?(\d+):([0-5]\d)", text.strip())
    if clock is None:
        try:
            return parse_duration(text)
        except DurationError:
            known = "" if began is None else f", or a date and time such as {began:%Y-%m-%dT%H:%M:%SZ}"
            raise ConfigError(
                f"--at {text!r}: expected the time since the start, as 41:00, 1:02:03 or 41m{known}"
            ) from None
    hours, minutes, seconds = (int(part or 0) for part in clock.groups())
    return 3600.0 * hours + 60.0 * minutes + seconds


def _since(text: str, began: datetime | None) -> float:
    if began is None:
        raise ConfigError(f"--at {text!r}: nobody knows when this run began; give the time since its start: 41:00")
    try:
        moment = datetime.fromisoformat(text.strip())
    except ValueError:
        raise ConfigError(f"--at {text!r}: not a date and time such as {began:%Y-%m-%dT%H:%M:%SZ}") from None
    seconds = (moment.replace(tzinfo=moment.tzinfo or UTC) - began).total_seconds()
    if seconds < 0.0:
        raise ConfigError(f"--at {text!r}: the run began at {began:%Y-%m-%dT%H:%M:%SZ}")
    return seconds


def moment(story: Story, model: str, at_s: float) -> Iterator[str]:
    """One model around one moment, line by line."""
    changes = [d for d in story.decisions if d.subject == model and d.before != d.after]
    # Moments are shown to the second, so a whole second has what is shown with it.
    whole = at_s == round(at_s)
    earlier = [d for d in changes if (round(d.t_s) if whole else d.t_s) <= at_s]
    later = changes[len(earlier) :]
    yield f"\n{model} at {show_moment(at_s)} ({at_s:,.0f} s)"
    if at_s > story.ends_s:
        yield f"  The run ended at {show_moment(story.ends_s)}; this is how it stood then."
    if earlier:
        yield from _tell(earlier[-1], at_s)
    else:
        yield "  The plan had not changed since the start."
    for line in story.state(model, max(at_s, earlier[-1].t_s) if earlier else at_s):
        yield f"  {line}"
    if len(earlier) > 1:
        yield f"  Before it: {_brief(earlier[-2])}"
    yield f"  Next: {_brief(later[0])}" if later else "  No change followed."


def _tell(decision: DecisionPoint, at_s: float) -> Iterator[str]:
    ago = max(0, round(at_s - decision.t_s))
    when = f"at {show_moment(decision.t_s)}" + (f", {ago:,} s before" if ago else "")
    verb = "grew" if decision.after > decision.before else "shrank"
    yield f"  The plan {verb} from {decision.before:g} to {decision.after:g} instances {when}."
    yield f"  Why: {words(decision.reason)} ({decision.reason})."
    if decision.numbers:
        yield "  Numbers: " + ", ".join(_quantity(name, value) for name, value in decision.numbers.items())


def _quantity(name: str, value: float) -> str:
    unit = " s" if name.endswith("_s") else ""
    number = f"{value:,.0f}" if value == round(value, 0) else f"{value:,.3g}"
    return f"{words(name.removesuffix('_s'))} {number}{unit}"


def _brief(decision: DecisionPoint) -> str:
    return f"{show_moment(decision.t_s)}, {decision.before:g} -> {decision.after:g}: {words(decision.reason)}."


def _print_overview(console: Console, model: str, decisions: Sequence[DecisionPoint]) -> None:
    changes = [d for d in decisions if d.before != d.after]
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
        console.print(f"  {_brief(decision)}", soft_wrap=True)
    console.print(f"More about one of them: --at {show_moment(largest[0].t_s)}")


def _models(story: Story, model: str | None) -> tuple[str, ...]:
    if model is None:
        return story.models
    if model not in story.models:
        raise ConfigError(f"--model {model!r}: {suggest(model, story.models)}")
    return (model,)
