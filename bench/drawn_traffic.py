"""Traffic that nobody wrote down: scenarios drawn at random, each from its number.

Model, GPU, SLOs, cold start, lengths, arrivals and batch work are drawn independently, so that most combinations have
never been run before. The mean load is a few instances, which keeps a run short. A scenario has a past of an
hour (``calibration.first``: the same streams go on) and half an hour that is judged.

Numbers below ``FRESH_FROM`` are for looking at while something is changed; those from there on are for judging what
has been changed, and a number that was judged with is used up.
"""

from __future__ import annotations

from dataclasses import dataclass
from random import Random

import numpy as np

from chiron.engines.profile_store import load_profile
from chiron.sim.bound_work import request_work_s
from chiron.workload.lengths import IndependentLengths, LognormalTokens, sample_lengths

FRESH_FROM = 100
PAST_MIN = 60
JUDGED_MIN = 30
RATE_MAX = 7.0
PROFILES = ("llama-3.1-8b/a100/tp1", "llama-3.1-8b/a100/tp1", "llama-3.1-8b/h100/tp1", "llama-3.1-70b/h100/tp4")


@dataclass(frozen=True, slots=True, kw_only=True)
class Drawn:
    about: str
    text: str
    """Of the scenario."""


def drawn(number: int) -> Drawn:
    dice = Random(f"unseen traffic {number}")
    profile = dice.choice(PROFILES)
    large = "70b" in profile
    wanted_ttft_s = _between(dice, 1.0, 6.0)
    itl_ms = round(_between(dice, 90, 200) if large else _between(dice, 50, 200))
    node_s, load_s = round(_between(dice, 5, 90)), round(_between(dice, 15, 120 if large else 60))
    pairs = _lengths(dice)
    rate = min(RATE_MAX, _between(dice, 1.5, 5.0) / _work_s(profile, pairs, itl_ms / 1000))
    lengths = pairs.text
    kind, streams = _arrivals(dice, rate, lengths)
    long = dice.random() < 0.25
    # A prompt must be possible in time: else nobody attains anything.
    longest = float(_LONG_P99 if long else pairs.input.p99 or 0.0)
    ttft_s = round(max(wanted_ttft_s, 2.5 * _prefill_s(profile, longest)), 1)
    parts = [_head(profile, ttft_s, itl_ms, node_s, load_s), *streams]
    about = f"{profile}, {kind}, {rate:.1f}/s, TTFT {ttft_s} s, ITL {itl_ms} ms, start {node_s} + {load_s} s"
    if long:
        parts.append(_stream(f'kind = "gamma", rate = {0.02 * rate:.4f}, cv = 1.5', _LONG))
        about += ", long prompts"
    if dice.random() < 0.4:
        due_min, share = dice.randint(15, 30), _between(dice, 0.3, 1.2)
        items = round(share * rate * 60 * due_min)
        parts.append(_JOB.format(at=PAST_MIN + dice.randint(2, 8), requests=items, due=due_min, lengths=lengths))
        about += f", {items} batch items due in {due_min} min"
    return Drawn(about=about, text="".join(parts))


def _between(dice: Random, low: float, high: float) -> float:
    """Any order of magnitude is as likely."""
    return float(low * (high / low) ** dice.random())


@dataclass(frozen=True, slots=True, kw_only=True)
class _Lengths:
    input: LognormalTokens
    output: LognormalTokens

    @property
    def text(self) -> str:
        fields = {"input": self.input, "output": self.output}
        return ", ".join(f"{name} = {{ p50 = {field.p50}, p99 = {field.p99} }}" for name, field in fields.items())


def _lengths(dice: Random) -> _Lengths:
    prompt, answer = _between(dice, 800, 6000), _between(dice, 30, 600)
    prompt_99 = min(prompt * _between(dice, 3, 10), 20000)
    answer_99 = min(answer * _between(dice, 3, 10), 3000)
    return _Lengths(
        input=LognormalTokens(p50=round(prompt), p99=round(prompt_99)),
        output=LognormalTokens(p50=round(answer), p99=round(answer_99)),
    )


_LONG_P99 = 25_000
_LONG = f"input = {{ p50 = 15000, p99 = {_LONG_P99} }}, output = {{ p50 = 60, p99 = 400 }}"


def _prefill_s(profile: str, tokens: float) -> float:
    times = load_profile(profile)
    return (times.f_ms_per_token * tokens + times.q_ms_per_token_squared * tokens**2) / 1000


def _work_s(profile: str, lengths: _Lengths, itl_s: float) -> float:
    """Instance-seconds of a mean request, at least."""
    prompts, answers = sample_lengths(
        IndependentLengths(input=lengths.input, output=lengths.output), 2000, np.random.default_rng(1)
    )
    return float(request_work_s(load_profile(profile), prompts, answers, itl_s).mean())


def _arrivals(dice: Random, rate: float, lengths: str) -> tuple[str, list[str]]:
    """What kind they are of, and the streams that make them."""
    cv = round(_between(dice, 1, 6), 1)
    kind = dice.choice(("gamma", "diurnal", "spikes", "once", "both"))
    if kind == "gamma":
        return f"bursts (cv {cv})", [_stream(f'kind = "gamma", rate = {rate:.3f}, cv = {cv}', lengths)]
    swings = (
        f'kind = "diurnal", rate = {rate:.3f}, peak_to_trough = {_between(dice, 1.5, 5):.1f}, '
        f'period = "{_between(dice, 15, 80):.0f}m", noise = {0.4 * dice.random():.2f}, cv = {min(cv, 3)}'
    )
    if kind == "diurnal":
        return "swings", [_stream(swings, lengths)]
    factor, length_s = _between(dice, 2, 5), _between(dice, 30, 240)
    if kind == "once":
        at_s = 60 * (PAST_MIN + dice.uniform(5, JUDGED_MIN - 10))
        steady = _stream(f'kind = "gamma", rate = {rate:.3f}, cv = {min(cv, 2)}', lengths)
        spike = f'kind = "poisson", rate = {rate * (factor - 1):.3f}'
        return "a spike that comes once", [steady, _stream(spike, lengths, length_s=length_s, at_s=at_s)]
    period_s = _between(dice, 6 * 60, 29 * 60)
    base = rate / (1 + (factor - 1) * length_s / period_s)
    spikes = (
        f'kind = "spikes", rate = {base:.3f}, factor = {factor:.2f}, length = "{length_s:.0f}s", '
        f'period = "{period_s:.0f}s", cv = {min(cv, 3)}'
    )
    if kind == "spikes":
        return f"surges every {period_s:.0f} s", [_stream(spikes, lengths)]
    half = swings.replace(f"rate = {rate:.3f}", f"rate = {rate / 2:.3f}")
    return f"swings and surges every {period_s:.0f} s", [
        _stream(half, lengths),
        _stream(spikes.replace(f"rate = {base:.3f}", f"rate = {base / 2:.3f}"), lengths),
    ]


def _head(profile: str, ttft_s: float, itl_ms: int, node_s: int, load_s: int) -> str:
    return f"""
[classes.chat]
kind = "interactive"
ttft = "{ttft_s}s"
itl = "{itl_ms}ms"

[classes.batch]
kind = "batch"
deadline = "30m"

[models.m]
instances = [{{ profile = "{profile}" }}]
max_instances = 40

[cold_start]
node_start = "{node_s}s"
model_load = "{load_s}s"

[calibration]
first = "{PAST_MIN}m"
"""


def _stream(arrivals: str, lengths: str, *, length_s: float = 60.0 * (PAST_MIN + JUDGED_MIN), at_s: float = 0.0) -> str:
    return f"""
[[workload]]
model = "m"
class = "chat"
offset = "{at_s:.0f}s"
generate = {{ {arrivals}, duration = "{length_s:.0f}s", lengths = {{ {lengths} }} }}
"""


_JOB = """
[[batch_job]]
model = "m"
class = "batch"
at = "{at}m"
requests = {requests}
lengths = {{ {lengths} }}
deadline = "{due}m"
"""
