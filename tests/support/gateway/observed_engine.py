"""An engine model under virtual time, and an observer that sees of it what a gateway sees. For tests."""

from __future__ import annotations

from collections.abc import Iterable
from random import Random

from chiron.control.learning import Learner
from chiron.core.clock import VirtualClock
from chiron.core.types import Instance, InstanceKind, Request, RequestClass, Sample
from chiron.engines.model import EngineModel, StepTable
from chiron.engines.profile import Profile
from chiron.gateway.instances.observer import EngineObserver

CHAT = RequestClass(name="chat", kind="interactive", ttft_s=2.0, itl_s=0.1)
STREAM, PIECE = "stream", "piece"
"""How an answer comes."""


class ObservedEngine:
    """Requests enter at their times; ``samples`` gathers one (truth, observed) pair a second."""

    def __init__(self, profile: Profile, *, told: bool = False) -> None:
        """``told``: the observer also hears the engine's own totals."""
        self.clock = VirtualClock()
        kind = InstanceKind(
            name="k",
            gpu="g",
            gpus=1,
            price_per_gpu_hour=0.0,
            kv_capacity_tokens=profile.kv_capacity_tokens,
            max_num_seqs=profile.max_num_seqs,
            max_num_batched_tokens=profile.max_num_batched_tokens,
        )
        self.instance = Instance(1, "m", kind, "mixed", 0.0)
        self.observer = EngineObserver(self.instance, 0.0)
        self.engine = EngineModel(
            clock=self.clock,
            instance=self.instance,
            profile=profile,
            times=StepTable(profile),
            listener=self,
            step_mode=True,
            stepped=self._stepped,
        )
        self.learner = Learner((CHAT,))
        self.truth = Learner((CHAT,))
        self.samples: list[tuple[Sample, Sample]] = []
        self.told = told
        self._square = self._square_sampled = 0.0
        self._began_s: dict[int, float] = {}
        self._entered_s: dict[int, float] = {}
        self._tokens: dict[int, int] = {}
        self._ways: dict[int, str] = {}
        self._prompts: dict[int, int] = {}
        self._left: set[int] = set()
        self.clock.call_later(1.0, self._scrape)

    def submit(self, at_s: float, tokens_in: int, tokens_out: int, way: str = STREAM) -> None:
        request = Request(len(self._ways), "m", CHAT, at_s, tokens_in, tokens_out)
        request.instance = self.instance
        self._ways[request.id], self._prompts[request.id] = way, tokens_in

        def enter() -> None:
            self._entered_s[request.id] = self.clock.now_s
            self.observer.entered(self.clock.now_s)
            self.engine.start(request)
            if way == PIECE:
                # A gateway presumes when such a prefill is over; it errs to the late side.
                self.clock.call_later(0.1, lambda: self._begin(request))

        self.clock.call_at(at_s, enter)

    def traffic(self, seconds: float, per_s: float, *, pieces: float = 0.0, seed: int = 1) -> None:
        draw, at_s = Random(seed), 0.0
        while (at_s := at_s + draw.expovariate(per_s)) < seconds:
            way = PIECE if draw.random() < pieces else STREAM
            self.submit(at_s, draw.randint(20, 1500), draw.randint(30, 300), way)

    def run(self, seconds: float) -> None:
        self.clock.run_until(seconds)

    def share(self, name: str, since: int = 4) -> float:
        """Observed over true growth of a total, from one sample to the last."""
        (true_0, seen_0), (true_1, seen_1) = self.samples[since], self.samples[-1]
        return float((getattr(seen_1, name) - getattr(seen_0, name)) / (getattr(true_1, name) - getattr(true_0, name)))

    def metrics(self) -> dict[str, float]:
        """The engine's own totals, by the names of ``engines.rows``."""
        sample = self.engine.sample()
        return {
            "steps": sample.steps,
            "busy_s": sample.busy_s,
            "decode_tokens": sample.decode_tokens,
            "prefill_tokens": sample.prefill_tokens,
            "context_tokens": sample.context_tokens,
        }

    # -- what the engine reports -------------------------------------------------------------------------------

    def first_token(self, request: Request) -> None:
        self._square += request.input_tokens**2
        if self._ways[request.id] == STREAM:
            self._begin(request)

    def finished(self, request: Request) -> None:
        streams = self._ways[request.id] == STREAM
        self._begin(request)
        self._left.add(request.id)
        if not streams:
            self.observer.answered(request.tokens_done - 1, self.clock.now_s - self._began_s[request.id])
        self.observer.left(
            self.clock.now_s, request.input_tokens, self._tokens.get(request.id, 0), decoded=True, streams=streams
        )

    def evicted(self, request: Request) -> None:
        raise AssertionError("nothing is evicted here")

    def refused(self, request: Request, reason: str) -> None:
        raise AssertionError(reason)

    def _begin(self, request: Request) -> None:
        if request.id in self._began_s or request.id in self._left:
            return
        self._began_s[request.id] = self.clock.now_s
        streams = self._ways[request.id] == STREAM
        tokens = request.input_tokens
        entered_s = self._entered_s[request.id]
        self.observer.first_token(self.clock.now_s, tokens, entered_s=entered_s, prefilled=tokens, streams=streams)

    def _stepped(self, decoding: Iterable[int]) -> None:
        for number in decoding:
            if self._ways[number] == STREAM:
                self.observer.tokens += 1
                self.observer.held_tokens += 1
                self._tokens[number] = self._tokens.get(number, 0) + 1

    def _scrape(self) -> None:
        self.clock.call_later(1.0, self._scrape)
        told = self.metrics() if self.told else None
        pair = self.engine.sample(), self.observer.sample(self.clock.now_s, told)
        if self.samples:
            square = self._square - self._square_sampled
            for learner, before, after in zip((self.truth, self.learner), self.samples[-1], pair, strict=True):
                learner.observe(before, after, square)
                learner.publish()
        self._square_sampled = self._square
        self.samples.append(pair)


def profile(**changed: float) -> Profile:
    """An 8B model on an A100, about."""
    fields: dict[str, float] = {
        "h_ms": 12.0,
        "w0_ms": 0.0,
        "f_ms_per_token": 0.06,
        "c_ms_per_context_token": 6e-5,
        "q_ms_per_token_squared": 0.0,
        "kv_capacity_tokens": 400_000,
        "max_num_seqs": 256,
        "max_num_batched_tokens": 2048,
    }
    return Profile(
        name="p",
        model="m",
        gpu="g",
        tp=1,
        engine="e",
        kv_bytes_per_token=1,
        price_per_gpu_hour=0.0,
        **(fields | changed),  # type: ignore[arg-type]
    )


def step_s(learner: Learner, batch: float, context: float) -> float:
    """A decode step as the learner would predict it."""
    times = learner.step_times
    return times.fixed_s + batch * (times.per_sequence_s + times.per_context_token_s * context)


def true_step_s(given: Profile, batch: int, context: float) -> float:
    return StepTable(given).base[batch] + batch * context * given.c_ms_per_context_token / 1000.0
