"""``aibrix-apa``, ``aibrix-kpa``: AIBrix's own pod autoscalers, with the metrics of their samples.

``aibrix-apa``, on the share of KV in use and on waiting requests: every 10 s, for each metric, over its mean over pods
in a window of 30 s; the larger number counts::

    u = mean / target
    u > 1 + tolerance up   : min(ceil(pods * u), ceil(rate up * pods))
    u < 1 - tolerance down : max(ceil(pods * u), floor(pods / rate down))
    else                   : pods

A rise is taken at once. A fall is stabilised over 300 s, by the *least* that was wanted meanwhile, as its code has it:
where Kubernetes takes the most, and so holds a fleet, this hurries.

``aibrix-kpa``, on the share of KV in use; after Knative, with a stable window of 180 s and a panic window of 60 s::

    pods(window) = ceil(pods * mean / target) out of a tolerance of 0.1, within floor(pods / 2) .. ceil(2 * pods)
    panic        : while the mean of the panic window is more than twice that of the stable one, or that is 0, and for
                   a stable window after it; meanwhile the most that either window has asked for, never less
    else         : pods(stable window); a fall waits for the most of the last 180 s

Sources: vllm-project/aibrix, pkg/controller/podautoscaler (rules and defaults), samples/autoscaling/
multimetrics-apa.yaml and kpa.yaml (metrics, targets, APA's window and tolerances, KPA's delay). Its KPA stores the mean
per pod and divides it by the target without multiplying by the pods, so it asks for one pod wherever one would be on
target, and it never forgets what it asked for in a panic; ``literal`` does likewise, and the default is what it means.
They know no SLO. Requests go to the instance with the fewest.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil, floor, inf
from typing import Annotated

from chiron.policies.checks import above, at_least
from chiron.policies.policy import Policy
from chiron.policies.ranges import Between
from chiron.policies.rivals.scalers.each_model import each_model, held, mixed_plan, scraped, within_bounds
from chiron.policies.views import FleetPlan, FleetView, ModelPlan, ModelView


@dataclass(frozen=True, slots=True, kw_only=True)
class AibrixSettings:
    kv_target: Annotated[float, Between(0.01, 0.9, log=True)] = 0.5
    """Share of KV in use (AIBrix's sample, as the next four)."""
    waiting_target: Annotated[float, Between(0.1, 200.0, log=True)] = 100.0
    """Waiting requests per pod."""
    window_s: Annotated[float, Between(10.0, 180.0, log=True)] = 30.0
    """Of the means; the code's default is 180."""
    tolerance_up: float = 0.1
    tolerance_down: float = 0.2
    """The code's default is 0.1."""
    rate_up: float = 2.0
    """AIBrix's default, as the next three."""
    rate_down: float = 2.0
    stabilise_down_s: float = 300.0
    sync_s: float = 10.0
    stale_s: float = 30.0
    """A metric older than this is missing. Our choice."""
    max_num_seqs: Annotated[int, Between(32, 512, log=True)] = 256
    """Static max batch size: vLLM's default."""

    def __post_init__(self) -> None:
        above(0, self, "kv_target", "waiting_target", "window_s", "sync_s", "stale_s", "max_num_seqs")
        at_least(0, self, "tolerance_up", "tolerance_down", "stabilise_down_s")
        above(1, self, "rate_up", "rate_down")


@dataclass(frozen=True, slots=True, kw_only=True)
class Memory:
    """What the autoscaler remembers of one model."""

    means: tuple[tuple[float, float, float], ...] = ()
    """(time, mean share of KV, mean waiting) in the window."""
    wanted: tuple[tuple[float, int], ...] = ()
    """(time, pods) over the time of stabilising."""


State = dict[str, Memory]


def desired_pods(settings: AibrixSettings, mean: float, target: float, pods: int) -> int:
    use = mean / target
    if use > 1.0 + settings.tolerance_up:
        return min(ceil(pods * use), ceil(settings.rate_up * pods))
    if use < 1.0 - settings.tolerance_down:
        return max(ceil(pods * use), floor(pods / settings.rate_down))
    return pods


def decide_fleet(settings: AibrixSettings, state: State | None, view: FleetView) -> tuple[FleetPlan, State]:
    """Every model by itself: one autoscaler each."""
    return each_model(_decide_model, Memory, settings, state, view)


def _decide_model(settings: AibrixSettings, memory: Memory, model: ModelView, now_s: float) -> tuple[ModelPlan, Memory]:
    current = sum(model.planned.values())
    fresh = scraped(model, settings.stale_s)
    if fresh is None:
        return held(model), memory
    now = (
        now_s,
        sum(i.kv_used_tokens / i.kv_capacity_tokens for i in fresh) / len(fresh),
        sum(i.waiting for i in fresh) / len(fresh),
    )
    means = (*(m for m in memory.means if m[0] > now_s - settings.window_s), now)
    kv, waiting = (sum(m[column] for m in means) / len(means) for column in (1, 2))
    last = max(
        desired_pods(settings, kv, settings.kv_target, current),
        desired_pods(settings, waiting, settings.waiting_target, current),
    )
    wanted = (*(w for w in memory.wanted if w[0] > now_s - settings.stabilise_down_s), (now_s, last))
    settled = min(n for _, n in wanted) if last < current else last
    count = within_bounds(model, settled)
    reason = "metric_above_target" if count > current else "metric_below_target" if count < current else "steady"
    numbers = {"kv": kv, "waiting": waiting, "wanted": float(last)}
    return mixed_plan(count, reason, numbers), Memory(means=means, wanted=wanted)


@dataclass(frozen=True, slots=True, kw_only=True)
class AibrixKpaSettings:
    kv_target: Annotated[float, Between(0.01, 0.9, log=True)] = 0.5
    """Share of KV in use (AIBrix's sample)."""
    literal: bool = False
    """The mean of a pod is compared as if it were the total, and a panic is remembered for ever: the code as it is."""
    stable_window_s: Annotated[float, Between(60.0, 600.0, log=True)] = 180.0
    """AIBrix's default, as all that follow but the last two and the delay, which is the sample's."""
    panic_window_s: float = 60.0
    panic_threshold: float = 2.0
    """Panic when the mean of the short window is more than that many times that of the long one."""
    tolerance: float = 0.1
    rate_up: float = 2.0
    rate_down: float = 2.0
    scale_down_delay_s: Annotated[float, Between(0.0, 600.0)] = 180.0
    sync_s: float = 10.0
    stale_s: float = 30.0
    """A metric older than this is missing. Our choice."""
    max_num_seqs: Annotated[int, Between(32, 512, log=True)] = 256
    """Static max batch size: vLLM's default."""

    def __post_init__(self) -> None:
        above(0, self, "kv_target", "panic_window_s", "panic_threshold", "sync_s", "stale_s", "max_num_seqs")
        at_least(0, self, "tolerance", "scale_down_delay_s")
        above(1, self, "rate_up", "rate_down")
        if not self.panic_window_s <= self.stable_window_s:
            raise ValueError(
                f"panic_window_s is {self.panic_window_s}; it must be at most stable_window_s ({self.stable_window_s})"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class KpaMemory:
    """What ``aibrix-kpa`` remembers of one model."""

    means: tuple[tuple[float, float], ...] = ()
    """(time, mean share of KV in use) in the stable window."""
    panic_s: float = -inf
    """When there was last a reason to panic; -inf: there is no panic."""
    panic_pods: int = 0
    """Most that was asked for in this panic."""
    asked: tuple[tuple[float, int], ...] = ()
    """(time, pods) over the delay of scaling down."""


KpaState = dict[str, KpaMemory]


def kpa_pods(settings: AibrixKpaSettings, mean: float, pods: int) -> int:
    """For a mean share of KV of this many pods."""
    use = mean / settings.kv_target
    if abs(use - 1.0) <= settings.tolerance:
        return pods
    wanted = ceil(use) if settings.literal else ceil(pods * use)
    return min(max(wanted, floor(pods / settings.rate_down)), ceil(settings.rate_up * pods))


def decide_kpa(settings: AibrixKpaSettings, state: KpaState | None, view: FleetView) -> tuple[FleetPlan, KpaState]:
    """Every model by itself: one autoscaler each."""
    return each_model(_decide_kpa, KpaMemory, settings, state, view)


def _decide_kpa(
    settings: AibrixKpaSettings, memory: KpaMemory, model: ModelView, now_s: float
) -> tuple[ModelPlan, KpaMemory]:
    current = sum(model.planned.values())
    fresh = scraped(model, settings.stale_s)
    if fresh is None:
        return held(model), memory
    now = (now_s, sum(i.kv_used_tokens / i.kv_capacity_tokens for i in fresh) / len(fresh))
    means = (*(m for m in memory.means if m[0] > now_s - settings.stable_window_s), now)
    stable = sum(mean for _, mean in means) / len(means)
    recent = [mean for at_s, mean in means if at_s > now_s - settings.panic_window_s]
    panic = sum(recent) / len(recent)
    panic_s, panic_pods = memory.panic_s, memory.panic_pods
    if stable <= 0.0 or panic / stable > settings.panic_threshold:
        panic_s = now_s
    elif now_s - panic_s > settings.stable_window_s:
        panic_s = -inf
        panic_pods = panic_pods if settings.literal else 0
    count = kpa_pods(settings, stable, len(fresh))
    if panic_s > -inf:
        count = panic_pods = max(count, kpa_pods(settings, panic, len(fresh)), panic_pods)
    asked = (*(a for a in memory.asked if a[0] > now_s - settings.scale_down_delay_s), (now_s, count))
    settled = max(pods for _, pods in asked)
    count = within_bounds(model, settled)
    if panic_s > -inf and count >= current:
        reason = "panic"
    else:
        reason = "metric_above_target" if count > current else "metric_below_target" if count < current else "steady"
    numbers = {"stable": stable, "panic": panic, "wanted": float(settled)}
    return mixed_plan(count, reason, numbers), KpaMemory(
        means=means, panic_s=panic_s, panic_pods=panic_pods, asked=asked
    )


def make_aibrix(settings: AibrixSettings) -> Policy:
    return Policy(
        name="aibrix-apa",
        settings=settings,
        fleet=decide_fleet,
        fleet_period_s=settings.sync_s,
        initial_max_batch_size=settings.max_num_seqs,
    )


def make_aibrix_kpa(settings: AibrixKpaSettings) -> Policy:
    return Policy(
        name="aibrix-kpa",
        settings=settings,
        fleet=decide_kpa,
        fleet_period_s=settings.sync_s,
        initial_max_batch_size=settings.max_num_seqs,
    )
