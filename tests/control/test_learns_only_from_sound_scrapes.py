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


def next_scrape(before: Sample, draw: Random, slower: float = 1.0) -> Sample:
    """A second later, on an engine whose steps are exactly linear."""
    steps = draw.randint(20, 80)
    decoded = steps * draw.randint(1, 100)
    context = decoded * draw.uniform(50, 3000)
    prefilled = draw.randint(0, 4000)
    busy_s = FIXED_S * steps + SEQUENCE_S * decoded + CONTEXT_S * context + PREFILL_S * prefilled
    busy_s *= slower
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


def predicted_s(learner: Learner) -> float:
    """A step of 40 sequences with 1,500 tokens of context each, and 500 tokens of prefill."""
    times = learner.step_times
    decode_s = times.fixed_s + 40 * (times.per_sequence_s + 1500 * times.per_context_token_s)
    return decode_s + 500 * times.per_prefill_token_s


TRUE_S = FIXED_S + 40 * (SEQUENCE_S + 1500 * CONTEXT_S) + 500 * PREFILL_S
ABSURD = [
    pytest.param({"busy_s": 1e-4}, 0.0, id="ten thousand times too fast"),
    pytest.param({"busy_s": 900.0}, 0.0, id="a stall billed to one second"),
    pytest.param({"context_tokens": 1e12}, 0.0, id="endless context"),
    pytest.param({"prefill_tokens": 10**9}, 0.0, id="endless prompts"),
    pytest.param({"steps": 10**6}, 0.0, id="a million steps"),
    pytest.param({}, 1e13, id="a prompt of three million tokens"),
]


@pytest.mark.parametrize(("absurd", "square"), ABSURD)
def test_one_scrape_that_is_far_off_moves_nothing(absurd: dict[str, float], square: float) -> None:
    learner, sample = taught(50)
    known = learner.step_times
    claimed = {name: getattr(sample, name) + value for name, value in absurd.items()}
    learner.observe(sample, replace(next_scrape(sample, Random(1)), **claimed), square)  # type: ignore[arg-type]
    learner.publish()
    assert learner.step_times == known


@pytest.mark.parametrize(("absurd", "square"), ABSURD)
def test_a_few_that_are_far_off_move_little(absurd: dict[str, float], square: float) -> None:
    learner, sample = taught(50)
    draw = Random("few")
    for number in range(100):
        after = next_scrape(sample, draw)
        told = after
        if number % 20 == 0:
            claimed = {name: getattr(sample, name) + value for name, value in absurd.items()}
            told = replace(after, **claimed)  # type: ignore[arg-type]
        learner.observe(sample, told, square if told is not after or (not absurd and number % 20 == 0) else 0.0)
        learner.publish()
        sample = after
    assert predicted_s(learner) == pytest.approx(TRUE_S, rel=0.15)


@pytest.mark.parametrize("slower", [0.2, 0.5, 2.0, 10.0])
def test_hardware_that_changed_is_learned_in_half_a_minute(slower: float) -> None:
    learner, sample = taught(400)
    draw = Random("changed")
    for _ in range(30):
        before, sample = sample, next_scrape(sample, draw, slower)
        learner.observe(before, sample, 0.0)
        learner.publish()
    assert predicted_s(learner) == pytest.approx(slower * TRUE_S, rel=0.1)


def test_what_only_few_scrapes_show_is_learned_from_them() -> None:
    """Long prompts are rare, and the first of them are far from what short ones taught."""
    learner, sample = taught(200)
    draw = Random("rare")
    for number in range(120):
        before, sample = sample, next_scrape(sample, draw)
        long = 0 if number % 20 else 60_000
        if long:
            more = {"prefill_tokens": sample.prefill_tokens + long, "busy_s": sample.busy_s + long * PREFILL_S + 14.4}
            sample = replace(sample, **more)  # type: ignore[arg-type]
        learner.observe(before, sample, float(long) ** 2)  # 4e-9 s per squared token.
        learner.publish()
    assert learner.step_times.per_prefill_square_s == pytest.approx(4e-9, rel=0.3)
