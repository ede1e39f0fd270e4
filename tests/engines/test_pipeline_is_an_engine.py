"""A pipeline of stages under any commands: with one stage the engine itself to the bit, exact, conserving."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from chiron.core.clock import VirtualClock
from chiron.core.types import Instance, PipelineKind, Request, StageKind
from chiron.engines.model import EngineModel
from chiron.engines.pipeline import PipelineModel
from chiron.engines.pipeline_rounds import StageTimes
from chiron.engines.profile import Profile
from effort import examples
from engine_bench import Bench, check_books, play
from scenario_factory import CLASSES, PROFILE, TICK_S, kind_of, profiles

small_profiles = profiles().map(lambda p: replace(p, kv_capacity_tokens=min(p.kv_capacity_tokens, 350)))
seeds = st.integers(0, 1_000_000)
transfers = st.sampled_from((0.0, TICK_S / 4, 0.002))


class Source:
    """Replicas that are up after a time, and a count of those that are not given back."""

    def __init__(self, clock: VirtualClock, start_s: float = 1.0) -> None:
        self.clock, self.start_s = clock, start_s
        self.held: dict[int, int] = {}
        self.next = 1000

    def start(self, instance: Instance, stage: int, up: Callable[[int, float], None]) -> int:
        self.next += 1
        number = self.next
        self.held[number] = stage

        def ready() -> None:
            if number in self.held:
                up(number, self.start_s)

        self.clock.call_later(self.start_s, ready)
        return number

    def stop(self, replica: int) -> None:
        self.held.pop(replica, None)


def pipeline_of(
    stages: Sequence[Profile],
    clock: VirtualClock,
    instance: Instance,
    listener: Bench,
    *,
    replicas: Sequence[int] | None = None,
    source: Source | None = None,
    kv_seconds_per_token: float = 0.0,
    step_mode: bool = False,
    **hops: float,
) -> PipelineModel:
    counts = replicas or [1] * len(stages)
    kinds = tuple(StageKind(name=f"s{i}", layers=(i, i), gpu="g", max_replicas=9) for i in range(len(stages)))
    return PipelineModel(
        clock=clock,
        instance=instance,
        kind=PipelineKind(stages=kinds, **hops),  # type: ignore[arg-type]
        profile=stages[0],
        stages=[StageTimes(each) for each in stages],
        replicas=[list(range(10 * i, 10 * i + n)) for i, n in enumerate(counts)],
        source=source or Source(clock),
        listener=listener,
        capacity_told=lambda instance, tokens: None,
        kv_seconds_per_token=kv_seconds_per_token,
        step_mode=step_mode,
    )


def played(
    stages: Sequence[Profile], seed: int, transfer_s: float, *, step_mode: bool = False, scales: bool = True
) -> Bench:
    """Any pipeline under any commands, its stages scaled at drawn times; hops and replicas are drawn by the seed."""
    draw = Random(f"{seed}:pipeline")
    hops = {"hop_s": draw.choice((0.0, TICK_S, 0.003)), "token_bytes": draw.choice((0, 4096))}
    hops |= {"hop_bytes_per_s": draw.choice((1e5, 1e8)), "micro_batches_max": draw.choice((0, 1, 3))}
    replicas = [draw.randint(1, 3) for _ in stages]
    made: list[PipelineModel] = []

    def make(clock: VirtualClock, instance: Instance, listener: Bench) -> EngineModel:
        source = Source(clock, draw.choice((0.0, 0.5, 2.0)))
        engine = pipeline_of(
            stages,
            clock,
            instance,
            listener,
            replicas=replicas,
            source=source,
            kv_seconds_per_token=transfer_s,
            step_mode=step_mode,
            **hops,
        )
        for _ in range(12 if scales else 0):
            wanted = [draw.randint(1, 3) for _ in stages]
            when_s = draw.choice((draw.randrange(512) * TICK_S, draw.uniform(0, 8)))
            clock.call_at(when_s, lambda wanted=wanted: engine.scale(wanted))  # type: ignore[misc]

        def fail_one() -> None:
            up = [each.number for stage in engine._stages for each in stage.replicas]
            if up:
                engine.replica_failed(draw.choice(up))

        for _ in range(draw.choice((0, 4, 24)) if scales else 0):
            clock.call_at(draw.choice((draw.randrange(512) * TICK_S, draw.uniform(0, 8))), fail_one)

        def note() -> None:
            listener.log.append((clock.now_s, repr(engine.stage_sample())))

        for _ in range(10):
            clock.call_at(draw.uniform(0, 8), note)
        made.append(engine)
        return engine

    def check(bench: Bench) -> None:
        check_books(bench)
        check_replicas(made[0])

    bench, _ = play(
        stages[0],
        seed=seed,
        kv_seconds_per_token=transfer_s,
        step_mode=step_mode,
        make=make,
        after_each=check if step_mode else None,
    )
    return bench


def check_replicas(engine: PipelineModel) -> None:
    """What each replica holds against a recount of the sequences on it."""
    for number, stage in enumerate(engine._stages):
        for replica in stage.replicas:
            inside = [
                (engine._sequences[i], claim) for i, claim in engine._claims.items() if replica is claim.path[number]
            ]
            decoding = [s for s, _ in inside if s.phase == 3]
            assert replica.draining or not replica.dead
            assert replica.sequences == len(inside)
            assert replica.batch == len(decoding)
            contexts = sum(s.context + engine.step - s.join_step for s in decoding)
            assert replica.context + replica.batch * engine.step == contexts
            claimed = sum(claim.kv for _, claim in inside)
            assert claimed <= replica.kv <= claimed + engine._held_tokens
            assert 0 <= contexts + replica.kv <= engine._stage_times[number].kv_capacity_tokens


@given(small_profiles, seeds, transfers)
@settings(max_examples=examples(48))
def test_with_one_stage_and_free_hops_it_is_the_engine_to_the_bit(
    profile: Profile, seed: int, transfer_s: float
) -> None:
    profile = replace(profile, admission_ms=0.0)  # Profiles by layer have none.
    alone, _ = play(profile, seed=seed, kv_seconds_per_token=transfer_s)
    pipeline, _ = play(
        profile,
        seed=seed,
        make=lambda clock, instance, listener: pipeline_of(
            [profile], clock, instance, listener, kv_seconds_per_token=transfer_s
        ),
    )
    assert pipeline.log == alone.log


@given(st.lists(small_profiles, min_size=1, max_size=3), seeds, transfers)
@settings(max_examples=examples(48))
def test_fast_forward_equals_step_mode_while_stages_are_scaled(
    stages: list[Profile], seed: int, transfer_s: float
) -> None:
    fast = played(stages, seed, transfer_s)
    slow = played(stages, seed, transfer_s, step_mode=True)
    assert fast.log == slow.log
    assert len(fast.ended) == 30


LINE = replace(PROFILE, kv_capacity_tokens=100_000, max_num_seqs=64, max_num_batched_tokens=64)


def run_line(
    stage_ms: Sequence[float], requests: int, *, replicas: Sequence[int] | None = None, **hops: float
) -> tuple[PipelineModel, float]:
    """Requests with one prompt token that arrive at once; the engine and the seconds of a round while all run."""
    stages = [replace(LINE, h_ms=ms) for ms in stage_ms]
    made: list[PipelineModel] = []

    def make(clock: VirtualClock, instance: Instance, listener: Bench) -> EngineModel:
        made.append(pipeline_of(stages, clock, instance, listener, replicas=replicas, **hops))
        return made[0]

    bench = Bench(LINE, kv_seconds_per_token=0.0, step_mode=False, seed=1, make=make)
    bench.chattiness = 0.0
    for number in range(requests):
        bench.start(Request(number, "m0", CLASSES[1], 0.0, 1, 100))
    while not made[0].steps > 1:
        bench.clock.step()
    before_s, before = made[0].busy_s, made[0].steps
    while len(bench.ended) < requests:
        bench.clock.step()
    return made[0], (made[0].busy_s - before_s) / (made[0].steps - before)


@pytest.mark.parametrize(
    ("stage_ms", "replicas", "hop_s", "round_ms"),
    [
        pytest.param([16, 16, 16, 16], None, 0.0, 64, id="nothing is gained by splitting what takes as long anyway"),
        pytest.param([16, 16, 16, 16], None, 0.001, 68, id="hops are on the way, one of them back"),
        pytest.param([16, 32], [1, 2], 0.0, 48, id="two micro-batches, the slow stage's on a replica each"),
        pytest.param([16, 32], [3, 1], 0.0, 96, id="three micro-batches, all of them through the slow stage"),
    ],
)
def test_rounds_by_hand(stage_ms: list[float], replicas: list[int] | None, hop_s: float, round_ms: float) -> None:
    _, round_s = run_line(stage_ms, 12, replicas=replicas, hop_s=hop_s)
    assert round_s == pytest.approx(round_ms / 1000, rel=1e-6)


def test_a_slow_link_is_a_station_too() -> None:
    # 12 tokens of 1,000 bytes leave each stage but the last in a round, and take a second each.
    _, round_s = run_line([16, 16], 12, hop_s=0.0, token_bytes=1000, hop_bytes_per_s=1000.0)
    assert round_s == pytest.approx(12.0, rel=0.01)


def test_a_round_follows_whatever_becomes_the_longest() -> None:
    """First the link, then the way, then the stage whose attention grows with the contexts."""
    growing = replace(LINE, c_ms_per_context_token=0.5)
    made: list[PipelineModel] = []

    def make(clock: VirtualClock, instance: Instance, listener: Bench) -> EngineModel:
        hops = {"token_bytes": 1000, "hop_bytes_per_s": 24_000.0, "micro_batches_max": 2}
        made.append(pipeline_of([LINE, growing], clock, instance, listener, **hops))
        return made[0]

    bench = Bench(LINE, kv_seconds_per_token=0.0, step_mode=False, seed=1, make=make)
    bench.chattiness = 0.0
    for number in range(12):
        bench.start(Request(number, "m0", CLASSES[1], 0.0, 1, 100))
    while made[0].batch < 12:
        bench.clock.step()
    engine, before_s, before = made[0], made[0].busy_s, made[0].steps
    contexts = [engine.context_sum + 12 * k for k in range(98)]
    assert contexts[0] < 40
    while engine.batch == 12:
        bench.clock.step()
    rounds = [max(0.5, 0.25 + 2 / 64 + 0.0005 * c / 2, 2 / 64 + 0.0005 * c) for c in contexts]
    taken = engine.steps - before
    assert taken >= 80
    assert engine.busy_s - before_s == pytest.approx(sum(rounds[:taken]), rel=1e-3)


def test_kv_is_booked_where_it_lies() -> None:
    small = replace(LINE, kv_capacity_tokens=50)
    clock = VirtualClock()
    bench = Bench(LINE, kv_seconds_per_token=0.0, step_mode=False, seed=1)
    engine = pipeline_of([LINE, small], clock, Instance(1, "m0", kind_of(LINE), "mixed", 0.0), bench, replicas=[1, 2])
    for number in range(3):
        engine.start(Request(number, "m0", CLASSES[1], 0.0, 40, 5))
    clock.run_until(0.04)
    # One on each replica of the small stage; the third waits, though the first stage has room.
    assert engine.sample().running == 2
    assert engine.sample().waiting == 1
    assert [stage.kv_used_tokens for stage in engine.stage_sample().stages] == [80, 40]


def test_a_replica_that_goes_keeps_its_sequences_and_one_that_comes_gets_the_new_ones() -> None:
    clock = VirtualClock()
    source = Source(clock, 1.0)
    bench = Bench(LINE, kv_seconds_per_token=0.0, step_mode=False, seed=1)
    bench.chattiness = 0.0
    engine = pipeline_of([LINE], clock, Instance(1, "m0", kind_of(LINE), "mixed", 0.0), bench, source=source)
    bench.engine = engine
    for number in range(4):
        bench.start(Request(number, "m0", CLASSES[1], 0.0, 4, 200))
    engine.scale([2])
    clock.run_until(1.5)
    assert engine.stage_sample().stages[0].start_s == 1.0
    for number in range(4, 7):
        bench.start(Request(number, "m0", CLASSES[1], 1.5, 4, 400))
    clock.run_until(2.0)
    assert [replica.sequences for replica in engine._stages[0].replicas] == [4, 3]
    engine.scale([1])
    stage = engine.stage_sample().stages[0]
    assert (stage.ready, stage.draining) == (1, 1)
    assert set(source.held) == {1001}
    bench.start(Request(7, "m0", CLASSES[1], 2.0, 4, 200))
    clock.run_until(2.1)
    assert [(replica.sequences, replica.draining) for replica in engine._stages[0].replicas] == [(5, False), (3, True)]
    while len(bench.ended) < 8:
        clock.step()
    assert (engine.stage_sample().stages[0].ready, engine.stage_sample().stages[0].draining) == (1, 0)
    assert source.held == {}


def test_a_replica_that_dies_takes_its_kv_with_it_and_another_one_comes() -> None:
    """Of three sequences one decodes on it, one is being restored there, one lies elsewhere."""
    clock = VirtualClock()
    source = Source(clock, 5.0)
    bench = Bench(LINE, kv_seconds_per_token=0.0, step_mode=False, seed=1)
    bench.chattiness = 0.0
    instance = Instance(1, "m0", kind_of(LINE), "mixed", 0.0)
    engine = pipeline_of(
        [LINE, LINE], clock, instance, bench, replicas=[1, 2], source=source, kv_seconds_per_token=0.01
    )
    bench.engine = engine
    for number in range(3):
        request = Request(number, "m0", CLASSES[1], 0.0, 20, 400)
        if number == 2:
            request.tokens_done, request.kv_saved_tokens, request.kv_saved_on = 30, 50, 1
        bench.start(request)
    clock.run_until(0.3)
    first, second = engine._stages[1].replicas
    assert [each.sequences for each in (first, second)] == [2, 1]
    prefilled = engine.prefill_tokens
    engine.replica_failed(first.number)
    engine.replica_failed(first.number)
    sample = engine.stage_sample().stages[1]
    assert (sample.ready, sample.draining, sample.starting) == (1, 1, 1)
    clock.run_until(1.0)  # The saved KV is in after half a second, and lost.
    assert [replica.number for replica in engine._stages[1].replicas] == [second.number]
    assert [second.sequences, engine._stages[0].replicas[0].sequences] == [3, 3]
    assert engine.prefill_tokens > prefilled + 20 + 50
    clock.run_until(6.0)
    assert [replica.number for replica in engine._stages[1].replicas] == [second.number, 1001]
    while len(bench.ended) < 3:
        clock.step()
    assert set(bench.ended.values()) == {"finished"}


def test_a_start_that_is_no_longer_wanted_is_given_up() -> None:
    clock = VirtualClock()
    source = Source(clock, 5.0)
    bench = Bench(LINE, kv_seconds_per_token=0.0, step_mode=False, seed=1)
    engine = pipeline_of([LINE], clock, Instance(1, "m0", kind_of(LINE), "mixed", 0.0), bench, source=source)
    engine.scale([3])
    assert engine.stage_sample().stages[0].starting == 2
    engine.scale([2])
    clock.run_until(10.0)
    assert (engine.stage_sample().stages[0].ready, len(source.held)) == (2, 1)


def message_by_message(stage_s: Sequence[float], replicas: Sequence[int], micro_batches: int, hop_s: float) -> float:
    """Seconds a round of a line in which each micro-batch queues for its replica of each stage, first come, first
    served, and begins anew when it is through: the mean over many rounds, once the line is full."""
    free_s = [[0.0] * n for n in replicas]
    # (when it is there, which micro-batch, the stage before which it is, rounds done)
    queue = [(0.0, number, 0, 0) for number in range(micro_batches)]
    began_s, rounds = 0.0, 240
    while True:
        at_s, number, stage, done = min(queue)
        queue.remove((at_s, number, stage, done))
        if stage == len(stage_s):
            stage, done = 0, done + 1
            if number == 0 and done == rounds // 2:
                began_s = at_s
            if number == 0 and done == rounds:
                return (at_s - began_s) / (rounds - rounds // 2)
        own = number % replicas[stage]
        start_s = max(at_s, free_s[stage][own])
        free_s[stage][own] = start_s + stage_s[stage]
        queue.append((free_s[stage][own] + hop_s, number, stage + 1, done))


@pytest.mark.parametrize("seed", range(12))
def test_a_round_takes_what_a_line_run_message_by_message_takes(seed: int) -> None:
    draw = Random(f"line:{seed}")
    stage_ms = [draw.choice((8, 16, 24, 40)) for _ in range(draw.randint(2, 4))]
    replicas = [draw.choice((1, 1, 2, 3)) for _ in stage_ms]
    hop_s = draw.choice((0.0, 0.002, 0.02))
    engine, round_s = run_line(stage_ms, 24, replicas=replicas, hop_s=hop_s)
    micro_batches = engine._rounds.choose_micro_batches(24, [0.0] * len(replicas), replicas)
    expected_s = message_by_message([ms / 1000 for ms in stage_ms], replicas, micro_batches, hop_s)
    assert round_s == pytest.approx(expected_s, rel=0.01)
