"""The longest prompts of a class, by length: what a smaller chunk would make late."""

from __future__ import annotations

import pytest

from chiron.control.learning import Learner
from chiron.core.types import Request, RequestClass

CHAT = RequestClass(name="chat", kind="interactive", ttft_s=5.0, itl_s=0.2)


def learner(*prompts: int) -> Learner:
    found = Learner((CHAT,))
    for number, tokens in enumerate(prompts):
        found.ran(Request(number, "m", CHAT, 0.0, tokens))
    return found


def test_the_longest_twentieth_is_told_within_an_eighth_longest_first() -> None:
    tail = learner(*([700] * 990 + [20_000] * 6 + [60_000] * 4)).mixes["chat"].view().input_tail
    assert [share for _, share in tail] == pytest.approx([0.004, 0.006, 0.99])
    for (tokens, _), true in zip(tail, (60_000, 20_000, 700), strict=True):
        assert abs(tokens - true) <= true / 8


def test_nothing_is_told_of_a_few_hundred() -> None:
    assert learner(*([700] * 300 + [20_000] * 10)).mixes["chat"].view().input_tail == ()


def test_where_all_are_alike_all_are_told() -> None:
    ((tokens, share),) = learner(*([20_000] * 1200)).mixes["chat"].view().input_tail
    assert (share, abs(tokens - 20_000) <= 2500) == (1.0, True)


def test_old_prompts_are_forgotten() -> None:
    before = learner(*([20_000] * 40 + [700] * 960))
    for number in range(8000):
        before.ran(Request(number, "m", CHAT, 0.0, 700))
    tail = before.mixes["chat"].view().input_tail
    assert sum(share for tokens, share in tail if tokens > 10_000) < 0.001
