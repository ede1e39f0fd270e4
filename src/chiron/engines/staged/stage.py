"""A stage's process: its layers behind one port, for heads and for HTTP.

    python -m chiron.engines.staged.stage --model MODEL --layers 0-9 --port 0

``GET /health``, ``GET /metrics``, ``PUT /chiron/limits`` ({"limit": 64}: the max batch size), ``POST /chiron/drain``.
On SIGTERM it tells its heads, which move their sequences elsewhere, and ends when they have, or after ``--grace``. With
``--end-with-stdin`` it does so when standard input ends, and ignores SIGTERM and SIGINT.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import logging
import os
import signal
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from chiron.engines.serve.http import respond_error
from chiron.engines.serve.openai import parse_limit
from chiron.engines.serve.options import add_model, real, whole
from chiron.engines.serve.request_error import RequestError
from chiron.engines.staged.architecture import DTYPES
from chiron.engines.staged.errors import StagedModelError
from chiron.engines.staged.messages import MAGIC
from chiron.engines.staged.split import StageRange, read_range
from chiron.engines.staged.weights import ModelFiles, read_model_files
from chiron.engines.staged.wire import FrameWire, read_tls, tls_server
from chiron.net.limits import ServerLimits
from chiron.net.loop import run_on_loop
from chiron.net.server import HttpServer, Incoming

if TYPE_CHECKING:
    from chiron.engines.staged.service import StageService

log = logging.getLogger("chiron.staged")

KV_GB_DEFAULT = 1.0
SILENT_S = 30.0
TOKENS_MAX = 8192
_END_S = 10.0
"""For its end, after it has drained."""


class StageHttp:
    """What a stage answers to HTTP."""

    def __init__(self, service: StageService, stage: StageRange, drain: Any) -> None:
        self._service = service
        self._stage = stage
        self._drain = drain
        self._scrapes: deque[tuple[float, float]] = deque()
        """(time, seconds worked until then) of those of the last minute."""

    def handle(self, incoming: Incoming) -> None:
        try:
            self._answer(incoming)
        except RequestError as error:
            respond_error(incoming, error)

    def _answer(self, incoming: Incoming) -> None:
        route = incoming.method.decode("latin-1"), incoming.path
        if route == ("GET", "/health"):
            incoming.respond(200, json.dumps(self.status()).encode())
        elif route == ("GET", "/metrics"):
            text = self.metrics_text()
            incoming.respond(200, text.encode(), content_type=b"text/plain; version=0.0.4; charset=utf-8")
        elif route == ("PUT", "/chiron/limits"):
            self._service.limit = parse_limit(incoming.body)
            incoming.respond(200, json.dumps(self.status()).encode())
        elif route == ("POST", "/chiron/drain"):
            self._drain()
            incoming.respond(200, b"{}")
        else:
            known = "GET /health, GET /metrics, PUT /chiron/limits, POST /chiron/drain"
            raise RequestError(f"No such route: {' '.join(route)[:200]}; known: {known}.", status=404, code="not_found")

    def status(self) -> dict[str, Any]:
        service = self._service
        return {
            "state": "draining" if service.draining else "ready",
            "layers": str(self._stage),
            "dtype": service.layers.dtype_name,
            "limit": service.limit,
            "heads": service.heads,
            "sequences": service.kv.sequences,
            "queued": service.queued,
            "kv_capacity_tokens": service.kv.capacity_tokens,
            "kv_used_tokens": service.kv.used_tokens,
            "weights_bytes": service.layers.weights_bytes,
            "steps": service.totals.steps,
            "busy_s": service.totals.busy_s,
        }

    def _utilisation(self, now_s: float) -> float:
        """Share of the time that it worked, since the first scrape of the last minute: what an autoscaler needs."""
        busy_s, scrapes = self._service.totals.busy_s, self._scrapes
        while len(scrapes) > 1 and scrapes[0][0] < now_s - 60.0:
            scrapes.popleft()
        since_s, before_s = scrapes[0] if scrapes else (self._service.began_s, 0.0)
        if not scrapes or now_s - scrapes[-1][0] >= 1.0:
            scrapes.append((now_s, busy_s))
        return min(1.0, (busy_s - before_s) / (now_s - since_s)) if now_s > since_s else 0.0

    def metrics_text(self) -> str:
        service, totals = self._service, self._service.totals
        up_s = time.monotonic() - service.began_s
        gauges = {
            "queued_sequences": service.queued,
            "heads": service.heads,
            "sequences": service.kv.sequences,
            "max_batch_size": service.limit,
            "kv_capacity_tokens": service.kv.capacity_tokens,
            "kv_used_tokens": service.kv.used_tokens,
            "weights_bytes": service.layers.weights_bytes,
            "utilisation_since_start": totals.busy_s / up_s if up_s else 0.0,
            "utilisation": self._utilisation(time.monotonic()),
            "draining": int(service.draining),
            "hop_seconds": service.hop_s,
        }
        counters = {
            "steps_total": totals.steps,
            "busy_seconds_total": totals.busy_s,
            "tokens_total": totals.tokens,
            "step_sequences_total": totals.sequences,
            "calls_total": totals.calls,
            "queue_seconds_total": totals.waited_s,
            "refused_total": totals.refused,
            "received_bytes_total": totals.received_bytes,
            "sent_bytes_total": totals.sent_bytes,
        }
        labels = f'{{layers="{self._stage}"}}'
        lines = []
        for kind, values in (("gauge", gauges), ("counter", counters)):
            for name, value in values.items():
                lines += [f"# TYPE chiron_stage_{name} {kind}", f"chiron_stage_{name}{labels} {value}"]
        return "\n".join(lines) + "\n"


class PortSharing(asyncio.Protocol):
    """Who connects: a head, or a client of HTTP. The first bytes tell."""

    def __init__(self, service: StageService, http: HttpServer) -> None:
        self._service = service
        self._http = http
        self._early = b""
        self._transport: asyncio.Transport | None = None
        self._late: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport  # type: ignore[assignment]
        self._late = asyncio.get_running_loop().call_later(20.0, transport.close)

    def data_received(self, data: bytes) -> None:
        self._early += data
        assert self._transport is not None
        if len(self._early) < len(MAGIC) and MAGIC.startswith(self._early):
            return
        if self._late is not None:
            self._late.cancel()
        chosen: Any = self._service.accept() if self._early.startswith(MAGIC) else self._http.accept()
        self._transport.set_protocol(chosen)
        chosen.connection_made(self._transport)
        if isinstance(chosen, FrameWire):
            chosen.feed(self._early)
        else:
            chosen.data_received(self._early)

    def connection_lost(self, exc: Exception | None) -> None:
        if self._late is not None:
            self._late.cancel()


def make_parser(*, positional: bool = False) -> argparse.ArgumentParser:
    """``positional``: the model is."""
    parser = argparse.ArgumentParser(prog="chiron stages serve", description=(__doc__ or "").split("\n")[0])
    add = parser.add_argument
    add_model(parser, positional=positional, help="a Hugging Face directory with safetensors")
    add("--layers", required=True, help="such as 0-9, both included")
    add("--host", default="127.0.0.1")
    add("--port", type=whole(0, 65_535), default=0, help="0: a free one")
    add("--dtype", choices=DTYPES, default="", help="default: as the weights are stored")
    add("--device", default="cpu", help="cpu, cuda or cuda:N")
    add("--threads", type=whole(1, 1024), default=1, help="of torch; on busy cores more are slower")
    add("--max-num-seqs", type=whole(1, 4096), default=64, help="sequences in a step")
    add("--max-num-batched-tokens", type=whole(16, 1 << 20), default=TOKENS_MAX, help="tokens in a step, at most")
    add("--kv-gb", type=real(0.0001, 100_000.0), default=KV_GB_DEFAULT, help="memory for KV, GB")
    add("--kv-capacity-tokens", type=whole(64), help="KV in tokens instead")
    add("--grace", type=real(0.0, 86_400.0), default=30.0, help="seconds for its sequences to end or move")
    add("--pace-ms", type=real(0.0, 60_000.0), default=0.0, help="a step takes at least this: a slower device")
    add("--pace-sequence-ms", type=real(0.0, 60_000.0), default=0.0, help="and this for each of its sequences")
    add("--silent", type=real(0.5, 3600.0), default=SILENT_S, help="a head that says nothing this long is lost")
    add("--end-with-stdin", action="store_true", help="end when standard input does, and not at SIGTERM")
    add("--tls-cert", type=Path)
    add("--tls-key", type=Path)
    add("--tls-ca", type=Path, help="TLS: heads must show a certificate of this authority")
    return parser


def parse_options(arguments: Sequence[str], *, positional: bool = False) -> argparse.Namespace:
    parser = make_parser(positional=positional)
    options = parser.parse_args(arguments)
    if len({options.tls_cert is None, options.tls_key is None, options.tls_ca is None}) == 2:
        parser.error("--tls-cert, --tls-key and --tls-ca belong together")
    return options


def load(options: argparse.Namespace) -> StageService:
    """Raises StagedModelError or ImportError."""
    stage = read_range(options.layers)
    read_tls(tls_server, options)  # Before minutes of loading.
    files = read_model_files(options.model)
    files.stage_tensors(stage)
    os.environ.setdefault("OMP_NUM_THREADS", str(options.threads))
    from chiron.engines.staged.layers import StageLayers
    from chiron.engines.staged.service import Pace, StageService
    from chiron.engines.staged.torch_parts import torch

    torch.set_num_threads(options.threads)
    try:
        layers = StageLayers(files, stage, dtype=options.dtype, device=options.device)
    except (RuntimeError, AssertionError) as error:  # torch asserts that it was built for the device.
        raise StagedModelError(f"layers {stage} cannot be loaded to {options.device}: {error}") from None
    return StageService(
        layers,
        files.fingerprint,
        kv_capacity_tokens=options.kv_capacity_tokens or _kv_tokens(files, stage, layers.dtype.itemsize, options.kv_gb),
        limit=options.max_num_seqs,
        pace=Pace(fixed_s=options.pace_ms / 1e3, per_sequence_s=options.pace_sequence_ms / 1e3),
        tokens_max=options.max_num_batched_tokens,
        silent_s=options.silent,
    )


def _kv_tokens(files: ModelFiles, stage: StageRange, item_bytes: int, gigabytes: float) -> int:
    return max(64, int(gigabytes * 1e9 / files.architecture.kv_bytes(len(stage), item_bytes)))


class Starter:
    """Whoever started this process and holds its standard input: when that is closed, this process ends. While it
    loads weights, at once; nothing else could be done in that time.

    Signals are for whoever started it, which still needs it while it answers what it has: supervisors send theirs to
    all processes below them, and systemd to all of a unit.
    """

    def __init__(self, grace_s: float = 0.0) -> None:
        """``grace_s``: what it may take to stop, once it serves."""
        self._grace_s = grace_s
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, signal.SIG_IGN)
        self._gone = threading.Event()
        self._stop: Callable[[], object] | None = None
        threading.Thread(target=self._read, name="starter", daemon=True).start()

    def serving(self, stop: Callable[[], None]) -> None:
        """From now on ``stop`` is called, on the loop's thread."""
        loop = asyncio.get_running_loop()
        self._stop = partial(loop.call_soon_threadsafe, stop)
        if self._gone.is_set():
            stop()

    def _read(self) -> None:
        with suppress(OSError):
            while os.read(0, 4096):
                pass
        self._gone.set()
        stop = self._stop
        if stop is None:
            os._exit(1)
        with suppress(RuntimeError):  # The loop has ended already.
            stop()
        # A step that never returns would keep this process, whose end waits for its thread, and its GPU.
        time.sleep(self._grace_s + _END_S)
        os._exit(1)


async def run(options: argparse.Namespace, service: StageService, starter: Starter | None = None) -> None:
    """Serve until SIGTERM, SIGINT or the end of the starter, a drain, or a step that fails."""
    loop = asyncio.get_running_loop()
    stop, errors = asyncio.Event(), []

    def fail(error: Exception) -> None:
        errors.append(error)
        stop.set()

    service.failed = fail
    http = HttpServer(StageHttp(service, service.layers.stage, stop.set).handle, ServerLimits(), None, None)
    context = read_tls(tls_server, options)
    await service.warm_up()
    service.start()
    listener = await loop.create_server(lambda: PortSharing(service, http), options.host, options.port, ssl=context)
    if starter is not None:
        starter.serving(stop.set)
    else:
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, stop.set)
    port = listener.sockets[0].getsockname()[1]
    print(f"chiron-engine ready port={port}", flush=True)
    log.info("layers %s: KV for %d tokens", service.layers.stage, service.kv.capacity_tokens)
    await stop.wait()
    if not errors:
        await service.drain(options.grace)
    listener.close()
    await service.close()
    await http.close(0.5)
    if errors:
        raise RuntimeError("a step failed") from errors[0]


def main(arguments: Sequence[str] | None = None, *, positional: bool = False) -> None:
    options = parse_options(sys.argv[1:] if arguments is None else arguments, positional=positional)
    logging.basicConfig(level=logging.INFO, stream=sys.stderr, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    try:
        run_on_loop(_main(options))
    except (StagedModelError, ImportError) as error:
        sys.exit(f"chiron-stage: {error}")
    except OSError as error:
        sys.exit(f"chiron-stage: cannot listen on {options.host}:{options.port}: {error}")
    except (RuntimeError, ValueError) as error:
        sys.exit(f"chiron-stage: {error}")


async def _main(options: argparse.Namespace) -> None:
    starter = Starter(options.grace) if options.end_with_stdin else None
    await run(options, load(options), starter)


if __name__ == "__main__":
    main()
