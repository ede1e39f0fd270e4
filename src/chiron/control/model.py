"""The control plane's state of one model, and the views that policies get of it.

What never ran moves nothing. An arrival is load from the moment it comes, because a burst that waits must be able to
ask for instances; if it ends without having run (refused by an engine, taken back by its client before the first
token, failed) it is taken out of the second in which it was counted. What ran in part counts for what it ran: its
prompt, and as many output tokens as it had made. What Chiron shed for want of room is load all the same: an overload
that hid itself would never be cured. Lengths, classes and SLOs are learned from what ran only.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from math import inf, nan
from typing import Any, Final

from chiron.control.learning import Learner
from chiron.control.queue import BatchQueue, Sizes, WaitingQueue
from chiron.core.kept import Kept
from chiron.core.types import Instance, InstanceKind, ModelSpec, Request, RequestClass, Role, StartSource
from chiron.policies.defaults import arrival_order, earliest_first_token, least_outstanding
from chiron.policies.policy import Policy
from chiron.policies.queues.deadline_groups import batch_due_s
from chiron.policies.views import ArrivalView, FleetView, InstanceView, LocalView, ModelView, TokenBudget

DUE_SPAN_S: Final = 60.0
"""Batch requests that are due within as long count as due together."""
ITL_MISSED_KEPT_S: Final = 600.0
"""What a class missed of its ITL SLO counts for so long after its last request: a class that was only tried would
shrink batches for ever."""
SOURCES: Final[tuple[StartSource, ...]] = ("node", "disk", "peer", "memory")
COLD_START_PRIOR_S = 60.0
"""Look-ahead before the first start has been timed; the paper's upper end."""


class _Arrivals:
    """Arrivals of one class in one second, less those of them that turned out not to run."""

    __slots__ = ("cls", "input_square", "input_tokens", "requests", "second")

    def __init__(self, cls: RequestClass, second: int) -> None:
        self.cls = cls
        self.second = second
        self.requests = 0
        self.input_tokens = 0
        self.input_square = 0

    def add(self, tokens: int, sign: int) -> None:
        """Whole numbers: what is added and taken out again leaves nothing behind."""
        self.requests += sign
        self.input_tokens += sign * tokens
        self.input_square += sign * tokens * tokens


class ModelState:
    """Queues, instances, router and what has been learned, of one model."""

    def __init__(self, spec: ModelSpec, classes: tuple[RequestClass, ...], policy: Policy) -> None:
        self.spec = spec
        self.classes = {c.name: c for c in classes}
        self.learner = Learner(classes)
        settings = policy.settings
        self.router = (policy.place or least_outstanding)(settings, self.learner)
        order, order_batch = policy.order or earliest_first_token, policy.order_batch or arrival_order
        self.sizes = Sizes([kind.kv_capacity_tokens for kind in spec.kinds])
        self.waiting = WaitingQueue(lambda: order(settings, self.learner), self.sizes)
        self.holds_batch = policy.order_batch is not None
        self.batch = BatchQueue(lambda: order_batch(settings, self.learner), policy.group_span_s, self.sizes)
        self.batch_at_risk = False
        """By the last plan: batch work goes before requests that are lost."""
        self.passed_lost = 0
        """Batch requests that went before them, since one of them was dispatched."""
        self.instances: dict[int, Instance] = {}
        self.planned: dict[Role, int] = {"interactive": 0, "mixed": 0, "batch": 0}
        self.advised: dict[Role, int] = {}
        """The last plan, while plans are only journalled."""
        self.batch_size_hint = 0
        """Max batch size last set anywhere: where a new instance starts."""
        self.token_budget: TokenBudget | None = None
        """By the last plan: what new instances are started with; None: what their kind has."""
        self.renews = 0
        """Likewise: instances that take the place of those with a larger one."""
        self.kv_capacity_tokens = max(kind.kv_capacity_tokens for kind in spec.kinds)
        self.arrived_interactive = 0
        """All interactive ones that arrived, less those that turned out not to run: for the stage loop."""
        self._batch_open: dict[int, int] = {}
        """Batch requests that arrived and have not ended, by when they are due: for the stage loop."""
        self.attained = 0
        self.missed = 0
        self._itl_missed = {c.name: 0.0 for c in classes}
        self._itl_seen_s = {c.name: -inf for c in classes}
        """When a request of the class last finished."""
        self.cold_start_s = COLD_START_PRIOR_S
        self.cold_starts_seen = 0
        self.start_s: dict[StartSource, float] = {}
        """What starts from each source took, where the fleet tells sources."""
        self._starts_seen: dict[StartSource, int] = {}
        self.asleep: dict[str, int] = {}
        """Sleepers by name of their kind."""
        self.asleep_most = 0
        """How many there may be, by the last plan."""
        self._arrivals: dict[tuple[str, int], _Arrivals] = {}
        """By class and second, not yet seen by a fleet tick. Of a second that a tick has seen: what is taken back."""
        self._arriving = {c.name: _Arrivals(c, -1) for c in classes}
        """The latest of each class."""

    def measure_kinds(self) -> None:
        """KV capacities of the kinds, each that of its largest instance; as configured while there is none."""
        capacities = [self._capacity(kind) for kind in self.spec.kinds]
        self.sizes.told(capacities)
        self.kv_capacity_tokens = max(capacities)

    def _capacity(self, kind: InstanceKind) -> int:
        told = (instance.kv_capacity_tokens for instance in self.instances.values() if instance.kind is kind)
        return max(told, default=kind.kv_capacity_tokens)

    def clients_waiting(self, *, interactive: bool) -> int:
        """Requests without an instance whose clients wait, interactive or flex. Items of jobs are not among them."""
        return self.waiting.interactive if interactive else self.waiting.flex + self.batch.flex

    @property
    def itl_missed(self) -> float:
        """Share of finished interactive requests that missed their ITL SLO: an exponential mean over some 500, of the
        class where it is largest, among those that finished any lately."""
        return self.learner.itl_missed

    def arrived(self, request: Request) -> None:
        name = request.class_name
        arrivals = self._arriving[name]
        second = int(request.arrival_s)
        if arrivals.second != second:
            arrivals = self._arriving[name] = self._bin(name, second)
        arrivals.add(request.input_tokens, 1)
        if request.interactive:
            self.arrived_interactive += 1
        else:
            self._count_batch(request, 1)
        request.counted = True

    def _count_batch(self, request: Request, sign: int) -> None:
        due = int(batch_due_s(request) // DUE_SPAN_S)
        count = self._batch_open.get(due, 0) + sign
        if count:
            self._batch_open[due] = count
        else:
            del self._batch_open[due]

    def batch_due(self) -> tuple[tuple[float, int], ...]:
        """(due, requests) of all batch work that has not ended, announced or here, earliest first."""
        sums = {due * DUE_SPAN_S: count for due, count in self._batch_open.items()}
        for deadline_s, count in self.batch.announced_due():
            sums[deadline_s] = sums.get(deadline_s, 0) + count
        return tuple(sorted(sums.items()))

    def arrivals(self, now_s: float) -> list[_Arrivals]:
        """Of full seconds, since they were last forgotten."""
        return [a for a in self._arrivals.values() if a.second < int(now_s) and (a.requests or a.input_tokens)]

    def end_interval(self, now_s: float) -> None:
        """What has been seen is not seen again. The second under way has not been."""
        self._arrivals = {key: a for key, a in self._arrivals.items() if a.second >= int(now_s)}
        self.attained = self.missed = 0
        self.learner.itl_missed = self._most_itl_missed(now_s)

    def _most_itl_missed(self, now_s: float) -> float:
        most = 0.0
        for name, missed in self._itl_missed.items():
            if missed > most and now_s - self._itl_seen_s[name] <= ITL_MISSED_KEPT_S:
                most = missed
        return most

    def _bin(self, name: str, second: int) -> _Arrivals:
        found = self._arrivals.get((name, second))
        if found is None:
            found = self._arrivals[name, second] = _Arrivals(self.classes[name], second)
        return found

    def ended(self, request: Request) -> None:
        name, outcome = request.class_name, request.outcome
        if request.counted and not request.interactive:
            self._count_batch(request, -1)
        shed = outcome == "shed"
        if not (shed or outcome == "finished" or (outcome == "cancelled" and request.ran)):
            if request.counted:
                self.arrived_interactive -= request.interactive
                self._bin(name, int(request.arrival_s)).add(request.input_tokens, -1)
            return
        if not request.interactive:
            return
        if outcome != "finished":
            # Why it was cut off is not known. What it had to wait for its first token is.
            self.missed += shed or request.first_token_s - request.arrival_s > request.ttft_slo_s
            return
        tokens = request.tokens_done
        slow = tokens > 1 and request.finish_s - request.first_token_s > request.itl_slo_s * (tokens - 1)
        missed = self._itl_missed[name]
        self._itl_missed[name] = missed + 0.002 * (slow - missed)
        self._itl_seen_s[name] = request.finish_s
        self.learner.itl_missed = self._most_itl_missed(request.finish_s)
        late = request.first_token_s - request.arrival_s > request.ttft_slo_s or request.finish_s > request.deadline_s
        if slow or late:
            self.missed += 1
        else:
            self.attained += 1

    def learned(self, now_s: float) -> dict[str, Any]:
        """As plain data."""
        return {
            "learner": self.learner.learned(),
            "itl_missed": {
                name: missed
                for name, missed in self._itl_missed.items()
                if now_s - self._itl_seen_s[name] <= ITL_MISSED_KEPT_S
            },
            "cold_start_s": self.cold_start_s,
            "cold_starts_seen": self.cold_starts_seen,
            "starts": {source: [self._starts_seen[source], took_s] for source, took_s in self.start_s.items()},
            "batch_size_hint": self.batch_size_hint,
        }

    def restore(self, kept: Kept, now_s: float) -> None:
        """What an earlier run has learned, as far as it is sound."""
        self.learner.restore(kept.part("learner"))
        missed = kept.part("itl_missed")
        for name in self._itl_missed:
            if name in missed:
                self._itl_missed[name] = missed.number(name, 0.0, 1.0) or 0.0
                self._itl_seen_s[name] = now_s
        self.learner.itl_missed = self._most_itl_missed(now_s)
        seen = kept.whole("cold_starts_seen", 0, 1_000_000_000)
        took_s = kept.number("cold_start_s", 0.0, 86400.0)
        if seen and took_s is not None:
            self.cold_starts_seen, self.cold_start_s = seen, took_s
        starts = kept.part("starts")
        for source in SOURCES:
            pair = starts.numbers(source, 0.0, 1e9, least=2, most=2) if source in starts else None
            if pair is not None and pair[0] >= 1.0 and pair[1] <= 86400.0:
                self._starts_seen[source], self.start_s[source] = int(pair[0]), pair[1]
        most = max(kind.max_num_seqs for kind in self.spec.kinds)
        self.batch_size_hint = kept.whole("batch_size_hint", 0, most) or 0

    def started(self, instance: Instance) -> None:
        """Learn the cold start from the time that this one took, without what it waited before."""
        took_s = instance.ready_s - instance.began_s
        if took_s <= 0.0:
            return
        source = instance.source
        if source:
            self._starts_seen[source] = seen = self._starts_seen.get(source, 0) + 1
            before_s = self.start_s.get(source, took_s)
            self.start_s[source] = before_s + (took_s - before_s) / min(seen, 5)
        if source == "memory":
            return
        self.cold_starts_seen += 1
        weight = 1.0 / min(self.cold_starts_seen, 5)
        self.cold_start_s += weight * (took_s - self.cold_start_s)


def instance_view(instance: Instance, now_s: float) -> InstanceView:
    sample, before = instance.sample, instance.previous_sample
    itl_s = nan
    if sample is not None and before is not None and sample.steps > before.steps:
        itl_s = (sample.busy_s - before.busy_s) / (sample.steps - before.steps)
    since_s = instance.ready_s if instance.ready_s >= 0.0 else instance.created_s
    return InstanceView(
        id=instance.id,
        role=instance.role,
        state=instance.state,
        age_s=now_s - since_s,
        dispatched=len(instance.requests),
        dispatched_interactive=instance.running_interactive,
        max_batch_size=instance.max_batch_size,
        kv_capacity_tokens=instance.kv_capacity_tokens,
        sample_age_s=now_s - sample.taken_s if sample else inf,
        running=sample.running if sample else 0,
        waiting=sample.waiting if sample else 0,
        waiting_tokens=sample.waiting_tokens if sample else 0,
        head_tokens=sample.head_tokens if sample else 0,
        kv_used_tokens=sample.kv_used_tokens if sample else 0,
        itl_s=itl_s,
        gpus=instance.gpus,
    )


def takes_budget(kind: InstanceKind) -> bool:
    """Whether its engine can be given a token budget at all."""
    return kind.start_token_budget or kind.live_token_budget


def first_budget(state: ModelState, kind: InstanceKind) -> int:
    """Token budget that an instance of this kind has at its start."""
    most = kind.max_num_batched_tokens
    if state.token_budget is None or not takes_budget(kind):
        return most
    return max(1, min(state.token_budget.max_num_batched_tokens, most))


def over_budget(state: ModelState, instance: Instance) -> bool:
    """Whether it keeps a larger token budget than new ones get."""
    kind = instance.kind
    return not kind.live_token_budget and instance.max_num_batched_tokens > first_budget(state, kind)


def _over_budget(state: ModelState) -> int:
    if state.token_budget is None:
        return 0
    return sum(1 for i in state.instances.values() if i.state in ("starting", "ready") and over_budget(state, i))


def model_view(state: ModelState, now_s: float, *, peek: bool) -> ModelView:
    """A snapshot; unless it only peeks, it ends the interval over which arrivals and outcomes are counted."""
    spec, kind = state.spec, state.spec.kinds[0]
    arrivals = tuple(
        ArrivalView(
            second=a.second,
            cls=a.cls,
            requests=a.requests,
            input_tokens=float(a.input_tokens),
            input_square=float(a.input_square),
        )
        for a in state.arrivals(now_s)
    )
    view = ModelView(
        name=spec.name,
        min_instances=spec.min_instances,
        max_instances=spec.max_instances,
        gpu=kind.gpu,
        gpus_per_instance=kind.gpus,
        price_per_hour=kind.gpus * kind.price_per_gpu_hour,
        kv_capacity_tokens=kind.kv_capacity_tokens,
        max_num_seqs=kind.max_num_seqs,
        max_num_batched_tokens=kind.max_num_batched_tokens,
        planned=dict(state.planned),
        instances=tuple(instance_view(i, now_s) for i in state.instances.values()),
        arrivals=arrivals,
        mixes=tuple(mix.view() for mix in state.learner.mixes.values()),
        waiting_interactive=len(state.waiting),
        waiting_input_tokens=float(state.waiting.input_tokens),
        waiting_input_square=state.waiting.input_square,
        oldest_wait_s=max(0.0, now_s - state.waiting.oldest_arrival_s()),
        groups=state.batch.views(state.learner.expected_output),
        running_batch=sum(len(i.batch) for i in state.instances.values()),
        attained=state.attained,
        missed=state.missed,
        itl_missed=state.itl_missed,
        step_times=state.learner.step_times,
        cold_start_s=state.cold_start_s,
        cold_starts_seen=state.cold_starts_seen,
        start_s=dict(state.start_s),
        asleep=sum(state.asleep.values()),
        over_budget=_over_budget(state),
    )
    if not peek:
        state.end_interval(now_s)
    return view


def fleet_view(
    now_s: float,
    since_s: float,
    states: Iterable[ModelState],
    gpus_max: Mapping[str, float],
    *,
    peek: bool = False,
) -> FleetView:
    models = tuple(model_view(s, now_s, peek=peek) for s in states)
    return FleetView(now_s=now_s, since_s=since_s, models=models, gpus_max=gpus_max)


def local_view(state: ModelState, instance: Instance, now_s: float) -> LocalView:
    sample, before = instance.sample, instance.previous_sample
    itl_s, decode_batch, throughput = nan, 0.0, 0.0
    if sample is not None and before is not None and sample.steps > before.steps:
        steps = sample.steps - before.steps
        decoded = sample.decode_tokens - before.decode_tokens
        itl_s = (sample.busy_s - before.busy_s) / steps
        decode_batch = decoded / steps
        throughput = decoded / (sample.taken_s - before.taken_s)
    classes = state.classes
    counts = {name: count for name, count in instance.class_counts.items() if count > 0}
    seen = state.learner.seen_names()
    running = [classes[name] for name in counts]
    if instance.role != "batch":
        # Room on the others is kept for interactive requests, so their SLO holds there at any time.
        running.extend(classes[name] for name in seen if classes[name].interactive)
    return LocalView(
        now_s=now_s,
        role=instance.role,
        max_batch_size=instance.max_batch_size,
        max_num_seqs=instance.kind.max_num_seqs,
        max_num_batched_tokens=instance.max_num_batched_tokens,
        token_budget_max=instance.kind.max_num_batched_tokens,
        prefill_limit_s=instance.prefill_limit_s,
        batch_limit=instance.batch_limit,
        batch_waits=state.batch.count > 0 or bool(state.batch.announced),
        itl_missed=state.itl_missed,
        dispatched=len(instance.requests),
        at_cap=instance.sequences >= instance.max_batch_size,
        itl_slo_s=min((c.itl_s for c in running), default=inf),
        itl_s=itl_s,
        decode_batch=decode_batch,
        throughput=throughput,
        class_counts=counts,
        mixes={name: state.learner.mix_views[name] for name in dict.fromkeys((*seen, *counts))},
        step_times=state.learner.step_times,
        learned=state.learner.trusted,
    )
