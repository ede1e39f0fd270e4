"""The engine alone, commanded at any moment, also from inside its own callbacks: exact, conserving, within limits."""

from __future__ import annotations

from dataclasses import replace

from hypothesis import given, settings
from hypothesis import strategies as st

from chiron.engines.profile import Profile
from effort import examples
from engine_bench import Bench, check_books, play
from scenario_factory import PROFILE, TICK_S, profiles

small_profiles = profiles().map(lambda p: replace(p, kv_capacity_tokens=min(p.kv_capacity_tokens, 350)))
seeds = st.integers(0, 1_000_000)
transfers = st.sampled_from((0.0, TICK_S / 4, 0.002))


@given(small_profiles, seeds, transfers)
@settings(max_examples=examples(120))
def test_fast_forward_equals_step_mode_under_any_commands(profile: Profile, seed: int, transfer_s: float) -> None:
    fast, _ = play(profile, seed=seed, kv_seconds_per_token=transfer_s)
    slow, _ = play(profile, seed=seed, kv_seconds_per_token=transfer_s, step_mode=True)
    assert fast.log == slow.log


@given(small_profiles, seeds, transfers)
@settings(max_examples=examples(60))
def test_books_balance_after_every_event(profile: Profile, seed: int, transfer_s: float) -> None:
    bench, requests = play(profile, seed=seed, kv_seconds_per_token=transfer_s, step_mode=True, after_each=check_books)
    engine = bench.engine
    assert sorted(bench.ended) == [r.id for r in requests], "every request ends"
    assert engine.kv_used_tokens == engine.batch == engine.context_sum == 0
    done = [r for r in requests if bench.ended[r.id] == "finished"]
    # Each token is made once: by the step that ends a prefill, or by a decode step.
    assert engine.decode_tokens + bench.prefills == sum(r.payload for r in done)
    recomputed = engine.prefill_tokens - sum(r.input_tokens for r in done)
    assert recomputed >= 0
    evicted = any(entry[1] == "evicted" for entry in bench.log)
    if engine.preemptions == 0 and not evicted:
        assert recomputed == 0
    too_long = {r.id for r in requests if r.input_tokens + r.payload > profile.kv_capacity_tokens}
    assert {i for i, outcome in bench.ended.items() if outcome == "failed"} == too_long


@given(small_profiles, seeds, transfers)
@settings(max_examples=examples(60))
def test_nothing_is_admitted_beyond_the_max_batch_size(profile: Profile, seed: int, transfer_s: float) -> None:
    admitted: set[int] = set()

    def check(bench: Bench) -> None:
        engine = bench.engine
        now = {i for i, s in engine._sequences.items() if s.phase != 0}
        if now - admitted:
            assert len(now) <= min(engine.max_batch_size, profile.max_num_seqs)
        admitted.clear()
        admitted.update(now)

    play(profile, seed=seed, kv_seconds_per_token=transfer_s, step_mode=True, after_each=check)


def test_the_script_reaches_what_it_is_meant_to_reach() -> None:
    tight = replace(PROFILE, kv_capacity_tokens=90, max_num_seqs=16)
    bench, _ = play(tight, seed=3, kv_seconds_per_token=TICK_S / 4)
    names = [entry[1] for entry in bench.log]
    assert bench.engine.preemptions > 0
    assert names.count("evicted") > 5
    assert any(entry[1] == "evicted" and entry[4] for entry in bench.log), "KV was saved"
    assert any(entry[1] == "evicted" and not entry[4] for entry in bench.log), "and lost"
