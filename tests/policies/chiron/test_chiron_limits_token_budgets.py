"""The token budget of a step beside long prompts: smaller where short answers miss their ITL SLO, and no smaller than
long prompts can bear."""

from __future__ import annotations

from dataclasses import replace
from math import inf

import pytest

from chiron.policies.chiron.local_loop import LocalState, decide_batch_size
from chiron.policies.chiron.settings import ChironSettings
from chiron.policies.chiron.token_budget import (
    Decoding,
    first_token_s,
    full_step_s,
    gain,
    late,
    long_prompt,
    short_answer_s,
    token_budget,
)
from chiron.policies.views import ClassMix, StepTimes
from policy_factory import CHAT, JOBS, local, mix

TIMES = StepTimes(
    fixed_s=0.01,
    per_sequence_s=0.0,
    per_context_token_s=0.0,
    per_prefill_token_s=5e-5,
    per_prefill_square_s=1e-9,
)
BESIDE = Decoding(sequences=0.0, step_s=0.005)
"""A full step of 2,048 tokens in a prompt of 20,000 takes 158 ms beside it."""


def chat(*, ttft_s: float = 5.0, tail: tuple[tuple[float, float], ...] = ((20_000.0, 0.01),)) -> ClassMix:
    return mix(replace(CHAT, ttft_s=ttft_s), input_tail=tail)


def budget(*mixes: ClassMix, slo_s: float = 0.1, present: int = 2048, missed: float = 0.01) -> tuple[int, str]:
    found = token_budget(
        TIMES,
        mixes or (chat(),),
        most=2048,
        present=present,
        decoding=BESIDE,
        target_s=0.9 * slo_s,
        slo_s=slo_s,
        missed=missed,
        missed_max=0.003,
    )
    return found.max_num_batched_tokens, found.reason


def test_a_full_step_is_what_every_step_takes_with_decoding_and_a_budget_of_prefill() -> None:
    assert full_step_s(TIMES, 2048, BESIDE, 20_000) == pytest.approx(0.015 + 2048 * (5e-5 + 2e-5))
    assert first_token_s(TIMES, 1024, BESIDE, 20_000) == pytest.approx(1.0 + 0.4 + 20 * 0.015)
    many = Decoding(sequences=24.0, step_s=0.005)
    assert full_step_s(TIMES, 1024, many, 20_000) == pytest.approx(0.015 + 1000 * (5e-5 + 2e-5))
    assert first_token_s(TIMES, 1024, many, 20_000) == pytest.approx(1.0 + 0.4 + 20 * 0.015)
    assert first_token_s(TIMES, 1024, Decoding(sequences=1024.0, step_s=0.005), 20_000) == inf


def test_the_long_prompt_is_one_that_few_exceed() -> None:
    assert long_prompt(chat(tail=((90_000.0, 0.004), (20_000.0, 0.01)))) == 20_000
    assert long_prompt(chat(tail=())) == 0.0


@pytest.mark.parametrize(
    ("slo_s", "tokens"),
    [(0.2, 2048), (0.16, 2048), (0.1, 1024), (0.07, 512), (0.04, 512), (0.02, 512), (inf, 2048)],
)
def test_the_largest_budget_whose_full_step_is_within_the_aim(slo_s: float, tokens: int) -> None:
    assert budget(chat(ttft_s=20.0), slo_s=slo_s)[0] == tokens


def test_nothing_changes_while_requests_meet_their_slo_and_nothing_goes_back_because_they_do() -> None:
    assert budget(missed=0.003)[0] == 2048
    assert budget(present=1024, missed=0.0)[0] == 1024


def test_it_is_raised_only_with_room_to_spare() -> None:
    # A full step of 1,024 tokens takes 86.7 ms: within an aim of 90, not of 0.85 times that.
    assert budget(slo_s=0.1, present=512)[0] == 512
    assert budget(slo_s=0.114, present=512) == (1024, "step_within_itl_slo")


def test_long_prompts_keep_their_ttft() -> None:
    # Prefill alone: 1.55 s in steps of 2,048 tokens, 1.7 s of 1,024, 2.0 s of 512; seven tenths of TTFT may be used.
    assert budget(chat(ttft_s=2.3), slo_s=0.07) == (2048, "long_prompts_in_time")
    assert budget(chat(ttft_s=2.5), slo_s=0.07) == (1024, "step_above_itl_slo")
    assert budget(chat(ttft_s=2.9), slo_s=0.07) == (512, "step_above_itl_slo")


def test_an_answer_beside_a_long_prompt_has_its_full_steps_while_the_prompt_or_the_answer_lasts() -> None:
    assert short_answer_s(TIMES, 2048, BESIDE, 20_000, 6) == pytest.approx(0.15836)
    assert short_answer_s(TIMES, 2048, BESIDE, 20_000, 21) == pytest.approx((10 * 0.15836 + 10 * 0.015) / 20)
    assert short_answer_s(TIMES, 1024, BESIDE, 20_000, 1) == pytest.approx(0.08668), "one that has no second token"


@pytest.mark.parametrize(("answer", "gained"), [(6, 1 - 0.08668 / 0.15836), (60, 0.0)])
def test_smaller_steps_gain_nothing_for_answers_that_outlast_the_prefill(answer: int, gained: float) -> None:
    mixes = [replace(chat(), output_low=answer), mix(JOBS, input_tail=((20_000.0, 0.01),))]
    assert gain(TIMES, mixes, most=2048, tokens=1024, decoding=BESIDE) == pytest.approx(gained, abs=1e-3)


def test_nothing_changes_while_lengths_are_not_known() -> None:
    assert budget(chat(ttft_s=2.3, tail=()), slo_s=0.07) == (2048, "lengths_not_known")
    assert budget(chat(ttft_s=2.3, tail=()), slo_s=0.07, present=512) == (512, "lengths_not_known")


def test_prompts_that_are_late_in_any_case_and_a_few_others_do_not_count() -> None:
    hopeless = ((90_000.0, 0.002), (20_000.0, 0.01))
    assert late(TIMES, 2048, BESIDE, chat(ttft_s=5.0, tail=hopeless)) == 0.002
    assert budget(chat(ttft_s=5.0, tail=hopeless), slo_s=0.07)[0] == 512
    few = ((30_000.0, 0.002), (20_000.0, 0.01))
    assert late(TIMES, 2048, BESIDE, chat(ttft_s=3.8, tail=few)) == 0.0
    assert late(TIMES, 512, BESIDE, chat(ttft_s=3.8, tail=few)) == 0.002
    assert budget(chat(ttft_s=3.8, tail=few), slo_s=0.07)[0] == 512


SETTINGS = ChironSettings()
VIEW = local(
    max_num_batched_tokens=2048,
    token_budget_max=2048,
    itl_slo_s=0.1,
    itl_missed=0.01,
    step_times=TIMES,
    mixes={"chat": chat(ttft_s=10.0)},
)


def test_the_local_loop_lowers_at_once_and_raises_after_a_while() -> None:
    decision, state = decide_batch_size(SETTINGS, None, VIEW)
    assert decision is not None
    assert decision.token_budget is not None
    lowered = decision.token_budget.max_num_batched_tokens
    assert lowered < 2048
    assert decision.token_budget.reason == "step_above_itl_slo"
    # Long prompts are gone; that has to last.
    short = VIEW._replace(max_num_batched_tokens=lowered, mixes={"chat": chat(tail=((500.0, 0.01),))}, itl_missed=0.0)
    short = short._replace(itl_slo_s=0.2)
    after = {}
    for seconds in (1.0, SETTINGS.hold_s - 1.0, SETTINGS.hold_s + 1.0):
        decision, state = decide_batch_size(SETTINGS, state, short._replace(now_s=VIEW.now_s + seconds))
        after[seconds] = None if decision is None or decision.token_budget is None else decision.token_budget
    raised = [None if each is None else each.max_num_batched_tokens for each in after.values()]
    assert raised == [None, None, 2048]


def test_off_means_as_it_was_and_without_an_itl_slo_an_engine_has_all_of_it() -> None:
    decision, _ = decide_batch_size(replace(SETTINGS, limit_chunk=False), None, VIEW)
    assert decision is None or decision.token_budget is None
    alone = VIEW._replace(itl_slo_s=inf, max_num_batched_tokens=512, at_cap=False)
    decision, _ = decide_batch_size(SETTINGS, LocalState(), alone)
    assert decision is not None
    assert decision.token_budget is not None
    assert decision.token_budget.max_num_batched_tokens == 2048
