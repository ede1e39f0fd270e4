"""``chiron demo``: the gateway with real engines under real traffic on one screen, then a verdict."""

from __future__ import annotations

import asyncio
import os
import resource
import shlex
import shutil
import signal
import sys
import time
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from chiron.cli.common.durations import seconds_of
from chiron.cli.common.extras import needs, require_extras
from chiron.cli.demo.gateway import Gateway, GatewayError
from chiron.cli.demo.plan import (
    about_engines,
    about_traffic,
    choose_engine,
    demo_plan,
    full_length_s,
    instances_max,
    write_config,
)
from chiron.cli.demo.stage_watch import StageWatch
from chiron.cli.demo.staged import (
    ABOUT,
    DURATION_S,
    SETTINGS,
    about_staged,
    recorded,
    staged_plan,
    staged_verdict,
    surge_of,
    write_model,
    write_staged_config,
)
from chiron.cli.demo.staged import DURATION_MIN_S as STAGED_MIN_S
from chiron.cli.demo.verdict import verdict_lines
from chiron.cli.demo.view import PERIOD_S, DemoView
from chiron.cli.top.command import StatusError, fetcher
from chiron.config.read import ConfigError
from chiron.load.plan import LoadPlan
from chiron.load.settings import BatchSettings, LoadSettings
from chiron.net.loop import run_on_loop

if TYPE_CHECKING:
    from chiron.load.run import LoadRun
    from chiron.telemetry.result import Result

FAILED = 1
INTERRUPTED = 130
DURATION_MIN_S, DURATION_MAX_S = 20.0, 600.0
GRACE_S = 2.0
"""After ctrl-C, for answers under way."""
BUSY_MAX = 0.85
"""Share of the machine's CPU time beyond which requests wait for a core."""
MARK = "chiron.toml"
"""A directory that holds it, or nothing, may be written over."""
NEXT_STEP = """Next, your own engines. Three lines in chiron.toml, then `chiron serve`:

  [models."llama-3.1-8b"]
  engine = "vllm"
  endpoints = ["http://127.0.0.1:8001"]
"""


def demo(
    duration: Annotated[
        str | None,
        typer.Option(
            "--duration", metavar="TIME", help="Of the traffic; the batch job in proportion.", show_default="2m 10s"
        ),
    ] = None,
    engine: Annotated[
        str, typer.Option("--engine", help="openvino, emulated, or auto: openvino if it is installed.")
    ] = "auto",
    out: Annotated[
        Path, typer.Option("--out", metavar="DIR", help="For the config, logs, the result and the report.")
    ] = Path("chiron-demo"),
    port: Annotated[int, typer.Option("--port", min=0, max=65535, help="Of the gateway; 0: any free one.")] = 0,
    seed: Annotated[int, typer.Option("--seed", "-s", min=0, help="Of arrivals, lengths and prompts.")] = 1,
    staged: Annotated[
        bool, typer.Option("--staged", help="A model as a pipeline of stages, scaled by each stage policy in turn.")
    ] = False,
) -> None:
    """Real requests, real engine processes, one endpoint: watch it scale, then read the verdict.

    Chat traffic at the times of two real traces and a batch job with a deadline go to `chiron serve`, which starts and
    stops small engines on this machine. Two cores are enough. Ctrl-C ends it, and nothing is left running.

    Examples:

    - `chiron demo`

    - `chiron demo --duration 60s --engine emulated`

    - `chiron demo --staged`
    """
    if staged:
        if engine != "auto":
            raise ConfigError(f"--engine {engine}: does not go with --staged, which has an engine of its own")
        demo_staged(duration, out, port, seed)
        return
    require_extras(["serve"])
    embedded = choose_engine(engine)
    duration_s = full_length_s() if duration is None else seconds_of("--duration", duration)
    if not DURATION_MIN_S <= duration_s <= DURATION_MAX_S:
        raise ConfigError(f"--duration {duration}: it must be {DURATION_MIN_S:g} s to {DURATION_MAX_S:g} s")
    console = Console(highlight=False)
    plan = demo_plan(duration_s, seed)
    prepare(out)
    config = write_config(out, embedded=embedded, port=port)
    if not embedded and engine == "auto":
        say(console, "The embedded engine is not installed (pip install 'chiron-serving[openvino]').")
    say(console, f"Engines: {about_engines(embedded)}.")
    say(console, f"Traffic: {about_traffic(plan)}.")
    say(console, "Starting the gateway and its first engine ...")
    started_s, cpu_before_s, busy_before = time.monotonic(), cpu_s(), busy_and_total_s()
    try:
        with Gateway(out) as gateway:
            caption = [about_engines(embedded), about_traffic(plan)]
            run = run_on_loop(_play(plan, gateway, console, caption))
            say(console, "Stopping the gateway and its engines ...")
    except GatewayError as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(FAILED) from None
    cores = (cpu_s() - cpu_before_s) / (time.monotonic() - started_s)
    about = [about_engines(embedded), about_traffic(plan)]
    conclude(console, out, run, config, about, machine_lines(cores, busy_before, busy_and_total_s()))
    if run.stopped:
        raise typer.Exit(INTERRUPTED)


def demo_staged(duration: str | None, out: Path, port: int, seed: int) -> None:
    """The same traffic for each stage policy, one after the other."""
    require_extras(["serve", "staged"])
    duration_s = DURATION_S if duration is None else seconds_of("--duration", duration)
    if not STAGED_MIN_S <= duration_s <= DURATION_MAX_S:
        raise ConfigError(f"--duration {duration}: with --staged it must be {STAGED_MIN_S:g} s to {DURATION_MAX_S:g} s")
    console = Console(highlight=False)
    prepare(out)
    write_model(out)
    (out / MARK).write_text("# Configs are in the directories of the stage policies.\n", encoding="utf-8")
    plan = staged_plan(out, duration_s, seed)
    say(console, f"Engine: {ABOUT}.")
    results: dict[str, tuple[Result, Result]] = {}
    started_s, cpu_before_s, busy_before = time.monotonic(), cpu_s(), busy_and_total_s()
    for policy in SETTINGS:
        directory = out / policy
        prepare(directory)
        config = write_staged_config(directory, policy, port=port)
        say(console, f"Starting a gateway and its pipeline, {about_staged(plan, policy)} ...")
        try:
            with Gateway(directory) as gateway:
                run = run_on_loop(_play(plan, gateway, console, [ABOUT, about_staged(plan, policy)], StageWatch()))
                say(console, "Stopping the gateway and its stages ...")
        except GatewayError as error:
            typer.echo(f"error: {error}", err=True)
            raise typer.Exit(FAILED) from None
        if run.stopped:
            raise typer.Exit(INTERRUPTED)
        results[policy] = recorded(directory, run, policy, config)
    cores = (cpu_s() - cpu_before_s) / (time.monotonic() - started_s)
    lines = staged_verdict(out / next(iter(SETTINGS)), results, surge_of(duration_s))
    machine = machine_lines(cores, busy_before, busy_and_total_s())
    console.print()
    for line in [*lines, *machine]:
        say(console, line)
    console.print()
    notes = [ABOUT, *lines, *machine]
    say(console, f"report     {_report(out, [gateway for _, gateway in results.values()], notes)}")
    for policy in results:
        say(console, f"reasons    {program()} explain {out / policy / 'data' / 'result.chiron'}")


def say(console: Console, text: str) -> None:
    console.print(text, soft_wrap=not console.is_terminal, markup=False)


def prepare(out: Path) -> None:
    """An empty directory, or what an earlier demo left there, made empty. Never anybody else's."""
    from chiron.store.directory import lock
    from chiron.store.port import StoreError

    out.mkdir(parents=True, exist_ok=True)
    if any(out.iterdir()) and not (out / MARK).is_file():
        raise ConfigError(f"--out {out}: it is not empty, and no earlier demo wrote it; name another directory")
    data = out / "data"
    if data.exists():
        try:
            os.close(lock(data))
        except StoreError as error:
            raise ConfigError(f"--out {error}: does another demo run?") from None
        shutil.rmtree(data)


def cpu_s() -> float:
    """CPU time of this process and of all that it started and that has ended, to any depth."""
    usages = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


def busy_and_total_s() -> tuple[float, float]:
    """CPU time of the whole machine so far: of everybody's work, and of all there was."""
    import psutil

    times = psutil.cpu_times()
    # Linux counts guests in the time of their users as well.
    total_s = sum(times) - getattr(times, "guest", 0.0) - getattr(times, "guest_nice", 0.0)
    return total_s - times.idle - getattr(times, "iowait", 0.0), total_s


def machine_lines(cores: float, before: tuple[float, float], after: tuple[float, float]) -> list[str]:
    """What the demo took of the machine, and a warning if it had to share it."""
    lines = [f"machine: {cores:.2f} of {os.cpu_count()} cores used, gateway, engines and client together"]
    busy_s, total_s = (late - early for late, early in zip(after, before, strict=True))
    if total_s > 0 and busy_s > BUSY_MAX * total_s:
        lines.append(
            f"warning: the machine was {busy_s / total_s:.0%} busy, mostly with other work; the latencies above "
            "suffered from it"
        )
    return lines


async def _play(
    plan: LoadPlan, gateway: Gateway, console: Console, caption: list[str], watch: StageWatch | None = None
) -> LoadRun:
    """Send the traffic and show what happens, until all is answered. Raises GatewayError if the gateway ends."""
    from chiron.load.run import run_load

    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    # Probes are requests too, of other lengths: a policy for stages would plan for them.
    settings = LoadSettings(url=gateway.url, batch=BatchSettings(poll_s=0.5), grace_s=GRACE_S, calibrate=watch is None)
    fetch = fetcher(gateway.url)
    elapsed_s = 0.0

    def progress(at: Any) -> None:
        nonlocal elapsed_s
        elapsed_s = at.elapsed_s

    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stop.set)
    load = loop.create_task(run_load(plan, settings, progress=progress, stop=stop))
    try:
        with DemoView(console, caption, watch) as view:
            while not load.done():
                if gateway.ended:
                    raise gateway.error("the gateway ended by itself")
                with suppress(StatusError):
                    status = await asyncio.to_thread(fetch)
                    if watch is not None:
                        await asyncio.to_thread(watch.look, status)
                    view.show(status, elapsed_s, plan.last_s, stop.is_set())
                await asyncio.wait((load,), timeout=PERIOD_S)
        return load.result()
    finally:
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.remove_signal_handler(number)
        load.cancel()
        await asyncio.gather(load, return_exceptions=True)


def conclude(console: Console, out: Path, run: LoadRun, config: str, about: list[str], machine: list[str]) -> None:
    """The verdict, the report, and where everything is."""
    with needs("serve"):
        from chiron.load.result import result_of
    from chiron.telemetry.store import load_result, save_result

    client = result_of(run, "client")
    save_result(client, out / "client.chiron")
    saved = out / "data" / "result.chiron"
    if not saved.exists():
        raise ConfigError(f"{saved} is missing: the gateway did not end well; see {out / 'gateway.log'}")
    result = replace(load_result(saved), scenario="live demo", scenario_text=f"{config}\n\n{run.plan.text}")
    lines = verdict_lines(client.settings, result, instances_max())
    lines += [*machine, *(f"warning: {text}" for text in client.settings["warnings"])]
    console.print()
    for line in lines:
        say(console, line)
    console.print()
    report = _report(out, [result], [*about, *lines])
    say(console, f"report     {report}")
    say(console, f"event log  {out / 'data' / 'events.jsonl'}")
    say(console, f"reasons    {program()} explain {saved}")
    console.print()
    say(console, NEXT_STEP)


def program() -> str:
    return "chiron" if shutil.which("chiron") else f"{sys.executable} -m chiron"


def _report(out: Path, results: list[Result], notes: list[str]) -> Path:
    from chiron.telemetry.html import write_report

    command = shlex.join(["chiron", *sys.argv[1:]])
    return write_report(results, out / "report.html", command=command, notes=notes)
