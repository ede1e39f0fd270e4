"""The least instance time that a request can be charged: the work part of the lower bound.

``bound_step`` says what one step's items are charged under a tangent and a sharing; here the best pair of each kind
of instance is chosen, and each request is charged the least over the kinds that it may run on.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import reduce
from math import inf

import numpy as np
import numpy.typing as npt

from chiron.engines.profile import Profile
from chiron.sim.bound_step import (
    ROUNDING_S,
    Demand,
    Floats,
    Mask,
    Sharing,
    Supply,
    Tangent,
    sharings,
    supply_of,
    tangents,
)

_SAMPLE = 4096
"""Requests on which tangent and sharing are chosen; the bound then counts all of them."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Prices:
    """Instance-seconds that each request's items are charged on one kind."""

    supply: Supply
    tangent: Tangent
    sharing: str
    first: Floats
    last: Floats
    prefill: Floats
    fits: Mask
    """Prompt and output fit into the KV cache: else it never runs on this kind."""
    fixed_s: float
    """What is still shared by duration (sharing ``itl``); 0 otherwise."""


def request_work_s(
    profile: Profile,
    input_tokens: npt.ArrayLike,
    output_tokens: npt.ArrayLike,
    itl_s: npt.ArrayLike = inf,
) -> Floats:
    """Instance-seconds that each request takes at least, whoever else is in flight.

    The sum over the requests is what is bounded: one request's figure depends on the tangent and the sharing that
    are best for all. ``itl_s`` is the mean inter-token latency to be met, inf where none is. A request longer than the
    KV cache takes inf.
    """
    inputs = np.atleast_1d(np.asarray(input_tokens, dtype=np.float64))
    outputs = np.atleast_1d(np.asarray(output_tokens, dtype=np.float64))
    demand = Demand(
        arrival_s=np.zeros(len(inputs)),
        due_s=np.full(len(inputs), inf),
        input_tokens=inputs,
        output_tokens=outputs,
        itl_s=np.broadcast_to(np.asarray(itl_s, dtype=np.float64), inputs.shape),
    )
    supply = supply_of(profile)
    demand = with_feasible_itl(demand, (supply,))
    return least_work([best_prices(demand, supply, in_flight=False)], [1.0], demand)


def prices(demand: Demand, supply: Supply, tangent: Tangent, sharing: Sharing) -> Prices:
    """What the items are charged under one tangent and one sharing."""
    alpha_s, beta_s = tangent.alpha_s, tangent.beta_s
    # A recomputed prefill of context + 1 tokens yields a token as well, and may be cheaper than reading the context.
    context_s = min(supply.profile.c_ms_per_context_token / 1000.0, beta_s)
    square_s = supply.profile.q_ms_per_token_squared / 1000.0
    prompt = demand.input_tokens
    return Prices(
        supply=supply,
        tangent=tangent,
        sharing=sharing.name,
        first=beta_s + context_s * prompt + alpha_s * sharing.first,
        last=beta_s + context_s * demand.context_last + alpha_s * sharing.last,
        prefill=beta_s * prompt + square_s * prompt**2 + alpha_s * sharing.prefill,
        fits=prompt + demand.output_tokens <= supply.kv_tokens,
        fixed_s=alpha_s if sharing.name == "itl" else 0.0,
    )


def best_prices(demand: Demand, supply: Supply, *, in_flight: bool = True) -> Prices:
    """The tangent and the sharing that charge these requests most, if all ran on this kind."""
    shared = sharings(demand, supply, in_flight=in_flight)
    every = slice(None, None, max(1, -(-len(demand) // _SAMPLE)))
    sample = demand.take(every)

    def charged(pair: tuple[Tangent, Sharing]) -> float:
        work = least_work([prices(sample, supply, pair[0], pair[1].take(every))], [1.0], sample)
        return float(np.sum(work, where=np.isfinite(work)))

    pairs = [(tangent, sharing) for tangent in tangents(supply.profile, supply.step_tokens) for sharing in shared]
    tangent, sharing = max(pairs, key=charged)
    return prices(demand, supply, tangent, sharing)


def least_work(kinds: Sequence[Prices], weights: Sequence[float], demand: Demand) -> Floats:
    """The least that each request is charged, in weighted instance-seconds; inf where it fits on no kind.

    Each item may run on another kind (a request can move), so kinds compete item by item. With the multiplier mu of
    "the gaps between n tokens sum to at most n*L", the cheapest step for a token of price p on a kind that shares
    alpha by duration costs ``w*p + 2*sqrt(mu*w*p*alpha) + mu*alpha``: concave in p, p linear in the context, so the
    sum over a request's tokens is at least the mean of its ends times n. Every mu >= 0 gives a bound; the candidates
    are the best ones of each kind.
    """
    weighted = [weight * kind.supply.exactness for weight, kind in zip(weights, kinds, strict=True)]
    gaps = demand.output_tokens - 1.0
    limit_s = demand.itl_s + ROUNDING_S

    def token(first: bool, root_mu: Floats) -> Floats:
        def on(kind: Prices, weight: float) -> Floats:
            price = weight * (kind.first if first else kind.last)
            cost = price + root_mu * (2.0 * np.sqrt(price * kind.fixed_s) + root_mu * kind.fixed_s)
            return np.where(kind.fits, cost, inf)

        return _least(on(kind, weight) for kind, weight in zip(kinds, weighted, strict=True))

    prefill = _least(np.where(kind.fits, w * kind.prefill, inf) for kind, w in zip(kinds, weighted, strict=True))
    free = np.zeros(len(demand))
    mean = 0.5 * (token(True, free) + token(False, free))
    for kind, weight in zip(kinds, weighted, strict=True):
        held = np.isfinite(limit_s) & (limit_s > kind.fixed_s) & kind.fits
        if kind.fixed_s > 0.0 and held.any():
            held_s = np.where(held, limit_s, inf)
            roots = 0.5 * (np.sqrt(kind.first) + np.sqrt(kind.last))
            root_mu = np.sqrt(weight * kind.fixed_s) * roots / (held_s - kind.fixed_s)
            timed = 0.5 * (token(True, root_mu) + token(False, root_mu))
            mean = np.maximum(mean, timed - root_mu**2 * np.where(held, limit_s, 0.0))
    return prefill + np.multiply(gaps, mean, where=gaps > 0.0, out=np.zeros(len(demand)))


def with_feasible_itl(demand: Demand, supplies: Sequence[Supply]) -> Demand:
    """An ITL that a request cannot meet even alone on the fastest kind is dropped, and its window with it."""
    context = 0.5 * (demand.input_tokens + demand.context_last)
    lone_s = _least(s.lone_step_s + s.profile.c_ms_per_context_token / 1000.0 * context for s in supplies)
    hopeless = (demand.output_tokens > 1.0) & (demand.itl_s < lone_s)
    return replace(demand, due_s=np.where(hopeless, inf, demand.due_s), itl_s=np.where(hopeless, inf, demand.itl_s))


def _least(columns: Iterable[Floats]) -> Floats:
    return reduce(np.minimum, columns)
