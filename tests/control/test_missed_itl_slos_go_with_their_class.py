"""Missed ITL SLOs steer the whole model: those of a class that no longer comes must not do so for ever."""

from __future__ import annotations

from random import Random

import pytest

from chiron.control.model import ITL_MISSED_KEPT_S, ModelState, model_view
from chiron.core.kept import Kept
from chiron.core.types import InstanceKind, ModelSpec, Request, RequestClass
from chiron.policies.registry import make_policy

CHAT = RequestClass(name="chat", kind="interactive", ttft_s=5.0, itl_s=0.2)
VOICE = RequestClass(name="voice", kind="interactive", ttft_s=1.0, itl_s=0.03)
JOBS = RequestClass(name="jobs", kind="batch", deadline_s=3600.0)
KIND = InstanceKind(
    name="a100", gpu="A100", gpus=1, price_per_gpu_hour=2.0, kv_capacity_tokens=400_000, max_num_seqs=1024
)
LATE = 0.0507
"""Share after 26 answers, all of them slow."""


def model() -> ModelState:
    return ModelState(ModelSpec(name="m", kinds=(KIND,)), (CHAT, VOICE, JOBS), make_policy("chiron"))


def ends(state: ModelState, cls: RequestClass, now_s: float, *, slow: bool = False) -> None:
    """A request of ten tokens, nine of them after the first."""
    request = Request(1, "m", cls, now_s - 20.0, 100)
    request.ran, request.tokens_done, request.outcome = True, 10, "finished"
    took_s = 9.0 * cls.itl_s * (1.1 if slow else 0.9) if cls.interactive else 9.0
    request.first_token_s, request.finish_s = now_s - took_s, now_s
    state.ended(request)


def tried_out() -> ModelState:
    """Voice has been tried, at 1000 s the last time, and was too slow."""
    state = model()
    for _ in range(26):
        ends(state, VOICE, 1000.0, slow=True)
    assert state.itl_missed == pytest.approx(LATE, abs=1e-4)
    return state


def tick(state: ModelState, now_s: float) -> float:
    """What the policy is told once this tick is over."""
    model_view(state, now_s, peek=False)
    return state.itl_missed


@pytest.mark.parametrize("others", [(CHAT,), (JOBS,), (CHAT, JOBS), ()])
def test_they_steer_for_ten_minutes_after_its_last_request_whatever_else_comes(
    others: tuple[RequestClass, ...],
) -> None:
    state, told = tried_out(), {}
    for now_s in range(1005, 3000, 5):
        for cls in others:
            ends(state, cls, now_s - 1.0)
        told[now_s] = tick(state, float(now_s))
    for now_s, share in told.items():
        assert share == pytest.approx(LATE if now_s <= 1000.0 + ITL_MISSED_KEPT_S else 0.0, abs=1e-4)


def test_they_steer_again_once_it_comes_again() -> None:
    state = tried_out()
    assert tick(state, 5000.0) == 0.0
    ends(state, VOICE, 5001.0)
    assert state.itl_missed == pytest.approx(0.998 * LATE, abs=1e-4)


@pytest.mark.parametrize(("stopped_s", "known"), [(1005.0, LATE), (1600.0, LATE), (1605.0, 0.0)])
def test_a_restart_knows_them_while_they_steer(stopped_s: float, known: float) -> None:
    again = model()
    again.restore(Kept(tried_out().learned(stopped_s), "models.m", []), 300.0)
    assert again.itl_missed == pytest.approx(known, abs=1e-4)
    assert tick(again, 300.0 + ITL_MISSED_KEPT_S) == pytest.approx(known, abs=1e-4)
    assert tick(again, 305.0 + ITL_MISSED_KEPT_S) == 0.0


@pytest.mark.parametrize("seed", range(3))
def test_of_classes_that_all_keep_coming_the_worst_steers(seed: int) -> None:
    draw, state, now_s = Random(seed), model(), 0.0
    shares = {CHAT.name: 0.0, VOICE.name: 0.0}
    for number in range(2000):
        cls, slow = (VOICE if number % 20 == 0 else CHAT), draw.random() < 0.05
        now_s += draw.uniform(0.0, ITL_MISSED_KEPT_S / 20.0)
        ends(state, cls, now_s, slow=slow)
        shares[cls.name] += 0.002 * (slow - shares[cls.name])
        if number % 5 == 0:
            tick(state, now_s)
        assert state.itl_missed == max(shares.values())
