"""``chiron ray``: what Chiron runs on a Ray cluster, looked at and removed from outside a gateway."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated

import typer

from chiron.cli.common.extras import needs, require_extras
from chiron.config.read import ConfigError

if TYPE_CHECKING:
    from chiron.fleet.ray.cluster import Answer, Seen

app = typer.Typer(help="Look at instances on a Ray cluster, and remove what is left there.", no_args_is_help=True)

REMOVE_TIMEOUT_S = 60.0
HOLDER = "chiron-ray"

Address = Annotated[str, typer.Option("--address", help="Of the cluster, as `address` in the config.")]
Namespace = Annotated[str, typer.Option("--namespace", help="Of the actors, as `namespace` in the config.")]
Python = Annotated[str, typer.Option("--python", help="A Python with the cluster's Ray, as `python` in the config.")]


@app.callback()
def ray() -> None:
    """Commands for instances on Ray."""


@app.command("list")
def list_(address: Address = "auto", namespace: Namespace = "chiron", python: Python = "") -> None:
    """List the instances of a namespace: name, state, address, and the gateway that has it.

    Example:

    - `chiron ray list --address 10.0.0.5:6379`
    """
    answer = _asked(address, namespace, python, {})
    for each in answer.instances:
        typer.echo(f"{each.name}  {_state(each)}")
    typer.echo(f"{len(answer.instances)} instances in namespace {namespace}; {nodes_text(answer)}", err=True)


@app.command()
def remove(
    names: Annotated[
        list[str] | None, typer.Argument(metavar="[NAME...]", help="Instances, as `chiron ray list` names them.")
    ] = None,
    address: Address = "auto",
    namespace: Namespace = "chiron",
    python: Python = "",
    grace_s: Annotated[float, typer.Option("--grace", min=0.0, help="Seconds from SIGTERM to SIGKILL.")] = 10.0,
    free: Annotated[bool, typer.Option("--free", help="All of the namespace that have a node and no gateway.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Also those that a gateway has, or may wait for.")] = False,
) -> None:
    """End instances that no gateway looks after, and give their nodes back.

    Example:

    - `chiron ray remove chiron:chiron:llama%2Fvllm:0a1b2c3d4e5f:8c9d0e1f-6f7a8b9c`
    """
    if bool(names) == free:
        raise ConfigError("name instances, or use --free")
    found = {each.name: each for each in _asked(address, namespace, python, {}).instances}
    names = names or [name for name, each in found.items() if each.free or (each.phase == "pending" and force)]
    for name in names:
        if name not in found:
            raise ConfigError(f"{name!r}: there is none in namespace {namespace}; `chiron ray list` lists them")
        if found[name].holder and not force:
            raise ConfigError(f"{name!r}: gateway {found[name].holder} has it; stop that first, or use --force")
        if found[name].phase == "unknown" and not force:
            raise ConfigError(f"{name!r}: it has not said yet which gateway has it; try again, or use --force")
    answer = _asked(address, namespace, python, dict.fromkeys(names, grace_s), force=force)
    if left := sorted(set(names) & {each.name for each in answer.instances}):
        raise ConfigError(f"still there after {REMOVE_TIMEOUT_S + grace_s:g} s: {', '.join(left)}")
    typer.echo(f"removed {len(names)}", err=True)


def nodes_text(answer: Answer) -> str:
    """What the cluster has."""
    totals: dict[str, float] = {}
    for node in answer.nodes:
        for name, amount in node.resources.items():
            totals[name] = totals.get(name, 0.0) + amount
    parts = [f"{name} {totals[name]:g}" for name in sorted(totals) if name != "memory"]
    return f"{len(answer.nodes)} node{'s' if len(answer.nodes) != 1 else ''} ({', '.join(parts)})"


def _state(seen: Seen) -> str:
    parts: list[str] = [seen.phase]
    if seen.port:
        parts.append(f"at {seen.host}:{seen.port}")
    nobody = "of a gateway that waits for it, or of none" if seen.phase == "pending" else "of no gateway"
    parts.append(f"of gateway {seen.holder}" if seen.holder else nobody)
    return "  ".join([*parts, *([seen.why.splitlines()[0]] if seen.why else [])])


def _asked(address: str, namespace: str, python: str, stop: Mapping[str, float], *, force: bool = False) -> Answer:
    """The cluster's answer, once what is to be stopped is gone."""
    require_extras(["serve", *([] if python else ["ray"])])
    with needs("serve"):
        from chiron.fleet.ray.client import AgentClient
        from chiron.fleet.ray.cluster import Question, RayError

    async def ask() -> Answer:
        client = AgentClient(address, namespace, python)
        until_s = time.monotonic() + REMOVE_TIMEOUT_S + max(stop.values(), default=0.0)
        try:
            while True:
                answer = await client.ask(Question(stop=stop, force=force, holder=HOLDER))
                if not any(each.name in stop for each in answer.instances) or time.monotonic() > until_s:
                    return answer
                await asyncio.sleep(0.2)
        finally:
            await client.close()

    try:
        return asyncio.run(ask())
    except RayError as error:
        raise ConfigError(f"--address {address}: {error}") from None
