"""llm-d's analyzer of queueing: the queue against formulas that are known, and the fleet for a rate."""

from __future__ import annotations

from dataclasses import replace
from math import inf
from typing import Any

import numpy as np
import pytest

from chiron.policies.rivals.scalers.wva_queueing import (
    QUEUE_OVER_BATCH,
    Replica,
    WvaQueueingSettings,
    decide_fleet,
    largest_rate,
    latencies,
)
from chiron.policies.views import StepTimes
from policy_factory import CHAT, TIMES, arrival, fleet, fleet_of, mix, model

FLAT = StepTimes(
    fixed_s=0.01, per_sequence_s=0.0, per_context_token_s=0.0, per_prefill_token_s=0.0, per_prefill_square_s=0.0
)
USUAL = Replica(times=TIMES, inputs=500.0, outputs=200.0, most=64)


def test_one_at_a_time_is_the_m_m_1_k_queue() -> None:
    """Service takes (1 + O) steps of 10 ms whatever is in it; with one place at the engine that is textbook."""
    replica = Replica(times=FLAT, inputs=100.0, outputs=99.0, most=1)
    load, places = 0.7, 1 + QUEUE_OVER_BATCH
    shares = np.array([load**n for n in range(places + 1)]) / sum(load**n for n in range(places + 1))
    waiting = sum((n - 1) * shares[n] for n in range(1, places + 1))
    ttft_s, itl_s = latencies(replica, load)
    assert itl_s == pytest.approx(0.01)
    assert ttft_s == pytest.approx(waiting / (load * (1.0 - shares[-1])) + 0.02)


def test_many_places_and_constant_steps_are_the_m_m_c_queue() -> None:
    """Erlang's C: with c places that serve at once, what waits is known."""
    c, each = 8, 1.0
    replica = Replica(times=FLAT, inputs=100.0, outputs=99.0, most=c)
    rate = 0.9 * c * each
    terms = [(rate / each) ** n / float(np.prod(np.arange(1, n + 1))) for n in range(c + 1)]
    last = terms[c] * c / (c - rate / each)
    wait_s = last / (sum(terms[:c]) + last) / (c * each - rate)
    ttft_s, _ = latencies(replica, rate)
    assert ttft_s - 0.02 == pytest.approx(wait_s, rel=0.01)  # Erlang's queue has no end; this one has 80 places.


def test_the_largest_rate_just_meets_the_slo() -> None:
    for ttft_slo_s, itl_slo_s in ((5.0, 0.05), (0.2, 1.0)):
        rate = largest_rate(USUAL, ttft_slo_s, itl_slo_s)
        ttft_s, itl_s = latencies(USUAL, rate)
        assert ttft_s <= ttft_slo_s
        assert itl_s <= itl_slo_s
        ttft_s, itl_s = latencies(USUAL, 1.02 * rate)
        assert ttft_s > ttft_slo_s or itl_s > itl_slo_s
    assert largest_rate(USUAL, 1.0, 0.02) < largest_rate(USUAL, 1.0, 0.05) <= largest_rate(USUAL, inf, inf)


def test_an_slo_that_nothing_meets_is_served_one_at_a_time() -> None:
    assert largest_rate(USUAL, 0.001, 0.2) == pytest.approx(float(USUAL.service_per_s()[0]))


def plans(settings: WvaQueueingSettings, rates: list[int], **changes: Any) -> list[Any]:
    state, made, current = None, [], 2
    for number, rate in enumerate(rates):
        now_s = 1000.0 + 15.0 * number
        arrivals = tuple(arrival(int(now_s) - back, rate) for back in range(15, 0, -1) if rate)
        one = model(fleet_of(current), arrivals=arrivals, mixes=(mix(CHAT),), **changes)
        decided, state = decide_fleet(settings, state, fleet(one, now_s=now_s))
        current = decided["llama"].counts["mixed"]
        made.append(decided["llama"])
    return made


def test_the_fleet_is_the_rate_of_a_minute_over_a_replicas() -> None:
    at_once = replace(WvaQueueingSettings(), stabilise_up_s=0.0, stabilise_down_s=0.0, up_pods=100, down_pods=100)
    last = plans(at_once, [40] * 6)[-1]
    assert last.numbers["requests_per_s"] == 40.0
    assert last.counts["mixed"] == int(np.ceil(40.0 / last.numbers["replica_per_s"])) > 2
    assert plans(at_once, [0] * 3)[-1].counts["mixed"] == 1


def test_the_hpa_waits_for_four_minutes() -> None:
    counts = [plan.counts["mixed"] for plan in plans(WvaQueueingSettings(), [80] * 24)]
    assert counts[:16] == [2] * 16
    assert max(counts) == counts[-1] > 2


def test_missing_metrics_hold() -> None:
    one = model(fleet_of(3, sample_age_s=100.0))
    decided, _ = decide_fleet(WvaQueueingSettings(), None, fleet(one))
    assert decided["llama"].counts["mixed"] == 3


def test_settings_that_make_no_sense_are_refused() -> None:
    with pytest.raises(ValueError, match=r"rate_window_s is 0; it must be above 0"):
        WvaQueueingSettings(rate_window_s=0)
