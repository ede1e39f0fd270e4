"""The ``compose`` hook in the engine: first come, first served through it is the engine's own way to the bit, and any
composer keeps the books and gives the same in both modes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from math import inf

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from chiron.control.learning import Learner
from chiron.core.clock import VirtualClock
from chiron.core.types import Instance, Request
from chiron.engines.model import EngineModel, StepTable
from chiron.engines.profile import Profile
from chiron.policies.composers.leveled import LeveledComposer
from chiron.policies.policy import Composer
from chiron.policies.rivals.schedulers.accelgen import AccelGen, AccelGenSettings
from chiron.policies.rivals.schedulers.autellix import AutellixSettings, ProcessTable
from chiron.policies.rivals.schedulers.jitserve import JitServe, JitServeSettings, TempoSettings
from chiron.policies.rivals.schedulers.niyama import Niyama, NiyamaSettings
from chiron.policies.rivals.schedulers.sarathi import FirstCome
from chiron.policies.rivals.schedulers.slos_serve import SlosServe, SlosServeSettings
from chiron.policies.views import StepView
from effort import examples
from engine_bench import Bench, Make, check_books, play
from scenario_factory import CLASSES, PROFILE, TICK_S


class Fickle(FirstCome):
    """First come, first served, but every third step somebody who has decoded for a while gives way."""

    def __init__(self, chunk_tokens: float, *, swaps: bool = True, every: int = 3) -> None:
        super().__init__(chunk_tokens)
        self.preempter = self
        self.swaps = swaps
        self._every = every
        self._began: dict[int, tuple[Request, int]] = {}

    def began(self, request: Request, generated: int, step: int, now_s: float) -> None:
        self._began[request.id] = (request, step)

    def left(self, request: Request) -> None:
        del self._began[request.id], self._came[request.id]  # It queues last.

    def steps_left(self, step: int) -> int:
        return self._every - step % self._every

    def gives_way(self, view: StepView) -> Sequence[Request]:
        if view.step % self._every:
            return ()
        old = [request for request, step in self._began.values() if step + self._every < view.step]
        return old[:1] if view.places_free <= 0 else ()

    def victim(self) -> Request | None:
        return max((request for request, _ in self._began.values()), key=lambda each: each.id, default=None)


def by_levels() -> LeveledComposer:
    """Queues that a call leaves within a few steps, and starvation soon."""
    settings = AutellixSettings(boundaries_s=(0.05, 0.1), quanta_s=(0.05, 0.1), beta=2.0, every_steps=2)
    return LeveledComposer(ProcessTable(settings), every_steps=2)


GROWING = replace(PROFILE, max_num_seqs=16, c_ms_per_context_token=0.013, q_ms_per_token_squared=0.002)
COMPOSERS: dict[str, Callable[[], Composer]] = {
    "first come": lambda: FirstCome(12),
    "one that preempts": lambda: Fickle(12),
    "one that preempts and computes again": lambda: Fickle(12, swaps=False),
    "by levels": by_levels,
    "accelgen": lambda: AccelGen(AccelGenSettings(), Learner(CLASSES)),
    "jitserve": lambda: JitServe(JitServeSettings(frame_steps=4), Learner(CLASSES)),
    "tempo": lambda: JitServe(TempoSettings(frame_steps=3), Learner(CLASSES)),
    "slos-serve": lambda: SlosServe(SlosServeSettings(), Learner(CLASSES)),
    "niyama": lambda: Niyama(NiyamaSettings()),
    "niyama without chunks": lambda: Niyama(NiyamaSettings(chunks=False)),
}


def maker(profile: Profile, composer: Composer, *, transfer_s: float = 0.0, step_mode: bool = False) -> Make:
    def make(clock: VirtualClock, instance: Instance, bench: Bench) -> EngineModel:
        return EngineModel(
            clock=clock,
            instance=instance,
            profile=profile,
            times=StepTable(profile),
            listener=bench,
            kv_seconds_per_token=transfer_s,
            step_mode=step_mode,
            composer=composer,
        )

    return make


@given(st.sampled_from((90, 200, 350)), st.integers(0, 100_000))
@settings(max_examples=examples(20))
def test_first_come_first_served_is_the_engines_own_way(kv_tokens: int, seed: int) -> None:
    """In steps without a limit: with one, a prompt's KV is taken with its first chunk and not before."""
    profile = replace(GROWING, kv_capacity_tokens=kv_tokens, max_num_batched_tokens=4000)
    own, _ = play(profile, seed=seed)
    composed, _ = play(profile, seed=seed, make=maker(profile, FirstCome(inf)))
    assert composed.log == own.log


@pytest.mark.parametrize("name", COMPOSERS)
@given(st.sampled_from((90, 350)), st.sampled_from((0.0, TICK_S / 4)), st.integers(0, 100_000))
@example(90, 0.0, 3)  # KV runs out, and then a full engine's next boundary is none at which places are taken back.
@settings(max_examples=examples(10))
def test_fast_forward_equals_step_mode_and_the_books_balance(
    name: str, kv_tokens: int, transfer_s: float, seed: int
) -> None:
    profile = replace(GROWING, kv_capacity_tokens=kv_tokens, max_num_batched_tokens=16)
    make = COMPOSERS[name]
    fast, _ = play(profile, seed=seed, make=maker(profile, make(), transfer_s=transfer_s))
    slow, requests = play(
        profile,
        seed=seed,
        make=maker(profile, make(), transfer_s=transfer_s, step_mode=True),
        after_each=check_books,
    )
    assert fast.log == slow.log
    assert sorted(slow.ended) == [request.id for request in requests], "every request ends"


class Scripted(FirstCome):
    """First come, first served, but the even numbers first, and a limit that a test sets."""

    def add(self, request: Request, tokens: int, begun: bool) -> None:
        self._queue.add(request, (float(request.id % 2),), begun)

    def tokens(self, view: StepView) -> int:
        self.seen = view
        return int(self._chunk_tokens)


def run(composer: Composer, *requests: Request, profile: Profile = PROFILE) -> list[tuple[object, ...]]:
    bench = Bench(profile, kv_seconds_per_token=0.0, step_mode=False, seed=0, make=maker(profile, composer))
    bench.chattiness = 0.0
    for request in requests:
        bench.clock.call_at(request.arrival_s, lambda request=request: bench.start(request))  # type: ignore[misc]
    while bench.clock.step():
        assert bench.clock.now_s < 1000.0, "it hangs"
    return [(at / TICK_S, *rest) for at, *rest in bench.log]  # type: ignore[operator]


def request(id: int, arrival_s: float, tokens: int, output: int = 1) -> Request:
    return Request(id, "m0", CLASSES[2], arrival_s, tokens, output)


def test_a_later_prompt_goes_before_one_that_has_begun() -> None:
    log = run(Scripted(8), request(1, 0.0, 24), request(2, 0.5 * TICK_S, 16))
    # 8 tokens of 1, then all 16 of 2, then the 16 that are left of 1.
    assert [(at, number) for at, name, number, *_ in log if name == "finished"] == [(3, 2), (5, 1)]


def test_a_step_holds_what_the_composer_gives_and_no_more_than_the_engine_takes() -> None:
    assert run(Scripted(100), request(1, 0.0, 64))[-1][0] == 2, "32 at the most"
    assert run(Scripted(0), request(1, 0.0, 3))[-1][0] == 3, "an engine without other work does not idle"


def test_a_prompt_without_room_does_not_hold_up_one_that_has_begun() -> None:
    small = replace(PROFILE, kv_capacity_tokens=40)
    log = run(Scripted(8), request(1, 0.0, 24), request(2, 0.5 * TICK_S, 30), profile=small)
    assert [(at, number) for at, name, number, *_ in log if name == "finished"] == [(3, 1), (7, 2)]


def test_it_is_told_what_the_step_would_take() -> None:
    composer = Scripted(8)
    run(composer, request(1, 0.0, 8), profile=replace(GROWING, kv_capacity_tokens=100))
    view = composer.seen
    assert (view.step, view.decoding, view.tokens_max, view.kv_free_tokens) == (0, 0, 32, 100)
    assert view.step_s(10, 5) == pytest.approx(TICK_S + 0.002e-3 * (15**2 - 5**2), abs=1e-9)


def crowded(composer: Composer, *, transfer_s: float = 0.0, places: int = 1) -> list[tuple[object, ...]]:
    """Request 2 comes when 1 has the only place, at twelve tokens of answer."""
    profile = replace(PROFILE, max_num_seqs=places)
    make = maker(profile, composer, transfer_s=transfer_s)
    bench = Bench(profile, kv_seconds_per_token=0.0, step_mode=False, seed=0, make=make)
    bench.chattiness = 0.0
    for each in (request(1, 0.0, 4, 12), request(2, 1.5 * TICK_S, 4, 2)):
        bench.clock.call_at(each.arrival_s, lambda each=each: bench.start(each))  # type: ignore[misc]
    while bench.clock.step():
        assert bench.clock.now_s < 1000.0, "it hangs"
    return [(at / TICK_S, *rest) for at, *rest in bench.log]  # type: ignore[operator]


def ends(log: list[tuple[object, ...]]) -> list[tuple[object, ...]]:
    return [(at, number) for at, name, number, *_ in log if name == "finished"]


def test_a_place_is_taken_back_for_a_prompt_that_waits_and_its_holder_goes_on_later() -> None:
    assert ends(crowded(FirstCome(inf))) == [(12, 1), (14, 2)]
    # It decodes from step 1 on, 5 steps more until step 6; 2 takes two; then 10 tokens again, with the next of them.
    assert ends(crowded(Fickle(inf, swaps=False))) == [(8, 2), (14, 1)]


def test_where_kv_is_saved_nothing_is_computed_again() -> None:
    log = crowded(Fickle(inf), transfer_s=TICK_S / 16)
    # 9 tokens out and in again take 9/16 of a step each; the way in begins when 2 has its last token.
    assert [number for _, name, number, *_ in log if name == "first_token"] == [1, 2], "one prefill each"
    assert ends(log) == [(8, 2), (14 + 9 / 16, 1)]


def test_the_composer_says_who_gives_kv_back() -> None:
    def last_of(composer: Composer) -> object:
        small = replace(PROFILE, kv_capacity_tokens=40)
        return ends(run(composer, request(2, 0.0, 8, 20), request(1, 0.5 * TICK_S, 8, 20), profile=small))[-1][1]

    assert last_of(FirstCome(inf)) == 1, "admitted last"
    assert last_of(Fickle(inf, every=1000)) == 2, "the larger number"
