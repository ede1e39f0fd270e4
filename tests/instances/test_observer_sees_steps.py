"""What a gateway works out about an engine that tells nothing, beside the truth of a model engine."""

from __future__ import annotations

from dataclasses import replace

import pytest

from chiron.core.types import Instance
from chiron.gateway.instances.observer import EngineObserver
from observed_engine import ObservedEngine, profile, step_s, true_step_s

TOTALS = ("steps", "busy_s", "decode_tokens", "prefill_tokens", "context_tokens")


@pytest.mark.parametrize(
    ("per_s", "pieces", "within"),
    [
        pytest.param(0.5, 0.0, 0.05, id="streams-now-and-then"),
        pytest.param(4.0, 0.0, 0.015, id="streams"),
        pytest.param(12.0, 0.0, 0.015, id="streams-busy"),
        pytest.param(8.0, 0.3, 0.04, id="a-third-in-one-piece"),
        pytest.param(4.0, 1.0, 0.13, id="all-in-one-piece"),
    ],
)
def test_totals_are_those_of_the_engine(per_s: float, pieces: float, within: float) -> None:
    engine = ObservedEngine(profile())
    engine.traffic(40.0, per_s, pieces=pieces)
    engine.run(40.0)
    for name in TOTALS:
        assert engine.share(name) == pytest.approx(1.0, abs=within), name


@pytest.mark.parametrize("pieces", [0.0, 0.3])
def test_step_times_learned_from_it_are_the_engines(pieces: float) -> None:
    given = profile()
    engine = ObservedEngine(given)
    engine.traffic(60.0, 9.0, pieces=pieces)
    engine.run(60.0)
    assert engine.learner.trusted
    for batch in (16, 64, 128):
        learned, truth = step_s(engine.learner, batch, 800.0), true_step_s(given, batch, 800.0)
        assert learned == pytest.approx(truth, rel=0.08), batch


def test_a_slow_engine_with_few_long_steps() -> None:
    engine = ObservedEngine(profile(h_ms=150.0, f_ms_per_token=2.0, max_num_seqs=8, max_num_batched_tokens=512))
    engine.traffic(120.0, 0.05)
    engine.run(120.0)
    for name in TOTALS:
        assert engine.share(name) == pytest.approx(1.0, abs=0.08), name


def test_a_prefill_of_seconds_is_not_taken_for_fast_steps() -> None:
    engine = ObservedEngine(profile(f_ms_per_token=1.0, max_num_batched_tokens=1024))
    engine.submit(0.5, 6000, 200)
    engine.run(15.0)
    for (_, before), (_, after) in zip(engine.samples, engine.samples[1:], strict=False):
        if after.steps - before.steps >= 4:
            covered_s = 1.1 if before.steps else 7.2  # The first one tells of the prefill too.
            assert after.busy_s - before.busy_s < covered_s
            assert (after.busy_s - before.busy_s) / (after.steps - before.steps) > 0.012
    assert engine.share("busy_s", 0) == pytest.approx(1.0, abs=0.03)
    assert engine.share("steps", 0) == pytest.approx(1.0, abs=0.03)


def test_steps_of_a_prefill_are_those_of_the_budget_that_the_instance_has(instance: Instance) -> None:
    observer = EngineObserver(instance, 0.0)
    instance.max_num_batched_tokens = 256
    observer.entered(0.0)
    assert observer.first_token(1.0, 2560, entered_s=0.0, prefilled=2560).steps == 10


def test_answers_in_one_piece_are_not_taken_for_long_steps() -> None:
    engine = ObservedEngine(profile())
    for i in range(40):
        engine.submit(0.2 * i, 100, 20, "piece")
    engine.run(15.0)
    assert engine.learner.trusted
    assert step_s(engine.learner, 1.0, 110.0) == pytest.approx(0.012, rel=0.3)


def test_the_engines_own_totals_take_precedence() -> None:
    engine = ObservedEngine(profile(), told=True)
    engine.traffic(20.0, 8.0, pieces=0.5)
    engine.run(20.0)
    for name in TOTALS:
        assert engine.share(name) == pytest.approx(1.0, abs=1e-6), name


def test_a_scrape_that_fails_costs_precision_and_nothing_else() -> None:
    engine = ObservedEngine(profile(), told=True)
    engine.traffic(30.0, 8.0)
    for second in range(30):
        engine.told = second % 7 != 6
        engine.run(second + 0.5)
    for (_, before), (_, after) in zip(engine.samples, engine.samples[1:], strict=False):
        assert 0 <= after.steps - before.steps < 90
        assert 0.0 <= after.busy_s - before.busy_s < 1.2
    for name in TOTALS:
        assert engine.share(name) == pytest.approx(1.0, abs=0.06), name


def test_an_engine_that_starts_again_counts_from_where_it_was() -> None:
    instance = ObservedEngine(profile()).instance
    observer = EngineObserver(instance, 0.0)
    told = {"steps": 5000.0, "busy_s": 80.0, "decode_tokens": 9e4, "prefill_tokens": 1e4, "context_tokens": 1e6}
    observer.sample(1.0, told)
    before = observer.sample(2.0, told | {"steps": 5050.0, "busy_s": 80.9})
    again = observer.sample(3.0, dict.fromkeys(told, 0.0))
    assert (again.steps, again.busy_s) == (before.steps, before.busy_s)
    assert (before.steps, round(before.busy_s, 6)) == (50, 0.9)
    after = observer.sample(4.0, dict.fromkeys(told, 0.0) | {"steps": 10.0, "busy_s": 0.2})
    assert after.steps - again.steps == 10


def test_an_idle_engine_shows_nothing(instance: Instance) -> None:
    observer = EngineObserver(instance, 0.0)
    first = observer.sample(1.0)
    assert first == replace(observer.sample(500.0), taken_s=1.0)
    assert (first.running, first.steps, first.busy_s) == (0, 0, 0.0)


def test_a_resumed_request_has_nothing_prefilled(instance: Instance) -> None:
    observer = EngineObserver(instance, 0.0)
    observer.entered(0.0)
    observer.first_token(0.1, 1000, entered_s=0.0, prefilled=0)
    observer.held_tokens += 50
    observer.tokens += 40
    sample = observer.sample(1.0)
    assert (sample.prefill_tokens, sample.kv_used_tokens, sample.decode_tokens) == (0, 1050, 40)


def stream(observer: EngineObserver, at_s: float, tokens: int, *, entered_s: float, per_token_s: float = 0.02) -> float:
    """A stream of a prompt of 100 tokens gets its first token at ``at_s`` and makes the others; returns its end."""
    observer.first_token(at_s, 100, entered_s=entered_s, prefilled=100)
    observer.tokens += tokens
    observer.held_tokens += tokens
    end_s = at_s + tokens * per_token_s
    observer.left(end_s, 100, tokens, decoded=True)
    return end_s


def test_time_in_which_an_engine_made_up_its_mind_to_refuse_is_no_work(instance: Instance) -> None:
    observer = EngineObserver(instance, 0.0)
    observer.entered(0.0)  # Refused after a minute, and a real one comes shortly before.
    observer.entered(59.9)
    observer.left(60.0, 30_000, 0, decoded=False)
    end_s = stream(observer, 60.05, 50, entered_s=59.9)
    sample = observer.sample(end_s)
    assert sample.busy_s == pytest.approx(0.15 + 1.0)
    assert sample.steps == 51


def test_a_refusal_that_was_presumed_to_decode_is_taken_out_again(instance: Instance) -> None:
    observer = EngineObserver(instance, 0.0)
    observer.entered(0.0)
    begun = observer.first_token(1.0, 30_000, entered_s=0.0, prefilled=30_000, streams=False)
    observer.sample(1.5)
    observer.entered(2.0)
    end_s = stream(observer, 2.1, 50, entered_s=2.0)
    observer.undo(end_s, begun)
    observer.left(end_s, 30_000, 0, decoded=True, streams=False)
    sample = observer.sample(end_s)
    assert sample.prefill_tokens == 100
    assert sample.decode_tokens == pytest.approx(50, abs=1)
    assert sample.context_tokens < 2 * 50 * 150
    assert sample.steps < 110, "and not those of 30,000 tokens of prefill besides"


def test_a_stream_that_says_nothing_makes_nobody_elses_steps_look_slow(instance: Instance) -> None:
    observer = EngineObserver(instance, 0.0)
    for _ in range(2):
        observer.entered(0.0)
        observer.first_token(0.1, 100, entered_s=0.0, prefilled=100)
    before, held = observer.sample(0.1), 0
    for second in range(1, 60):  # One of them makes 50 tokens a second; the other's client does not read.
        if second == 6:
            observer.fell_silent(6.0, 0.1, 100, 0)
        observer.tokens += 50
        observer.held_tokens += 50
        held += 50
        after = observer.sample(second + 0.1)
        if second > 6:
            assert after.steps - before.steps == 50
            assert after.decode_tokens - before.decode_tokens == 50
        before = after
    observer.spoke_again(59.2, 100, 3000)  # It had gone on all the time.
    after = observer.sample(59.3)
    assert after.steps - before.steps < 10, "nobody saw 3,000 tokens being made"


@pytest.fixture
def instance() -> Instance:
    return ObservedEngine(profile()).instance


@pytest.mark.parametrize("streams", [True, False])
def test_choices_are_sequences_of_the_same_steps(streams: bool) -> None:
    """Four choices make four tokens a step, not four steps."""
    engine = ObservedEngine(profile())
    observer = EngineObserver(engine.instance, 0.0)
    observer.entered(0.0)
    observer.first_token(1.0, 10, entered_s=0.0, prefilled=10, streams=streams, sequences=4)
    for step in range(1, 101):
        if streams:
            observer.tokens += 4
            observer.held_tokens += 4
        observer.sample(1.0 + step * 0.02)
    if not streams:
        observer.answered(400, 2.0 * 4)
    observer.left(3.0, 10, 400 if streams else 0, decoded=True, streams=streams, sequences=4)
    sample = observer.sample(3.0)
    assert (sample.steps, sample.decode_tokens) == (101, 400)
    assert (observer.inside, observer.decoding, observer.streaming) == (0, 0, 0)
