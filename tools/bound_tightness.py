"""How tight the lower bound is: the table of docs/bound.md. Run: python tools/bound_tightness.py (about a minute)."""

from __future__ import annotations

from math import inf

import numpy as np

from chiron.core.types import InstanceKind, ModelSpec, RequestClass
from chiron.engines.profile_store import load_profile
from chiron.sim.bound import bound_of_run
from chiron.sim.bound_work import request_work_s
from chiron.sim.run import simulate
from chiron.sim.setup import Setup
from chiron.workload.types import Workload

CHAT = RequestClass(name="chat", kind="interactive", ttft_s=2.0, itl_s=0.1)
NIGHT = RequestClass(name="night", kind="batch", deadline_s=7200.0)
ROWS: list[tuple[str, str, str, int, float, int, int, int]] = [
    # name, policy, profile, instances, chats a second for 20 minutes, batch requests at 0, prompt, output (means)
    ("batch, chat lengths", "static", "llama-3.1-8b/a100/tp1", 1, 0, 6_000, 1_000, 250),
    ("batch, long prompts", "static", "llama-3.1-8b/h100/tp1", 1, 0, 6_000, 4_000, 30),
    ("batch, long outputs", "static", "llama-3.1-8b/a100/tp1", 1, 0, 2_000, 300, 2_000),
    ("batch, chat lengths", "static", "llama-3.1-70b/h100/tp4", 1, 0, 6_000, 1_000, 250),
    ("chat, one instance, idle", "static", "llama-3.1-8b/a100/tp1", 1, 0.05, 0, 1_000, 250),
    ("chat, one instance, half full", "static", "llama-3.1-8b/a100/tp1", 1, 5, 0, 1_000, 250),
    ("chat, few instances", "chiron", "llama-3.1-8b/a100/tp1", 4, 40, 0, 1_000, 250),
    ("chat and batch", "chiron", "llama-3.1-8b/a100/tp1", 4, 40, 6_000, 1_000, 250),
    ("chat", "chiron", "llama-3.1-70b/h100/tp4", 4, 20, 0, 1_000, 250),
]


def setup(policy: str, profile: str, instances: int, rate: float, nights: int, prompt: int, output: int) -> Setup:
    random = np.random.default_rng(7)
    chats = int(rate * 1200)
    count = chats + nights
    arrival_s = np.concatenate([np.zeros(nights), np.sort(random.uniform(0, 1200, chats))])
    cls = np.repeat([1, 0], [nights, chats])
    loaded = load_profile(profile)
    kind = InstanceKind(
        name="kind",
        gpu=loaded.gpu,
        gpus=loaded.tp,
        price_per_gpu_hour=1.0,
        kv_capacity_tokens=loaded.kv_capacity_tokens,
        max_num_seqs=loaded.max_num_seqs,
    )
    return Setup(
        scenario="tightness",
        models=(ModelSpec(name="m", kinds=(kind,), min_instances=1),),
        profiles={"kind": loaded},
        initial={"m": instances},
        workload=Workload(
            arrival_s=arrival_s,
            input_tokens=np.maximum(1, random.lognormal(np.log(prompt) - 0.32, 0.8, count)).astype(np.int64),
            output_tokens=np.maximum(1, random.lognormal(np.log(output) - 0.32, 0.8, count)).astype(np.int64),
            model=np.zeros(count, dtype=np.int64),
            cls=cls.astype(np.int64),
            deadline_s=np.where(cls == 1, arrival_s + NIGHT.deadline_s, inf),
            models=("m",),
            classes=(CHAT, NIGHT),
        ),
        policy=policy,
        settings=None,
    )


def main() -> None:
    print("| load | profile | policy | attained | GPU-h | work, any load | work, in flight | floor | bound ", end="")
    print("| GPU-h / work | GPU-h / bound |\n|---|---|---|---|---|---|---|---|---|---|---|")
    for name, policy, profile, instances, rate, nights, prompt, output in ROWS:
        run = setup(policy, profile, instances, rate, nights, prompt, output)
        result = simulate(run, with_bound=False)
        spent, table = result.summary["gpu_hours"], result.requests
        least = bound_of_run(run, table, result.summary["sim_s"])
        done = table.outcome == 0
        itl_s = np.where(table.attained(result.classes) & (table.cls == 0), CHAT.itl_s, inf)
        kind = run.profiles["kind"]
        packed = request_work_s(kind, table.input_tokens[done], table.output_tokens[done], itl_s[done]).sum()
        print(
            f"| {name} | {profile} | {policy} | {result.summary['attainment_all']:.3f} | {spent:.3f} "
            f"| {packed * kind.tp / 3600:.3f} | {least.work_gpu_hours:.3f} | {least.floor_gpu_hours:.3f} "
            f"| {least.gpu_hours:.3f} | {spent / least.work_gpu_hours:.2f} | {spent / least.gpu_hours:.2f} |"
        )


if __name__ == "__main__":
    main()
