"""At batch 1 the engine is a single server: its waits are Lindley's recursion exactly, and theory on average."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import numpy.typing as npt
import pytest

from chiron.core.clock import VirtualClock
from chiron.core.types import Instance, Request
from chiron.engines.model import EngineModel, StepTable
from scenario_factory import CLASSES, PROFILE, TICK_S, kind_of

SERVER = replace(PROFILE, h_ms=1000 / 64, max_num_seqs=1, kv_capacity_tokens=1_000_000)
"""One request at a time; a token a step, a step 1/64 s."""
Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
COUNT = 60_000
LOAD = 0.6


class Finishes:
    """Hears when each request ends."""

    def __init__(self, clock: VirtualClock) -> None:
        self.clock = clock
        self.finish_s: list[float] = []

    def first_token(self, request: Request) -> None: ...

    def finished(self, request: Request) -> None:
        self.finish_s.append(self.clock.now_s)

    def evicted(self, request: Request) -> None: ...

    def refused(self, request: Request, reason: str) -> None: ...


def waits(arrival_s: Floats, tokens: Ints) -> Floats:
    """Seconds from arrival to the start of service, from the engine model."""
    clock = VirtualClock()
    ear = Finishes(clock)
    engine = EngineModel(
        clock=clock,
        instance=Instance(1, "m0", kind_of(SERVER), "mixed", 0.0),
        profile=SERVER,
        times=StepTable(SERVER),
        listener=ear,
    )
    for number, (arrives_s, length) in enumerate(zip(arrival_s.tolist(), tokens.tolist(), strict=True)):
        clock.run_until(arrives_s)
        engine.start(Request(number, "m0", CLASSES[0], arrives_s, 1, length))
    clock.run_until(1e9)
    starts: Floats = np.array(ear.finish_s) - tokens * TICK_S
    waited: Floats = starts - arrival_s
    return waited


def lindley(arrival_s: Floats, tokens: Ints) -> Floats:
    """Waits of a single first-come-first-served server, a step a token."""
    wait_s, service_s = np.zeros(len(arrival_s)), tokens * TICK_S
    for n in range(1, len(arrival_s)):
        free_s = arrival_s[n - 1] + wait_s[n - 1] + service_s[n - 1]
        wait_s[n] = max(0.0, free_s - arrival_s[n])
    return wait_s


def poisson(mean_service_s: float, seed: int) -> Floats:
    gaps = np.random.default_rng(seed).exponential(mean_service_s / LOAD, COUNT)
    arrivals: Floats = np.cumsum(gaps)
    return arrivals


@pytest.mark.slow
def test_constant_service_waits_as_an_m_d_1_queue_does() -> None:
    arrival_s = poisson(TICK_S, seed=1)
    tokens = np.ones(COUNT, dtype=np.int64)
    seen = waits(arrival_s, tokens)
    assert seen == pytest.approx(lindley(arrival_s, tokens), abs=1e-6)
    assert seen.mean() == pytest.approx(LOAD * TICK_S / (2 * (1 - LOAD)), rel=0.05)


@pytest.mark.slow
def test_exponential_service_waits_as_an_m_m_1_queue_does() -> None:
    mean_tokens = 50
    tokens = np.random.default_rng(2).geometric(1 / mean_tokens, COUNT)
    arrival_s = poisson(mean_tokens * TICK_S, seed=3)
    seen = waits(arrival_s, tokens)
    assert seen == pytest.approx(lindley(arrival_s, tokens), abs=1e-6)
    # M/M/1: mean wait = load / (1 - load) services; whole tokens make it (1 - 1/(2*50)) of that (Pollaczek-Khinchine).
    assert seen.mean() == pytest.approx(LOAD / (1 - LOAD) * mean_tokens * TICK_S, rel=0.05)
