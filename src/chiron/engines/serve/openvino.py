"""The embedded engine: OpenVINO GenAI behind an OpenAI server of its own.

    python -m chiron.engines.serve.openvino --model model.gguf --port 0

It runs GGUF files and OpenVINO's own format on the CPU. ``--model toy`` runs a small model with random weights, made
on first use, whose text is noise. ``--pace PROFILE`` makes steps take at least as long as that profile says.
"""

from __future__ import annotations

import argparse
import asyncio
import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from chiron.engines.model import StepTable
from chiron.engines.profile import Profile, ProfileError
from chiron.engines.profile_store import load_profile
from chiron.engines.serve.http import EngineServer, serve_until_stopped
from chiron.engines.serve.openvino_engine import EngineSettings, OpenVinoEngine
from chiron.engines.serve.openvino_model import Model, ModelError, ModelSettings
from chiron.engines.serve.options import whole
from chiron.engines.serve.schemas.grammar import Bounds
from chiron.engines.serve.toy import NAME as TOY_NAME
from chiron.engines.serve.toy import toy_model
from chiron.net.loop import run_on_loop

log = logging.getLogger("chiron.openvino")

TOY = "toy"
TOY_BOUNDS = Bounds(text_chars=24, items=3)
"""A random model hardly ever closes a string or a list."""


def parse_options(arguments: Sequence[str]) -> tuple[argparse.Namespace, Profile | None]:
    """The command line; exits with a message when it is wrong."""
    model, engine = ModelSettings(path=Path()), EngineSettings(name="", model_len_max=0)
    parser = argparse.ArgumentParser(prog="chiron.engines.serve.openvino", description=(__doc__ or "").split("\n")[0])
    add = parser.add_argument
    add("--model", default=TOY, help="a GGUF file, a directory in OpenVINO's format, or 'toy' (noise)")
    add("--served-model-name", nargs="+", help="names in requests; default: the file's name")
    add("--host", default="127.0.0.1")
    add("--port", type=whole(0, 65_535), default=0, help="0: a free one")
    add("--threads", type=whole(0, 1024), default=model.threads, help="for inference; 0: OpenVINO's choice")
    add("--precision", choices=("f32", "bf16", "f16"), default="", help="of inference; default: OpenVINO's choice")
    memory = parser.add_mutually_exclusive_group()
    memory.add_argument("--cache-gb", type=whole(1, 4096), default=model.cache_gb, help="KV cache, GiB")
    memory.add_argument("--kv-capacity-tokens", type=whole(1), default=0, help="KV cache in tokens instead")
    add("--max-num-seqs", type=whole(1, 4096), help="sequences at once; default: 64, or the pace profile's")
    add("--max-num-batched-tokens", type=whole(16, 1 << 20), help="tokens a step; default: 512, or the profile's")
    add("--max-model-len", type=whole(2), help="tokens of prompt and answer; default: the model's")
    add("--queue-max", type=whole(0), default=engine.queue_max, help="requests that may wait inside; beyond: 429")
    add("--pace", metavar="PROFILE", help="a packaged profile's name, or a JSON file: steps take at least its time")
    add("--toy-cache", type=Path, help="directory of the toy model; default: the user's cache")
    options = parser.parse_args(arguments)
    profile = None
    if options.pace:
        try:
            profile = load_profile(options.pace)
            StepTable(profile)
        except (ProfileError, ValueError) as error:
            parser.error(f"--pace: {error}")
    for name in ("max_num_seqs", "max_num_batched_tokens"):
        if getattr(options, name) is None:
            setattr(options, name, getattr(profile or model, name))
    return options, profile


def load(options: argparse.Namespace) -> Model:
    """The model that the options name. Raises ModelError, OSError or ImportError."""
    path = toy_model(directory=options.toy_cache) if options.model == TOY else Path(options.model)
    return Model(
        ModelSettings(
            path=path,
            threads=options.threads,
            precision=options.precision,
            cache_gb=options.cache_gb,
            kv_capacity_tokens=options.kv_capacity_tokens,
            max_num_seqs=options.max_num_seqs,
            max_num_batched_tokens=options.max_num_batched_tokens,
        )
    )


async def run(options: argparse.Namespace, profile: Profile | None, model: Model) -> None:
    """Serve until told to stop. Raises RuntimeError when the engine failed."""
    failed, errors = asyncio.Event(), []

    def fail(error: Exception) -> None:
        errors.append(error)
        failed.set()

    names = options.served_model_name or [TOY_NAME if options.model == TOY else Path(options.model).stem]
    length = min(options.max_model_len or model.context_tokens, model.kv_capacity_tokens)
    engine = OpenVinoEngine(
        model,
        EngineSettings(
            name=names[0],
            model_len_max=length,
            queue_max=options.queue_max,
            bounds=TOY_BOUNDS if options.model == TOY else Bounds(),
            tells_tools=options.model != TOY,  # Noise would make nothing of them, and its context is small.
        ),
        loop=asyncio.get_running_loop(),
        failed=fail,
        pace=StepTable(profile) if profile else None,
    )
    about: dict[str, Any] = {"engine": "openvino", "max_model_len": length}
    if options.model == TOY:
        about["note"] = "random weights; the text is noise"
        log.info("the toy model has random weights: its text is noise")
    if profile is not None:
        about["paced"] = f"steps take at least as long as profile {profile.name} says"
        log.info("paced: %s", about["paced"])
    log.info("KV cache: %d tokens; context: %d tokens", model.kv_capacity_tokens, length)
    await serve_until_stopped(EngineServer(engine, names, about), host=options.host, port=options.port, failed=failed)
    if errors:
        raise RuntimeError("the engine failed") from errors[0]


def main(arguments: Sequence[str] | None = None) -> None:
    options, profile = parse_options(sys.argv[1:] if arguments is None else arguments)
    logging.basicConfig(level=logging.INFO, stream=sys.stderr, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    logging.getLogger("gguf").setLevel(logging.WARNING)
    try:
        model = load(options)
    except (ModelError, ImportError, OSError) as error:
        sys.exit(f"chiron-engine: {error}")
    try:
        run_on_loop(run(options, profile, model))
    except OSError as error:
        sys.exit(f"chiron-engine: cannot listen on {options.host}:{options.port}: {error}")
    except RuntimeError as error:
        sys.exit(f"chiron-engine: {error}")


if __name__ == "__main__":
    main()
