"""``chiron top``: a running gateway on one screen, from ``GET /chiron/status``."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Annotated, Any
from urllib.error import HTTPError, URLError
from urllib.parse import urlsplit
from urllib.request import HTTPRedirectHandler, HTTPSHandler, ProxyHandler, Request, build_opener

import typer
from rich.console import Console
from rich.live import Live

from chiron.cli.common.tls import trust_hint, trusting
from chiron.cli.top.view import Status, one_line, render
from chiron.config.read import ConfigError
from chiron.net.reasons import reason_of

PATH = "/chiron/status"
TIMEOUT_S = 5.0
STATUS_BYTES_MAX = 32 << 20
PLAIN_PERIOD_S = 5.0
"""Between two lines where there is no terminal."""

Fetch = Callable[[], Status]


class StatusError(ConfigError):
    """The gateway gave no status; the message says what to do. ``final``: asking again will not help."""

    def __init__(self, message: str, *, final: bool) -> None:
        super().__init__(message)
        self.final = final


def top(
    url: Annotated[str, typer.Option("--url", metavar="URL", help="The gateway.")] = "http://127.0.0.1:8000",
    key: Annotated[
        str, typer.Option("--key", metavar="KEY", envvar="CHIRON_ADMIN_KEY", help="Its admin key, if it has one.")
    ] = "",
    cacert: Annotated[
        Path | None, typer.Option("--cacert", metavar="FILE.pem", help="Trust this certificate, for https.")
    ] = None,
    period: Annotated[float, typer.Option("--period", min=0.1, max=3600, help="Seconds between updates.")] = 0.5,
    once: Annotated[bool, typer.Option("--once", help="Print the screen once and exit.")] = False,
    json_: Annotated[bool, typer.Option("--json", help="Print the status once, as JSON, and exit.")] = False,
) -> None:
    """Watch a running gateway: instances, queues, latency against SLOs, batches, decisions and their reasons.

    Where stdout is no terminal it prints a line every five seconds. Ctrl-C ends it.

    Examples:

    - `chiron top`

    - `CHIRON_ADMIN_KEY=... chiron top --url https://localhost:8443 --cacert ca.pem`
    """
    fetch = fetcher(url, key, cacert)
    console = Console(highlight=False)
    status = fetch()  # A wrong address or key is an error before the screen is taken.
    if json_:
        typer.echo(json.dumps(status, indent=2))
    elif once:
        console.print(render(status, console.width, max(console.height, 60)))
    else:
        try:
            follow(fetch, status, console, period)
        except KeyboardInterrupt:
            raise typer.Exit(0) from None


def follow(fetch: Fetch, status: Status, console: Console, period_s: float) -> None:
    """Show ``status`` and what ``fetch`` says from then on, until it raises KeyboardInterrupt or a final error."""
    period_s = period_s if console.is_terminal else max(period_s, PLAIN_PERIOD_S)
    failing_since_s: float | None = None
    with Screen(console) as screen:
        note = ""
        while True:
            screen.show(status, note)
            time.sleep(period_s)
            try:
                status, note, failing_since_s = fetch(), "", None
            except StatusError as error:
                if error.final:
                    raise
                now_s = time.monotonic()
                failing_since_s = now_s if failing_since_s is None else failing_since_s
                note = f"no status for {now_s - failing_since_s:.0f} s, trying again: {error}"


class Screen:
    """The whole terminal, as a context; a line at a time where there is no terminal. For whoever has a status."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._stack = ExitStack()
        self._live: Live | None = None

    def __enter__(self) -> Screen:
        if self._console.is_terminal:
            self._live = self._stack.enter_context(Live(console=self._console, screen=True, auto_refresh=False))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._stack.close()

    def show(self, status: Status, note: str = "") -> None:
        """``note`` says why the status is old; empty: it is not."""
        console = self._console
        if self._live is not None:
            self._live.update(render(status, console.width, console.height, note), refresh=True)
        else:
            console.print(note or one_line(status), soft_wrap=True, markup=False)


def fetcher(url: str, key: str = "", cacert: Path | None = None) -> Fetch:
    """Asks the gateway at ``url`` for its status. Raises ConfigError for an address that cannot be one."""
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ConfigError(f"--url {url!r}: expected the gateway's address, such as http://127.0.0.1:8000")
    context = trusting(cacert) if parts.scheme == "https" else None
    # No proxies and no redirects: an admin key goes to the gateway and nowhere else.
    opener = build_opener(ProxyHandler({}), HTTPSHandler(context=context), _NoRedirect())
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    address = f"{parts.scheme}://{parts.netloc}{PATH}"

    def fetch() -> Status:
        try:
            with opener.open(Request(address, headers=headers), timeout=TIMEOUT_S) as answer:
                body = answer.read(STATUS_BYTES_MAX + 1)
        except HTTPError as error:
            error.close()
            raise _refused(error.code, address) from None
        except (URLError, OSError, ValueError) as error:
            reason = getattr(error, "reason", error)
            why = reason_of(reason) if isinstance(reason, OSError) else reason
            hint = (
                "; is `chiron serve` running there? (--url)"
                if isinstance(reason, ConnectionError)
                else trust_hint(reason)
            )
            raise StatusError(f"{address} does not answer: {why}{hint}", final=False) from None
        return _read(body, address)

    return fetch


class _NoRedirect(HTTPRedirectHandler):
    def redirect_request(self, *args: Any, **kwargs: Any) -> None:
        return None


def _refused(code: int, address: str) -> StatusError:
    if code in (401, 403):
        return StatusError(f"{address} needs the admin key (--key or CHIRON_ADMIN_KEY); it answered {code}", final=True)
    if code == 404:
        return StatusError(f"{address} is not there (404): is this a Chiron gateway?", final=True)
    return StatusError(f"{address} answered {code}", final=300 <= code < 500 and code != 429)


def _read(body: bytes, address: str) -> Status:
    try:
        status = json.loads(body)
    except ValueError:
        status = None
    if not isinstance(status, dict) or not {"now_s", "models", "decisions", "batches"} <= status.keys():
        raise StatusError(f"{address} returned something that is not a status: is this a Chiron gateway?", final=True)
    return status
