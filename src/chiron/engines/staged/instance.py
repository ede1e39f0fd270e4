"""A whole pipeline as one instance on one machine: a head, and replicas of its stages as processes.

    python -m chiron.engines.staged.instance --model MODEL --stages '[{"layers": "0-3", "min": 1, "max": 3}, ...]'

Above it this is an engine like any other, at one URL. ``PUT /chiron/stages`` with ``{"counts": [1, 2, 1]}`` sets how
many replicas each stage is to have, within its bounds; what is new is used once it is up, what goes is drained first,
and a replica that ends by itself is replaced. Replicas end with the process that started them.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import logging
import os
import re
import sys
import time
from asyncio.subprocess import PIPE, Process
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from chiron.engines.serve.http import EngineServer, serve_until_stopped
from chiron.engines.serve.options import add_model, real, whole
from chiron.engines.serve.request_error import RequestError, shown
from chiron.engines.staged.architecture import DTYPES
from chiron.engines.staged.errors import StagedModelError
from chiron.engines.staged.head import ABSENT, GRACE, GRACE_S, HeadServer, body_limits, make_head
from chiron.engines.staged.head_engine import HeadEngine, HeadSettings
from chiron.engines.staged.pipeline import PipelineSettings
from chiron.engines.staged.replica import LinkSettings
from chiron.engines.staged.split import StageRange, check_split, read_range
from chiron.engines.staged.tokenizer import ModelTokenizer
from chiron.engines.staged.weights import ModelFiles, read_model_files
from chiron.net.loop import run_on_loop

log = logging.getLogger("chiron.staged")

_READY = re.compile(rb"ready port=(\d+)")
_DEVICE = re.compile(r"[a-z]{2,20}(:\d{1,3})?")
_LOOK_S = 0.25
_RETRY_S, _RETRY_MAX_S = 1.0, 60.0
"""Before a replica is started again that could not be started, or that ended soon: doubled each time."""
_SOON_S = 20.0
"""After it was ready."""
_FAILURES_MAX = 5
"""After so many in succession, of a stage without any replica, the instance ends: something is wrong with it."""
PACE_MAX_MS = 60_000.0
KV_TOKENS_MIN = 64
_DOWN_S = 2.0
"""A replica that runs and that the head has not reached for this long hangs, and is killed."""
_END_S = 10.0
"""Between the end of its standard input and SIGKILL."""
REPLICAS_MAX = 256
START_TIMEOUT_S = 600.0


@dataclass(frozen=True, slots=True, kw_only=True)
class StageSpec:
    """One stage of the instance."""

    range: StageRange
    least: int = 1
    most: int = 1
    device: str = "cpu"
    pace_ms: float = 0.0
    pace_sequence_ms: float = 0.0
    kv_capacity_tokens: int = 0


def read_specs(text: str, layers: int) -> tuple[StageSpec, ...]:
    """From JSON. Raises StagedModelError that names the stage and the key."""
    try:
        given = json.loads(text)
    except ValueError as error:
        raise StagedModelError(f"--stages: is not JSON: {error}") from None
    if not isinstance(given, list) or not all(isinstance(each, dict) for each in given):
        raise StagedModelError("--stages: must be a list of objects")
    specs = tuple(_spec(each, f"--stages[{number}]") for number, each in enumerate(given))
    check_split([spec.range for spec in specs], layers)
    return specs


def _spec(given: Mapping[str, Any], where: str) -> StageSpec:
    known = {"layers", "min", "max", "device", "pace_ms", "pace_sequence_ms", "kv_capacity_tokens"}
    if unknown := sorted(set(given) - known):
        raise StagedModelError(f"{where}.{unknown[0]}: unknown key; known are {', '.join(sorted(known))}")
    least, most = given.get("min", 1), given.get("max", given.get("min", 1))
    if type(least) is not int or type(most) is not int or not 1 <= least <= most <= REPLICAS_MAX:
        raise StagedModelError(f"{where}: min {least!r} and max {most!r} must be 1 <= min <= max <= {REPLICAS_MAX}")
    for key in ("pace_ms", "pace_sequence_ms", "kv_capacity_tokens"):
        value = given.get(key, 0)
        highest = 1e12 if key == "kv_capacity_tokens" else PACE_MAX_MS
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= highest:
            raise StagedModelError(f"{where}.{key}: {value!r} must be a number from 0 to {highest:g}")
    if 0 < given.get("kv_capacity_tokens", 0) < KV_TOKENS_MIN:
        raise StagedModelError(f"{where}.kv_capacity_tokens: {given['kv_capacity_tokens']!r} must be 64 or more, or 0")
    if not _DEVICE.fullmatch(device := str(given.get("device", "cpu"))):
        raise StagedModelError(f"{where}.device: {device!r} must be cpu, cuda, cuda:0, ...")
    if device != "cpu" and most > 1:
        raise StagedModelError(
            f"{where}: device {device!r} and max {most}: replicas would share the GPU; max must be 1"
        )
    return StageSpec(
        range=read_range(str(given.get("layers", ""))),
        least=least,
        most=most,
        device=device,
        pace_ms=float(given.get("pace_ms", 0)),
        pace_sequence_ms=float(given.get("pace_sequence_ms", 0)),
        kv_capacity_tokens=int(given.get("kv_capacity_tokens", 0)),
    )


class ReplicaProcess:
    """One replica of a stage, from its start to its end."""

    def __init__(self, command: Sequence[str], changed: Callable[[], None], timed: Callable[[float], None]) -> None:
        """``timed`` hears what its start took, when it is ready."""
        self.address = ""
        """Empty until it is ready."""
        self.began_s = time.monotonic()
        self.start_s = 0.0
        """What its start took."""
        self.leaving = False
        self.ended = False
        self.down_since_s: float | None = None
        self._changed = changed
        self._timed = timed
        self._process: Process | None = None
        self.task = asyncio.get_running_loop().create_task(self._run(command))

    @property
    def ready(self) -> bool:
        return bool(self.address) and not self.leaving and not self.ended

    @property
    def pid(self) -> int:
        return self._process.pid if self._process is not None else 0

    def stop(self) -> None:
        """It drains, and ends."""
        if self._process is not None and not self.ended:
            assert self._process.stdin is not None
            self._process.stdin.close()
            asyncio.get_running_loop().call_later(_END_S, self.kill)

    def kill(self) -> None:
        if self._process is not None and not self.ended:
            with contextlib.suppress(ProcessLookupError):
                self._process.kill()

    async def _run(self, command: Sequence[str]) -> None:
        try:
            # It ends when this pipe does: with this process, however that ends. Signals are for this process, which
            # still needs it then; some that a terminal sends cannot be ignored.
            self._process = await asyncio.create_subprocess_exec(
                *command, stdin=PIPE, stdout=PIPE, start_new_session=True
            )
            if self.leaving:
                self.stop()
            assert self._process.stdout is not None
            while line := await self._process.stdout.readline():
                if not self.address and (found := _READY.search(line)):
                    self.start_s = time.monotonic() - self.began_s
                    self.address = f"127.0.0.1:{int(found[1])}"
                    self._timed(self.start_s)
                    self._changed()
            await self._process.wait()
        except OSError as error:
            log.error("a replica cannot be started: %s", error)
        finally:
            self.ended = True
            self._changed()


class StageProcesses:
    """The replicas of all stages: as many as wanted, told to the pipeline."""

    def __init__(
        self,
        engine: HeadEngine,
        specs: Sequence[StageSpec],
        command: Callable[[StageSpec], list[str]],
        *,
        start_timeout_s: float = START_TIMEOUT_S,
    ) -> None:
        self.specs = tuple(specs)
        self.wanted = [spec.least for spec in specs]
        self.start_s = [0.0] * len(specs)
        """What the last start of a replica took."""
        self._engine = engine
        self._command = command
        self._replicas: list[list[ReplicaProcess]] = [[] for _ in specs]
        self._not_before_s = [0.0] * len(specs)
        self._failures = [0] * len(specs)
        """Starts in succession after which the replica ended at once, or soon."""
        self._start_timeout_s = start_timeout_s
        self._closing = False
        self.failed = asyncio.Event()
        """A stage cannot be had."""
        self.why = ""
        self._watching: asyncio.Task[None] | None = None

    def start(self) -> None:
        self._watching = asyncio.get_running_loop().create_task(self._watch())

    def scale(self, counts: Sequence[int]) -> None:
        """Within the bounds of each stage."""
        pairs = zip(self.specs, counts, strict=True)
        self.wanted = [min(max(count, spec.least), spec.most) for spec, count in pairs]
        self._settle()

    def counts(self, stage: int) -> tuple[int, int, int]:
        """Ready, starting, and those that end."""
        replicas = self._replicas[stage]
        ready = sum(1 for each in replicas if each.ready)
        leaving = sum(1 for each in replicas if each.leaving)
        return ready, len(replicas) - ready - leaving, leaving

    async def until_ready(self) -> None:
        """Each stage has a replica that the head has reached. Raises StagedModelError if one cannot be had."""
        while not all(any(r.up for r in replicas) for replicas in self._engine.pipeline.replicas):
            self.check()
            await asyncio.sleep(0.02)

    def check(self) -> None:
        """Raises StagedModelError if a stage cannot be had."""
        if self.failed.is_set():
            raise StagedModelError(self.why)

    async def close(self) -> None:
        self._closing = True
        if self._watching is not None:
            self._watching.cancel()
        everything = [each for replicas in self._replicas for each in replicas]
        for each in everything:
            each.leaving = True
            each.stop()
        await asyncio.gather(*(each.task for each in everything), return_exceptions=True)

    async def _watch(self) -> None:
        while True:
            self._settle()
            await asyncio.sleep(_LOOK_S)

    def _settle(self) -> None:
        """From what is to what is wanted."""
        if self._closing:
            return
        now_s = time.monotonic()
        self._kill_hanging(now_s)
        for stage, wanted in enumerate(self.wanted):
            replicas = self._replicas[stage]
            for each in [each for each in replicas if each.ended]:
                replicas.remove(each)
                if not each.leaving:
                    self._ended(stage, each, now_s)
            staying = [each for each in replicas if not each.leaving]
            if len(staying) < wanted and now_s >= self._not_before_s[stage]:
                for _ in range(wanted - len(staying)):
                    timed = partial(self.start_s.__setitem__, stage)
                    replicas.append(ReplicaProcess(self._command(self.specs[stage]), self._settle, timed))
            for each in self._to_go(stage, staying, len(staying) - wanted):
                each.leaving = True
                if not each.address:
                    each.stop()
        self._tell()

    def _ended(self, stage: int, replica: ReplicaProcess, now_s: float) -> None:
        """By itself: another one is started, later each time that it ends at once, or soon."""
        log.warning("a replica of layers %s has ended by itself", self.specs[stage].range)
        if replica.address and now_s - replica.began_s - replica.start_s > _SOON_S:
            self._failures[stage] = 0
            return
        self._failures[stage] += 1
        pause_s = min(_RETRY_MAX_S, _RETRY_S * 2 ** (self._failures[stage] - 1))
        self._not_before_s[stage] = now_s + pause_s
        if self._failures[stage] >= _FAILURES_MAX and not any(each.ready for each in self._replicas[stage]):
            self.why = (
                f"layers {self.specs[stage].range}: {self._failures[stage]} replicas in succession ended at once, or "
                "soon; what they said is above"
            )
            self.failed.set()

    def _kill_hanging(self, now_s: float) -> None:
        for stage, replicas in enumerate(self._replicas):
            for each in replicas:
                if not each.address and not each.ended and now_s - each.began_s > self._start_timeout_s:
                    said = self.specs[stage].range, self._start_timeout_s
                    log.warning("a replica of layers %s is not ready after %g s, and is killed", *said)
                    each.kill()
        for stage, replicas in enumerate(self._replicas):
            up = {replica.address for replica in self._engine.pipeline.replicas[stage] if replica.up}
            for each in replicas:
                if not each.ready or each.address in up:
                    each.down_since_s = None
                elif each.down_since_s is None:
                    each.down_since_s = now_s
                elif now_s - each.down_since_s > _DOWN_S:
                    log.warning("a replica of layers %s hangs, and is killed", self.specs[stage].range)
                    each.kill()

    def _to_go(self, stage: int, staying: list[ReplicaProcess], count: int) -> list[ReplicaProcess]:
        """Those that start, then those with the fewest sequences."""
        loads = {r.address: len(r.sequences) for r in self._engine.pipeline.replicas[stage]}
        return sorted(staying, key=lambda each: (bool(each.address), loads.get(each.address, 0)))[: max(0, count)]

    def _tell(self) -> None:
        """The pipeline learns what there is; what it has left is stopped."""
        pipeline = self._engine.pipeline
        pipeline.set_replicas([[each.address for each in replicas if each.ready] for replicas in self._replicas])
        for stage, replicas in enumerate(self._replicas):
            known = {replica.address for replica in pipeline.replicas[stage]}
            for each in replicas:
                if each.leaving and each.address and each.address not in known:
                    each.stop()


class InstanceServer:
    """A head's routes, with counts of replicas in place of their addresses."""

    def __init__(self, engine: HeadEngine, processes: StageProcesses, served: EngineServer) -> None:
        self._processes = processes
        self._head = HeadServer(engine, served, told=self._set, more=self._more)
        self.handle = self._head.handle

    def _set(self, given: Mapping[str, Any]) -> None:
        counts, stages = given.get("counts"), len(self._processes.specs)
        if not isinstance(counts, list) or len(counts) != stages or not all(type(each) is int for each in counts):
            raise RequestError(f"counts is {shown(counts)}; it must be a list of {stages} numbers.", param="counts")
        self._processes.scale(counts)

    def _more(self, stage: int) -> dict[str, Any]:
        ready, starting, leaving = self._processes.counts(stage)
        spec = self._processes.specs[stage]
        return {
            "ready": ready,
            "starting": starting,
            "draining": leaving,
            "wanted": self._processes.wanted[stage],
            "min": spec.least,
            "max": spec.most,
            "start_s": self._processes.start_s[stage],
        }


def stage_command(options: argparse.Namespace, spec: StageSpec) -> list[str]:
    command = [sys.executable, "-m", "chiron.engines.staged.stage", "--end-with-stdin", "--port", "0"]
    command += ["--model", str(options.model), "--layers", str(spec.range), "--device", spec.device]
    command += ["--threads", str(options.threads), "--max-num-seqs", str(options.max_num_seqs)]
    command += ["--grace", "5"]
    if options.dtype:
        command += ["--dtype", options.dtype]
    if spec.pace_ms or spec.pace_sequence_ms:
        command += ["--pace-ms", str(spec.pace_ms), "--pace-sequence-ms", str(spec.pace_sequence_ms)]
    tokens = spec.kv_capacity_tokens or options.kv_capacity_tokens
    return [*command, "--kv-capacity-tokens", str(tokens)] if tokens else command


def make_parser(*, positional: bool = False) -> argparse.ArgumentParser:
    """``positional``: the model is."""
    pipeline, link = PipelineSettings(), LinkSettings()
    parser = argparse.ArgumentParser(prog="chiron stages run", description=(__doc__ or "").split("\n")[0])
    add = parser.add_argument
    add_model(parser, positional=positional, help="a Hugging Face directory with safetensors")
    add("--stages", required=True, help='JSON: [{"layers": "0-3", "min": 1, "max": 2, "device": "cpu"}, ...]')
    add("--served-model-name", nargs="+", help="names in requests; default: the directory's")
    add("--host", default="127.0.0.1")
    add("--port", type=whole(0, 65_535), default=0, help="0: a free one")
    add("--dtype", choices=DTYPES, default="", help="default: as the weights are stored")
    add("--threads", type=whole(1, 1024), default=1, help="of each stage")
    add("--max-num-seqs", type=whole(1, 4096), default=64, help="sequences at once")
    add("--max-num-batched-tokens", type=whole(16, 1 << 20), default=pipeline.max_num_batched_tokens)
    add("--kv-capacity-tokens", type=whole(KV_TOKENS_MIN), default=0, help="of each replica; default: 1 GB of it")
    add("--max-model-len", type=whole(2), help="tokens of prompt and answer; default: the model's")
    add("--start-timeout", type=real(1.0, 86_400.0), default=START_TIMEOUT_S, help="seconds, of a replica")
    add("--queue-max", type=whole(0), default=256, help="requests that may wait inside; beyond: 429")
    add("--drain", type=real(0.0, 86_400.0), default=pipeline.drain_s, help="seconds before sequences are moved")
    add("--absent", type=real(0.0, 86_400.0), default=pipeline.absent_s, help=ABSENT)
    add("--silent", type=real(0.5, 3600.0), default=link.silent_s, help="a replica that says nothing this long is lost")
    add("--grace", type=real(0.0, 86_400.0), default=GRACE_S, help=GRACE)
    return parser


def parse_options(arguments: Sequence[str], *, positional: bool = False) -> argparse.Namespace:
    return make_parser(positional=positional).parse_args(arguments)


async def run(options: argparse.Namespace, files: ModelFiles, tokenizer: ModelTokenizer) -> None:
    specs = read_specs(options.stages, files.architecture.layers)
    names = options.served_model_name or [options.model.resolve().name]
    length = min(options.max_model_len or files.architecture.context_tokens, files.architecture.context_tokens)
    engine = make_head(
        files,
        tokenizer,
        [spec.range for spec in specs],
        HeadSettings(
            name=names[0], model_len_max=length, max_num_seqs=options.max_num_seqs, queue_max=options.queue_max
        ),
        PipelineSettings(
            max_num_batched_tokens=options.max_num_batched_tokens,
            drain_s=options.drain,
            absent_s=options.absent,
            link=LinkSettings(silent_s=options.silent),
        ),
        dtype=options.dtype,
    )
    os.environ["OMP_NUM_THREADS"] = str(options.threads)
    processes = StageProcesses(
        engine, specs, lambda spec: stage_command(options, spec), start_timeout_s=options.start_timeout
    )
    processes.start()
    engine.start()
    about = {"engine": "staged", "max_model_len": length, "stages": [str(spec.range) for spec in specs]}
    try:
        await processes.until_ready()
        server = InstanceServer(engine, processes, EngineServer(engine, names, about))
        await serve_until_stopped(
            server,
            host=options.host,
            port=options.port,
            failed=processes.failed,
            drain=lambda: engine.drain(options.grace),
            grace_s=options.grace,
            limits=body_limits(length),
        )
        processes.check()
    finally:
        await engine.close()
        await processes.close()


def main(arguments: Sequence[str] | None = None, *, positional: bool = False) -> None:
    options = parse_options(sys.argv[1:] if arguments is None else arguments, positional=positional)
    logging.basicConfig(level=logging.INFO, stream=sys.stderr, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    try:
        files = read_model_files(options.model)
        run_on_loop(run(options, files, ModelTokenizer(options.model)))
    except (StagedModelError, ImportError) as error:
        sys.exit(f"chiron-staged: {error}")
    except OSError as error:
        sys.exit(f"chiron-staged: cannot listen on {options.host}:{options.port}: {error}")


if __name__ == "__main__":
    main()
