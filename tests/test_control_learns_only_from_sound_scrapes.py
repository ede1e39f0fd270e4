"""What scrapes teach: exact coefficients from exact scrapes, nothing from broken ones."""

from __future__ import annotations

from dataclasses import replace
from math import inf, nan
from random import Random

import pytest

from chiron.control.learning import Learner
from chiron.core.types import Sample
from scenario_factory import CLASSES

FIXED_S, SEQUENCE_S, CONTEXT_S, PREFILL_S = 0.009, 1e-4, 2e-7, 8e-5
START = Sample(
    instance_id=1,
    taken_s=0.0,
    running=0,
    waiting=0,
    waiting_tokens=0,
    head_tokens=0,
    kv_used_tokens=0,
    steps=0,
    busy_s=0.0,
    decode_tokens=0,
    prefill_tokens=0,
    context_tokens=0.0,
    preemptions=0,
)


def next_scrape(before: Sample, draw: Random) -> Sample:
    """A second later, on an engine whose steps are exactly linear."""
    steps = draw.randint(20, 80)
    decoded = steps * draw.randint(1, 100)
    context = decoded * draw.uniform(50, 3000)
    prefilled = draw.randint(0, 4000)
    busy_s = FIXED_S * steps + SEQUENCE_S * decoded + CONTEXT_S * context + PREFILL_S * prefilled
    return replace(
        before,
        taken_s=before.taken_s + 1.0,
        steps=before.steps + steps,
        busy_s=before.busy_s + busy_s,
        decode_tokens=before.decode_tokens + decoded,
        prefill_tokens=before.prefill_tokens + prefilled,
        context_tokens=before.context_tokens + context,
    )


def taught(rounds: int) -> tuple[Learner, Sample]:
    learner, draw, sample = Learner(CLASSES), Random("scrapes"), START
    for _ in range(rounds):
        before, sample = sample, next_scrape(sample, draw)
        learner.observe(before, sample, 0.0)
    learner.publish()
    return learner, sample


def test_step_times_are_recovered_from_scrapes() -> None:
    learner, _ = taught(200)
    assert learner.trusted
    times = learner.step_times
    assert times.fixed_s == pytest.approx(FIXED_S, rel=0.1)
    assert times.per_sequence_s == pytest.approx(SEQUENCE_S, rel=0.1)
    assert times.per_prefill_token_s == pytest.approx(PREFILL_S, rel=0.1)


@pytest.mark.parametrize(
    "broken",
    [
        {"busy_s": nan},
        {"busy_s": inf},
        {"context_tokens": nan},
        {"steps": 0, "busy_s": 0.0, "decode_tokens": 0, "context_tokens": 0.0},
        {"busy_s": -1.0},
    ],
    ids=["nan time", "endless time", "nan context", "counters started over", "time ran back"],
)
def test_a_broken_scrape_changes_nothing_that_is_known(broken: dict[str, float]) -> None:
    learner, sample = taught(50)
    known, updates = learner.step_times, learner.updates
    after = next_scrape(sample, Random(1))
    learner.observe(sample, replace(after, **broken), 0.0)  # type: ignore[arg-type]
    learner.publish()
    assert learner.step_times == known
    assert learner.updates == updates
