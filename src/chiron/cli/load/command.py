"""``chiron load``: send a request stream to any OpenAI endpoint, in real time, and report like the simulator."""

from __future__ import annotations

import asyncio
import json
import os
import shlex
import signal
import sys
from collections.abc import Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from chiron.cli.batch.command import KEY_VARIABLE
from chiron.cli.common.durations import seconds_of
from chiron.cli.common.extras import needs
from chiron.cli.common.tls import checked
from chiron.cli.load.plan import (
    ARRIVALS,
    check_options,
    drawn_lengths,
    from_trace,
    generated,
    mixed_plan,
    scenario_plan,
)
from chiron.cli.load.view import LoadView, print_figures
from chiron.cli.simulate.command import INTERRUPTED, Outputs
from chiron.cli.simulate.tables import results_console
from chiron.config.read import ConfigError
from chiron.load.body import BodySettings
from chiron.load.errors import StoppedError
from chiron.load.plan import Lengths, LoadPlan
from chiron.load.settings import BatchSettings, LoadSettings
from chiron.net.loop import run_on_loop

FAILED = 1
what = partial(typer.Option, rich_help_panel="What to send")
looks = partial(typer.Option, rich_help_panel="What requests look like")
limits = partial(typer.Option, rich_help_panel="Limits and waits")
results = partial(typer.Option, rich_help_panel="Results")


def load(
    context: typer.Context,
    url: Annotated[str, typer.Option("--url", help="The endpoint, with or without /v1.")] = "http://127.0.0.1:8000",
    model: Annotated[
        str | None,
        what("--model", "-m", help="Model to request; a scenario names its own.", show_default=False),
    ] = None,
    trace: Annotated[
        str | None,
        what("--trace", help="A packaged one (`chiron trace list`) or a file.", show_default=False),
    ] = None,
    scenario: Annotated[
        str | None,
        what("--scenario", help="A scenario: its streams, classes and batch jobs.", show_default=False),
    ] = None,
    rate: Annotated[
        float | None,
        what("--rate", help="Generate arrivals: requests per second.", show_default=False),
    ] = None,
    kind: Annotated[str, what("--kind", help=f"Of generated arrivals: {', '.join(ARRIVALS)}.")] = "poisson",
    arrival: Annotated[
        list[str] | None,
        what("--arrival", metavar="KEY=VALUE", help="A setting of that kind, such as cv=2. Repeatable."),
    ] = None,
    start: Annotated[str, what("--start", metavar="TIME", help="Where in the trace to begin.")] = "0s",
    duration: Annotated[
        str | None,
        what("--duration", metavar="TIME", help="How long to send.", show_default="the trace's, or 60s"),
    ] = None,
    rate_scale: Annotated[float, what("--rate-scale", help="Multiply all rates and batch jobs.")] = 1.0,
    lengths: Annotated[
        str | None,
        what("--lengths", help="Of generated requests: a packaged set, a trace or a file.", show_default=False),
    ] = None,
    input_tokens: Annotated[
        str,
        what("--input-tokens", help="Without --lengths: 256, mean=256,cv=1 or p50=200,p99=2000."),
    ] = "256",
    output_tokens: Annotated[str, what("--output-tokens", help="Likewise.")] = "128",
    class_mix: Annotated[
        str,
        what("--class-mix", metavar="NAME=SHARE,...", help="Classes of a trace or generated stream."),
    ] = "chat=1",
    class_: Annotated[
        list[str] | None,
        what(
            "--class",
            metavar="NAME=KEY:VALUE,...",
            help="A class and its SLO, as `chat=ttft:2s,itl:100ms` or `flex=kind:batch,deadline:1h`. Repeatable.",
        ),
    ] = None,
    set_: Annotated[
        list[str] | None,
        what("--set", metavar="PATH=VALUE", help="Set a value of the scenario. Repeatable."),
    ] = None,
    batch_jobs: Annotated[
        str,
        what("--batch-jobs", help="A scenario's jobs: api (/v1/batches), requests (one by one) or skip."),
    ] = "api",
    api: Annotated[str, looks("--api", help="chat or completions.")] = "chat",
    prompt: Annotated[str, looks("--prompt", help="text, or token-ids (completions only).")] = "text",
    ignore_eos: Annotated[
        bool | None,
        looks(
            "--ignore-eos/--no-ignore-eos",
            help="Request outputs of exactly the wanted length.",
            show_default="if the server knows the field",
        ),
    ] = None,
    slo_headers: Annotated[
        bool,
        looks("--slo-headers/--no-slo-headers", help="Send x-slo-ttft-ms and x-slo-tpot-ms of each class."),
    ] = True,
    calibrate: Annotated[
        bool,
        looks("--calibrate/--no-calibrate", help="Measure bytes per token with two requests per model."),
    ] = True,
    input_scale: Annotated[float, looks("--input-scale", help="Multiply prompt lengths by this.")] = 1.0,
    output_scale: Annotated[float, looks("--output-scale", help="Multiply output lengths by this.")] = 1.0,
    input_max: Annotated[int, looks("--input-max", help="Longest prompt, tokens.")] = 131_072,
    max_tokens_max: Annotated[int, looks("--max-tokens-max", help="Longest output, tokens.")] = 131_072,
    header: Annotated[
        list[str] | None,
        looks("--header", metavar="NAME:VALUE", help="Send a header. Repeatable."),
    ] = None,
    body: Annotated[
        str | None,
        looks("--body", metavar="JSON", help="Further fields of every body: '{\"temperature\": 0}'."),
    ] = None,
    key: Annotated[
        str | None,
        looks("--key", help=f"API key; default: the variable {KEY_VARIABLE}.", show_default=False),
    ] = None,
    in_flight_max: Annotated[
        int,
        limits("--in-flight-max", help="Requests at a time; more are not sent, and reported."),
    ] = 4096,
    timeout: Annotated[str, limits("--timeout", metavar="TIME", help="Of a request, to its last byte.")] = "10m",
    connect_timeout: Annotated[str, limits("--connect-timeout", metavar="TIME")] = "5s",
    probe_timeout: Annotated[
        str,
        limits("--probe-timeout", metavar="TIME", help="Of each request before the run; an engine may have to start."),
    ] = "5m",
    grace: Annotated[
        str,
        limits("--grace", metavar="TIME", help="After ctrl-C, for requests in flight to finish."),
    ] = "10s",
    batch_wait: Annotated[
        str,
        limits("--batch-wait", metavar="TIME", help="How long after its deadline a batch job is waited for."),
    ] = "1m",
    cacert: Annotated[
        Path | None,
        limits("--cacert", metavar="FILE", help="PEM file of the authority that signed the server's certificate."),
    ] = None,
    insecure: Annotated[bool, limits("--insecure", help="Accept any TLS certificate.")] = False,
    keepalive: Annotated[bool, limits("--keepalive/--no-keepalive", help="Reuse connections.")] = True,
    seed: Annotated[
        int,
        what("--seed", "-s", min=0, help="Of arrivals, lengths, classes and prompts."),
    ] = 1,
    label: Annotated[str, results("--label", help="The run's name in reports.")] = "load",
    json_: Annotated[
        str | None,
        results("--json", metavar="FILE", help="Write a JSON object; - is stdout.", show_default=False),
    ] = None,
    report: Annotated[
        Path | None,
        results("--report", metavar="FILE.html", help="Write one self-contained HTML page.", show_default=False),
    ] = None,
    save: Annotated[
        Path | None,
        results("--save", metavar="FILE.chiron", help="Save the result.", show_default=False),
    ] = None,
    dry_run: Annotated[
        bool,
        results("--dry-run", help="Print what would be sent, with its digest, and send nothing."),
    ] = False,
) -> None:
    """Send a trace, a scenario or generated traffic to any OpenAI endpoint, open loop, and report.

    Requests are sent at their scheduled times, answered or not; latencies count from those times. Every
    answer is streamed. Exit status 1: no request finished.

    Examples:

    - `chiron load --url http://127.0.0.1:8000 --model llama --rate 5 --duration 60s`

    - `chiron load --model llama --trace azure-2023-conv --start 10m --duration 5m --class-mix chat=0.8,flex=0.2`

    - `chiron load --scenario demo --duration 2m --set workload.0.rate_scale=1 --report report.html --json load.json`
    """
    outputs = Outputs(json=json_, report=report, figures=None, events=None, save=save)
    outputs.check()
    changed = Lengths(
        input_scale=input_scale, output_scale=output_scale, input_max=input_max, output_max=max_tokens_max
    )
    check_options(_given(context))
    if scenario is not None:
        plan = scenario_plan(scenario, set_, rate_scale, duration, seed, batch_jobs, changed)
    else:
        if trace is not None:
            name = trace
            source = from_trace(trace, start, duration, rate_scale, seed)
        else:
            drawn = drawn_lengths(lengths, input_tokens, output_tokens)
            name, source = (
                f"{kind} {rate:g}/s",
                generated(kind, rate or 0.0, arrival, duration, rate_scale, drawn, seed),
            )
        plan = mixed_plan(source, name, model, class_mix, class_, seed, changed)
    settings = LoadSettings(
        url=url,
        body=BodySettings(
            api=api,  # type: ignore[arg-type]
            prompt=prompt,  # type: ignore[arg-type]
            slo_headers=slo_headers,
            extra=_json_object(body),
            headers=dict(_header(text) for text in header or ()),
            key=os.environ.get(KEY_VARIABLE, "") if key is None else key,
        ),
        batch=BatchSettings(wait_s=seconds_of("--batch-wait", batch_wait)),
        ignore_eos=ignore_eos,
        calibrate=calibrate,
        in_flight_max=in_flight_max,
        connect_timeout_s=seconds_of("--connect-timeout", connect_timeout),
        probe_timeout_s=seconds_of("--probe-timeout", probe_timeout),
        request_timeout_s=seconds_of("--timeout", timeout),
        grace_s=seconds_of("--grace", grace),
        keepalive=keepalive,
        verify=not insecure,
        cacert=checked(cacert),
    )
    if dry_run:
        _describe(plan)
        return
    _run(plan, settings, outputs, label)


def _given(context: typer.Context) -> list[str]:
    """The options of the command line, by their long names: a value alone does not tell whether it was asked for."""
    return [
        parameter.opts[0]
        for parameter in context.command.params
        if (source := context.get_parameter_source(parameter.name or "")) and source.name == "COMMANDLINE"
    ]


def _header(text: str) -> tuple[str, str]:
    name, found, value = text.partition(":")
    if not found or not name.strip():
        # The value may be a secret: it is not repeated.
        raise ConfigError("--header: expected NAME:VALUE")
    return name.strip(), value.strip()


def _json_object(text: str | None) -> dict[str, Any]:
    if text is None:
        return {}
    try:
        value = json.loads(text)
    except ValueError as error:
        raise ConfigError(f"--body: not JSON: {error}") from None
    if not isinstance(value, dict):
        raise ConfigError(f"--body: {value!r} must be a JSON object")
    return value


def _describe(plan: LoadPlan) -> None:
    work = plan.workload
    typer.echo(
        f"{plan.name}, seed {plan.seed}: {len(plan.single):,} requests and {len(plan.jobs)} batch jobs "
        f"({sum(len(job.rows) for job in plan.jobs):,} items) over {plan.last_s:.1f} s, "
        f"{int(work.input_tokens.sum()):,} prompt and {int(work.output_tokens.sum()):,} output tokens, "
        f"models {', '.join(work.models)}, classes {', '.join(cls.name for cls in work.classes)}; "
        f"digest {plan.digest}"
    )


def _run(plan: LoadPlan, settings: LoadSettings, outputs: Outputs, label: str) -> None:
    """Send, then write everything asked for; also after ctrl-C."""
    with needs("serve"):
        from chiron.load.result import result_of
        from chiron.load.run import LoadRun, run_load

    console = Console(stderr=True, markup=False)
    with LoadView(console, f"{plan.name} to {settings.url}") as view:

        async def main() -> LoadRun:
            stop = asyncio.Event()
            with _stopped_by_interrupt(stop):
                return await run_load(plan, settings, progress=view.show, waiting=view.waiting, stop=stop)

        try:
            run = run_on_loop(main())
        except StoppedError as error:
            console.print(str(error))
            raise typer.Exit(INTERRUPTED) from None
    result = result_of(run, label)
    print_figures(results_console(stderr=outputs.json == "-"), result.settings)
    _write(result, outputs)
    if run.stopped:
        raise typer.Exit(INTERRUPTED)
    if not result.summary["finished"]:
        raise typer.Exit(FAILED)


class _stopped_by_interrupt:  # noqa: N801 - reads as a statement
    """The first ctrl-C sets ``stop``, the second one interrupts as usual."""

    def __init__(self, stop: asyncio.Event) -> None:
        self._stop = stop

    def __enter__(self) -> None:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            with suppress(NotImplementedError):
                loop.add_signal_handler(number, self._heard)

    def __exit__(self, *_: object) -> None:
        self._default()

    def _heard(self) -> None:
        self._stop.set()
        self._default()

    def _default(self) -> None:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            with suppress(NotImplementedError):
                loop.remove_signal_handler(number)
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _write(result: Any, outputs: Outputs) -> None:
    if outputs.json is not None:
        text = json.dumps({"load": result.settings, "summary": result.summary}, indent=2) + "\n"
        if outputs.json == "-":
            sys.stdout.write(text)
        else:
            Path(outputs.json).write_text(text, encoding="utf-8")
    if outputs.save is not None:
        from chiron.telemetry.store import save_result

        save_result(result, outputs.save)
    if outputs.report is not None:
        from chiron.telemetry.html import write_report

        command = shlex.join(["chiron", *without_secrets(sys.argv[1:])])
        figures = result.settings
        errors = {kind: (count, figures["examples"].get(kind, "")) for kind, count in figures["errors"].items()}
        write_report([result], outputs.report, command=command, notes=figures["warnings"], errors=errors)


def without_secrets(words: Sequence[str]) -> list[str]:
    """A command line that may be shown: without the values of --key and --header."""
    shown: list[str] = []
    hide = False
    for word in words:
        option, equals, _ = word.partition("=")
        if hide:
            shown.append("...")
            hide = False
        elif option in ("--key", "--header"):
            shown.append(f"{option}=..." if equals else word)
            hide = not equals
        else:
            shown.append(word)
    return shown
