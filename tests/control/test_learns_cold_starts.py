"""The cold start that planners look ahead by is what engines take, not what they waited for."""

from __future__ import annotations

import pytest

from chiron.control.model import ModelState
from chiron.core.types import Instance, InstanceKind, ModelSpec, RequestClass
from chiron.policies.registry import make_policy

CHAT = RequestClass(name="chat", kind="interactive", ttft_s=5.0, itl_s=0.2)
KIND = InstanceKind(
    name="a100", gpu="A100", gpus=1, price_per_gpu_hour=2.0, kv_capacity_tokens=400_000, max_num_seqs=1024
)


def started(state: ModelState, *, created_s: float, began_s: float | None, ready_s: float) -> None:
    instance = Instance(1, "m", KIND, "mixed", created_s)
    if began_s is not None:
        instance.began_s = began_s
    instance.ready_s = ready_s
    state.started(instance)


def test_a_start_counts_from_when_it_began() -> None:
    state = ModelState(ModelSpec(name="m", kinds=(KIND,)), (CHAT,), make_policy("chiron"))
    started(state, created_s=0.0, began_s=60.0, ready_s=70.0)
    assert state.cold_start_s == 10.0
    started(state, created_s=100.0, began_s=None, ready_s=120.0)
    assert state.cold_start_s == pytest.approx(15.0)
    assert state.cold_starts_seen == 2
