"""``chiron serve``: the gateway, until it is told to stop."""

from __future__ import annotations

import asyncio
import errno
import functools
import json
import logging
import os
import signal
import socket
import tempfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from chiron.cli.common.extras import needs, require_extras
from chiron.cli.common.tls import certificate_trouble, gateways_trouble
from chiron.config.read import ConfigError
from chiron.engines.rows import ENGINES
from chiron.net.loop import run_on_loop

if TYPE_CHECKING:
    from chiron.cli.common.chiron_models import FollowedModels
    from chiron.gateway.processes.keeper import Keeper, Seat
    from chiron.gateway.processes.kept import KeeperLink
    from chiron.gateway.settings import ServeConfig, ServerSettings

log = logging.getLogger("chiron.gateway")

DEFAULT_CONFIG = "chiron.toml"
INTERRUPTED = 130
KEEPER_GONE = 1
FILES_PER_CONNECTION = 2
"""A request holds the client's connection and one to an engine."""
FILES_BESIDES = 1000
"""Files that are open for other reasons: the store, logs, pipes to engines."""


def serve(
    config: Annotated[
        Path, typer.Argument(metavar="CONFIG", help="The serve config; `chiron init` writes one.")
    ] = Path(DEFAULT_CONFIG),
    advise: Annotated[
        bool,
        typer.Option("--advise", help="Decide and log how many engines and which batch sizes, but change nothing."),
    ] = False,
    policy: Annotated[
        str | None,
        typer.Option("--policy", "-p", help="A policy (`chiron policies`) or a label of the config's [policies]."),
    ] = None,
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="PATH=VALUE", help="Set a value of the config, such as `limits.queue_max=500`."),
    ] = None,
    host: Annotated[str | None, typer.Option("--host", help="Address to listen on, instead of the config's.")] = None,
    port: Annotated[
        int | None, typer.Option("--port", min=0, max=65535, help="Port, instead of the config's; 0: any free one.")
    ] = None,
    data: Annotated[
        Path | None,
        typer.Option("--data", metavar="DIR", help="Directory for batches and logs, instead of the config's."),
    ] = None,
    workers: Annotated[
        str | None,
        typer.Option(
            "--workers", metavar="N|auto", help="Processes that carry connections and tokens; auto: cores less one."
        ),
    ] = None,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Log more.")] = False,
) -> None:
    """Serve OpenAI's API in front of your engines, with autoscaling.

    Ctrl-C, SIGTERM or a closed terminal (SIGHUP) stops it: no new requests, running ones finish within `server.grace`,
    batches continue at the next start. A second ctrl-C stops at once.

    Examples:

    - `chiron init && chiron serve`

    - `chiron serve chiron.toml --advise`

    - `chiron serve chiron.toml --policy llumnix --set limits.queue_max=500`
    """
    loaded = load(config, overrides(set_, host, port, data, workers), policy)
    require_extras(extras_of(loaded))
    _require_certificate(loaded.server)
    if loaded.gateways is not None and (trouble := gateways_trouble(loaded.gateways)[0]):
        raise ConfigError(trouble)
    with needs("serve"):
        import chiron.gateway.service  # noqa: F401  Loaded before the first fork, and asked for with a clear message.
        from chiron.gateway.peers.door import ListenError
        from chiron.store.port import StoreError, StoreLocked
    logging.basicConfig(
        level=logging.DEBUG if verbose else logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s"
    )
    raise_file_limit(loaded.limits.connections_max * FILES_PER_CONNECTION + FILES_BESIDES)

    models = None
    if loaded.kubernetes is not None:
        from chiron.cli.common.chiron_models import FollowedModels

        models = FollowedModels(loaded, config.absolute().parent, policy)
        loaded = models.first()
    try:
        _serve(loaded, models, advise=advise)
    except OSError as error:
        refusal = _cannot_listen(error, loaded.server) or _cannot_write(error, loaded)
        if refusal:
            raise ConfigError(refusal) from None
        raise
    except ListenError as error:
        raise ConfigError(str(error)) from None
    except StoreLocked as error:
        hint = "one gateway has a data directory at a time: stop that one, or choose another directory with --data"
        raise ConfigError(f"server.data: {error}; {hint}") from None
    except StoreError as error:
        raise ConfigError(f"{'server.data: ' if str(loaded.data) in str(error) else ''}{error}") from None


def _serve(config: ServeConfig, models: FollowedModels | None, *, advise: bool) -> None:
    """In one process, or as the keeper of several: then also once in each brain that it makes."""
    from chiron.gateway.processes.keeper import AGAIN
    from chiron.gateway.processes.start import BrainStart
    from chiron.gateway.service import run

    keeper = _keeper(config, models)
    seat = keeper.run() if keeper is not None else None
    if keeper is not None and seat is None:
        raise typer.Exit(keeper.status)
    follows = seat is not None and seat.number > 1
    if models is not None:
        config = models.renewed() or config
    if follows:
        log.warning("this is brain %d: the one before it has ended", seat.number if seat is not None else 0)

    async def body(link: KeeperLink | None, relays_ended: asyncio.Event) -> None:
        say_keeper = link.say if link is not None else lambda word: None

        def ready(url: str) -> None:
            say_keeper("ready")
            if not follows:
                say(welcome(config, url, advise))

        if keeper is None or seat is None or link is None:
            await run(config, advise=advise, on_ready=ready)
            return
        opened = functools.partial(say_keeper, "open")
        start = keeper.start
        brain = BrainStart(
            relays=start, opened=opened, follows=follows, term=seat.number, expects=start.relays, superseded=_superseded
        )
        followed: dict[str, Any] = {}
        if models is not None:
            followed = {"leading": models.lead, "hands_over": lambda: models.changed}
        if config.gateways is None:
            serving = run(config, advise=advise, brain=brain, on_ready=ready, **followed)
        else:
            from chiron.gateway.peers.member import Member

            serving = Member(
                config,
                advise=advise,
                brain=brain,
                nonce=seat.nonce,
                say=say_keeper,
                say_at_once=link.say_at_once,
                on_ready=ready,
                relays_ended=relays_ended,
                models=models,
                **followed,
            ).run()
        await (serving if models is None else models.follow(serving))

    stopped_by = run_until_stopped(body, keeper, seat)
    if models is not None and models.changed and stopped_by is None:
        raise typer.Exit(AGAIN)
    say("stopped")
    if stopped_by == signal.SIGINT:
        raise typer.Exit(INTERRUPTED)


def _superseded(term: int) -> None:
    """The keeper starts the next one."""
    from chiron.gateway.processes.fence import OVER

    log.error("a brain of term %d is at work: this one ends", term)
    os._exit(OVER)


def _keeper(config: ServeConfig, models: FollowedModels | None) -> Keeper | None:
    """To be made before there is a loop, or a thread; None: one process does it all."""
    relays = config.server.relays(os.cpu_count() or 1)
    if config.gateways is not None or models is not None:
        relays = max(1, relays)  # Those of each gateway reach whichever brain leads, or follows.
    if not relays:
        return None
    # All that a brain needs: to load it after the fork would take longer.
    import chiron.net.asgi
    from chiron.gateway.processes.keeper import Keeper
    from chiron.gateway.processes.relay import run_relay
    from chiron.gateway.processes.reserved import reserve
    from chiron.gateway.processes.start import RelayStart

    if config.gateways is not None:
        import chiron.gateway.peers.member
        import chiron.store.postgres.lease
        import chiron.store.postgres.store  # noqa: F401

    port = reserve(config.server.host, config.server.port)
    folder = Path(tempfile.mkdtemp(prefix="chiron-"))  # Nobody else may look into it.
    return Keeper(
        relay=lambda keeper, start: run_relay(config, keeper, start, *([models.renewed] if models is not None else [])),
        start=RelayStart(port=port.number, folder=folder, relays=relays),
        port=port,
        stopping=_stopping_signals(),
        grace_s=config.server.grace_s,
    )


def _cannot_listen(error: OSError, server: ServerSettings) -> str:
    """Why, and what to do; empty if the error is about something else, such as a file."""
    where = f"{server.host}:{server.port}"
    if error.errno == errno.EADDRINUSE:
        return f"server.port: {where} is in use by another program; --port chooses another (0: any free one)"
    if isinstance(error, socket.gaierror):
        return f"server.host: cannot listen on {where}: {error.strerror}"
    if error.errno in (errno.EADDRNOTAVAIL, errno.EACCES) and not error.filename:
        return f"server.host: cannot listen on {where}: {os.strerror(error.errno)}"
    return ""


def _cannot_write(error: OSError, config: ServeConfig) -> str:
    """Which key of the config names the file; empty if none does."""
    if not error.filename:
        return ""
    path = Path(os.fsdecode(error.filename))
    logs = (("telemetry.event_log", config.event_log), ("telemetry.input_log", config.input_log))
    for key, own in (("server.data", config.data), *logs):
        if own is not None and (path in (own, *own.parents) or own in path.parents):
            return f"{key}: cannot write {path}: {error.strerror}"
    return ""


def _require_certificate(server: ServerSettings) -> None:
    """Before anything starts: the words of the TLS library name no file."""
    if server.tls and (trouble := certificate_trouble(server.tls_cert, server.tls_key)):
        found, hint = trouble
        raise ConfigError(f"server.tls_cert, server.tls_key: {found}; {hint}")


def say(text: str) -> None:
    """To the terminal, or to the file that stands for it; a full disk there must not keep anything from happening."""
    with suppress(OSError):
        typer.echo(text, err=True)


def load(config: Path, assignments: list[str], policy: str | None) -> ServeConfig:
    """The serve config, or one line that says what to install or to change."""
    with needs("serve"):
        from chiron.config.serve import load_serve
    return load_serve(config, assignments, policy)


def overrides(
    set_: list[str] | None, host: str | None, port: int | None, data: Path | None, workers: str | None = None
) -> list[str]:
    """The command's options as ``path=value``; a later one wins."""
    found = list(set_ or ())
    if host is not None:
        found.append(f"server.host={json.dumps(host)}")
    if port is not None:
        found.append(f"server.port={port}")
    if workers is not None:
        found.append(f"server.workers={workers if workers.isdecimal() else json.dumps(workers)}")
    if data is not None:
        # Relative to where the command runs, as every path of a command line is.
        found.append(f"server.data={json.dumps(str(data.absolute()))}")
    return found


def extras_of(config: ServeConfig) -> list[str]:
    """Extras of the package that this config needs."""
    from chiron.fleet.process.fleet import ProcessSource
    from chiron.fleet.ray.source import RaySource
    from chiron.store.postgres.settings import PostgresSettings

    sources = [kind.source for model in config.models for kind in model.kinds]
    of_fleet = ["ray"] if any(isinstance(each, RaySource) and not each.python for each in sources) else []
    kinds = [kind for model in config.models for kind in model.kinds if isinstance(kind.source, ProcessSource)]
    of_store = ["postgres"] if isinstance(config.store, PostgresSettings) else []
    return [
        "serve",
        *of_store,
        *of_fleet,
        *dict.fromkeys(extra for kind in kinds if (extra := ENGINES[kind.engine].extra)),
    ]


def welcome(config: ServeConfig, url: str, advise: bool) -> str:
    """What a user wants to see at the start, and how to go on."""
    lines = [f"chiron serves at {url}/v1" + ("  (advise: decides and logs, changes nothing)" if advise else "")]
    for model in config.models:
        kinds = ", ".join(_describe_kind(kind) for kind in model.kinds)
        bounds = _describe_bounds(model.min_instances, model.max_instances)
        lines.append(f"  model {model.name}: {kinds}; {bounds}; classes {', '.join(model.classes)}")
    for model in config.cascades:
        assert model.cascade is not None
        lines.append(
            f"  model {model.name}: {model.cascade.first} first, then {model.cascade.then} where that is unsure"
        )
    names = ", ".join(key.name for key in config.keys)
    lines.append(f"  keys: {names or 'none, everybody who reaches the port may use every model'}")
    lines.append(f"  policy: {config.policy_label}")
    lines.append(f"  data: {config.data}")
    lines.append(f"  event log: {config.event_log or 'off'}")
    lines.append("Stop with ctrl-C.")
    return "\n".join(lines)


def _describe_bounds(least: int, most: int) -> str:
    return f"{least} to {_count(most, 'instance')}" if least != most else _count(most, "instance")


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" + ("s" if number != 1 else "")


def _describe_kind(kind: Any) -> str:
    return f"{kind.kind.name.rpartition('/')[2]} ({kind.source.summary})"


def run_until_stopped(
    body: Callable[[KeeperLink | None, asyncio.Event], Any], keeper: Keeper | None = None, seat: Seat | None = None
) -> int | None:
    """Run a coroutine; the first SIGINT, SIGTERM or SIGHUP cancels it, so that it can end well; a second, but for
    SIGHUP, ends the process at once. Returns the signal that stopped it. With a ``keeper``, that says so; ``body`` gets
    the link to it, and an event that is set once all relays have ended."""
    signals = _stopping_signals() if seat is None else []
    stopped_by: list[int] = []

    async def supervised() -> None:
        loop = asyncio.get_running_loop()

        def stop(number: int) -> None:
            if stopped_by and number == signal.SIGHUP:
                return  # A terminal that closes says so more than once: its shell does as well.
            if stopped_by:
                # Engines die with this process: their supervisors see the pipe close.
                os._exit(128 + number)
            stopped_by.append(number)
            if task is not None:
                task.cancel()
            say("stopping: waiting for running requests to finish; once more stops at once")

        task: asyncio.Future[Any] | None = None
        ended = asyncio.Event()
        link = await _join_keeper(keeper, seat, stop, ended.set) if keeper is not None and seat is not None else None
        task = asyncio.ensure_future(body(link, ended))
        if stopped_by:
            task.cancel()
        for number in signals:
            loop.add_signal_handler(number, stop, number)
        try:
            await task
        except asyncio.CancelledError:
            if not stopped_by:
                raise
        finally:
            for number in signals:
                loop.remove_signal_handler(number)
            if stopped_by:
                signal.signal(signal.SIGHUP, signal.SIG_IGN)
            if link is not None:
                link.close()

    run_on_loop(supervised())
    return stopped_by[0] if stopped_by else None


async def _join_keeper(
    keeper: Keeper, seat: Seat, stop: Callable[[int], None], alone: Callable[[], None]
) -> KeeperLink:
    from chiron.gateway.processes.kept import KeeperLink

    def gone() -> None:
        keeper.start.clear()
        os._exit(KEEPER_GONE)  # As if all had been killed at once: what is to survive that is on disk.

    link = KeeperLink(stop=stop, gone=gone, alone=alone, beside=seat.socket.dup())
    await asyncio.get_running_loop().create_unix_connection(lambda: link, sock=seat.socket)
    return link


def _stopping_signals() -> list[signal.Signals]:
    """Without SIGHUP where it is ignored: nohup asks for that."""
    hangs_up = signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN
    return [signal.SIGINT, signal.SIGTERM, *([signal.SIGHUP] if hangs_up else [])]


def raise_file_limit(wanted: int) -> None:
    """More open files for this process, as far as the system lets it; the usual 1,024 are few for a server."""
    try:
        import resource
    except ModuleNotFoundError:
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
    if soft != resource.RLIM_INFINITY and soft < most:
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
