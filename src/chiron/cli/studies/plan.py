"""``chiron plan``."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from chiron.cli.common.durations import seconds_of
from chiron.cli.simulate.tables import results_console
from chiron.cli.studies.common import (
    JobsOption,
    RayOption,
    RayPythonOption,
    StudyFiguresOption,
    check_figures,
    check_file,
    executor,
    running,
    write_whole,
)
from chiron.config.read import ConfigError
from chiron.config.scenario import Scenario, load_scenario
from chiron.studies.plan import (
    Change,
    Fleet,
    Mode,
    Plan,
    Sized,
    as_json,
    expected_trials,
    in_words,
    points_of,
    usual_changes,
)
from chiron.studies.plan import plan as make_plan
from chiron.studies.settings_file import apply_settings, read_settings
from chiron.telemetry import axes
from chiron.telemetry.chart_files import write_charts
from chiron.telemetry.format import NONE, amount, counted, listed, percent
from chiron.telemetry.marks import Chart, Panel, Rule, Series
from chiron.telemetry.palette import COLOURS
from chiron.telemetry.study_page import chart_section, study_page, table_section

INTERRUPTED = 130
MODES: dict[Mode, tuple[str, str]] = {
    "fixed": ("fixed", "circle"),
    "autoscaled": ("autoscaled, upper bound", "square"),
}
"""Names and marks in the chart."""
ROOM = 1.06
"""An axis ends this far beyond what it shows."""
HEADINGS = (
    *("model", "on", "fixed fleet", "GPUs", "GPU-hours", "cost"),
    *("autoscaled", "GPUs at peak", "GPU-hours", "cost", "against fixed"),
)
CHANGED_CAPTION = "Cheapest: GPU-hours of the cheaper of both fleets, against the cheaper of both without the change."
CHANGED = ("what if", "model", "fixed fleet", "GPUs", "autoscaled", "GPU-hours", "cost", "cheapest")


def plan(
    scenario: Annotated[
        str, typer.Argument(metavar="SCENARIO", help="Traffic, models, SLOs, starts: a file or a packaged name.")
    ],
    policy: Annotated[
        str, typer.Option("--policy", "-p", help="The policy that runs the fleet: its name or a label.")
    ] = "chiron",
    instance: Annotated[
        list[str] | None,
        typer.Option(
            "--instance",
            metavar="[MODEL=]PROFILE",
            help="A kind of instance to consider (`chiron profile list`), such as llama-3.1-8b/h100/tp1. Repeatable. "
            "Default: the scenario's.",
        ),
    ] = None,
    target: Annotated[float, typer.Option("--target", help="Share of each class that must be within its SLO.")] = 0.99,
    seed: Annotated[
        list[int] | None, typer.Option("--seed", "-s", min=0, help="All of them must keep the target. Repeatable.")
    ] = None,
    most: Annotated[
        int | None, typer.Option("--max", help="Most instances to try.", show_default="the scenario's max_instances")
    ] = None,
    what_if: Annotated[
        list[str] | None,
        typer.Option("--what-if", metavar="PATH=VALUE", help="Another change to try, as for --set. Repeatable."),
    ] = None,
    changes: Annotated[
        bool, typer.Option("--changes/--no-changes", help="Also say what looser SLOs, faster starts ... would save.")
    ] = True,
    json_: Annotated[str | None, typer.Option("--json", metavar="FILE", help="Write all figures; - is stdout.")] = None,
    report: Annotated[
        Path | None, typer.Option("--report", metavar="FILE.html", help="Write one self-contained HTML page.")
    ] = None,
    figures: StudyFiguresOption = None,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", metavar="DIR", help="Results, and what makes it resumable.")
    ] = None,
    settings: Annotated[
        Path | None, typer.Option("--settings", metavar="FILE.toml", help="Settings that `chiron tune` has found.")
    ] = None,
    set_: Annotated[
        list[str] | None, typer.Option("--set", metavar="PATH=VALUE", help="Set a value of the scenario. Repeatable.")
    ] = None,
    scale: Annotated[float | None, typer.Option("--scale", help="Multiply all request rates by this.")] = None,
    duration: Annotated[
        str | None, typer.Option("--duration", metavar="TIME", help="Only the first part of the workload.")
    ] = None,
    jobs: JobsOption = "auto",
    ray: RayOption = "",
    ray_python: RayPythonOption = "",
) -> None:
    """How many GPUs a workload needs: the fewest that keep every SLO, as a fixed fleet and scaled by a policy.

    Each kind of instance is tried, and for the cheapest one what looser SLOs, faster starts, longer deadlines and more
    batch work would save, one at a time. Limits of `[gpus]` do not count: the question is how many there should be.

    Examples:

    - `chiron plan my.toml --report plan.html`

    - `chiron plan my.toml --scale 2 --instance llama-3.1-8b/a100/tp1 --instance llama-3.1-8b/h100/tp1 --out plan`
    """
    if report is not None:
        check_file(report, "--report")
    check_figures(figures)
    if json_ not in (None, "-"):
        check_file(Path(str(json_)), "--json")
    if out is not None and out.exists() and not out.is_dir():
        raise ConfigError(f"--out {out}: is a file; name a directory")
    where = executor(jobs, ray, ray_python)
    loaded = _loaded(scenario, instance or [], set_ or [], scale, duration)
    if settings is not None:
        loaded = apply_settings(loaded, read_settings(settings), seed)
    loaded.choice(policy, "--policy")
    asked = [*(usual_changes(loaded) if changes else []), *_custom(what_if or [])]
    seeds = seed or list(loaded.seeds)
    journal = None
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        journal = out / "trials.jsonl"
    try:
        with running(where, journal, f"plan {loaded.name}") as runner:
            kinds = [len(section.instances) for section in loaded.models.values()]
            bound = most or max(section.max_instances for section in loaded.models.values())
            runner.total = expected_trials(sum(kinds), len(asked), len(kinds), len(seeds), bound)
            found = make_plan(loaded, policy, seeds, asked, runner, target=target, most=most)
    except KeyboardInterrupt:
        kept = f"what is done is in {journal}; the same command goes on from there" if journal else "nothing is kept"
        typer.echo(f"stopped: {kept}", err=True)
        raise typer.Exit(INTERRUPTED) from None
    text = json.dumps(as_json(found, scenario=loaded.name, policy=policy, seeds=seeds, target=target), indent=1) + "\n"
    _print(results_console(stderr=json_ == "-"), found, policy, target)
    if json_ == "-":
        sys.stdout.write(text)
    elif json_ is not None:
        write_whole(Path(json_), text)
    page = plan_page(found, loaded, policy, seeds, target)
    if report is not None:
        write_whole(report, page)
    if figures is not None:
        write_charts({f"{s.case.model}-{s.case.kind}": sizes_chart(s, target) for s in found.options}, figures)
    if out is not None:
        write_whole(out / "plan.json", text)
        write_whole(out / "plan.html", page)


def _loaded(
    source: str, instances: Sequence[str], set_: Sequence[str], scale: float | None, duration: str | None
) -> Scenario:
    overrides = list(set_)
    if scale is not None:
        overrides.append(f"scale={scale!r}")
    if duration is not None:
        seconds_of("--duration", duration)
        overrides.append(f"duration={json.dumps(duration)}")
    loaded = load_scenario(source, overrides)
    kinds: dict[str, list[str]] = {}
    for each in instances:
        model, equals, profile = each.rpartition("=")
        models = [model] if equals else list(loaded.models)
        if not equals and len(models) > 1:
            raise ConfigError(f"--instance {each}: there are several models; say whose, {models[0]}={each}")
        if models[0] not in loaded.models:
            raise ConfigError(f"--instance {each}: unknown model {model!r}; allowed: {', '.join(loaded.models)}")
        kinds.setdefault(models[0], []).append(profile)
    for model, profiles in kinds.items():
        tables = ", ".join(f"{{ profile = {json.dumps(profile)} }}" for profile in profiles)
        loaded = loaded.with_overrides(f"models.{json.dumps(model)}.instances=[{tables}]")
    return loaded


def _custom(assignments: Sequence[str]) -> list[Change]:
    return [Change(name=each, overrides=(each,)) for each in assignments]


def _print(console: Console, found: Plan, policy: str, target: float) -> None:
    for model in found.models:
        console.print(answer(found, model, policy, target), style="bold", highlight=False, soft_wrap=True)
    console.print()
    _print_table(console, HEADINGS, [option_row(sized) for sized in found.options])
    if found.changes:
        console.print()
        _print_table(console, CHANGED, [change_row(sized, found.best(sized.case.model)) for sized in found.changes])
        console.print(CHANGED_CAPTION, highlight=False, soft_wrap=True)


def _print_table(console: Console, headings: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for number, heading in enumerate(headings):
        table.add_column(heading, justify="left" if number < 2 else "right", no_wrap=number < 2)
    for row in rows:
        table.add_row(*row)
    console.print(table)


def answer(found: Plan, model: str, policy: str, target: float) -> str:
    """The plan of a model in a sentence or two."""
    best = found.best(model)
    fixed, scaled = best.fixed, best.autoscaled
    if not fixed.kept and not scaled.kept:
        return f"{model}: {in_words(fixed, best.case, target)}. Raise --max, or name a faster kind with --instance."
    parts = []
    if fixed.kept:
        gpus = counted(fixed.at.most * best.case.gpus, "GPU")
        parts.append(f"{model} needs {gpus} ({in_words(fixed, best.case, target)}) as a fixed fleet.")
    if scaled.kept:
        parts.append(
            f"Scaled by {policy} it is {in_words(scaled, best.case, target)}, at most "
            f"{counted(scaled.at.gpus_peak, 'GPU')} at a time, and {saved(scaled, fixed)}."
        )
    else:
        parts.append(f"Scaled by {policy} {in_words(scaled, best.case, target)}.")
    free = found.unpriced(model)
    if free and len(found.options_of(model)) > 1:
        have = "has" if len(free) == 1 else "have"
        parts.append(f"Kinds are compared by GPU-hours, because {listed(free)} {have} no price.")
    return " ".join(parts)


def saved(fleet: Fleet, against: Fleet) -> str:
    hours = f"{amount(fleet.at.gpu_hours)} GPU-hours"
    if not against.kept or not against.at.gpu_hours:
        return hours
    share = round(100 * (1.0 - fleet.at.gpu_hours / against.at.gpu_hours))
    words = f"{abs(share)} % {'fewer' if share > 0 else 'more'} than fixed" if share else "as many as fixed"
    return f"{hours}, {words}"


def signed(share: float) -> str:
    """A difference in whole per cent."""
    whole = round(100 * share)
    return f"{whole:+d} %" if whole else "0 %"


def option_row(sized: Sized) -> list[str]:
    case, fixed, scaled = sized.case, sized.fixed, sized.autoscaled
    both = fixed.kept and scaled.kept and fixed.at.gpu_hours > 0
    return [
        case.model,
        case.kind,
        *(count(fixed), str(fixed.at.most * case.gpus), *bill(fixed)),
        *(count(scaled), str(scaled.at.gpus_peak), *bill(scaled)),
        signed(scaled.at.gpu_hours / fixed.at.gpu_hours - 1.0) if both else NONE,
    ]


def change_row(sized: Sized, base: Sized) -> list[str]:
    """Savings are of the cheaper way to run it, now and then."""
    case, fixed, scaled = sized.case, sized.fixed, sized.autoscaled
    now, then = base.cheaper, sized.cheaper
    both = now.kept and then.kept and now.at.gpu_hours > 0
    return [
        case.change.name if case.change is not None else "",
        case.model,
        *(count(fixed), str(fixed.at.most * case.gpus)),
        *(count(scaled), *bill(scaled)),
        signed(then.at.gpu_hours / now.at.gpu_hours - 1.0) if both else NONE,
    ]


def count(fleet: Fleet) -> str:
    if not fleet.kept:
        return f"over {fleet.at.most} ({percent(fleet.at.worst)})"
    return f"{fleet.at.most}" if fleet.at.least == fleet.at.most else f"{fleet.at.least} to {fleet.at.most}"


def bill(fleet: Fleet) -> tuple[str, str]:
    return amount(fleet.at.gpu_hours), amount(fleet.at.cost) if fleet.at.cost else NONE


def plan_page(found: Plan, scenario: Scenario, policy: str, seeds: Sequence[int], target: float) -> str:
    """One HTML page: the answer, both tables, and attainment by size of the fleet."""
    sections = [table_section("Kinds of instances", HEADINGS, [option_row(sized) for sized in found.options])]
    sections.append(chart_section("Attainment by fleet", [sizes_chart(sized, target) for sized in found.options]))
    if found.changes:
        rows = [change_row(sized, found.best(sized.case.model)) for sized in found.changes]
        sections.append(table_section("One change at a time", CHANGED, rows, CHANGED_CAPTION))
    answers = [answer(found, model, policy, target) for model in found.models]
    subtitle = f"{percent(target)} of every class within its SLO, {counted(len(seeds), 'seed')}, run by {policy}"
    command = shlex.join(["chiron", *sys.argv[1:]])
    return study_page(f"GPUs for {scenario.name}", subtitle, answers[0], answers[1:], sections, command)


def sizes_chart(sized: Sized, target: float) -> Chart:
    """Attainment of the worst class against the size of the fleet: every fleet that was tried."""
    series = []
    for number, (mode, (name, shape)) in enumerate(MODES.items()):
        points = [point for each, point in points_of(sized) if each == mode]
        series.append(
            Series(
                name=name,
                colour=COLOURS[number],
                mark="dots",
                shape=shape,
                x=tuple(float(point.most * sized.case.gpus) for point in points),
                y=tuple(point.worst for point in points),
                texts=tuple(
                    f"{point.least} to {point.most} instances: {percent(point.worst)} in the worst class, "
                    f"{amount(point.gpu_hours)} GPU-hours"
                    for point in points
                ),
            )
        )
    shares = [share for one in series for share in one.y]
    most = max(place for one in series for place in one.x)
    return Chart(
        title=f"{sized.case.model} on {sized.case.kind}",
        x=axes.linear("GPUs", 0.0, ROOM * most, whole=True),
        panels=(
            Panel(
                y=axes.attainment("within SLO, worst class", [*shares, target]),
                series=tuple(series),
                rules=(Rule(name=f"target {percent(target)}", y=target),),
            ),
        ),
    )
