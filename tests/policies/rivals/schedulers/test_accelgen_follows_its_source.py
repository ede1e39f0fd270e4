"""AccelGen: steps sized by the tightest ITL SLO, filled by slack, and by what is nearest to the tokens and KV left."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest

from chiron.control.learning import Learner
from chiron.core.types import Request, RequestClass
from chiron.policies.rivals.schedulers.accelgen import AccelGen, AccelGenSettings, compose, distance, step_tokens
from chiron.policies.views import StepView
from policy_factory import CHAT, JOBS

DEFAULT = AccelGenSettings()
TOKEN_S = 1e-4


def view(now_s: float = 0.0, **changes: int) -> StepView:
    """Steps of 10 ms and a tenth of one for each token of prompt."""
    given = {
        "step": 0, "decoding": 0, "tokens_max": 2048, "kv_free_tokens": 10_000, "kv_capacity_tokens": 10_000,
        "places": 64, "places_free": 64,
    }  # fmt: skip
    return StepView(now_s=now_s, step_s=lambda tokens, done: 0.01 + TOKEN_S * tokens, **(given | changes))


def request(id: int, tokens: int, *, cls: RequestClass = CHAT, arrival_s: float = 0.0) -> Request:
    return Request(id, "m", cls, arrival_s, tokens)


def made(*requests: Request, settings: AccelGenSettings = DEFAULT) -> AccelGen:
    composer = compose(settings, Learner((CHAT, JOBS)))
    for each in requests:
        composer.add(each, each.input_tokens, False)
    return composer


def order(composer: AccelGen, now_s: float = 0.0, **changes: int) -> list[int]:
    left = composer.tokens(view(now_s, **changes))
    found = []
    while left > 0 and (head := composer.head(now_s, False)) is not None:
        found.append(head.id)
        left -= head.input_tokens
        composer.remove_head(head)
    return found


def test_the_worked_figure() -> None:
    assert step_tokens(DEFAULT, 0.1, 0.15) == pytest.approx(1152)


def test_a_step_is_as_long_as_the_tightest_slo_of_those_that_decode() -> None:
    composer = made()
    assert composer.tokens(view()) == 2048, "nobody decodes"
    composer.began(request(1, 10), 1, 0, 0.0)
    # 768 tokens of which 40 decode take 10 + 72.8 ms: 768 * 200 / 82.8 = 1,855 of them in 200 ms.
    assert composer.tokens(view(decoding=40)) == 1855 - 40
    tight = request(2, 10, cls=replace(CHAT, itl_s=0.05))
    composer.began(tight, 1, 0, 0.0)
    assert composer.tokens(view(decoding=40)) == 463 - 40
    composer.left(tight)
    assert composer.tokens(view(decoding=40)) == 1855 - 40


def test_what_must_run_goes_first_the_least_slack_before_others() -> None:
    late, later, easy = request(1, 1900, arrival_s=0.05), request(2, 400), request(3, 2000, arrival_s=4.0)
    # At 4.9 s 1 and 2 have less than the 215 ms of a step left, though 1 is nearer to what it holds; 3 has 4 s.
    assert order(made(easy, late, later), 4.9) == [2, 1]


def test_of_like_slack_the_nearest_to_what_is_left_goes_first() -> None:
    assert distance((512, 1000), (2048, 1000), (2048, 10_000)) == pytest.approx(0.75)
    small, large, other = request(1, 100), request(2, 1900), request(3, 1500)
    # 1,900 tokens are nearest to 2,048 and 10,000 of KV; of the 148 that are left then, 3 takes all and more KV.
    assert order(made(small, large, other)) == [2, 3]
    assert order(made(small, request(2, 1900, arrival_s=0.8), other)) == [3, 1, 2], "out of the window"


def test_a_prompt_without_room_is_passed_unless_it_must_run() -> None:
    assert order(made(request(1, 1900), request(2, 1500)), kv_free_tokens=1600, decoding=1) == [2]
    assert order(made(request(1, 1900), request(2, 1500)), kv_free_tokens=1600, places_free=0, decoding=1) == []
    composer = made(request(1, 1900, arrival_s=-4.9), request(2, 1500))
    composer.tokens(view(kv_free_tokens=1600, decoding=1))
    assert composer.head(0.0, False).id == 1  # type: ignore[union-attr]


def test_one_long_prompt_at_a_time() -> None:
    def heads(exclusive: bool) -> list[int]:
        long = request(1, 9000, arrival_s=-0.2)
        composer = made(long, settings=replace(DEFAULT, exclusive=exclusive))
        composer.tokens(view())
        composer.remove_head(long)
        composer.add(long, 6952, True)
        composer.add(request(2, 3000), 3000, False)
        return order(composer, kv_free_tokens=9000)

    assert heads(True) == [1]
    assert heads(False) == [2], "whose KV is nearer to what is free"


def gives(composer: AccelGen, **changes: int) -> Sequence[Request]:
    composer.tokens(view(4.9, step=100))
    return composer.gives_way(view(4.9, **({"step": 100, "decoding": 3, "places_free": 0} | changes)))


def test_the_largest_slack_gives_way_to_what_must_run() -> None:
    chat, jobs, soon = request(11, 100), request(12, 100, cls=JOBS), request(13, 100, cls=JOBS, arrival_s=-2000.0)
    must = request(1, 500)

    def composer(*prompts: Request) -> AccelGen:
        composer = made(*prompts)
        for each in (chat, soon, jobs):
            composer.began(each, 1, 60, 4.0)
        return composer

    assert gives(composer(must)) == [jobs]
    assert gives(composer(must), places_free=1, kv_free_tokens=240) == [jobs, soon], "141 tokens each"
    assert gives(composer(must), places_free=1) == (), "it has room"
    assert gives(composer(request(1, 500, arrival_s=3.0))) == (), "nobody must run"
    assert gives(composer(must), step=60) == (), "whoever has just begun has its token first"
    assert composer(must).victim() is jobs
    assert made(settings=replace(DEFAULT, preempts=False)).preempter is None


def test_the_slack_of_batch_work_follows_from_the_predicted_length_of_its_answer() -> None:
    short, long, unknown = (request(id, 100, cls=JOBS) for id in (1, 2, 3))
    short.predicted_tokens, long.predicted_tokens = 60, 6000
    composer = made(short, long, unknown)
    slacks = {prompt.request.id: prompt.slack_s(0.0) for prompt in composer._prompts.values()}
    assert slacks[2] < slacks[3] < slacks[1]
    assert composer._prompts[2].steps == pytest.approx(6000 + 100)
