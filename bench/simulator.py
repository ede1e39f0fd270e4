"""Speed of the simulator on one core, and beside NVIDIA Dynamo's replay on the same requests.

    python bench/simulator.py [--compiled SRC] [--dynamo-python PYTHON] [--repeat 3] [--quick] [--json FILE]

The shape: Poisson arrivals at 6 requests/s per instance, 300 prompt and 200 output tokens, Llama-3.1 8B on A100s, a
fleet of fixed size under the full policy (both loops, dispatch, scrapes every second, results and their summary; the
lower bound is left out). Each case runs in a process of its own. Times are CPU seconds of the process, the least of
``--repeat`` runs: other work on the machine disturbs them little. Making the workload is not counted.

With ``--compiled`` the same runs are made by the optional compiled build, in turns with the plain one; ``SRC`` is its
source folder (``make bench`` makes one). Their results must be equal to the last bit.

Dynamo's replay (``python -m dynamo.replay``, offline mode, wheels ai-dynamo and ai-dynamo-runtime) gets the same
arrivals and lengths and the same step times, as its NPZ of prefill and decode times. Its start-up, measured on one
request, is taken off. Prefix caching is off and blocks hold 512 tokens: the fastest of the settings that fit.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import multiprocessing
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from chiron.core.types import InstanceKind, ModelSpec, RequestClass
from chiron.engines.profile import Profile
from chiron.engines.profile_store import load_profile
from chiron.policies.registry import POLICIES
from chiron.sim.run import simulate
from chiron.sim.setup import Setup
from chiron.telemetry.result import Result
from chiron.workload.types import Workload

RATE_PER_INSTANCE = 6.0
INPUT_TOKENS = 300
OUTPUT_TOKENS = 200
PROFILE = "llama-3.1-8b/a100/tp1"
ITL_SLO_S = 0.2
BLOCK_TOKENS = 512


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One simulation to be timed."""

    policy: str
    instances: int
    requests: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Timing:
    """The least CPU time of a few runs, and what the run said of the requests."""

    what: str
    instances: int
    requests: int
    cpu_s: float
    rss_mib: float
    """Peak memory of the process."""
    itl_ms: float
    """Mean, as the next."""
    ttft_ms: float
    finished: int
    digest: str = ""
    """Of all that the run decided, and when: equal digests are equal runs."""

    @property
    def per_second(self) -> float:
        return self.requests / self.cpu_s


def arrivals(case: Case) -> Any:
    """Seconds; the same for both simulators."""
    rng = np.random.default_rng(0)
    return np.cumsum(rng.exponential(1.0 / (case.instances * RATE_PER_INSTANCE), case.requests))


def setup(case: Case) -> Setup:
    profile = load_profile(PROFILE)
    count = case.requests
    chat = RequestClass(name="chat", kind="interactive", ttft_s=5.0, itl_s=ITL_SLO_S)
    kind = InstanceKind(
        name="a100",
        gpu="A100",
        gpus=1,
        price_per_gpu_hour=profile.price_per_gpu_hour,
        kv_capacity_tokens=profile.kv_capacity_tokens,
        max_num_seqs=profile.max_num_seqs,
    )
    workload = Workload(
        arrival_s=arrivals(case),
        input_tokens=np.full(count, INPUT_TOKENS),
        output_tokens=np.full(count, OUTPUT_TOKENS),
        model=np.zeros(count, dtype=np.int64),
        cls=np.zeros(count, dtype=np.int64),
        deadline_s=np.full(count, np.inf),
        models=("8b",),
        classes=(chat,),
    )
    return Setup(
        scenario="speed",
        models=(ModelSpec(name="8b", kinds=(kind,), min_instances=case.instances, max_instances=case.instances),),
        profiles={"a100": profile},
        initial={"8b": case.instances},
        workload=workload,
        policy=case.policy,
        settings=POLICIES[case.policy].settings(),
    )


def run_case(case: Case, repeat: int) -> Timing:
    """In this process."""
    made = setup(case)
    least = float("inf")
    for _ in range(repeat):
        started = time.process_time()
        result = simulate(made, with_bound=False)
        least = min(least, time.process_time() - started)
    # Kilobytes on Linux, bytes on macOS.
    unit = 2**20 if sys.platform == "darwin" else 2**10
    summary = result.summary
    return Timing(
        what=case.policy,
        instances=case.instances,
        requests=case.requests,
        cpu_s=least,
        rss_mib=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit,
        itl_ms=1000.0 * summary["itl_s"]["chat"]["mean"],
        ttft_ms=1000.0 * summary["ttft_s"]["chat"]["mean"],
        finished=summary["finished"],
        digest=digest(result),
    )


def digest(result: Result) -> str:
    times = (result.requests.dispatch_s, result.requests.first_token_s, result.requests.finish_s)
    made = hashlib.sha256(repr(result.decisions).encode())
    for column in times:
        made.update(column.tobytes())
    return made.hexdigest()


def timed(case: Case, repeat: int, source: Path | None = None) -> Timing:
    """In a fresh process, so that peak memory is this case's own. ``source``: of the package, if not the one here."""
    context = multiprocessing.get_context("spawn")
    path = sys.path.copy()
    if source is not None:
        sys.path.insert(0, str(source))  # The process that is spawned gets it.
    try:
        with ProcessPoolExecutor(max_workers=1, mp_context=context) as pool:
            return pool.submit(run_case, case, repeat).result()
    finally:
        sys.path[:] = path


def both(case: Case, repeat: int, compiled: Path) -> tuple[Timing, Timing]:
    """Plain and compiled, in turns, the least of each."""
    turns = [(timed(case, 1), timed(case, 1, compiled)) for _ in range(repeat)]
    plain, fast = (min(timings, key=lambda timing: timing.cpu_s) for timings in zip(*turns, strict=True))
    if plain.digest != fast.digest:
        raise SystemExit(f"error: {case.policy}: the compiled build decides otherwise than the plain one")
    return replace(plain, what=f"{case.policy}, plain"), replace(fast, what=f"{case.policy}, compiled")


# -- Dynamo ------------------------------------------------------------------------------------------------------


def write_step_times(profile: Profile, path: Path) -> None:
    """The profile as the table that the replay interpolates: milliseconds by prompt, and by KV in use and context."""
    prompts = np.array([1.0, 64.0, 128.0, 256.0, INPUT_TOKENS, 512.0, 1024.0, 2048.0])
    used = np.array([1.0, 1e3, 5e3, 1e4, 2e4, 4e4, 8e4, 1.6e5, float(profile.kv_capacity_tokens)])
    contexts = np.array([100.0, 300.0, 400.0, 500.0, 600.0])
    prefill = [profile.step_s(decoding=0, context_tokens=0.0, prefill_tokens=int(n)) for n in prompts]
    decode = [
        [profile.step_s(decoding=max(1, int(kv / context)), context_tokens=kv) for context in contexts] for kv in used
    ]
    np.savez(
        path,
        prefill_isl=prompts,
        prefill_ttft_ms=1000.0 * np.array(prefill),
        decode_active_kv_tokens=used,
        decode_context_length=contexts,
        decode_itl=1000.0 * np.array(decode),
    )


def replay(python: str, case: Case, folder: Path) -> tuple[float, float, dict[str, Any]]:
    """(CPU seconds, peak MiB, the replay's own report) of one replay in a process of its own."""
    profile = load_profile(PROFILE)
    table, trace, report = folder / "steps.npz", folder / "trace.jsonl", folder / "report.json"
    write_step_times(profile, table)
    with trace.open("w") as file:
        for number, arrival_s in enumerate(arrivals(case).tolist()):
            row = {
                "timestamp": 1000.0 * arrival_s,
                "input_length": INPUT_TOKENS,
                "output_length": OUTPUT_TOKENS,
                "hash_ids": [number],
            }
            file.write(json.dumps(row) + "\n")
    engine = {
        "block_size": BLOCK_TOKENS,
        "num_gpu_blocks": profile.kv_capacity_tokens // BLOCK_TOKENS,
        "max_num_seqs": profile.max_num_seqs,
        "max_num_batched_tokens": profile.max_num_batched_tokens,
        "enable_prefix_caching": False,
        "planner_profile_data": str(table),
    }
    command = [python, "-m", "dynamo.replay", str(trace), "--trace-block-size", str(BLOCK_TOKENS)]
    command += ["--num-workers", str(case.instances), "--extra-engine-args", json.dumps(engine)]
    command += ["--report-json", str(report)]
    child = subprocess.Popen(command, cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    assert child.stderr is not None
    said = child.stderr.read()
    _, status, usage = os.wait4(child.pid, 0)
    child.returncode = os.waitstatus_to_exitcode(status)
    if child.returncode != 0:
        raise SystemExit(f"error: {python} -m dynamo.replay failed with status {child.returncode}:\n{said[-2000:]}")
    unit = 2**20 if sys.platform == "darwin" else 2**10
    return usage.ru_utime + usage.ru_stime, usage.ru_maxrss / unit, json.loads(report.read_text())


def timed_dynamo(python: str, case: Case, repeat: int) -> Timing:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        one = Case(policy=case.policy, instances=case.instances, requests=1)
        start_up_s = min(replay(python, one, folder)[0] for _ in range(2))
        runs = [replay(python, case, folder) for _ in range(repeat)]
    cpu_s, rss_mib, report = min(runs, key=lambda run: run[0])
    return Timing(
        what="Dynamo replay",
        instances=case.instances,
        requests=case.requests,
        cpu_s=cpu_s - start_up_s,
        rss_mib=rss_mib,
        itl_ms=report["mean_itl_ms"],
        ttft_ms=report["mean_ttft_ms"],
        finished=report["completed_requests"],
    )


# -- the program -------------------------------------------------------------------------------------------------

HEADING = ("", "instances", "requests", "CPU s", "requests/s", "us/request", "peak MiB", "ITL ms", "TTFT ms", "cost")


def row(timing: Timing, base: Timing) -> str:
    cells = (
        timing.what,
        f"{timing.instances:,}",
        f"{timing.requests:,}",
        f"{timing.cpu_s:.2f}",
        f"{timing.per_second:,.0f}",
        f"{1e6 / timing.per_second:.1f}",
        f"{timing.rss_mib:,.0f}",
        f"{timing.itl_ms:.1f}",
        f"{timing.ttft_ms:.0f}",
        f"{base.per_second / timing.per_second:.2f}x",
    )
    return line(cells)


def line(cells: Sequence[str]) -> str:
    return f"{cells[0]:<18}" + "".join(f"{cell:>11}" for cell in cells[1:])


def show(title: str, timings: Sequence[Timing]) -> None:
    """A table; its last column is the cost of a request over that of the first row."""
    print(f"\n{title}\n{line(HEADING)}")
    for timing in timings:
        print(row(timing, timings[0]))
    sys.stdout.flush()


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--repeat", type=int, default=3, help="runs of each small case; the least time counts")
    parser.add_argument("--quick", action="store_true", help="a hundredth of the requests: does it work at all?")
    parser.add_argument("--compiled", type=Path, metavar="SRC", help="source folder with the compiled build in it")
    parser.add_argument("--dynamo-python", metavar="PYTHON", help="an interpreter that has ai-dynamo installed")
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args(arguments)
    if options.repeat < 1:
        parser.error(f"--repeat is {options.repeat}; it must be at least 1")
    if options.json is not None and not options.json.absolute().parent.is_dir():
        parser.error(f"--json: there is no directory {options.json.absolute().parent}")
    if options.compiled is not None and not list(options.compiled.glob("chiron__mypyc*")):
        parser.error(f"--compiled: there is no compiled build in {options.compiled}")
    share = 100 if options.quick else 1
    repeat = 1 if options.quick else options.repeat

    print(f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}, numpy {np.__version__}")
    shape = {"instances": 50, "requests": 50_000 // share}
    fleet = [timed(Case(policy=name, **shape), repeat) for name in ("chiron", "static")]
    if options.dynamo_python is not None:
        # static has the dispatch that is nearest to the replay's: round robin and least outstanding spread alike.
        fleet.append(timed_dynamo(options.dynamo_python, Case(policy="static", **shape), min(repeat, 2)))
    show("a fleet of 50: cost of a request over chiron's in the last column", fleet)

    builds = []
    if options.compiled is not None:
        print("\nplain Python and the compiled build, equal to the last bit")
        for name in ("chiron", "static"):
            plain, fast = both(Case(policy=name, **shape), repeat, options.compiled.absolute())
            builds += [plain, fast]
            show(f"{name}: {plain.cpu_s / fast.cpu_s:.2f} times as fast compiled", [plain, fast])

    # As many requests per instance at every size, so that each fleet passes through the same states.
    sizes = [(10, 5 * repeat), (100, repeat), (1_000, 1), (5_000, 1)]
    if options.quick:
        sizes = [(2, 1), (20, 1)]
    scaling = [timed(Case(policy="chiron", instances=n, requests=200 * n), runs) for n, runs in sizes]
    show("200 requests per instance: cost of a request over the smallest fleet's in the last column", scaling)

    million = timed(Case(policy="chiron", instances=50, requests=1_000_000 // share), 1)
    show("a million requests", [million])

    if options.json is not None:
        groups = {"fleet": fleet, "builds": builds, "scaling": scaling, "million": [million]}
        figures = {name: [asdict(timing) for timing in group] for name, group in groups.items()}
        options.json.write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()
