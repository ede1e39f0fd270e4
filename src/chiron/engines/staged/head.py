"""The head of a pipeline of stages: OpenAI's API in front of them.

    python -m chiron.engines.staged.head --model MODEL --stage 0-3=HOST:PORT,HOST:PORT --stage 4-7=HOST:PORT

Beside the routes of every engine: ``GET /chiron/stages`` tells stages and replicas, ``PUT /chiron/stages`` with
``{"replicas": [["HOST:PORT", ...], ...]}`` sets which replicas each stage has; what is left out is drained.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import logging
import ssl
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from chiron.engines.serve.http import EngineServer, respond_error, serve_until_stopped
from chiron.engines.serve.openai import parse_object
from chiron.engines.serve.options import add_model, real, whole
from chiron.engines.serve.request_error import RequestError, shown
from chiron.engines.staged.architecture import DTYPES
from chiron.engines.staged.discovery import Discovery
from chiron.engines.staged.errors import StagedModelError
from chiron.engines.staged.head_engine import HeadEngine, HeadSettings, broken, stopping
from chiron.engines.staged.messages import VERSION, HeadHello
from chiron.engines.staged.pipeline import Pipeline, PipelineSettings
from chiron.engines.staged.replica import LinkSettings
from chiron.engines.staged.split import StageRange, check_split, read_range
from chiron.engines.staged.tokenizer import ModelTokenizer
from chiron.engines.staged.weights import ModelFiles, read_model_files
from chiron.engines.staged.wire import read_tls, tls_client
from chiron.net.limits import ServerLimits
from chiron.net.loop import run_on_loop
from chiron.net.server import Incoming

log = logging.getLogger("chiron.staged")

ABSENT = "seconds that requests wait for a stage without a replica"
GRACE = "seconds for running requests to end when it is stopped"
GRACE_S = 60.0
REPLICAS_MAX = 1024
"""Of one stage."""


_BODY_BYTES_PER_TOKEN = 32
_BODY_BYTES_LEAST = 4 << 20
"""Room for a batch of prompts in one request, as evaluations send them: 128 of 4,000 tokens as text."""


def body_limits(model_len_max: int) -> ServerLimits:
    """A body is read on the thread that all streams are served by: some 50 ms a megabyte at worst. So none may be much
    longer than a prompt that fits the context, as text or as ids; several have that and a few megabytes together."""
    most = _BODY_BYTES_LEAST + _BODY_BYTES_PER_TOKEN * model_len_max
    return ServerLimits(body_max_bytes=min(ServerLimits().body_max_bytes, most))


class HeadServer:
    """An engine's routes, and those of its stages."""

    def __init__(
        self,
        engine: HeadEngine,
        served: EngineServer,
        *,
        told: Callable[[Mapping[str, Any]], None] | None = None,
        more: Callable[[int], dict[str, Any]] = lambda stage: {},
    ) -> None:
        """``told`` hears what is put, in place of the addresses of replicas; ``more`` is told of each stage besides."""
        self._engine = engine
        self._served = served
        self._told = told or self._set
        self._more = more

    def handle(self, incoming: Incoming) -> None:
        if incoming.path == "/health" and incoming.method in (b"GET", b"HEAD"):
            if self._engine.draining:
                respond_error(incoming, stopping())
                return
            if why := self._engine.unready():
                respond_error(incoming, broken(why))
                return
        if incoming.path != "/chiron/stages":
            self._served.handle(incoming)
            return
        try:
            if incoming.method == b"PUT":
                self._told(parse_object(incoming.body))
            elif incoming.method != b"GET":
                raise RequestError("/chiron/stages takes GET or PUT.", status=405, code="method_not_allowed")
            said = self._engine.stages()
            for number, stage in enumerate(said["stages"]):
                stage.update(self._more(number))
            incoming.respond(200, json.dumps(said).encode())
        except RequestError as error:
            respond_error(incoming, error)

    def _set(self, body: Mapping[str, Any]) -> None:
        given = body.get("replicas")
        count = len(self._engine.pipeline.stages)
        if not isinstance(given, list) or len(given) != count:
            raise RequestError(f"replicas is {shown(given)}; it must be a list of {count} lists.", param="replicas")
        for number, addresses in enumerate(given):
            sound = isinstance(addresses, list) and all(isinstance(each, str) for each in addresses)
            if not sound or len(addresses) > REPLICAS_MAX:
                raise RequestError(
                    f"replicas[{number}] is {shown(addresses)}; it must list up to {REPLICAS_MAX} HOST:PORT.",
                    param="replicas",
                )
        try:
            self._engine.pipeline.set_replicas(given)
        except StagedModelError as error:
            raise RequestError(f"{error}.", param="replicas") from None


def make_parser(*, positional: bool = False) -> argparse.ArgumentParser:
    """``positional``: the model is."""
    pipeline, link, head = PipelineSettings(), LinkSettings(), HeadSettings(name="", model_len_max=1)
    parser = argparse.ArgumentParser(prog="chiron stages head", description=(__doc__ or "").split("\n")[0])
    add = parser.add_argument
    add_model(parser, positional=positional, help="a Hugging Face directory; its weights are not read")
    add("--stage", action="append", required=True, metavar="LAYERS[=HOST:PORT,...]", help="once for each, in order")
    add("--served-model-name", nargs="+", help="names in requests; default: the directory's")
    add("--host", default="127.0.0.1")
    add("--port", type=whole(0, 65_535), default=0, help="0: a free one")
    add("--dtype", choices=DTYPES, default="", help="as the stages have it; default: as the weights are stored")
    add("--max-num-seqs", type=whole(1, 4096), default=head.max_num_seqs, help="sequences at once")
    add("--max-num-batched-tokens", type=whole(16, 1 << 20), default=pipeline.max_num_batched_tokens)
    add("--max-model-len", type=whole(2), help="tokens of prompt and answer; default: the model's")
    add("--queue-max", type=whole(0), default=head.queue_max, help="requests that may wait inside; beyond: 429")
    add(
        "--discover",
        type=real(0.0, 3600.0),
        default=0.0,
        help="every so many seconds each HOST is resolved anew, and each of its addresses is a replica; 0: never",
    )
    add("--micro-batches", type=whole(0, 256), default=0, help="0: as many as make a round shortest")
    add("--drain", type=real(0.0, 86_400.0), default=pipeline.drain_s, help="seconds before sequences are moved")
    add("--absent", type=real(0.0, 86_400.0), default=pipeline.absent_s, help=ABSENT)
    add("--silent", type=real(0.5, 3600.0), default=link.silent_s, help="a replica that says nothing this long is lost")
    add("--call-timeout", type=real(0.5, 86_400.0), default=link.call_s, help="longest that a step may take, seconds")
    add("--grace", type=real(0.0, 86_400.0), default=GRACE_S, help=GRACE)
    add("--tls-cert", type=Path)
    add("--tls-key", type=Path)
    add("--tls-ca", type=Path, help="TLS to the stages, which must show a certificate of this authority")
    return parser


def parse_options(arguments: Sequence[str], *, positional: bool = False) -> argparse.Namespace:
    parser = make_parser(positional=positional)
    options = parser.parse_args(arguments)
    if len({options.tls_cert is None, options.tls_key is None, options.tls_ca is None}) == 2:
        parser.error("--tls-cert, --tls-key and --tls-ca belong together")
    return options


def read_stages(texts: Sequence[str], layers: int) -> tuple[list[StageRange], list[list[str]]]:
    """Ranges and addresses. Raises StagedModelError."""
    ranges, addresses = [], []
    for text in texts:
        layers_text, _, replicas = text.partition("=")
        ranges.append(read_range(layers_text))
        addresses.append([each.strip() for each in replicas.split(",") if each.strip()])
    check_split(ranges, layers)
    return ranges, addresses


def make_head(
    files: ModelFiles,
    tokenizer: ModelTokenizer,
    ranges: Sequence[StageRange],
    head: HeadSettings,
    pipeline: PipelineSettings,
    *,
    dtype: str = "",
    context: ssl.SSLContext | None = None,
) -> HeadEngine:
    """A head without replicas yet. Called on the loop."""
    architecture = files.architecture
    dtype = dtype or architecture.dtype
    item_bytes = 4 if dtype == "float32" else 2

    def hello(stage: StageRange) -> HeadHello:
        return HeadHello(VERSION, files.fingerprint, stage.begin, stage.end, dtype)

    engine: HeadEngine
    stages = Pipeline(
        ranges,
        hello,
        pipeline,
        call_later=asyncio.get_running_loop().call_later,
        time_s=asyncio.get_running_loop().time,
        changed=lambda: engine.admit(),
        context=context,
        row_bytes=architecture.hidden * item_bytes,
        kv_token_bytes=[architecture.kv_bytes(len(stage), item_bytes) for stage in ranges],
    )
    engine = HeadEngine(architecture, tokenizer, stages, head)
    return engine


async def run(options: argparse.Namespace, files: ModelFiles, tokenizer: ModelTokenizer) -> None:
    ranges, addresses = read_stages(options.stage, files.architecture.layers)
    names = options.served_model_name or [options.model.resolve().name]
    length = min(options.max_model_len or files.architecture.context_tokens, files.architecture.context_tokens)
    context = read_tls(tls_client, options)
    engine = make_head(
        files,
        tokenizer,
        ranges,
        HeadSettings(
            name=names[0], model_len_max=length, max_num_seqs=options.max_num_seqs, queue_max=options.queue_max
        ),
        PipelineSettings(
            max_num_batched_tokens=options.max_num_batched_tokens,
            micro_batches=options.micro_batches,
            drain_s=options.drain,
            absent_s=options.absent,
            link=LinkSettings(silent_s=options.silent, call_s=options.call_timeout),
        ),
        dtype=options.dtype,
        context=context,
    )
    discovery: Discovery | None = None
    told: Callable[[Mapping[str, Any]], None] | None = None
    if options.discover:
        discovery = Discovery(addresses, engine.pipeline.set_replicas, every_s=max(0.1, options.discover))
        discovery.start()
        told = _refuse
    else:
        engine.pipeline.set_replicas(addresses)
    engine.start()
    about: dict[str, Any] = {"engine": "staged", "max_model_len": length, "stages": [str(each) for each in ranges]}
    server = HeadServer(engine, EngineServer(engine, names, about), told=told)
    await serve_until_stopped(
        server,
        host=options.host,
        port=options.port,
        failed=asyncio.Event(),
        drain=lambda: engine.drain(options.grace),
        grace_s=options.grace,
        limits=body_limits(length),
    )
    if discovery is not None:
        await discovery.close()
    await engine.close()


def _refuse(body: Mapping[str, Any]) -> None:
    raise RequestError("Replicas are found by name here (--discover).", status=409, code="conflict")


def main(arguments: Sequence[str] | None = None, *, positional: bool = False) -> None:
    options = parse_options(sys.argv[1:] if arguments is None else arguments, positional=positional)
    logging.basicConfig(level=logging.INFO, stream=sys.stderr, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    try:
        files = read_model_files(options.model)
        run_on_loop(run(options, files, ModelTokenizer(options.model)))
    except (StagedModelError, ImportError) as error:
        sys.exit(f"chiron-head: {error}")
    except OSError as error:
        sys.exit(f"chiron-head: cannot listen on {options.host}:{options.port}: {error}")


if __name__ == "__main__":
    main()
