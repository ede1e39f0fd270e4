"""llama.cpp's own server, started in this process from the ``xllamacpp`` wheel.

    python -m chiron.engines.serve.llamacpp --model model.gguf --port 0

The HTTP interface is llama.cpp's (OpenAI's API, ``/metrics`` when asked for, ``/slots``); nothing of ours stands in
between, so it has no live limit inside: the gate in front of it is its max batch size, which is exact because only busy
slots enter a batch. It accepts any name as the model. One inference thread by default: with as many threads as busy
cores its spinning barriers slow everything down.
"""

from __future__ import annotations

import argparse
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from urllib.error import URLError
from urllib.parse import urlsplit
from urllib.request import urlopen

from chiron.engines.serve.options import whole
from chiron.engines.serve.toy import toy_model

log = logging.getLogger("chiron.llamacpp")

_READY_TIMEOUT_S = 60.0
"""From the end of loading until the server answers its health check."""
_SPARE_HTTP_THREADS = 16
"""Each connection takes a thread; health checks and scrapes must not wait for streams."""
_WARNINGS = 2
_WHERE_KNOWN = {
    "fit_params": False,  # It would shrink the context to what it thinks fits; an error is better.
    "ui": False,
    # Any page in the user's browser could talk to it otherwise.
    "cors_origins": "",
    "cors_credentials": False,
}
"""Parameters that older wheels lack."""
_GGUF_MAGIC = b"GGUF"
_TOY = Path("toy")


class EngineError(Exception):
    """The server cannot be started; the message says what to do."""


def start_server(options: argparse.Namespace) -> Any:
    """Load the model and listen. The server lives as long as the object does. Raises EngineError."""
    try:
        import xllamacpp
    except ImportError:
        raise EngineError("llama.cpp needs the package xllamacpp: pip install 'chiron-serving[llamacpp]'") from None
    check_model(options.model)
    params = xllamacpp.CommonParams()
    params.model.path = str(options.model)
    params.model_alias = set(options.served_model_name or [options.model.stem])
    params.hostnames = [options.host]
    params.port = options.port
    params.n_parallel = options.max_num_seqs
    params.n_ctx = options.max_num_seqs * options.ctx_per_seq
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = options.threads
    params.n_threads_http = options.max_num_seqs + _SPARE_HTTP_THREADS
    params.n_gpu_layers = options.gpu_layers
    params.cache_ram_mib = options.prompt_cache_mib
    params.endpoint_metrics = params.endpoint_slots = True
    for name, value in _WHERE_KNOWN.items():
        if hasattr(params, name):
            setattr(params, name, value)
    params.verbosity = _WARNINGS
    try:
        return xllamacpp.Server(params)
    except Exception as error:  # What the wheel raises differs between versions.
        raise EngineError(f"llama.cpp did not start with {options.model}: {error or 'no reason given'}") from None


def make_toy() -> Path:
    """Raises EngineError."""
    try:
        path = toy_model()
    except ImportError:
        raise EngineError("the toy model needs the package gguf: pip install 'chiron-serving[llamacpp]'") from None
    except OSError as error:
        raise EngineError(f"the toy model cannot be written: {error}") from None
    log.info("the toy model has random weights: its text is noise")
    return path


def check_model(path: Path) -> None:
    """Raises EngineError: llama.cpp itself may crash on what is no model."""
    try:
        with path.open("rb") as file:
            magic = file.read(len(_GGUF_MAGIC))
    except OSError as error:
        raise EngineError(f"--model {path}: {error.strerror or error}") from None
    if magic != _GGUF_MAGIC:
        raise EngineError(f"--model {path}: not a GGUF file")


def wait_until_healthy(address: str) -> None:
    """Raises EngineError."""
    deadline_s = time.monotonic() + _READY_TIMEOUT_S
    while True:
        try:
            with urlopen(f"{address}/health", timeout=5) as response:
                if response.status == 200:
                    return
        except (URLError, OSError):
            pass
        if time.monotonic() > deadline_s:
            raise EngineError(f"{address}/health did not answer within {_READY_TIMEOUT_S:g} s")
        time.sleep(0.02)


def parse_options(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="chiron.engines.serve.llamacpp", description=(__doc__ or "").split("\n")[0])
    add = parser.add_argument
    add("--model", type=Path, default=_TOY, help="a GGUF file, or 'toy': random weights, its text is noise")
    add("--served-model-name", nargs="+", help="names in its list of models; default: the file's")
    add("--host", default="127.0.0.1")
    add("--port", type=whole(0, 65_535), default=0, help="0: a free one")
    add("--threads", type=whole(1, 1024), default=1, help="for inference")
    add("--max-num-seqs", type=whole(1, 1024), default=8, help="slots: sequences at once")
    add("--ctx-per-seq", type=whole(16, 1 << 20), default=2048, help="tokens of prompt and answer in a slot")
    add("--gpu-layers", type=whole(-1, 10_000), default=-1, help="layers on a GPU, if the wheel has one; -1: all")
    add("--prompt-cache-mib", type=whole(0, 1 << 20), default=1024, help="host memory for KV of earlier prompts")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse_options(sys.argv[1:] if arguments is None else arguments)
    logging.basicConfig(level=logging.INFO, stream=sys.stderr, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    stop = threading.Event()
    try:
        if options.model == _TOY:
            options.model = make_toy()
        server = start_server(options)
        address = str(server.listening_address)
        wait_until_healthy(address)
    except EngineError as error:
        sys.exit(f"chiron-engine: {error}")
    # After the start, because llama.cpp may install handlers of its own.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    log.info("%s: %d slots of %d tokens", options.model.name, options.max_num_seqs, options.ctx_per_seq)
    print(f"chiron-engine ready port={urlsplit(address).port}", flush=True)
    stop.wait()
    # Taking the server down would wait for its streams, however long they are, and hold the interpreter meanwhile.
    os._exit(0)


if __name__ == "__main__":
    main()
