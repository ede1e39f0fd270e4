"""One engine under commands at drawn times, also from inside its own callbacks."""

from __future__ import annotations

from collections.abc import Callable
from random import Random

from chiron.core.clock import VirtualClock
from chiron.core.types import Instance, Request
from chiron.engines.model import EngineModel, StepTable
from chiron.engines.profile import Profile
from scenario_factory import CLASSES, TICK_S, kind_of

Make = Callable[[VirtualClock, Instance, "Bench"], EngineModel]


class Bench:
    """One engine and a listener that answers its callbacks with more commands, drawn by seed."""

    def __init__(
        self,
        profile: Profile,
        *,
        kv_seconds_per_token: float,
        step_mode: bool,
        seed: int,
        make: Make | None = None,
    ) -> None:
        """``make``: of the clock, the instance and this listener; else the engine of ``profile`` by itself."""
        self.clock = VirtualClock()
        self.random = Random(seed)
        instance = Instance(1, "m0", kind_of(profile), "mixed", 0.0)
        self.engine = (
            make(self.clock, instance, self)
            if make is not None
            else EngineModel(
                clock=self.clock,
                instance=instance,
                profile=profile,
                times=StepTable(profile),
                listener=self,
                kv_seconds_per_token=kv_seconds_per_token,
                step_mode=step_mode,
            )
        )
        self.inside: dict[int, Request] = {}
        self.log: list[tuple[object, ...]] = []
        self.ended: dict[int, str] = {}
        self.prefills = 0
        self.chattiness = 0.3
        """Probability that a callback gives a command."""

    # -- what the engine reports ----------------------------------------------------------------

    def first_token(self, request: Request) -> None:
        self.prefills += 1
        self.note("first_token", request)
        self.answer()

    def finished(self, request: Request) -> None:
        self.end(request, "finished")

    def refused(self, request: Request, reason: str) -> None:
        self.end(request, "failed")

    def evicted(self, request: Request) -> None:
        self.note("evicted", request)
        del self.inside[request.id]
        if self.random.random() < 0.5:
            self.start(request)
        else:
            self.clock.call_later(self.random.choice((0.0, TICK_S, 1.0)), lambda: self.start(request))
        self.answer()

    # -- commands ----------------------------------------------------------------

    def start(self, request: Request) -> None:
        self.inside[request.id] = request
        self.engine.start(request)

    def evict_one(self) -> None:
        if self.inside:
            self.engine.evict(self.inside[self.random.choice(sorted(self.inside))])

    def resize(self) -> None:
        self.engine.set_max_batch_size(self.random.choice((1, 2, 5, 16)))

    def scrape(self) -> None:
        self.log.append((self.clock.now_s, repr(self.engine.sample())))

    def answer(self) -> None:
        if self.random.random() < self.chattiness:
            self.random.choice((self.evict_one, self.resize, self.scrape))()

    # -- books ----------------------------------------------------------------

    def end(self, request: Request, outcome: str) -> None:
        assert request.id not in self.ended, "a request ends once"
        self.ended[request.id] = outcome
        del self.inside[request.id]
        self.note(outcome, request)
        self.answer()

    def note(self, name: str, request: Request) -> None:
        self.log.append((self.clock.now_s, name, request.id, request.tokens_done, request.kv_saved_tokens))


def play(
    profile: Profile,
    *,
    seed: int,
    kv_seconds_per_token: float = 0.0,
    step_mode: bool = False,
    make: Make | None = None,
    after_each: Callable[[Bench], None] | None = None,
) -> tuple[Bench, list[Request]]:
    """Thirty requests and thirty commands at drawn times, to the end."""
    bench = Bench(profile, kv_seconds_per_token=kv_seconds_per_token, step_mode=step_mode, seed=seed, make=make)
    draw = Random(f"{seed}:script")
    requests = []
    for number in range(30):
        cls = draw.choice(CLASSES)
        arrival_s = draw.choice((float(draw.randrange(4)), draw.randrange(128) * TICK_S, draw.uniform(0, 4)))
        requests.append(Request(number, "m0", cls, arrival_s, draw.randint(1, 40), draw.randint(1, 40)))
        bench.clock.call_at(arrival_s, lambda request=requests[-1]: bench.start(request))  # type: ignore[misc]
        command = draw.choice((bench.evict_one, bench.resize, bench.scrape))
        bench.clock.call_at(draw.choice((draw.randrange(512) * TICK_S, draw.uniform(0, 8))), command)
    bench.clock.call_at(20.0, lambda: setattr(bench, "chattiness", 0.0))
    while bench.clock.step():
        assert bench.clock.now_s < 1000.0, "it hangs"
        if after_each is not None:
            after_each(bench)
    return bench, requests


def check_books(bench: Bench) -> None:
    """The engine's counters against a recount of what is inside it. The one place that looks under the hood."""
    engine = bench.engine
    held = prefilling = restoring = decoding = context_sum = 0
    for sequence in engine._sequences.values():
        if sequence.phase == 1:
            restoring += 1
            held += sequence.context
        elif sequence.phase == 2:
            prefilling += 1
            held += sequence.prompt
        elif sequence.phase == 3:
            decoding += 1
            context_sum += sequence.context + engine.step - sequence.join_step
    assert engine.batch == decoding
    assert engine.context_sum == context_sum
    assert engine.kv_used_tokens == held + context_sum + engine._held_tokens
    assert 0 <= engine.kv_used_tokens <= engine.kv_capacity_tokens
    sample = engine.sample()
    assert sample.running == decoding + prefilling + restoring
    assert sample.kv_used_tokens <= engine.kv_capacity_tokens
