"""Settings of ``chiron``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from chiron.policies.checks import above, at_least
from chiron.policies.queues.overload_settings import OverloadSettings
from chiron.policies.ranges import Between
from chiron.policies.routers.packing_settings import PackingSettings


@dataclass(frozen=True, slots=True, kw_only=True)
class ChironSettings:
    """Settings of ``chiron``. One set serves every workload that we publish figures for."""

    # Local loop.
    initial_max_batch_size: int = 128
    """Until step times are learned (a few seconds of traffic)."""
    itl_margin: Annotated[float, Between(0.7, 1.0)] = 0.9
    """Share of the ITL SLO that batch sizes aim at: the mean over an instance hides some spread over requests."""
    tune_batch_size: bool = True
    """Off: ``initial_max_batch_size`` for ever, as a static engine flag."""
    limit_prefill: bool = True
    """Bound the longest step by the prefill in flight where the ITL SLO is tighter than the engine's token budget."""
    limit_chunk: bool = True
    """Where short answers miss their ITL SLO because a step full of a long prompt's prefill is longer, engines get
    a smaller token budget: at once where they take it, else with the next start."""
    itl_missed_max: float = 0.003
    """Share of requests that may miss the ITL SLO before the aim is lowered."""
    itl_gain: float = 10.0
    """How much: 1 % of requests more lowers it by a tenth; at most by half."""
    # Dispatch.
    spread_long: bool = True
    """While more than ``itl_missed_max`` of the requests miss their ITL SLO, prompts that take longer than it go where
    the fewest requests are young, instead of where packing would have them."""
    spread: bool = True
    """While no batch work waits for room, interactive requests are spread over the instances that stay anyway; off:
    they are packed on as few as keep the SLOs."""
    packing: PackingSettings = PackingSettings()
    evict: bool = True
    """Interactive requests may evict batch work."""
    overload: OverloadSettings = OverloadSettings()
    group_span_s: float = 300.0
    """Batch requests whose deadlines share a span of this length form a request group."""
    # Global loop.
    tick_s: float = 5.0
    utilisation: Annotated[float, Between(0.7, 1.0)] = 0.95
    """Share of an instance's capacity that the interactive fleet is planned with."""
    miss_max: Annotated[float, Between(0.001, 0.01, log=True)] = 0.008
    """Share of each class's requests that may miss their SLOs, of the 1 % that 99 % attainment allows: what those leave
    that miss their ITL SLO, the backtest may let wait for too long, and a quarter of it in any case."""
    slack_share: Annotated[float, Between(0.3, 1.0)] = 0.8
    """Share of TTFT, less the prompt's own prefill, that waiting may take; the rest is the instance's own queue."""
    windows_s: tuple[int, ...] = (15, 60, 180, 600, 1800)
    """Averages of the load that the backtest chooses from."""
    settles_s: tuple[int, ...] = (60, 300, 1800)
    """Times to stay small before shrinking, likewise."""
    look_back: bool = True
    """Where the load comes back after some time, look that far back as well, if the backtest finds it cheaper."""
    memory_s: int = 3600
    """History that the backtest runs over."""
    backtest_s: float = 60.0
    """Time between backtests."""
    prior_load: float = 0.6
    """Load per instance that the fleet found at the start is taken to have carried for ``prior_s`` before."""
    prior_s: int = 600
    headroom_prior: float = 1.5
    """Headroom over the busiest minute so far, of the last ten, until there was a backtest."""
    prior_steady_s: float = 0.0
    """Above 0: once requests have come for longer than this, what that headroom has above one falls with the root of
    the time since the first. Off: it saves on most traffic, and cost azure its 99 % (docs/unseen.md)."""
    learning_s: float = 600.0
    """Traffic to be seen before the first backtest, seconds."""
    margin: float = 0.0
    """Added to the headroom that the past would have needed."""
    margin_unseen: float = 0.15
    """More of it while less than ``memory_s`` has been seen."""
    over_steady: float = 1.3
    """A fleet that follows the load is at most this many times the least that, held for the last hour, would have done;
    0: any number."""
    surge_slack: float = 2.0
    """A spike that will make requests wait for this many times what they can, before a start could end, is answered at
    once; 0: none is."""
    floor_over_load: float = 1.05
    """The fleet is never planned below this many times the last minute's load."""
    look_ahead: bool = True
    """The backtest's fleet follows the load one cold start late, as the real one does; off: at once."""
    adapt_headroom: bool = True
    """Off: ``headroom_prior`` over the 60 s mean, for ever."""
    keep_last_s: float = 300.0
    """The last instance stays this long after the last interactive request (with ``min_instances = 0``); at least a
    second."""
    sleepers: bool = True
    """Instances that are not needed sleep instead of being stopped, where the fleet can do that; off: they are
    stopped."""
    stale_s: float = 30.0
    """The fleet does not shrink while no engine has been scraped for this long."""
    hold_s: float = 30.0
    """Least time between changes in opposite directions."""
    # Batch.
    spare_trust: float = 0.6
    """Share of the spare capacity that deadlines may rely on before it has been measured."""
    start_share: float = 0.6
    """A batch instance is added when overdue work would fill this share of its time to the deadline."""
    batch_least_s: float = 30.0
    """Instances that would have no longer than this to work before the deadline are added only if there is so much
    work for each, or a cold start's worth, if that is longer; 0: however little there is."""
    fill: float = 0.85
    """Share of an added instance's time that the plan counts on."""
    deadline_margin: float = 0.1
    """Share of the time to each deadline that is kept in hand, besides one request's own duration."""
    risk_share: float = 0.1
    """Batch work goes before interactive requests that have missed their TTFT already, and is not evicted for them, if
    the fleet's present spare capacity will not finish it in time, nor would this share of the whole fleet."""
    apart_gain: float = 1.1
    """Spare instances are kept free of interactive requests for batch work where it gains at least this factor."""
    plan_batch: bool = True
    """Off: batch instances are added as soon as batch work queues (what the paper argues against)."""

    def __post_init__(self) -> None:
        for name in ("itl_margin", "utilisation", "slack_share", "miss_max", "spare_trust", "start_share", "fill"):
            if not 0 < getattr(self, name) <= 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be above 0 and at most 1")
        above(0, self, "tick_s", "backtest_s", "initial_max_batch_size", "memory_s", "group_span_s", "headroom_prior")
        at_least(
            0,
            self,
            "hold_s",
            "learning_s",
            "prior_s",
            "prior_load",
            "prior_steady_s",
            "margin",
            "margin_unseen",
            "itl_gain",
            "risk_share",
            "batch_least_s",
            "surge_slack",
        )
        if self.over_steady and not self.over_steady >= 1:
            raise ValueError(f"over_steady is {self.over_steady}; it must be 0, or 1 or more")
        if not 0 <= self.deadline_margin < 1:
            raise ValueError(f"deadline_margin is {self.deadline_margin}; it must be 0 or more and below 1")
