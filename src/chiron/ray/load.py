"""What a policy is shown of a Ray Serve deployment, of which only numbers of requests and replicas are known.

Ray Serve tells how many requests run and how many wait; a fleet hook wants arrivals, lengths and step times. Lengths
are what the user says (``Workload``), step times those of a profile. How many end follows from both by Little's law
(requests that run = ends per second * seconds that each takes), and how many arrive from that and from how many more
there are than before. So a policy sees less here than behind Chiron's own gateway, and nothing of batch work.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import isfinite

from chiron.core.types import RequestClass
from chiron.engines.profile import Profile
from chiron.policies.views import ArrivalView, ClassMix, FleetView, InstanceView, ModelView, StepTimes

MANY = 1000
"""Requests that have finished: what the user says of them is believed."""
_WIDE = 256
"""Sequences at which the line through a profile's step times meets them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """What requests of the deployment are like, and how soon they should be answered."""

    input_tokens: float = 1000.0
    """Mean prompt."""
    output_tokens: float = 250.0
    """Mean answer."""
    ttft_s: float = 2.0
    itl_s: float = 0.1
    cold_start_s: float = 60.0
    """From a decision until a replica serves."""

    def __post_init__(self) -> None:
        for name in ("input_tokens", "output_tokens", "ttft_s", "itl_s", "cold_start_s"):
            if not (isfinite(getattr(self, name)) and getattr(self, name) > 0):
                raise ValueError(f"{name} is {getattr(self, name)!r}; it must be a number above 0")

    @property
    def cls(self) -> RequestClass:
        return RequestClass(name="chat", kind="interactive", ttft_s=self.ttft_s, itl_s=self.itl_s)


@dataclass(frozen=True, slots=True, kw_only=True)
class ServeLoad:
    """A deployment now."""

    running: float
    """Requests at replicas."""
    queued: float
    """Requests that wait for one."""
    replicas: int
    """That run."""
    target: int
    least: int
    most: int

    @property
    def sound(self) -> bool:
        """False: a figure is missing or cannot be."""
        figures = (self.running, self.queued)
        return all(isfinite(each) and each >= 0 for each in figures) and self.replicas >= 0 and self.most >= 1


def step_times(profile: Profile) -> StepTimes:
    per_sequence_s = (profile.base_s(_WIDE) - profile.base_s(1)) / (_WIDE - 1)
    return StepTimes(
        fixed_s=profile.base_s(1) - per_sequence_s,
        per_sequence_s=per_sequence_s,
        per_context_token_s=profile.c_ms_per_context_token / 1000.0,
        per_prefill_token_s=profile.f_ms_per_token / 1000.0,
        per_prefill_square_s=profile.q_ms_per_token_squared / 1000.0,
    )


def request_s(workload: Workload, profile: Profile, on_each: float) -> float:
    """Seconds from a replica's first step on a request to its last, with so many on each replica."""
    decoding = max(1, min(round(on_each), profile.max_num_seqs))
    context = decoding * (workload.input_tokens + workload.output_tokens / 2.0)
    prompt = round(workload.input_tokens)
    prefill_s = profile.step_s(decoding=0, context_tokens=0.0, prefill_tokens=max(1, prompt))
    return prefill_s + workload.output_tokens * profile.step_s(decoding=decoding, context_tokens=context)


def ends_per_s(workload: Workload, profile: Profile, load: ServeLoad) -> float:
    """By Little's law, of the requests that run."""
    if load.running <= 0.0:
        return 0.0
    return load.running / request_s(workload, profile, load.running / max(1, load.replicas))


def fleet_view(
    *,
    name: str,
    workload: Workload,
    profile: Profile,
    load: ServeLoad,
    arrived: tuple[tuple[int, int], ...],
    now_s: float,
    since_s: float,
) -> FleetView:
    """``arrived``: requests by second, since the view before."""
    return FleetView(now_s=now_s, since_s=since_s, models=(_model(name, workload, profile, load, arrived),))


def _model(
    name: str, workload: Workload, profile: Profile, load: ServeLoad, arrived: tuple[tuple[int, int], ...]
) -> ModelView:
    tokens, square = workload.input_tokens, workload.input_tokens**2
    cls = workload.cls
    mix = ClassMix(
        cls=cls,
        input_tokens=tokens,
        input_square=square,
        output_tokens=workload.output_tokens,
        output_sd=workload.output_tokens,
        finished=MANY,
    )
    waiting = round(load.queued)
    return ModelView(
        name=name,
        min_instances=load.least,
        max_instances=load.most,
        gpu=profile.gpu,
        gpus_per_instance=profile.tp,
        price_per_hour=profile.tp * profile.price_per_gpu_hour,
        kv_capacity_tokens=profile.kv_capacity_tokens,
        max_num_seqs=profile.max_num_seqs,
        max_num_batched_tokens=profile.max_num_batched_tokens,
        planned={"interactive": 0, "mixed": load.target, "batch": 0},
        instances=_instances(workload, profile, load),
        arrivals=tuple(
            ArrivalView(
                second=second, cls=cls, requests=count, input_tokens=count * tokens, input_square=count * square
            )
            for second, count in arrived
        ),
        mixes=(mix,),
        waiting_interactive=waiting,
        waiting_input_tokens=waiting * tokens,
        waiting_input_square=waiting * square,
        oldest_wait_s=0.0,
        groups=(),
        running_batch=0,
        attained=0,
        missed=0,
        itl_missed=0.0,
        step_times=step_times(profile),
        cold_start_s=workload.cold_start_s,
        cold_starts_seen=1,
    )


def _instances(workload: Workload, profile: Profile, load: ServeLoad) -> tuple[InstanceView, ...]:
    """Ray Serve spreads requests evenly; replicas that are wanted and do not run yet are starting."""
    even, rest = divmod(round(load.running), max(1, load.replicas))
    held = workload.input_tokens + workload.output_tokens / 2.0
    found = []
    for number in range(max(load.replicas, load.target)):
        ready = number < load.replicas
        count = even + (number < rest) if ready else 0
        context = count * held
        found.append(
            InstanceView(
                id=number + 1,
                role="mixed",
                state="ready" if ready else "starting",
                age_s=0.0,
                dispatched=count,
                dispatched_interactive=count,
                max_batch_size=profile.max_num_seqs,
                kv_capacity_tokens=profile.kv_capacity_tokens,
                sample_age_s=0.0,
                running=count,
                waiting=0,
                waiting_tokens=0,
                head_tokens=0,
                kv_used_tokens=min(profile.kv_capacity_tokens, round(context)),
                itl_s=profile.step_s(decoding=max(1, count), context_tokens=context),
                gpus=profile.tp,
            )
        )
    return tuple(found)
