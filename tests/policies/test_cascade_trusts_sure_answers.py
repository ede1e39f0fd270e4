"""A cascade's rule: how sure an answer is, from the log-probabilities of its tokens."""

from __future__ import annotations

from math import exp, inf, log, nan
from typing import Any

import pytest

from chiron.gateway.relay.cascade import Judge
from chiron.policies.cascade import THRESHOLDS, CascadeRule, entropy, margin

HALF, QUARTER = log(0.5), log(0.25)


def test_worked_figures() -> None:
    assert margin([log(0.7), log(0.2)]) == pytest.approx(0.5)
    assert entropy([HALF, HALF]) == pytest.approx(log(2))
    assert entropy([QUARTER] * 4) == pytest.approx(log(4))
    assert entropy([HALF, QUARTER]) == pytest.approx(1.5 * log(2))  # The quarter that is left counts as one token.
    assert entropy([0.0, -50.0]) == pytest.approx(0.0, abs=1e-9)
    assert entropy([0.0, 0.0]) == pytest.approx(log(2))  # More than there can be: taken as shares.


@pytest.mark.parametrize(
    ("test", "chosen", "likeliest", "found"),
    [
        ("logprob", -0.3, (), -0.3),
        ("logprob", 4.0, (), 0.0),
        ("logprob", -inf, (), None),
        ("logprob", nan, (), None),
        ("margin", -0.3, (QUARTER, HALF), 0.25),
        ("margin", -0.3, (HALF,), None),
        ("margin", -0.3, (HALF, nan), None),
        ("entropy", -0.3, (HALF, HALF), -log(2)),
        ("entropy", -0.3, (), None),
    ],
)
def test_confidence_of_a_token(test: Any, chosen: float, likeliest: tuple[float, ...], found: float | None) -> None:
    said = CascadeRule(test=test).confidence(chosen, likeliest)
    assert said is None if found is None else said == pytest.approx(found)


def test_thresholds_have_defaults_and_bounds() -> None:
    assert {test: CascadeRule(test=test).least for test in THRESHOLDS} == dict(THRESHOLDS)  # type: ignore[arg-type]
    assert CascadeRule(threshold=-2.0).sure(-2.0)
    assert not CascadeRule(threshold=-2.0).sure(-2.1)
    assert [CascadeRule(after_tokens=after).judged_tokens(40) for after in (0, 16, 50)] == [40, 16, 40]
    for values in ({"threshold": nan}, {"test": "margin", "threshold": 1.5}, {"after_tokens": -1}, {"test": "guess"}):
        with pytest.raises(ValueError, match=r"must be"):
            CascadeRule(**values)  # type: ignore[arg-type]


def test_the_first_tokens_are_judged_however_they_come() -> None:
    sure, unsure = {"logprob": -0.1}, {"logprob": -3.0}
    for pieces in ([[sure, sure, unsure]], [[sure], [sure], [unsure]]):
        judge = Judge(CascadeRule(after_tokens=2))
        for piece in pieces:
            judge.take({"content": piece}, chat=True)
        assert (judge.tokens, judge.full, judge.sure) == (2, True, True)
    whole = Judge(CascadeRule(after_tokens=0))
    whole.take({"token_logprobs": [None, -0.1, -0.3]}, chat=False)
    assert (whole.tokens, whole.full, whole.sure) == (2, False, True)
    assert not Judge(CascadeRule()).sure  # Nothing is known.


@pytest.mark.parametrize("chat", [False, True])
@pytest.mark.parametrize(
    "said",
    [
        None,
        [],
        "x",
        {"content": 5, "token_logprobs": "x"},
        {"content": [5, None, {}, {"logprob": "x"}, {"logprob": True}], "token_logprobs": [{}, "x", True]},
        {"content": [{"logprob": inf}, {"logprob": nan}], "token_logprobs": [inf, -inf, nan]},
        {"content": [{"logprob": None, "top_logprobs": 5}], "token_logprobs": [None], "top_logprobs": [5]},
    ],
)
def test_what_an_engine_may_say_is_no_confidence(said: Any, chat: bool) -> None:
    for test in THRESHOLDS:
        judge = Judge(CascadeRule(test=test))  # type: ignore[arg-type]
        judge.take(said, chat)
        assert (judge.tokens, judge.sure) == (0, False)


def test_the_likeliest_of_both_kinds_of_answers_are_read() -> None:
    top = [{"logprob": HALF}, {"logprob": QUARTER}]
    for said, chat in (
        ({"content": [{"logprob": HALF, "top_logprobs": top}]}, True),
        ({"token_logprobs": [HALF], "top_logprobs": [{"a": HALF, "b": QUARTER}]}, False),
    ):
        judge = Judge(CascadeRule(test="margin", threshold=0.24, after_tokens=1))
        judge.take(said, chat)
        assert judge.sure
        assert judge.full
    assert exp(HALF) - exp(QUARTER) == pytest.approx(0.25)
