"""The emulated engine: a server with the timing of any profile, so that a laptop can run a fleet of GPUs.

    python -m chiron.engines.serve.emulated --profile llama-3.1-8b/a100/tp1 --port 0

Steps take as long as the profile says, batches, KV and preemption are those of the simulator's engine, sockets and
tokens are real; the text is filler. ``--fleet N`` serves N instances, each on a port of its own, from one process.
``--start-delay S`` is a cold start: nobody is answered before S seconds are over. With ``--enable-sleep-mode`` it can
sleep and wake as vLLM does (``sleep_mode``). Text prompts are counted at four
bytes a token, lists of token ids exactly.
"""

from __future__ import annotations

import argparse
import asyncio
import logging
import sys
from collections.abc import Sequence
from dataclasses import replace

from chiron.engines.model import StepTable
from chiron.engines.profile import Profile, ProfileError
from chiron.engines.profile_store import load_profile
from chiron.engines.serve.emulated_engine import EmulatedEngine, EmulatedSettings, at_speed
from chiron.engines.serve.filler import LengthSettings
from chiron.engines.serve.http import EngineServer, serve_until_stopped
from chiron.engines.serve.options import real, whole
from chiron.engines.serve.sleep_mode import SleepTimes, copy_s
from chiron.net.clock import LiveClock
from chiron.net.loop import run_on_loop

log = logging.getLogger("chiron.emulated")

_FLEET_MAX = 1000


async def run(options: argparse.Namespace, profile: Profile) -> None:
    """Serve until SIGTERM or SIGINT."""
    await asyncio.sleep(options.start_delay)
    clock = LiveClock(asyncio.get_running_loop())
    fast = at_speed(profile, options.speedup)
    times = StepTable(fast)
    settings = EmulatedSettings(
        lengths=LengthSettings(mean_tokens=options.output_mean, sigma=options.output_sigma, seed=options.seed),
        model_len_max=options.max_model_len,
        queue_max=options.queue_max,
        kv_transfer_gb_per_s=options.kv_transfer_gb_per_s,
        kv_saved_tokens_max=options.kv_saved_tokens,
    )
    names = options.served_model_name or [profile.model]
    servers = []
    for index in range(options.fleet):
        engine = EmulatedEngine(
            clock=clock,
            number=index,
            name=names[0],
            profile=fast,
            times=times,
            settings=settings,
            speedup=options.speedup,
            sleep_times=_sleep_times(options, profile) if options.enable_sleep_mode else None,
        )
        about = {
            "max_model_len": engine.model_len_max,
            "emulated": {
                "profile": profile.name,
                "speedup": options.speedup,
                "note": "timing is emulated, text is filler",
            },
        }
        routes = engine.sleep_mode.routes if engine.sleep_mode is not None else None
        servers.append(EngineServer(engine, names, about, routes))
    log.info("emulates %d x %s at %g times its speed; the text is filler", options.fleet, profile.name, options.speedup)
    await serve_until_stopped(*servers, host=options.host, port=options.port, failed=asyncio.Event())
    clock.stop()


def _sleep_times(options: argparse.Namespace, profile: Profile) -> SleepTimes:
    copied_s = copy_s(profile) / options.speedup
    return SleepTimes(
        sleep_s=copied_s if options.sleep_s is None else options.sleep_s,
        wake_s=copied_s if options.wake_s is None else options.wake_s,
        reload_s=options.start_delay,
    )


def parse_options(arguments: Sequence[str]) -> tuple[argparse.Namespace, Profile]:
    """The command line; exits with a message when it is wrong."""
    parser = argparse.ArgumentParser(prog="chiron.engines.serve.emulated", description=(__doc__ or "").split("\n")[0])
    add = parser.add_argument
    add("--profile", default="llama-3.1-8b/a100/tp1", help="a packaged profile's name, or a JSON file")
    add("--served-model-name", nargs="+", help="names in requests; default: the profile's model")
    add("--host", default="127.0.0.1")
    add("--port", type=whole(0, 65_535), default=0, help="0: a free one; with --fleet the first of N")
    add("--fleet", type=whole(1, _FLEET_MAX), default=1, help="instances in this process, each on its own port")
    add("--start-delay", type=real(0.0, 3600.0), default=0.0, help="seconds before it listens: a cold start")
    add("--enable-sleep-mode", action="store_true", help="it can sleep: POST /sleep and /wake_up, as vLLM has them")
    add("--sleep-s", type=real(0.0, 3600.0), help="to fall asleep; default: the profile's weights at 20 GB/s a GPU")
    add("--wake-s", type=real(0.0, 3600.0), help="to wake up; default: the same")
    add("--max-num-seqs", type=whole(1), help="sequences at once; default: the profile's")
    add("--max-num-batched-tokens", type=whole(1), help="token budget of a step; default: the profile's")
    add("--kv-capacity-tokens", type=whole(1), help="default: the profile's")
    add("--max-model-len", type=whole(2), default=131_072, help="tokens of prompt and answer")
    add("--queue-max", type=whole(0), default=1024, help="requests that may wait inside; beyond: 429")
    add("--output-mean", type=real(1.0), default=200.0, help="mean answer, tokens, where ignore_eos is not set")
    add("--output-sigma", type=real(0.0, 3.0), default=0.7, help="spread of its logarithm")
    add("--seed", type=whole(0), default=0)
    add("--speedup", type=real(0.001, 1000.0), default=1.0, help="times faster than the profile")
    add("--kv-transfer-gb-per-s", type=real(0.0), default=20.0, help="to host memory; 0: KV is not saved")
    add("--kv-saved-tokens", type=whole(0), default=4_000_000, help="KV of interrupted requests in host memory")
    options = parser.parse_args(arguments)
    if options.port and options.port + options.fleet - 1 > 65_535:
        parser.error(f"--port {options.port} and --fleet {options.fleet} reach beyond port 65535")
    try:
        profile = load_profile(options.profile)
        profile = replace(
            profile,
            max_num_seqs=options.max_num_seqs or profile.max_num_seqs,
            max_num_batched_tokens=options.max_num_batched_tokens or profile.max_num_batched_tokens,
            kv_capacity_tokens=options.kv_capacity_tokens or profile.kv_capacity_tokens,
        )
        StepTable(at_speed(profile, options.speedup))
    except (ProfileError, ValueError) as error:
        parser.error(str(error))
    return options, profile


def main(arguments: Sequence[str] | None = None) -> None:
    options, profile = parse_options(sys.argv[1:] if arguments is None else arguments)
    logging.basicConfig(level=logging.INFO, stream=sys.stderr, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    try:
        run_on_loop(run(options, profile))
    except OSError as error:
        sys.exit(f"chiron-engine: cannot listen on {options.host}:{options.port}: {error}")


if __name__ == "__main__":
    main()
