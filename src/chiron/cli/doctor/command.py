"""``chiron doctor``: would it work, and if not, what to do?"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.text import Text

from chiron.cli.common.extras import missing
from chiron.cli.doctor.checks import (
    FAIL,
    RUNNING,
    WARN,
    Check,
    check,
    data_checks,
    extra_checks,
    file_limit_check,
    gateways_checks,
    log_checks,
    machine_checks,
    port_check,
    process_checks,
    security_checks,
    store_checks,
)
from chiron.cli.serve import DEFAULT_CONFIG, FILES_BESIDES, FILES_PER_CONNECTION, extras_of, load, overrides
from chiron.config.read import ConfigError

if TYPE_CHECKING:
    from chiron.gateway.settings import ServeConfig

STYLES = {"ok": "green", "warn": "yellow", "fail": "red"}
FAILED = 1


def doctor(
    config: Annotated[
        Path | None,
        typer.Argument(metavar="CONFIG", help=f"A serve config; default: {DEFAULT_CONFIG} if there is one."),
    ] = None,
    set_: Annotated[
        list[str] | None, typer.Option("--set", metavar="PATH=VALUE", help="Set a value, as for `chiron serve`.")
    ] = None,
    port: Annotated[
        int | None,
        typer.Option("--port", min=0, max=65535, help="As for `chiron serve`, instead of the config's."),
    ] = None,
    json_: Annotated[bool, typer.Option("--json", help="Print a JSON array, one object per check.")] = False,
) -> None:
    """Check this machine, a config and its engines: each line is ok, warn or fail, with what to do next.

    It changes nothing, and sends each endpoint one short completion request. Exit status 1 if something fails.

    Examples:

    - `chiron doctor`

    - `chiron doctor chiron.toml --port 8080 --json`
    """
    if config is None and Path(DEFAULT_CONFIG).is_file():
        config = Path(DEFAULT_CONFIG)
    console = Console(highlight=False, markup=False)
    found = []
    for each in _checks(config, list(set_ or ()), port):
        found.append(each)
        if not json_:
            console.print(_line(each), soft_wrap=True)
    if json_:
        typer.echo(json.dumps([each.as_dict() for each in found], indent=2))
    else:
        console.print(_verdict(found, config))
    if any(each.state == FAIL for each in found):
        raise typer.Exit(FAILED)


def _checks(path: Path | None, assignments: list[str], port: int | None) -> Iterator[Check]:
    yield from machine_checks()
    config: ServeConfig | None = None
    trouble = ""
    if path is not None and not missing("serve"):
        try:
            config = load(path, overrides(assignments, None, port, None), None)
        except ConfigError as error:
            trouble = str(error)
    yield from extra_checks(["serve"] if config is None else extras_of(config))
    if path is None:
        yield check("config", "none given; `chiron init` writes one")
        return
    if config is None:
        hint = "correct the config; docs/config.md explains each key" if trouble else "install the packages above first"
        yield check("config", trouble or f"{path} was not read", FAIL, hint)
        return
    names = ", ".join(model.name for model in (*config.models, *config.cascades)) or "no models of its own"
    yield check("config", f"{path}: {names}; policy {config.policy_label}")
    connections = config.limits.connections_max
    yield file_limit_check(connections, connections * FILES_PER_CONNECTION + FILES_BESIDES)
    yield port_check(config)
    yield from data_checks(config)
    yield from store_checks(config)
    yield from log_checks(config)
    yield from security_checks(config)
    yield from gateways_checks(config)
    yield from process_checks(config)
    from chiron.cli.doctor.kubernetes import kubernetes_checks

    yield from kubernetes_checks(config, path.absolute().parent)
    from chiron.cli.doctor.ray import ray_checks

    yield from ray_checks(config)
    from chiron.cli.doctor.endpoints import endpoint_checks

    yield from endpoint_checks(config)


def _line(each: Check) -> Text:
    line = Text(f"{each.state:<5}", style=STYLES[each.state])
    line.append(f"{each.what}: ", style="default bold")
    line.append(each.found, style="default")
    if each.next:
        line.append(f"\n     -> {each.next}", style="default")
    return line


def _verdict(found: list[Check], config: Path | None) -> str:
    fails, warns = (sum(each.state == state for each in found) for state in (FAIL, WARN))
    if fails:
        return f"{fails} of {len(found)} checks failed" + (f", {warns} with a warning" if warns else "")
    fine = f"all {len(found)} checks passed" + (f", {warns} with a warning" if warns else "")
    running = any(RUNNING in each.found for each in found)
    return fine + (f"; next: chiron serve {config}" if config and not running else "")
