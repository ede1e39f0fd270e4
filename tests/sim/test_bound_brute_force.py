"""No schedule beats the bound: random ones, step by step, on an engine written anew and on nothing but the formula."""

from __future__ import annotations

from dataclasses import dataclass, field
from math import inf
from random import Random

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from chiron.engines.profile import Profile
from chiron.sim.bound_step import Demand, Supply, sharings, supply_of, tangents
from chiron.sim.bound_work import best_prices, least_work, prices, request_work_s
from effort import examples


@dataclass
class Sequence:
    arrival_s: float
    inputs: int
    outputs: int
    prompt: int
    free_at_s: float
    prefilled: int = 0
    generated: int = 0
    first_s: float = -1.0
    finish_s: float = -1.0
    instance: int = -1

    @property
    def decoding(self) -> bool:
        return self.prefilled == self.prompt

    @property
    def context(self) -> int:
        """Tokens in KV, once decoding."""
        return self.inputs + self.generated - 1


@dataclass
class Batcher:
    """Instances that run whatever ``random`` picks within the limits of a step."""

    random: Random
    supplies: list[Supply]
    instances: list[int]
    """Kind of each instance."""
    sequences: list[Sequence]
    packed: bool
    """Take all that fits, rather than some of it."""
    idle: bool
    lossy: bool
    """Drop KV now and then: the prompt and all tokens so far are prefilled again."""
    busy_s: list[float] = field(default_factory=list)

    def run(self) -> None:
        clocks = [0.0] * len(self.instances)
        self.busy_s = [0.0] * len(self.supplies)
        while any(s.finish_s < 0.0 for s in self.sequences):
            at = min(range(len(clocks)), key=clocks.__getitem__)
            kind = self.instances[at]
            ready = [s for s in self.sequences if s.finish_s < 0.0 and max(s.arrival_s, s.free_at_s) <= clocks[at]]
            took_s = self.step(self.supplies[kind], ready, clocks[at], at)
            self.busy_s[kind] += took_s
            clocks[at] += took_s if took_s else 0.001
            if self.idle and self.random.random() < 0.2:
                clocks[at] += self.random.random() * 0.05

    def step(self, supply: Supply, ready: list[Sequence], now_s: float, at: int) -> float:
        self.random.shuffle(ready)
        if not self.packed:
            ready = ready[: self.random.randint(0, len(ready))]
        kv = slots = tokens = prefill = attention = contexts = decodes = 0
        chosen: list[tuple[Sequence, int]] = []
        for s in ready:
            if self.lossy and s.generated and self.random.random() < 0.1:
                s.prompt, s.prefilled = s.inputs + s.generated, 0
            need = s.context if s.decoding else s.prompt
            if kv + need > supply.kv_tokens or slots + 1 > supply.sequences or tokens + 1 > supply.step_tokens:
                continue
            count = 1
            if not s.decoding:
                count = min(s.prompt - s.prefilled, supply.budget - prefill, supply.step_tokens - tokens)
                if not self.packed and count > 1:
                    count = self.random.randint(1, count)
                if count <= 0:
                    continue
                prefill += count
                attention += (s.prefilled + count) ** 2 - s.prefilled**2
            else:
                contexts += s.context
                decodes += 1
            kv, slots, tokens = kv + need, slots + 1, tokens + count
            chosen.append((s, count))
        if not chosen:
            return 0.0
        p = supply.profile
        took_s = p.step_s(decoding=decodes, context_tokens=contexts, prefill_tokens=prefill)
        took_s += p.q_ms_per_token_squared * (attention - prefill**2) / 1000.0
        for s, count in chosen:
            self.advance(s, count, now_s + took_s)
        return took_s

    def advance(self, s: Sequence, count: int, end_s: float) -> None:
        s.free_at_s = end_s
        if not s.decoding:
            s.prefilled += count
            if not s.decoding:
                return
        s.generated += 1
        if s.first_s < 0.0:
            s.first_s = end_s
        if s.generated == s.outputs:
            s.finish_s = end_s


@st.composite
def profiles(draw: st.DrawFn) -> Profile:
    number = lambda low, high: draw(st.floats(low, high))  # noqa: E731
    return Profile(
        name="random",
        model="m",
        gpu="g",
        tp=1,
        engine="e",
        h_ms=draw(st.sampled_from([0.0, 1.0, 5.0])) + 1.0,
        w0_ms=draw(st.sampled_from([0.0, 1.0, 10.0])),
        f_ms_per_token=draw(st.sampled_from([0.0, number(0.001, 2.0)])),
        c_ms_per_context_token=draw(st.sampled_from([0.0, number(0.0, 0.5)])),
        q_ms_per_token_squared=draw(st.sampled_from([0.0, number(0.0, 0.01)])),
        kv_capacity_tokens=draw(st.integers(50, 400)),
        kv_bytes_per_token=1,
        max_num_seqs=draw(st.integers(1, 12)),
        max_num_batched_tokens=draw(st.integers(4, 64)),
    )


def scheduled(seed: int, kinds: list[Profile], *, same: bool, requests: int) -> tuple[Batcher, Demand]:
    """A finished random schedule, and what it delivered as a demand: half of the requests with their own latencies."""
    random = Random(seed)
    one = (random.randint(1, 40), random.randint(1, 10))
    sizes = [one if same else (random.randint(1, 40), random.randint(1, 10)) for _ in range(requests)]
    spread_s = random.choice([0.0, 0.1, 2.0])
    arrivals = [random.random() * spread_s for _ in sizes]
    batcher = Batcher(
        random=random,
        supplies=[supply_of(p) for p in kinds],
        instances=[random.randrange(len(kinds)) for _ in range(random.randint(1, 3))],
        sequences=[Sequence(a, i, o, i, 0.0) for a, (i, o) in zip(arrivals, sizes, strict=True)],
        packed=random.random() < 0.7,
        idle=random.random() < 0.3,
        lossy=random.random() < 0.3,
    )
    batcher.run()
    held = [random.random() < 0.5 for _ in sizes]
    done = batcher.sequences
    gaps = [max(s.outputs - 1, 1) for s in done]
    mean_s = [(s.finish_s - s.first_s) / gap for s, gap in zip(done, gaps, strict=True)]
    demand = Demand(
        arrival_s=np.array([s.arrival_s for s in done]),
        due_s=np.array([s.finish_s if h else inf for s, h in zip(done, held, strict=True)]),
        input_tokens=np.array([float(s.inputs) for s in done]),
        output_tokens=np.array([float(s.outputs) for s in done]),
        itl_s=np.array([m if h and s.outputs > 1 else inf for s, m, h in zip(done, mean_s, held, strict=True)]),
    )
    return batcher, demand


@settings(max_examples=examples(100))
@given(profile=profiles(), seed=st.integers(0, 10**9), same=st.booleans(), requests=st.integers(1, 14))
def test_no_random_schedule_on_one_kind_beats_any_tangent_and_sharing(
    profile: Profile, seed: int, same: bool, requests: int
) -> None:
    batcher, demand = scheduled(seed, [profile], same=same, requests=requests)
    busy_s, supply = batcher.busy_s[0], batcher.supplies[0]
    assert request_work_s(profile, demand.input_tokens, demand.output_tokens, demand.itl_s).sum() <= busy_s
    for sharing in sharings(demand, supply, in_flight=True) + sharings(demand, supply, in_flight=False):
        for tangent in tangents(profile, supply.step_tokens):
            charged = least_work([prices(demand, supply, tangent, sharing)], [1.0], demand).sum()
            assert charged <= busy_s * (1 + 1e-9), (sharing.name, tangent)


@settings(max_examples=examples(50))
@given(
    first=profiles(),
    second=profiles(),
    weight=st.sampled_from([0.0, 0.5, 1.0, 4.0]),
    seed=st.integers(0, 10**9),
    requests=st.integers(1, 14),
)
def test_no_random_schedule_beats_the_bound_when_requests_move_between_two_kinds(
    first: Profile, second: Profile, weight: float, seed: int, requests: int
) -> None:
    batcher, demand = scheduled(seed, [first, second], same=False, requests=requests)
    paid = batcher.busy_s[0] + weight * batcher.busy_s[1]
    kinds = [best_prices(demand, supply) for supply in batcher.supplies]
    assert least_work(kinds, [1.0, weight], demand).sum() <= paid * (1 + 1e-9)
    for one in sharings(demand, batcher.supplies[0], in_flight=True):
        timed = [prices(demand, batcher.supplies[0], tangents(first, 64)[-1], one)]
        for two in sharings(demand, batcher.supplies[1], in_flight=True):
            mixed = [
                *timed,
                prices(demand, batcher.supplies[1], tangents(second, 64)[3 % len(tangents(second, 64))], two),
            ]
            assert least_work(mixed, [1.0, weight], demand).sum() <= paid * (1 + 1e-9), (one.name, two.name)
