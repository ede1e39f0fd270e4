"""``chiron simulate``, ``compare``, ``bound``, ``scenarios``, ``policies``."""

from __future__ import annotations

import json
import shlex
import sys
import tomllib
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.padding import Padding
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from chiron.cli.common.durations import seconds_of
from chiron.cli.simulate.tables import print_results, results_console
from chiron.cli.studies.common import RayOption, RayPythonOption, executor
from chiron.cli.studies.grid import GridOutputs, compare_grid
from chiron.config.build import policy_rows, setups
from chiron.config.read import ConfigError
from chiron.config.scenario import Scenario, load_scenario, scenario_files
from chiron.sim.bound import bound as bound_of_setup
from chiron.sim.many import Done, Run, run_many
from chiron.sim.setup import Setup
from chiron.studies.grid import Asked, loads_of, seeds_of
from chiron.studies.settings_file import apply_settings, read_settings
from chiron.telemetry.format import span
from chiron.telemetry.result import Result
from chiron.telemetry.store import save_result

FAILED = 1
INTERRUPTED = 130

ScenarioArgument = Annotated[
    str, typer.Argument(metavar="SCENARIO", help="A scenario file, or the name of a packaged one (`chiron scenarios`).")
]
PolicyOption = Annotated[
    list[str] | None,
    typer.Option("--policy", "-p", help="A policy (`chiron policies`) or a label of the file. Repeatable."),
]
SeedOption = Annotated[
    list[int] | None, typer.Option("--seed", "-s", help="A seed; default: the scenario's. Repeatable.", min=0)
]
JsonOption = Annotated[
    str | None,
    typer.Option("--json", metavar="FILE", help="Write a JSON array, one object per policy and seed; - is stdout."),
]
ReportOption = Annotated[
    Path | None, typer.Option("--report", metavar="FILE.html", help="Write one self-contained HTML page.")
]
FiguresOption = Annotated[
    Path | None, typer.Option("--figures", metavar="DIR", help="Write the plots as PNG and SVG into this directory.")
]
EventsOption = Annotated[
    Path | None,
    typer.Option("--events", metavar="FILE.jsonl", help="Write the event log (several runs: FILE.POLICY.SEED.jsonl)."),
]
SaveOption = Annotated[
    Path | None,
    typer.Option("--save", metavar="FILE.chiron", help="Save results, for `chiron explain` (several runs: as above)."),
]
SetOption = Annotated[
    list[str] | None,
    typer.Option(
        "--set", metavar="PATH=VALUE", help="Set a value of the scenario, such as `classes.chat.ttft=2s`. Repeatable."
    ),
]
ScaleOption = Annotated[
    float | None, typer.Option("--scale", help="Multiply all request rates and batch jobs by this.", show_default=False)
]
SettingsOption = Annotated[
    list[Path] | None,
    typer.Option("--settings", metavar="FILE.toml", help="Settings that `chiron tune` has found. Repeatable."),
]
DurationOption = Annotated[
    str | None, typer.Option("--duration", metavar="TIME", help="Only the first part of the workload, such as 10m.")
]
JobsOption = Annotated[
    int | None,
    typer.Option("--jobs", "-j", min=1, help="Simulations at a time (default: the cores).", show_default=False),
]


@dataclass(frozen=True, slots=True, kw_only=True)
class Outputs:
    """Where results go, besides the table."""

    json: str | None
    report: Path | None
    figures: Path | None
    events: Path | None
    save: Path | None

    def check(self) -> None:
        """Fail before an hour of simulation, not after it."""
        files = [Path(self.json)] if self.json not in (None, "-") else []
        for path in [*files, *(p for p in (self.report, self.events, self.save) if p is not None)]:
            if not path.absolute().parent.is_dir():
                raise ConfigError(f"{path}: there is no directory {path.absolute().parent}")
            if path.is_dir():
                raise ConfigError(f"{path}: is a directory; name a file")
        if self.figures is not None and self.figures.is_file():
            raise ConfigError(f"{self.figures}: is a file; name a directory")


def simulate(
    scenario: ScenarioArgument,
    policy: PolicyOption = None,
    seed: SeedOption = None,
    json_: JsonOption = None,
    report: ReportOption = None,
    figures: FiguresOption = None,
    events: EventsOption = None,
    save: SaveOption = None,
    set_: SetOption = None,
    settings: SettingsOption = None,
    scale: ScaleOption = None,
    duration: DurationOption = None,
    jobs: JobsOption = None,
) -> None:
    """Run one policy (the scenario's first, or those given) on a scenario.

    Examples:

    - `chiron simulate demo`

    - `chiron simulate azure -p chiron --duration 10m --json -`

    - `chiron simulate my.toml -p chiron --set policies.chiron.utilisation=0.8 --save run.chiron`
    """
    outputs = Outputs(json=json_, report=report, figures=figures, events=events, save=save)
    loaded = _tuned(_load(scenario, set_, scale, duration), settings, seed)
    _run(loaded, policy or loaded.labels[:1], seed, outputs, jobs)


def compare(
    scenario: ScenarioArgument,
    policy: PolicyOption = None,
    seed: SeedOption = None,
    json_: JsonOption = None,
    report: ReportOption = None,
    figures: FiguresOption = None,
    events: EventsOption = None,
    save: SaveOption = None,
    set_: SetOption = None,
    settings: SettingsOption = None,
    scale: ScaleOption = None,
    duration: DurationOption = None,
    jobs: JobsOption = None,
    loads: Annotated[
        str | None, typer.Option("--loads", metavar="L,L,...", help="A grid: each multiplies all request rates.")
    ] = None,
    seeds: Annotated[str | None, typer.Option("--seeds", metavar="A..B", help="Seeds, such as 1..5 or 1,2,7.")] = None,
    baseline: Annotated[
        str | None, typer.Option("--baseline", help="Of a grid: the policy that others are compared with.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", metavar="DIR", help="Of a grid: results, and what makes it resumable.")
    ] = None,
    bound_each: Annotated[
        bool, typer.Option("--bound-each", help="Of a grid: the lower bound of each run, not only of each workload.")
    ] = False,
    early_stop: Annotated[
        bool,
        typer.Option(
            "--early-stop",
            help="Of a grid: no third seed where a policy's worst class is below 94 % in each of the first two.",
        ),
    ] = False,
    ray: RayOption = "",
    ray_python: RayPythonOption = "",
) -> None:
    """Run several policies (the scenario's, or those given) on the same requests; print a table and a verdict.

    With `--loads`, `--baseline`, `--out`, `--early-stop` or `--ray` it is a grid of loads, policies and seeds, with
    confidence intervals and differences from a baseline on the same requests. Stopped and started again it goes on from
    `--out`.

    Examples:

    - `chiron compare demo --report report.html`

    - `chiron compare azure -p chiron -p llumnix -s 1 -s 2 -s 3 --json results.json --figures figures`

    - `chiron compare my.toml --scale 2 --set cold_start.model_load=60s`

    - `chiron compare azure -p chiron -p llumnix --loads 0.4,1,2.5 --seeds 1..5 --baseline chiron --out grid`
    """
    chosen = _seeds(seed, seeds)
    if loads is not None or baseline is not None or out is not None or early_stop or ray or ray_python:
        refused = {"--events": events, "--save": save}
        if given := [name for name, value in refused.items() if value is not None]:
            raise ConfigError(f"{given[0]}: a grid keeps figures of each run, not the runs; leave it out")
        Outputs(json=json_, report=report, figures=None, events=None, save=None).check()
        loaded = _tuned(_load(scenario, set_, scale, duration), settings, chosen)
        labels = tuple(dict.fromkeys(policy or loaded.labels))
        asked = Asked(
            loads=loads_of(loads or "1"),
            policies=labels,
            seeds=tuple(chosen or loaded.seeds),
            baseline=baseline or labels[0],
            bound_each=bound_each,
            early=early_stop,
        )
        where = executor("auto" if jobs is None else str(jobs), ray, ray_python)
        compare_grid(loaded, asked, where, GridOutputs(json=json_, report=report, figures=figures, out=out))
        return
    outputs = Outputs(json=json_, report=report, figures=figures, events=events, save=save)
    loaded = _tuned(_load(scenario, set_, scale, duration), settings, chosen)
    _run(loaded, policy or loaded.labels, chosen, outputs, jobs)


def bound(
    scenario: ScenarioArgument,
    seed: Annotated[int | None, typer.Option("--seed", "-s", help="Default: the scenario's first.", min=0)] = None,
    set_: SetOption = None,
    scale: ScaleOption = None,
    duration: DurationOption = None,
) -> None:
    """The fewest GPU-hours that any scheduler could need for a scenario, and where they come from.

    It knows the future, starts instances at once and packs perfectly; yet it keeps every SLO and the fleet's bounds.

    Example: `chiron bound azure`
    """
    loaded = _load(scenario, set_, scale, duration)
    (setup,) = setups(loaded, policies=loaded.labels[:1], seeds=[loaded.seeds[0] if seed is None else seed])
    _print_bound(Console(markup=False), setup)


def scenarios() -> None:
    """List the packaged scenarios."""
    table = Table("name", "what it shows", box=None, pad_edge=False, header_style="bold")
    for name, file in scenario_files().items():
        table.add_row(name, tomllib.loads(file.read_text(encoding="utf-8"))["description"])
    Console().print(table)


def policies() -> None:
    """List the policies, with their settings and defaults."""
    console = Console(highlight=False)
    for name, about, settings in policy_rows():
        console.print(f"[bold]{name}[/bold]: {about}")
        listed = ", ".join(f"{key} = {value}" for key, value in settings.items())
        console.print(Padding(listed or "no settings", (0, 0, 1, 4)), markup=False)


def _print_bound(console: Console, setup: Setup) -> None:
    least = bound_of_setup(setup)
    console.print(
        f"{setup.scenario}, seed {setup.seed}: no scheduler can do it in fewer than {least.gpu_hours:.2f} GPU-hours, "
        f"at a cost of {least.cost:.2f}.",
        style="bold",
        highlight=False,
        soft_wrap=True,
    )
    table = Table("model", box=None, pad_edge=False, header_style="bold")
    for heading in ("requests", "GPU-hours", "from work", "from the smallest fleet", "cost"):
        table.add_column(heading, justify="right")
    for part in least.models:
        figures = (part.gpu_hours, part.work_gpu_hours, part.floor_gpu_hours, part.cost)
        table.add_row(part.model, f"{part.requests:,}", *(f"{figure:.2f}" for figure in figures))
    console.print(table)
    for note in least.notes:
        console.print(f"- {note}", highlight=False, soft_wrap=True)


def _load(source: str, assignments: Sequence[str] | None, scale: float | None, duration: str | None) -> Scenario:
    overrides = list(assignments or ())
    if scale is not None:
        overrides.append(f"scale={scale!r}")
    if duration is not None:
        seconds_of("--duration", duration)
        overrides.append(f"duration={json.dumps(duration)}")
    return load_scenario(source, overrides)


def _seeds(each: Sequence[int] | None, spans: str | None) -> list[int] | None:
    if each and spans is not None:
        raise ConfigError("give either --seed or --seeds")
    return list(each or ()) or (None if spans is None else list(seeds_of(spans)))


def _tuned(scenario: Scenario, files: Sequence[Path] | None, seeds: Sequence[int] | None) -> Scenario:
    """The scenario with settings that were tuned. What they were tuned on is not judged."""
    for path in files or ():
        scenario = apply_settings(scenario, read_settings(path), seeds)
    if files and scenario.calibration is not None and scenario.calibration.first_s > 0:
        first = span(scenario.calibration.first_s)
        typer.echo(f"judged without the first {first}, on which settings were tuned", err=True)
    return scenario


def _run(
    scenario: Scenario, policies: Sequence[str], seeds: Sequence[int] | None, outputs: Outputs, jobs: int | None
) -> None:
    """Simulate, write what was done (also after ctrl-C or a failure), then say how it went."""
    outputs.check()
    runs = _name_events(setups(scenario, policies=policies, seeds=seeds), outputs.events)
    done: list[Done] = []
    interrupted = False
    try:
        _collect(runs, done, jobs)
    except KeyboardInterrupt:
        interrupted = True
    done.sort(key=lambda end: end.index)
    _write([end.result for end in done if end.result is not None], outputs, several=len(runs) > 1)
    failed = [end for end in done if end.result is None]
    for end in failed:
        typer.echo(f"failed: {end.run.name}: {end.error}", err=True)
        if end.details:
            typer.echo(end.details, err=True)
    if interrupted:
        finished = sum(end.result is not None for end in done)
        typer.echo(f"stopped: {finished} of {len(runs)} runs are done and written", err=True)
        raise typer.Exit(INTERRUPTED)
    if failed:
        raise typer.Exit(FAILED)


def _name_events(made: Sequence[Setup], events: Path | None) -> list[Run]:
    several = len(made) > 1
    return [
        Run(setup=setup, events=events and _path_of_run(events, setup.label or setup.policy, setup.seed, several))
        for setup in made
    ]


def _path_of_run(path: Path, policy: str, seed: int | None, several: bool) -> Path:
    return path.with_name(f"{path.stem}.{policy}.{seed}{path.suffix}") if several else path


def _collect(runs: Sequence[Run], done: list[Done], jobs: int | None) -> None:
    """Append each run's end to ``done`` as it comes, with progress on stderr."""
    console = Console(stderr=True, markup=False)
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f} %"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bars:
        total = bars.add_task(f"{len(runs)} runs", total=len(runs)) if len(runs) > 1 else None
        tasks: dict[int, TaskID] = {}
        fractions: dict[int, float] = {}

        def show(index: int, fraction: float) -> None:
            if index not in tasks:
                tasks[index] = bars.add_task(runs[index].name, total=1.0)
            fractions[index] = fraction
            bars.update(tasks[index], completed=fraction)
            if total is not None:
                bars.update(total, completed=sum(fractions.values()))

        with closing(run_many(runs, jobs=jobs, progress=show)) as ends:
            for end in ends:
                done.append(end)
                show(end.index, 1.0)
                bars.remove_task(tasks.pop(end.index))
                if len(runs) > 1:
                    bars.console.print(_line(end), highlight=False)


def _line(end: Done) -> str:
    if end.result is None:
        return f"{end.run.name}: FAILED"
    return f"{end.run.name}: {end.result.summary['gpu_hours']:.2f} GPU-hours, {end.result.summary['wall_s']:.1f} s"


def _write(results: Sequence[Result], outputs: Outputs, several: bool) -> None:
    if not results:
        return
    print_results(results_console(stderr=outputs.json == "-"), results)
    if outputs.json is not None:
        _write_json(results, outputs.json)
    if outputs.save is not None:
        for result in results:
            save_result(result, _path_of_run(outputs.save, result.policy, result.seed, several))
    if outputs.report is not None:
        from chiron.telemetry.html import write_report

        write_report(results, outputs.report, command=shlex.join(["chiron", *sys.argv[1:]]))
    if outputs.figures is not None:
        from chiron.telemetry.figures import write_figures

        write_figures(results, outputs.figures)


def _write_json(results: Sequence[Result], target: str) -> None:
    text = json.dumps([result.summary for result in results], indent=2) + "\n"
    if target == "-":
        sys.stdout.write(text)
    else:
        Path(target).write_text(text, encoding="utf-8")
