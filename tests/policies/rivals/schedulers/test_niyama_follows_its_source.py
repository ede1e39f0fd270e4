"""Niyama's scheduler: deadlines mixed with length, relegation, and chunks as long as the slack of what decodes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest

from chiron.core.types import Request, RequestClass
from chiron.policies.rivals.schedulers.niyama import Niyama, NiyamaSettings, first_due_s, step_tokens
from chiron.policies.views import StepView
from policy_factory import CHAT, JOBS

DEFAULT = NiyamaSettings()
FREE = 1_000_000


def view(
    *,
    now_s: float = 0.0,
    step: int = 0,
    decoding: int = 0,
    tokens_max: int = 8192,
    free: int = FREE,
    step_s: Callable[[int, int], float] = lambda tokens, done: 0.01 + 1e-4 * tokens,
) -> StepView:
    return StepView(
        now_s=now_s, step=step, decoding=decoding, tokens_max=tokens_max, kv_free_tokens=free, step_s=step_s
    )


def request(id: int, tokens: int, *, cls: RequestClass = CHAT, arrival_s: float = 0.0) -> Request:
    return Request(id, "m", cls, arrival_s, tokens)


@pytest.mark.parametrize(
    ("slack_s", "changes", "expected"),
    [
        pytest.param(float("inf"), {}, 2552, id="nobody decodes"),
        # 1.2 (0.01 + 1e-4 (size - 56)) <= 0.1 up to 789 tokens.
        pytest.param(0.1, {"decoding": 56}, 768, id="the largest that ends in time"),
        pytest.param(0.13206, {"decoding": 24}, 1024, id="to the end of the slack"),
        pytest.param(0.13194, {"decoding": 24}, 768, id="and no further"),
        pytest.param(-1.0, {}, 128, id="too late already"),
        pytest.param(float("inf"), {"free": 31_999}, 512, id="KV runs out: 999 for each of 32 steps"),
        pytest.param(float("inf"), {"free": 32_000}, 2552, id="and 1,000"),
    ],
)
def test_the_step_is_the_largest_of_its_list_that_ends_in_time(
    slack_s: float, changes: dict[str, int], expected: int
) -> None:
    assert step_tokens(DEFAULT, view(**changes), 0, slack_s) == expected  # type: ignore[arg-type]


def test_what_decodes_comes_off_the_step() -> None:
    assert Niyama(DEFAULT).tokens(view(decoding=100)) == 2452
    full = Niyama(DEFAULT)
    full.began(request(9, 10), 1, 0, -100.0)
    assert full.tokens(view(decoding=200)) == 0, "late, and 128 are decoded anyway"
    assert Niyama(replace(DEFAULT, chunks=False)).tokens(view(tokens_max=77)) == 77


def test_a_batch_answer_must_begin_in_time_for_its_guessed_length() -> None:
    assert first_due_s(DEFAULT, request(1, 10, arrival_s=2.0)) == 7.0
    assert first_due_s(DEFAULT, request(1, 10, cls=JOBS, arrival_s=2.0)) == 3602.0 - 15 * 0.4


def heads(composer: Niyama, now_s: float = 0.0) -> list[int]:
    found = []
    while (head := composer.head(now_s, False)) is not None:
        found.append(head.id)
        composer.remove_head(head)
    return found


def test_a_token_of_prompt_counts_as_8_ms_of_deadline() -> None:
    def added(weight_s: float) -> Niyama:
        composer = Niyama(replace(DEFAULT, weight_s=weight_s))
        composer.add(request(1, 2000), 2000, False)  # Due at 5 + 16 s.
        composer.add(request(2, 1000, arrival_s=7.9), 1000, False)  # 12.9 + 8
        composer.add(request(3, 1000, arrival_s=8.1), 1000, False)  # 13.1 + 8
        return composer

    assert heads(added(0.008)) == [2, 1, 3]
    assert heads(added(0.0)) == [1, 2, 3]


def test_what_is_left_counts_of_a_prompt_that_has_begun() -> None:
    composer = Niyama(DEFAULT)
    long = request(1, 2000)
    composer.add(long, 2000, False)
    composer.remove_head(long)
    composer.add(request(2, 1000, arrival_s=7.9), 1000, False)
    composer.add(long, 1900, True)  # 5 + 15.2 s.
    assert heads(composer) == [1, 2]


def test_a_prompt_that_would_be_late_waits_behind_all_that_are_not() -> None:
    composer = Niyama(DEFAULT)
    composer.add(request(1, 850), 850, False)  # A tenth of a second at 8,500 tokens a second; due at 5 s.
    composer.add(request(2, 10, cls=JOBS), 10, False)
    composer.add(request(3, 850, arrival_s=4.0), 850, False)
    assert composer.head(4.9, False).id == 1  # type: ignore[union-attr]
    assert heads(composer, 4.91) == [3, 2, 1]
    kept = Niyama(replace(DEFAULT, relegates=False))
    kept.add(request(1, 850), 850, False)
    kept.add(request(2, 10, cls=JOBS), 10, False)
    assert heads(kept, 4.91) == [1, 2]


def test_one_that_has_begun_is_never_relegated() -> None:
    composer = Niyama(DEFAULT)
    first = request(1, 850)
    composer.add(first, 850, False)
    composer.remove_head(first)
    composer.add(first, 600, True)
    composer.add(request(2, 10, cls=JOBS), 10, False)
    assert heads(composer, 100.0) == [1, 2]


def test_the_speed_of_prefill_is_a_slow_mean() -> None:
    composer = Niyama(DEFAULT)
    for _ in range(1000):
        composer.planned(100, 0.1)  # 1,000 a second: after a thousand steps 0.67 % of the first guess is left.
    composer.add(request(1, 1000), 1000, False)
    composer.add(request(2, 10, cls=JOBS), 10, False)
    assert heads(composer, 4.04) == [1, 2]
    composer.add(request(1, 1000), 1000, False)
    composer.add(request(2, 10, cls=JOBS), 10, False)
    assert heads(composer, 4.06) == [2, 1]


@pytest.mark.parametrize(
    ("early_credit", "expected_s"),
    [
        # First token at 1 s and step 10. After five more steps its seventh is next, due 6 intervals of 0.2 s later.
        pytest.param(False, 1.0 + 6 * 0.2 - 1.5, id="from the first token"),
        pytest.param(True, 5.0 + 7 * 0.2 - 1.5, id="as published: from the deadline of the first"),
    ],
)
def test_the_slack_is_that_of_the_next_token(early_credit: bool, expected_s: float) -> None:
    composer = Niyama(replace(DEFAULT, early_credit=early_credit))
    composer.began(request(1, 10), 1, 10, 1.0)
    now = view(now_s=1.5, step=15)
    assert composer._slack_s(now) == pytest.approx(expected_s)
    tighter = RequestClass(name="tight", kind="interactive", ttft_s=0.5, itl_s=0.05)
    second = request(2, 10, cls=tighter)
    composer.began(second, 1, 15, 1.5)
    assert composer._slack_s(now) == pytest.approx(0.05 if not early_credit else 0.1)
    composer.left(second)
    assert composer._slack_s(now) == pytest.approx(expected_s)


def test_what_decodes_no_more_is_not_kept() -> None:
    def kept(composer: Niyama) -> int:
        return sum(map(len, composer._due.values()))

    composer, unchunked = Niyama(DEFAULT), Niyama(replace(DEFAULT, chunks=False))
    lasting = request(0, 10)
    composer.began(lasting, 1, 0, 0.0)
    for id in range(1, 300):  # A step of 20 ms each, at a pace of 200 ms: each entry is less than those before.
        one = request(id, 10)
        for each in (composer, unchunked):
            each.began(one, 1, id, 0.02 * id)
            composer._slack_s(view(now_s=0.02 * id, step=id))
            each.left(one)
    assert kept(composer) <= 67
    assert kept(unchunked) == 0
    assert composer._slack_s(view(now_s=1.0, step=3)) == pytest.approx(0.2 * 4 - 1.0), "what still decodes is kept"


def test_batch_work_slows_no_step_while_its_answer_need_not_have_begun() -> None:
    composer = Niyama(DEFAULT)
    composer.began(request(1, 10, cls=JOBS), 1, 0, 1.0)
    assert composer._slack_s(view(now_s=1.0)) == pytest.approx(3594.0 + 0.4 * 2 - 1.0)
    lasting = Niyama(DEFAULT)
    lasting.began(request(1, 10, cls=RequestClass(name="any", kind="batch")), 1, 0, 1.0)
    assert lasting._slack_s(view()) == float("inf")
