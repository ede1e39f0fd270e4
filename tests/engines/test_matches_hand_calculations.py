"""The engine against times worked out by hand: steps of 1/64 s, so that every sum is exact."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest

from chiron.core.clock import VirtualClock
from chiron.core.types import Instance, Request
from chiron.engines.model import EngineModel, StepTable
from chiron.engines.profile import Profile
from scenario_factory import CLASSES, PROFILE, TICK_S, kind_of


class Ear:
    """Notes what an engine reports, in steps of 1/64 s."""

    def __init__(self, clock: VirtualClock) -> None:
        self.clock = clock
        self.heard: list[tuple[float, str, int]] = []
        self.answers: dict[str, Callable[[], None]] = {}

    def note(self, name: str, request: Request) -> None:
        self.heard.append((self.clock.now_s / TICK_S, name, request.id))
        if name in self.answers:
            self.answers[name]()

    def first_token(self, request: Request) -> None:
        self.note("first", request)

    def finished(self, request: Request) -> None:
        self.note("done", request)

    def evicted(self, request: Request) -> None:
        self.note("evicted", request)

    def refused(self, request: Request, reason: str) -> None:
        self.note("failed", request)


def bench(profile: Profile = PROFILE, *, transfer_s: float = 0.0) -> tuple[VirtualClock, EngineModel, Ear]:
    clock = VirtualClock()
    ear = Ear(clock)
    engine = EngineModel(
        clock=clock,
        instance=Instance(1, "m0", kind_of(profile), "mixed", 0.0),
        profile=profile,
        times=StepTable(profile),
        listener=ear,
        kv_seconds_per_token=transfer_s,
    )
    return clock, engine, ear


def request(id: int, tokens_in: int, tokens_out: int) -> Request:
    return Request(id, "m0", CLASSES[2], 0.0, tokens_in, tokens_out)


def test_one_request_takes_its_prefill_chunks_and_one_step_a_token() -> None:
    clock, engine, ear = bench()
    engine.start(request(1, 70, 5))  # Chunks of 32, 32 and 6 tokens; then four more tokens.
    clock.run_until(10.0)
    assert ear.heard == [(3, "first", 1), (7, "done", 1)]
    assert (engine.steps, engine.prefill_tokens, engine.decode_tokens) == (7, 70, 4)
    assert engine.busy_s == 7 * TICK_S


def test_a_step_grows_with_context_as_the_profile_says() -> None:
    growing = replace(PROFILE, c_ms_per_context_token=1000 / 1024)
    clock, engine, _ = bench(growing)
    engine.start(request(1, 16, 4))
    clock.run_until(10.0)
    # Prefill: 1/64 s, no context yet. Decodes: contexts of 16, 17 and 18 tokens at 1/1024 s each.
    assert engine.busy_s == 4 / 64 + (16 + 17 + 18) / 1024


def test_a_step_takes_as_long_as_one_of_the_next_captured_size() -> None:
    """One tick, and one more a token: a prompt of 3 and each decode are padded to 4, one of 8 is above all sizes."""
    padded = replace(PROFILE, f_ms_per_token=1000 / 64, captured_sizes=(4, 6))
    clock, engine, ear = bench(padded)
    engine.start(request(1, 3, 2))
    clock.run_until(1.0)
    engine.start(request(2, 8, 1))
    clock.run_until(10.0)
    assert ear.heard == [(5, "first", 1), (10, "done", 1), (64 + 9, "first", 2), (64 + 9, "done", 2)]


def test_each_prompt_adds_its_admission_to_the_step_in_which_it_begins() -> None:
    clock, engine, ear = bench(replace(PROFILE, admission_ms=2000 / 64))
    for number in (1, 2, 3):
        engine.start(request(number, 20, 1))
    clock.run_until(10.0)
    # 1 begins alone: 1 + 2 ticks. 2 and 12 tokens of 3 begin together: 1 + 4. What is left of 3 has begun: 1.
    assert ear.heard[::2] == [(3, "first", 1), (8, "first", 2), (9, "first", 3)]


def test_an_arrival_waits_for_the_step_under_way_and_no_longer() -> None:
    clock, engine, ear = bench()
    engine.start(request(1, 8, 100))
    clock.run_until(10.5 * TICK_S)
    engine.start(request(2, 8, 1))
    clock.run_until(20 * TICK_S)
    assert ear.heard == [(1, "first", 1), (12, "first", 2), (12, "done", 2)]


def test_prompts_share_a_step_up_to_the_token_budget_first_come_first_served() -> None:
    clock, engine, ear = bench()
    for number in (1, 2, 3):
        engine.start(request(number, 20, 1))
    clock.run_until(10.0)
    # 1 goes alone: a step was planned the moment it came. Then 20 + 12 tokens, then the 8 that are left of 3.
    assert [entry for entry in ear.heard if entry[1] == "done"] == [(1, "done", 1), (2, "done", 2), (3, "done", 3)]


def test_the_max_batch_size_holds_the_next_one_back_until_a_place_is_free() -> None:
    clock, engine, ear = bench()
    engine.set_max_batch_size(1)
    engine.start(request(1, 4, 3))
    engine.start(request(2, 4, 3))
    clock.run_until(10.0)
    assert ear.heard == [(1, "first", 1), (3, "done", 1), (4, "first", 2), (6, "done", 2)]


def test_raising_the_max_batch_size_lets_the_next_one_in_at_the_next_step() -> None:
    clock, engine, ear = bench()
    engine.set_max_batch_size(1)
    engine.start(request(1, 4, 50))
    engine.start(request(2, 4, 2))
    clock.run_until(9.5 * TICK_S)
    engine.set_max_batch_size(2)
    clock.run_until(12 * TICK_S)
    assert ear.heard == [(1, "first", 1), (11, "first", 2), (12, "done", 2)]


def test_a_max_batch_size_above_what_the_engine_can_run_is_cut_to_it() -> None:
    clock, engine, _ = bench(replace(PROFILE, max_num_seqs=2, max_num_batched_tokens=2))
    engine.set_max_batch_size(1000)
    for number in range(4):
        engine.start(request(number, 1, 30))
    clock.run_until(20 * TICK_S)
    assert engine.max_batch_size == 2
    assert engine.sample().running == 2


def test_when_kv_runs_out_the_last_one_in_is_recomputed_and_no_token_is_made_twice() -> None:
    clock, engine, ear = bench(replace(PROFILE, kv_capacity_tokens=20))
    engine.start(request(1, 5, 12))
    engine.start(request(2, 5, 8))
    clock.run_until(10.0)
    # 1 is prefilled in step 1, 2 in step 2 while 1 decodes: 11 tokens. Each later step adds 2: 13, 15, 17, 19 after
    # step 6. 21 would not fit: 2 leaves with 5 tokens made. 1 has made 6; its other 6 end in step 12. Then 2 comes
    # back, with 5 + 5 tokens to prefill for its 6th, and 2 more steps.
    assert ear.heard == [(1, "first", 1), (2, "first", 2), (12, "done", 1), (13, "first", 2), (15, "done", 2)]
    assert engine.preemptions == 1
    assert engine.prefill_tokens == 5 + 5 + 10
    assert engine.decode_tokens + 3 == 12 + 8
    assert engine.kv_used_tokens == 0


def test_an_evicted_request_resumes_from_its_saved_kv_after_the_transfer() -> None:
    clock, engine, ear = bench(transfer_s=TICK_S)
    job = request(1, 4, 10)
    engine.start(job)
    clock.run_until(3.5 * TICK_S)
    engine.evict(job)
    clock.run_until(4 * TICK_S)
    assert ear.heard[-1] == (4, "evicted", 1)
    assert (job.tokens_done, job.kv_saved_tokens, job.kv_saved_on) == (4, 7, 1)
    assert engine.kv_used_tokens == 7, "the copy out holds its space"
    clock.run_until(20 * TICK_S)
    assert engine.kv_used_tokens == 0
    engine.start(job)
    clock.run_until(10.0)
    # 7 tokens at a step each to copy in, then the 6 tokens that were missing; no second prefill.
    assert ear.heard[-1] == (20 + 7 + 6, "done", 1)
    assert engine.prefill_tokens == 4


def test_without_a_way_to_save_kv_an_evicted_request_is_prefilled_again() -> None:
    clock, engine, ear = bench()
    job = request(1, 4, 10)
    engine.start(job)
    clock.run_until(3.5 * TICK_S)
    engine.evict(job)
    clock.run_until(20 * TICK_S)
    assert (job.tokens_done, job.kv_saved_tokens) == (4, 0)
    engine.start(job)
    clock.run_until(10.0)
    assert ear.heard[-1] == (20 + 1 + 5, "done", 1)
    assert engine.prefill_tokens == 4 + 8


def test_saved_kv_survives_an_eviction_before_the_resume_has_begun() -> None:
    clock, engine, _ = bench(replace(PROFILE, request_overhead_ms=1000.0), transfer_s=TICK_S)
    job = request(1, 4, 10)
    engine.start(job)
    clock.run_until(1.0 + 3.5 * TICK_S)
    engine.evict(job)
    clock.run_until(2.0)
    saved = job.kv_saved_tokens
    assert saved > 0
    engine.start(job)
    clock.run_until(2.5)
    engine.evict(job)
    clock.run_until(2.6)
    assert (job.kv_saved_tokens, job.kv_saved_on) == (saved, 1)


def test_an_eviction_asked_for_in_answer_to_another_happens_at_the_same_step() -> None:
    clock, engine, ear = bench()
    first, second = request(1, 4, 150), request(2, 4, 150)
    ear.answers["evicted"] = lambda: engine.evict(second)
    engine.start(first)
    engine.start(second)
    clock.run_until(9.5 * TICK_S)
    engine.evict(first)
    clock.run_until(100 * TICK_S)
    assert ear.heard[-2:] == [(10, "evicted", 1), (10, "evicted", 2)]
    assert engine.batch == 0


def test_an_eviction_at_the_moment_work_starts_happens_at_the_next_step() -> None:
    clock, engine, ear = bench(replace(PROFILE, request_overhead_ms=10_000 / 64), transfer_s=TICK_S)
    resumed, other = request(1, 4, 60), request(2, 4, 60)
    engine.start(resumed)
    clock.run_until(13.5 * TICK_S)
    engine.evict(resumed)
    clock.run_until(100 * TICK_S)
    assert resumed.kv_saved_tokens == 7
    # From here: 10 steps of overhead, 7 to copy its KV in; at that very moment the other, in its overhead, is evicted.
    clock.call_at(117 * TICK_S, lambda: engine.evict(other))
    engine.start(resumed)
    clock.run_until(110 * TICK_S)
    engine.start(other)
    clock.run_until(10.0)
    assert ear.heard[-2:] == [(118, "evicted", 2), (117 + 56, "done", 1)]


def test_a_request_longer_than_the_kv_cache_is_refused_alone() -> None:
    clock, engine, ear = bench(replace(PROFILE, kv_capacity_tokens=20))
    engine.start(request(1, 15, 6))
    engine.start(request(2, 15, 5))
    clock.run_until(1.0)
    assert ear.heard == [(0, "failed", 1), (1, "first", 2), (5, "done", 2)]


def test_a_dead_engine_says_nothing_more() -> None:
    clock, engine, ear = bench(transfer_s=TICK_S)
    jobs = [request(number, 4, 20) for number in range(3)]
    for job in jobs:
        engine.start(job)
    clock.run_until(4 * TICK_S)
    engine.evict(jobs[0])
    clock.run_until(6 * TICK_S)
    heard = list(ear.heard)
    engine.fail()
    clock.run_until(10.0)
    assert ear.heard == heard
    assert engine.kv_used_tokens == 0


def test_a_step_that_takes_no_time_or_more_than_an_hour_is_refused_by_name() -> None:
    for milliseconds in (1e-5, 4e6):
        with pytest.raises(ValueError, match=r"profile 'small': a step must take between"):
            StepTable(replace(PROFILE, h_ms=milliseconds))


def test_another_token_budget_holds_from_the_next_step_with_prefill_on() -> None:
    clock, engine, ear = bench()
    engine.start(request(1, 70, 1))  # A step of 32 tokens is under way.
    engine.set_max_num_batched_tokens(8)
    clock.run_until(10.0)
    assert ear.heard[0] == (6, "first", 1), "38 more tokens in chunks of 8"
    engine.set_max_num_batched_tokens(1000)
    engine.start(request(2, 70, 1))
    clock.run_until(20.0)
    assert engine.steps == 6 + 3, "the profile's budget of 32 bounds it"


def test_an_engine_starts_with_the_token_budget_of_its_instance() -> None:
    clock, ear = VirtualClock(), Ear(VirtualClock())
    instance = Instance(1, "m0", kind_of(PROFILE), "mixed", 0.0)
    instance.max_num_batched_tokens = 16
    engine = EngineModel(clock=clock, instance=instance, profile=PROFILE, times=StepTable(PROFILE), listener=ear)
    engine.start(request(1, 64, 1))
    clock.run_until(10.0)
    assert engine.steps == 4


def test_a_raised_token_budget_lets_a_prompt_go_on_beside_decoding_that_took_all_of_the_one_before() -> None:
    clock, engine, ear = bench()
    for number in range(4):
        engine.start(request(number, 4, 40))
    clock.run_until(5.5 * TICK_S)
    engine.set_max_num_batched_tokens(4)
    engine.start(request(9, 20, 1))
    clock.run_until(20.5 * TICK_S)
    assert (20, "first", 9) not in ear.heard
    engine.set_max_num_batched_tokens(32)
    clock.run_until(25 * TICK_S)
    assert (22, "first", 9) in ear.heard
