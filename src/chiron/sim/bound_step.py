"""How the time of a step is shared among its items, so that no schedule can save what an item is charged.

A step lasts ``D = phi(T) + c*S + q*A`` with phi convex, so for every tangent ``phi(T) >= alpha + beta*T``::

    D >= alpha + sum over items of u        u = beta + c*context (decode token), beta*n + q*((o+n)^2 - o^2) (chunk)

The items of a step share the fixed part alpha. A *sharing* charges item i the fraction w_i of alpha, where the
fractions of one step can never sum to more than 1; then the charges of a step never exceed its duration, and what a
request's items are charged is time that no schedule saves. The sharings:

``kv``       context / KV capacity: the sequences of a step fit into the cache;
``slots``    1 / max_num_seqs;
``tokens``   tokens / largest step;
``density``  v_i / sum of v over the requests that can be in flight at the same time, for any v: here tokens a second;
``itl``      by duration: an item with marginal cost u in a step of D is charged u*D/(D - alpha), and steps whose mean
             is held below an ITL cannot be long.

In the first three, too, the capacity is replaced by what the requests in flight could occupy, where that is less.
One tangent and one sharing hold for all steps of a kind of instance; every choice is valid, the best is taken.
``docs/bound.md`` has the proof.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import inf

import numpy as np
import numpy.typing as npt

from chiron.core.types import InstanceKind
from chiron.engines.profile import Profile
from chiron.sim.bound_time import peak_load

Floats = npt.NDArray[np.float64]
Mask = npt.NDArray[np.bool_]

ROUNDING_S = 4097 * 2.0**-33
"""The engine model rounds two coefficients of a segment of up to 4,096 steps to 2^-32 s: a step may come out this much
shorter than the formula says."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Demand:
    """Requests of one model that have to be served, as columns."""

    arrival_s: Floats
    due_s: Floats
    """The last token is due by then; inf if it only has to come."""
    input_tokens: Floats
    output_tokens: Floats
    itl_s: Floats
    """Mean inter-token latency that has to be met; inf where none has to."""

    def take(self, rows: Mask | slice) -> Demand:
        return Demand(
            arrival_s=self.arrival_s[rows],
            due_s=self.due_s[rows],
            input_tokens=self.input_tokens[rows],
            output_tokens=self.output_tokens[rows],
            itl_s=self.itl_s[rows],
        )

    @property
    def context_last(self) -> Floats:
        """Tokens that the last decode step reads. The first reads the prompt."""
        return self.input_tokens + np.maximum(self.output_tokens - 2.0, 0.0)

    def __len__(self) -> int:
        return len(self.arrival_s)


@dataclass(frozen=True, slots=True, kw_only=True)
class Supply:
    """What one kind of instance can do in a step."""

    name: str
    profile: Profile
    kv_tokens: int
    sequences: int
    step_tokens: int
    budget: int
    """Prefill tokens of a step, at most."""
    gpus: int = 1
    price_per_gpu_hour: float = 0.0

    @property
    def lone_step_s(self) -> float:
        """No step is shorter."""
        return self.profile.base_s(1)

    @property
    def exactness(self) -> float:
        """The share of a step's formula that is left after rounding, at least."""
        return max(0.0, 1.0 - ROUNDING_S / self.lone_step_s)


@dataclass(frozen=True, slots=True, kw_only=True)
class Tangent:
    """``phi(T) >= alpha_s + beta_s*T`` for every T >= 0."""

    tokens: float
    """Where it touches; inf for the asymptote."""
    alpha_s: float
    beta_s: float


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Sharing:
    """Fractions of a step's fixed part that a request's items are charged, whatever step they are in."""

    name: str
    first: Floats
    """The first decode step's; in between the fraction is linear in the context."""
    last: Floats
    prefill: Floats
    """Sum over the chunks of the prompt."""

    def take(self, rows: slice) -> Sharing:
        return Sharing(name=self.name, first=self.first[rows], last=self.last[rows], prefill=self.prefill[rows])


def supply_of(profile: Profile, kind: InstanceKind | None = None) -> Supply:
    """Limits of a step: the profile's, or the kind's where it says more."""
    sequences = max(profile.max_num_seqs, kind.max_num_seqs if kind else 0)
    return Supply(
        name=kind.name if kind else profile.name,
        profile=profile,
        kv_tokens=kind.kv_capacity_tokens if kind else profile.kv_capacity_tokens,
        sequences=sequences,
        step_tokens=max(profile.max_num_batched_tokens, sequences),
        budget=profile.max_num_batched_tokens,
        gpus=kind.gpus if kind else profile.tp,
        price_per_gpu_hour=kind.price_per_gpu_hour if kind else profile.price_per_gpu_hour,
    )


def tangents(profile: Profile, step_tokens: int) -> list[Tangent]:
    """Tangents of phi from one token to the largest step, and its asymptote."""
    fixed_ms, w0_ms, f_ms = profile.h_ms + profile.step_overhead_ms, profile.w0_ms, profile.f_ms_per_token
    found = [Tangent(tokens=inf, alpha_s=fixed_ms / 1000.0, beta_s=f_ms / 1000.0)]
    for tokens in np.geomspace(1.0, step_tokens, 16).tolist():
        knee = (w0_ms**4 + (f_ms * tokens) ** 4) ** 0.25
        if knee > 0.0:
            slope = f_ms * (f_ms * tokens / knee) ** 3
            alpha_s = (fixed_ms + knee - slope * tokens) / 1000.0
            found.append(Tangent(tokens=tokens, alpha_s=alpha_s, beta_s=slope / 1000.0))
    return found


def sharings(demand: Demand, supply: Supply, *, in_flight: bool) -> list[Sharing]:
    """The ways to share the fixed part. ``in_flight``: capacities shrink to what can be in flight at the same time."""
    prompt, one, none = demand.input_tokens, np.ones(len(demand)), np.zeros(len(demand))
    total = prompt + demand.output_tokens
    chunks = np.ceil(prompt / supply.budget)

    def capacity(limit: float, most: Floats) -> Floats:
        if not in_flight:
            return np.full(len(demand), limit)
        return np.minimum(limit, peak_load(demand.arrival_s, demand.due_s, most))

    kv = capacity(supply.kv_tokens, total)
    slots = capacity(supply.sequences, one)
    tokens = capacity(supply.step_tokens, np.minimum(total, supply.budget))
    found = [
        Sharing(name="kv", first=prompt / kv, last=demand.context_last / kv, prefill=prompt * chunks / kv),
        Sharing(name="slots", first=1.0 / slots, last=1.0 / slots, prefill=chunks / slots),
        Sharing(name="tokens", first=1.0 / tokens, last=1.0 / tokens, prefill=prompt / tokens),
        Sharing(name="itl", first=none, last=none, prefill=none),
    ]
    if in_flight:
        until_s = np.minimum(demand.due_s, _last_finite(demand))
        density = (chunks + demand.output_tokens) / np.maximum(until_s - demand.arrival_s, 1.0)
        part = density / peak_load(demand.arrival_s, demand.due_s, density)
        found.append(Sharing(name="density", first=part, last=part, prefill=part * chunks))
    return found


def _last_finite(demand: Demand) -> float:
    """The latest time that is named: after it nothing new happens."""
    finite = demand.due_s[np.isfinite(demand.due_s)]
    return max(float(demand.arrival_s.max(initial=0.0)), float(finite.max(initial=0.0)))
