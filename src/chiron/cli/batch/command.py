"""``chiron batch``: submit a file of requests with a deadline, follow it, fetch the results."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any
from urllib.parse import quote

import typer
from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TransferSpeedColumn,
)
from rich.table import Table

from chiron.cli.batch.client import Server, ServerError
from chiron.cli.common.durations import seconds_of
from chiron.cli.common.group import ErrorsInALine
from chiron.config.read import ConfigError

KEY_VARIABLE = "CHIRON_API_KEY"
DEFAULT_URL = "http://127.0.0.1:8000"
POLL_S = 1.0
VALIDATION_WAIT_S = 60.0
"""``submit`` waits this long for the server's opinion of the file; then it leaves the batch to itself."""
RECONNECTS_MAX = 60
"""Polls in a row that may fail while a batch is watched: a gateway that restarts loses no batch."""
LINE_PERIOD_S = 30.0
"""Between two lines about a watched batch where there is no terminal for a bar."""
PIPE_WIDTH = 160
ERRORS_SHOWN = 10
"""Lines of a refused file; often all have the same error."""
ENDED = ("completed", "failed", "expired", "cancelled")
NOT_DONE = 1

app = typer.Typer(
    cls=ErrorsInALine,
    no_args_is_help=True,
    rich_markup_mode="markdown",
    help="Batch jobs of a running gateway: submit a file of requests with a deadline, follow it, fetch the results.",
    epilog="Start with: `chiron batch submit requests.jsonl --window 2h --wait`",
)

UrlOption = Annotated[
    str, typer.Option("--url", metavar="URL", help="The gateway, or any server with OpenAI's batch API.")
]
KeyOption = Annotated[
    str | None,
    typer.Option("--key", metavar="KEY", help=f"API key; default: the variable {KEY_VARIABLE}.", show_default=False),
]
CacertOption = Annotated[
    Path | None,
    typer.Option("--cacert", metavar="FILE", help="PEM file of the authority that signed the server's certificate."),
]
IdArgument = Annotated[str, typer.Argument(metavar="ID", help="Of the batch, as `chiron batch list` shows it.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print the batch object(s) as JSON.")]


@app.command()
def submit(
    file: Annotated[Path, typer.Argument(metavar="FILE.jsonl", help="One request per line, in OpenAI's batch format.")],
    window: Annotated[
        str, typer.Option("--window", "-w", metavar="TIME", help="Deadline, from now on: 30m, 2h, 1d ...")
    ] = "24h",
    endpoint: Annotated[
        str, typer.Option("--endpoint", help="What each line calls; default: the `url` of the first line.")
    ] = "",
    metadata: Annotated[
        list[str] | None,
        typer.Option("--metadata", "-m", metavar="KEY=VALUE", help="Stored with the batch. Repeatable."),
    ] = None,
    wait: Annotated[bool, typer.Option("--wait", help="Wait until it has ended, with a progress bar.")] = False,
    url: UrlOption = DEFAULT_URL,
    key: KeyOption = None,
    cacert: CacertOption = None,
) -> None:
    """Upload a file and start a batch from it. Prints the batch's id on stdout, everything else on stderr.

    Examples:

    - `chiron batch submit requests.jsonl --window 2h`

    - `chiron batch submit requests.jsonl -w 30m --metadata team=search --wait`
    """
    seconds_of("--window", window)
    notes = _read_metadata(metadata or [])
    called = endpoint or _endpoint_of(file)
    server = _server(url, key, cacert)
    with _transfer(f"uploading {file.name}", file.stat().st_size) as progress:
        uploaded = server.upload(file, "batch", progress)
    request = {"input_file_id": uploaded["id"], "endpoint": called, "completion_window": window}
    batch = server.post("/v1/batches", request | ({"metadata": notes} if notes else {}))
    with _going_on(batch):
        typer.echo(batch["id"])
        batch = _await_validation(server, batch)
        _say(batch)
        if batch["status"] == "failed":
            raise typer.Exit(2)
        if wait:
            _follow(server, batch, Console(stderr=True, markup=False))


@app.command()
def status(
    id: Annotated[str | None, typer.Argument(metavar="ID", help="Of the batch; default: the latest.")] = None,
    watch: Annotated[bool, typer.Option("--watch", help="Follow it until it has ended.")] = False,
    json_: JsonOption = False,
    url: UrlOption = DEFAULT_URL,
    key: KeyOption = None,
    cacert: CacertOption = None,
) -> None:
    """How far a batch is, and when it will be done.

    Examples:

    - `chiron batch status`

    - `chiron batch status batch_0123 --watch`
    """
    server = _server(url, key, cacert)
    batch = server.get(_path(id)) if id else _latest(server)
    if json_:
        typer.echo(json.dumps(batch, indent=2))
    elif watch and batch["status"] not in ENDED:
        with _going_on(batch):
            _follow(server, batch, Console(markup=False))
    else:
        _say(batch, Console(markup=False))


@app.command()
def cancel(id: IdArgument, url: UrlOption = DEFAULT_URL, key: KeyOption = None, cacert: CacertOption = None) -> None:
    """Stop a batch. What was done by then can be fetched.

    Example: `chiron batch cancel batch_0123`
    """
    _say(_server(url, key, cacert).post(f"{_path(id)}/cancel"), Console(markup=False))


@app.command()
def results(
    id: IdArgument,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", metavar="FILE", help="Write here; default: stdout.")
    ] = None,
    errors: Annotated[bool, typer.Option("--errors", help="The items that failed, with the reasons.")] = False,
    url: UrlOption = DEFAULT_URL,
    key: KeyOption = None,
    cacert: CacertOption = None,
) -> None:
    """Fetch the results of a batch that has ended: one JSON object per line, in the order of the input.

    Examples:

    - `chiron batch results batch_0123 -o results.jsonl`

    - `chiron batch results batch_0123 --errors`
    """
    server = _server(url, key, cacert)
    batch = server.get(_path(id))
    file_id = batch.get("error_file_id" if errors else "output_file_id")
    if batch["status"] not in ENDED:
        raise ConfigError(f"{id}: {describe(batch)}; results can be fetched when it has ended")
    if not file_id:
        typer.echo(f"{id}: {describe(batch)}; no item {'failed' if errors else 'has a result'}", err=True)
        return
    if output is None:
        server.download(file_id, sys.stdout.buffer, lambda _: None)
        sys.stdout.buffer.flush()
    else:
        _download(server, file_id, output)
    counts = batch["request_counts"]
    if counts["failed"] and not errors:
        typer.echo(f"{counts['failed']:,} of {counts['total']:,} items failed; --errors fetches them", err=True)


@app.command(name="list")
def list_(
    limit: Annotated[int, typer.Option("--limit", "-n", min=1, help="At most so many, the latest first.")] = 20,
    json_: JsonOption = False,
    url: UrlOption = DEFAULT_URL,
    key: KeyOption = None,
    cacert: CacertOption = None,
) -> None:
    """The batches of this key, the latest first.

    Example: `chiron batch list -n 100`
    """
    server = _server(url, key, cacert)
    batches: list[dict[str, Any]] = []
    more = True
    while more and len(batches) < limit:
        after = {"after": batches[-1]["id"]} if batches else {}
        page = server.get("/v1/batches", limit=min(100, limit - len(batches)), **after)
        batches += page["data"]
        more = page.get("has_more", False) and bool(page["data"])
    if json_:
        typer.echo(json.dumps(batches, indent=2))
        return
    if not batches:
        typer.echo("no batches")
        return
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("id", no_wrap=True, min_width=max(len(batch["id"]) for batch in batches))
    for heading in ("status", "created", "deadline"):
        table.add_column(heading)
    for heading in ("done", "failed", "total"):
        table.add_column(heading, justify="right")
    for batch in batches:
        counts = batch["request_counts"]
        figures = (f"{counts[name]:,}" for name in ("completed", "failed", "total"))
        table.add_row(
            batch["id"], batch["status"], _clock(batch["created_at"]), _clock(batch.get("expires_at")), *figures
        )
    console = Console(markup=False)
    # A pipe has no width of its own, and lines that are broken help nobody there.
    (console if console.is_terminal else Console(width=PIPE_WIDTH, markup=False)).print(table)


def describe(batch: dict[str, Any]) -> str:
    """A batch in a line of words: state, progress, speed, when it will be done and when it must be."""
    counts = batch["request_counts"]
    ended = counts["completed"] + counts["failed"]
    words = [batch["status"].replace("_", " ")]
    if counts["total"]:
        words.append(f"{ended:,} of {counts['total']:,} items ({100 * ended / counts['total']:.1f} %)")
    if counts["failed"]:
        words.append(f"{counts['failed']:,} failed")
    if batch["status"] not in ENDED:
        ours = batch.get("chiron") or {}
        if ours.get("items_per_s"):
            words.append(f"{ours['items_per_s']:.1f} items/s")
        if ours.get("eta_s") is not None:
            words.append(f"done in {_span(ours['eta_s'])}")
        if batch.get("expires_at"):
            words.append(f"deadline {_clock(batch['expires_at'])}")
    return ", ".join(words)


def _server(url: str, key: str | None, cacert: Path | None) -> Server:
    return Server(url, os.environ.get(KEY_VARIABLE, "") if key is None else key, cacert)


def _path(id: str) -> str:
    return f"/v1/batches/{quote(id, safe='')}"


def _latest(server: Server) -> dict[str, Any]:
    batches: list[dict[str, Any]] = server.get("/v1/batches", limit=1)["data"]
    if not batches:
        raise ConfigError(f"{server.url} has no batches of this key")
    return batches[0]


def _read_metadata(pairs: list[str]) -> dict[str, str]:
    found = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not equals or not name:
            raise ConfigError(f"--metadata {pair!r}: expected KEY=VALUE")
        found[name] = value
    return found


def _endpoint_of(path: Path) -> str:
    """The ``url`` of the first line, since every line must have the same."""
    with path.open("rb") as file:
        line = b"\n"
        while line and not line.strip():
            line = file.readline(BATCH_LINE_MAX_BYTES)
    try:
        url = json.loads(line.removeprefix(b"\xef\xbb\xbf"))["url"]
    except (ValueError, KeyError, TypeError):
        url = None
    if not isinstance(url, str):
        what = '{"custom_id": ..., "method": "POST", "url": "/v1/chat/completions", "body": {...}}'
        raise ConfigError(f"{path}: the first line is not a batch request; each line must look like {what}")
    return url


BATCH_LINE_MAX_BYTES = 64 << 20
"""Of the first line, which is read here; the server has a limit of its own."""


def _await_validation(server: Server, batch: dict[str, Any]) -> dict[str, Any]:
    """The batch once the server has checked its file, or as it is when that takes very long."""
    until_s = time.monotonic() + VALIDATION_WAIT_S
    with Console(stderr=True, markup=False).status("the server checks the file ..."):
        while batch["status"] == "validating" and time.monotonic() < until_s:
            time.sleep(POLL_S / 5)
            with suppress(_NotReachedError):
                batch = _look(server, batch)
    return batch


class _NotReachedError(Exception):
    """The server did not answer: perhaps it starts again."""


def _look(server: Server, batch: dict[str, Any]) -> dict[str, Any]:
    """The batch as it is now. Raises _NotReachedError, and ServerError for what the server refuses."""
    try:
        return server.get(_path(batch["id"]))
    except ServerError as error:
        if error.status:
            raise
        raise _NotReachedError(str(error)) from error


def _say(batch: dict[str, Any], console: Console | None = None) -> None:
    """The batch in words, and what was wrong with its file."""
    console = console or Console(stderr=True, markup=False)
    console.print(f"{batch['id']}: {describe(batch)}", highlight=False, markup=False, soft_wrap=True)
    errors = (batch.get("errors") or {}).get("data", [])
    for error in errors[:ERRORS_SHOWN]:
        line = f"line {error['line']}: " if error.get("line") is not None else ""
        console.print(f"  {line}{error['message']}", highlight=False, markup=False, soft_wrap=True)
    if len(errors) > ERRORS_SHOWN:
        console.print(
            f"  and {len(errors) - ERRORS_SHOWN} more: chiron batch status {batch['id']} --json", soft_wrap=True
        )


def _follow(server: Server, batch: dict[str, Any], console: Console) -> None:
    """Watch a batch to its end, and say on ``console`` how it ended."""
    batch = _watch(server, batch)
    _say(batch, console)
    if batch["status"] != "completed":
        raise typer.Exit(NOT_DONE)


@contextmanager
def _going_on(batch: dict[str, Any]) -> Iterator[None]:
    """Ctrl-C stops the watching, not the batch; say so."""
    try:
        yield
    except KeyboardInterrupt:
        typer.echo(f"the batch continues; chiron batch status {batch['id']} --watch follows it again", err=True)
        raise


def _watch(server: Server, batch: dict[str, Any]) -> dict[str, Any]:
    """The batch when it has ended; a bar until then."""
    columns = (BarColumn(), MofNCompleteColumn(), TextColumn("{task.description}", markup=False), TimeElapsedColumn())
    console = Console(stderr=True, markup=False)
    failures = 0
    said_s, said = time.monotonic(), describe(batch)
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bars:
        task = bars.add_task("", total=None)
        while batch["status"] not in ENDED:
            counts = batch["request_counts"]
            words = describe(batch)
            if not console.is_terminal and words != said and time.monotonic() - said_s >= LINE_PERIOD_S:
                _say(batch)
                said_s, said = time.monotonic(), words
            bars.update(
                task,
                total=counts["total"] or None,
                completed=counts["completed"] + counts["failed"],
                description=words,
            )
            time.sleep(POLL_S)
            try:
                batch = _look(server, batch)
                failures = 0
            except _NotReachedError as error:
                failures += 1
                if failures == 1 and not console.is_terminal:
                    console.print(f"{error}; trying again", highlight=False, markup=False, soft_wrap=True)
                if failures > RECONNECTS_MAX:
                    raise ServerError(str(error)) from error
                bars.update(task, description=str(error))
    return batch


def _download(server: Server, file_id: str, target: Path) -> None:
    """Into a file beside the target first: what is called by the target's name is complete."""
    if target.is_dir():
        raise ConfigError(f"{target}: is a directory; name a file")
    partial = target.with_name(f"{target.name}.part")
    try:
        with partial.open("wb") as file, _transfer(f"fetching {target.name}", None) as progress:
            total = server.download(file_id, file, progress)
        partial.replace(target)
    finally:
        partial.unlink(missing_ok=True)
    typer.echo(f"{target}: {total:,} bytes", err=True)


@contextmanager
def _transfer(what: str, total: int | None) -> Iterator[Any]:
    """A progress bar of bytes on a terminal."""
    console = Console(stderr=True, markup=False)
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bars:
        task = bars.add_task(what, total=total)
        yield lambda count: bars.advance(task, count)


def _clock(at_s: float | None) -> str:
    return "-" if at_s is None else datetime.fromtimestamp(at_s).strftime("%Y-%m-%d %H:%M:%S")


def _span(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes:02}m" if hours else f"{minutes}m{rest:02}s" if minutes else f"{rest}s"
