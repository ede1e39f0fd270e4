"""Sarathi-Serve: steps of a fixed number of tokens, decoding first."""

from __future__ import annotations

import pytest

from chiron.control.learning import Learner
from chiron.core.types import Request
from chiron.policies.rivals.schedulers.sarathi import SarathiSettings, compose
from chiron.policies.views import StepView
from policy_factory import CHAT


@pytest.mark.parametrize(
    ("decoding", "engine_takes", "expected"),
    [(0, 2048, 512), (100, 1948, 412), (512, 1536, 0), (0, 256, 256)],
)
def test_prompts_get_what_decoding_leaves_of_512(decoding: int, engine_takes: int, expected: int) -> None:
    composer = compose(SarathiSettings(), Learner((CHAT,)))
    view = StepView(
        now_s=0.0,
        step=0,
        decoding=decoding,
        tokens_max=engine_takes,
        kv_free_tokens=1,
        step_s=lambda tokens, done: 0.0,
    )
    assert composer.tokens(view) == expected


def test_prompts_in_their_order_and_a_preempted_one_keeps_its_place() -> None:
    composer = compose(SarathiSettings(), Learner((CHAT,)))
    one, two, three = (Request(number, "m", CHAT, 0.0, 10) for number in (7, 5, 6))
    for each in (one, two, three):
        composer.add(each, 10, False)
    composer.remove_head(one)
    composer.left(one)
    composer.add(one, 12, False)
    assert composer.head(0.0, False) is one
    composer.forget(one)
    assert composer.head(0.0, False) is two
    assert composer.head(0.0, True) is None, "none has begun"
    composer.remove_head(two)
    composer.add(two, 3, True)
    assert composer.head(0.0, True) is two


def test_a_negative_number_of_instances_is_refused() -> None:
    with pytest.raises(ValueError, match="instances"):
        SarathiSettings(instances=-1)
