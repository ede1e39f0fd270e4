"""Priority levels inside an engine: whose turn it is, and who gives place and KV back to whom."""

from __future__ import annotations

from math import inf

import pytest

from chiron.core.types import Request
from chiron.policies.composers.leveled import LeveledComposer
from chiron.policies.views import StepView
from policy_factory import CHAT


class Fixed:
    """Levels by a request's hundreds; 9 is better from second 5 on."""

    def __init__(self) -> None:
        self.told: list[tuple[str, int, float]] = []

    def enters(self, request: Request) -> bool:
        self.told.append(("enters", request.id, 0.0))
        return False

    def starts(self, request: Request, now_s: float) -> None:
        self.told.append(("starts", request.id, now_s))

    def stops(self, request: Request, now_s: float) -> None:
        self.told.append(("stops", request.id, now_s))

    def level(self, request: Request, now_s: float, made: int) -> int:
        level = request.id // 100
        return 0 if level == 9 and now_s >= 5.0 else level

    def better_s(self, request: Request) -> float:
        return 5.0 if request.id // 100 == 9 else inf


def composer(*decoding: int, every_steps: int = 4) -> LeveledComposer:
    """Requests that decode since step 1, with prompts of 10 tokens."""
    made = LeveledComposer(Fixed(), every_steps=every_steps)
    for number in decoding:
        one = request(number)
        made.add(one, 10, False)
        made.head(0.0, False)
        made.remove_head(one)
        made.began(one, 1, 1, 0.0)
    return made


def request(number: int) -> Request:
    return Request(number, "m", CHAT, 0.0, 10)


def view(step: int = 8, *, places: int = 0, kv_free: int = 1000, now_s: float = 1.0, decoding: int = 3) -> StepView:
    return StepView(
        now_s=now_s,
        step=step,
        decoding=decoding,
        tokens_max=100,
        kv_free_tokens=kv_free,
        step_s=lambda tokens, done: 0.0,
        places_free=places,
    )


def leaving(made: LeveledComposer, seen: StepView) -> list[int]:
    return [each.id for each in made.gives_way(seen)]


@pytest.mark.parametrize(("waits", "leaves"), [(1, [301]), (101, [301]), (201, [301]), (301, []), (401, [])])
def test_only_a_worse_level_gives_way_the_last_of_the_worst_first(waits: int, leaves: list[int]) -> None:
    made = composer(1, 201, 301)
    made.add(request(waits + 1), 10, False)
    assert leaving(made, view()) == leaves


def test_as_many_give_way_as_it_takes_and_none_in_vain() -> None:
    """Each holds 10 tokens of prompt and 8 of its answer, and the next one; 3 tokens are for those that decode."""
    made = composer(201, 202, 301)
    made.add(request(2), 40, False)
    assert leaving(made, view(kv_free=4)) == [301, 202, 201]
    made.add(request(1), 10, False)  # Behind it.
    assert leaving(made, view(kv_free=3 + 40, places=1)) == [], "there is room"
    assert leaving(made, view(kv_free=3 + 30, places=1)) == [301]
    big = composer(201, 301)
    big.add(request(1), 400, False)
    assert leaving(big, view(kv_free=4)) == []


def test_places_are_taken_back_at_every_few_steps_only_and_not_before_a_token_is_made() -> None:
    made = composer(301)
    made.add(request(1), 10, False)
    assert [leaving(made, view(step)) for step in (5, 6, 7, 8)] == [[], [], [], [301]]
    assert [made.steps_left(step) for step in (4, 5, 7)] == [4, 3, 1]
    new = composer(301, every_steps=1)
    new.add(request(1), 10, False)
    assert leaving(new, view(1)) == []
    assert leaving(new, view(2)) == [301]


def test_who_gave_way_waits_in_its_turn_and_the_levels_are_told_when() -> None:
    levels = Fixed()
    made = LeveledComposer(levels, every_steps=1)
    one, two = request(301), request(302)
    for each in (one, two):
        made.add(each, 10, False)
    assert made.head(0.5, False) is one
    made.remove_head(one)
    made.began(one, 1, 1, 0.5)
    made.left(one)
    made.add(one, 14, False)
    assert made.head(2.0, False) is one, "it was there before the other"
    assert [told for told in levels.told if told[1] == 301] == [
        ("enters", 301, 0.0),
        ("starts", 301, 0.5),
        ("stops", 301, 2.0),
    ]


def test_a_level_that_gets_better_passes_those_that_came_before() -> None:
    made = composer()
    first, late = request(101), request(901)
    made.add(first, 10, False)
    made.add(late, 10, False)
    assert made.head(4.9, False) is first
    assert made.head(5.0, False) is late


def test_the_worst_gives_kv_back_where_it_runs_out() -> None:
    made = composer(201, 301, 101)
    victim = made.victim()
    assert victim is not None
    assert victim.id == 301
    assert LeveledComposer(Fixed(), every_steps=1, preempts=False).preempter is None


class Left(Fixed):
    """Levels by the hundreds of tokens that are left of 500."""

    def level(self, request: Request, now_s: float, made: int) -> int:
        return (500 - made) // 100


def test_who_gave_way_keeps_the_credit_for_what_it_made() -> None:
    made = LeveledComposer(Left(), every_steps=1)
    one = request(1)
    made.add(one, 10, False)
    made.head(0.0, False)
    made.remove_head(one)
    made.began(one, 1, 1, 0.0)
    made.left(one)
    made.add(one, 10 + 400, False)
    half, new = request(2), request(3)
    made.add(new, 10, False)
    made.add(half, 10 + 250, False)  # It was in another engine before.
    found = []
    while (head := made.head(1.0, False)) is not None:
        found.append(head.id)
        made.remove_head(head)
    assert found == [1, 2, 3]
