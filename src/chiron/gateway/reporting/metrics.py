"""Prometheus metrics, made from the journal and the control plane when somebody scrapes.

Names have the field's usual stems with the prefix ``chiron_``. Everything is one collector on a registry of its own,
so that two gateways in a process do not share anything.
"""

from __future__ import annotations

import asyncio
import platform
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from itertools import accumulate
from math import isfinite

from prometheus_client import CollectorRegistry, ProcessCollector, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from chiron.control.snapshot import PlaneSnapshot, Readers
from chiron.gateway.reporting.desired import desired
from chiron.gateway.reporting.journal import LiveJournal
from chiron.gateway.reporting.status import LeaderReport, StatusSources
from chiron.gateway.reporting.tally import SLOS, Histogram
from chiron.store.port import ENDED

CONTENT_TYPE = b"text/plain; version=0.0.4; charset=utf-8"
LAG_PERIOD_S = 0.25
LAG_KEPT = 40
"""Looks at the loop that the gauge covers: ten seconds."""

_CLASS = ("model", "class")
_INSTANCE = ("model", "instance_id")
"""Not ``instance``: that is Prometheus's own name for what it scrapes."""


class Metrics:
    """``render`` gives the page. ``around`` is asked at each scrape."""

    def __init__(self, plane: Readers, journal: LiveJournal, around: Callable[[], StatusSources]) -> None:
        self._registry = CollectorRegistry()
        self._registry.register(_Collector(plane, journal, around))
        ProcessCollector(registry=self._registry)

    def render(self) -> bytes:
        """Prometheus text format; ``CONTENT_TYPE`` goes with it."""
        return generate_latest(self._registry)


class LoopLag:
    """How late the event loop is with what is due: the first sign that it has too much to do."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._late_s: deque[float] = deque(maxlen=LAG_KEPT)
        self._due_s = loop.time() + LAG_PERIOD_S
        self._handle = loop.call_at(self._due_s, self._look)

    @property
    def worst_s(self) -> float:
        """The longest delay in the last ten seconds."""
        return max(self._late_s, default=0.0)

    def close(self) -> None:
        self._handle.cancel()

    def _look(self) -> None:
        now_s = self._loop.time()
        self._late_s.append(max(0.0, now_s - self._due_s))
        self._due_s = now_s + LAG_PERIOD_S
        self._handle = self._loop.call_at(self._due_s, self._look)


class _Collector(Collector):
    def __init__(self, plane: Readers, journal: LiveJournal, around: Callable[[], StatusSources]) -> None:
        self._plane = plane
        self._journal = journal
        self._around = around

    def describe(self) -> Iterable[Metric]:
        return ()

    def collect(self) -> Iterator[Metric]:
        around, plane = self._around(), self._plane.snapshot()
        yield from self._requests()
        yield from self._keys()
        yield from self._distributions()
        yield from self._queues(plane)
        yield from self._instances(plane)
        yield from self._fleet(around, plane)
        yield self._desired(around, plane)
        yield from self._cascades(around)
        yield from self._batches(around)
        yield from self._gateway(around, plane)

    def _requests(self) -> Iterator[Metric]:
        requests = CounterMetricFamily("chiron_requests", "Requests that ended.", labels=(*_CLASS, "outcome"))
        arrived = CounterMetricFamily("chiron_requests_arrived", "Requests that arrived.", labels=_CLASS)
        prompt = CounterMetricFamily(
            "chiron_prompt_tokens",
            "Prompt tokens of ended requests: their engines' count, else an estimate.",
            labels=_CLASS,
        )
        made = CounterMetricFamily("chiron_generation_tokens", "Output tokens of ended requests.", labels=_CLASS)
        evicted = CounterMetricFamily(
            "chiron_evictions", "Requests evicted from an instance, to resume later.", labels=_CLASS
        )
        retried = CounterMetricFamily(
            "chiron_retries", "Retries of ended requests after engine failures.", labels=_CLASS
        )
        labels = (*_CLASS, "slo")
        attained = CounterMetricFamily("chiron_slo_attained", "SLOs that ended requests met.", labels=labels)
        missed = CounterMetricFamily("chiron_slo_missed", "SLOs that ended requests missed.", labels=labels)
        for (model, name), tally in self._journal.tallies.items():
            key = (model, name)
            arrived.add_metric(key, tally.arrived)
            prompt.add_metric(key, tally.prompt_tokens)
            made.add_metric(key, tally.generation_tokens)
            evicted.add_metric(key, tally.evictions)
            retried.add_metric(key, tally.retries)
            for outcome, count in tally.outcomes.items():
                requests.add_metric((*key, outcome), count)
            for slo in SLOS:
                if tally.slos_met[slo] or tally.slos_missed[slo]:
                    attained.add_metric((*key, slo), tally.slos_met[slo])
                    missed.add_metric((*key, slo), tally.slos_missed[slo])
        yield from (requests, arrived, prompt, made, evicted, retried, attained, missed)

    def _keys(self) -> Iterator[Metric]:
        requests = CounterMetricFamily(
            "chiron_key_requests", "Requests of an API key that ended, batch items too.", labels=("key", "outcome")
        )
        prompt = CounterMetricFamily("chiron_key_prompt_tokens", "Their prompt tokens.", labels=("key",))
        made = CounterMetricFamily("chiron_key_generation_tokens", "Their output tokens.", labels=("key",))
        for key, tally in self._journal.keys.items():
            for outcome, count in tally.requests.items():
                requests.add_metric((key, outcome), count)
            prompt.add_metric((key,), tally.prompt_tokens)
            made.add_metric((key,), tally.generation_tokens)
        yield from (requests, prompt, made)

    def _distributions(self) -> Iterator[Metric]:
        ttft = _histogram("time_to_first_token_seconds", "From arrival to the first token.")
        itl = _histogram("inter_token_latency_seconds", "Mean between tokens, one observation per finished request.")
        e2e = _histogram("e2e_request_latency_seconds", "From arrival to the last token, of finished requests.")
        queue = _histogram("request_queue_time_seconds", "From arrival to the first dispatch, of ended requests.")
        for key, tally in self._journal.tallies.items():
            for family, seen in ((ttft, tally.ttft), (itl, tally.itl), (e2e, tally.e2e), (queue, tally.queue)):
                family.add_metric(key, _buckets(seen), seen.sum)
        yield from (ttft, itl, e2e, queue)

    def _queues(self, plane: PlaneSnapshot) -> Iterator[Metric]:
        running = GaugeMetricFamily("chiron_num_requests_running", "Requests on an instance.", labels=_CLASS)
        waiting = GaugeMetricFamily("chiron_num_requests_waiting", "Requests queued in the gateway.", labels=_CLASS)
        now = {model.spec.name: model.running for model in plane.models}
        for (model, name), tally in self._journal.tallies.items():
            count = now[model].get(name, 0)
            running.add_metric((model, name), count)
            waiting.add_metric((model, name), max(0, tally.arrived - tally.ended - count))
        yield from (running, waiting)

    def _instances(self, plane: PlaneSnapshot) -> Iterator[Metric]:
        size = GaugeMetricFamily("chiron_max_batch_size", "Most requests an instance may run now.", labels=_INSTANCE)
        load = GaugeMetricFamily(
            "chiron_instance_requests_running", "Requests on this instance.", labels=(*_INSTANCE, "kind")
        )
        kv = GaugeMetricFamily("chiron_kv_cache_usage_perc", "KV in use at the last scrape, 0..1.", labels=_INSTANCE)
        itl_slo = GaugeMetricFamily(
            "chiron_itl_slo_seconds", "Tightest ITL SLO of the requests on an instance.", labels=_INSTANCE
        )
        for instance in [instance for model in plane.models for instance in model.instances]:
            key = (instance.model, str(instance.id))
            size.add_metric(key, instance.max_batch_size)
            load.add_metric((*key, "interactive"), instance.running_interactive)
            load.add_metric((*key, "batch"), instance.running_batch)
            kv.add_metric(key, instance.kv_usage)
            if isfinite(instance.itl_slo_s):
                itl_slo.add_metric(key, instance.itl_slo_s)
        yield from (size, load, kv, itl_slo)

    def _fleet(self, around: StatusSources, plane: PlaneSnapshot) -> Iterator[Metric]:
        there = GaugeMetricFamily("chiron_instances", "Instances.", labels=("model", "role", "state"))
        planned = GaugeMetricFamily(
            "chiron_instances_planned", "Instances that the plan asks for.", labels=("model", "role")
        )
        pressure = {
            "ibp": GaugeMetricFamily("chiron_ibp", "Interactive backpressure.", labels=("model",)),
            "ibp_target": GaugeMetricFamily("chiron_ibp_target", "Its target.", labels=("model",)),
            "bbp": GaugeMetricFamily("chiron_bbp", "Batch backpressure.", labels=("model",)),
        }
        up = GaugeMetricFamily("chiron_model_ready", "1: the model has an instance that is ready.", labels=("model",))
        out = GaugeMetricFamily(
            "chiron_model_outage",
            "1: the model has no instance and none can start; requests get 503.",
            labels=("model",),
        )
        cold = GaugeMetricFamily("chiron_cold_start_seconds", "Measured cold start of an instance.", labels=("model",))
        for state in plane.models:
            model = state.spec.name
            up.add_metric((model,), state.is_ready)
            out.add_metric((model,), model in around.outages)
            counts: dict[tuple[str, str], int] = {}
            for instance in state.instances:
                key = (instance.role, instance.state)
                counts[key] = counts.get(key, 0) + 1
            for role, wanted in state.planned.items():
                planned.add_metric((model, role), wanted)
                for phase in ("starting", "ready", "draining"):
                    there.add_metric((model, role, phase), counts.get((role, phase), 0))
            plan = self._journal.plan_of(model)
            for name, family in pressure.items():
                if plan is not None and isfinite(value := getattr(plan, name)):
                    family.add_metric((model,), value)
            if state.cold_starts_seen:
                cold.add_metric((model,), state.cold_start_s)
        yield from (there, planned, *pressure.values(), cold, up, out)
        yield from self._starts(around, plane)
        yield from self._bills(plane.now_s)

    def _desired(self, around: StatusSources, plane: PlaneSnapshot) -> Metric:
        """Nothing where there is no number: whoever scales by it keeps what there is."""
        family = GaugeMetricFamily(
            "chiron_instances_desired",
            "Instances that there should be now, for KEDA and the like; absent while that is not known.",
            labels=("model", "kind"),
        )
        for each in desired(plane, self._journal, around):
            for kind, count in each.kinds.items():
                family.add_metric((each.model.spec.name, kind), count)
        return family

    def _starts(self, around: StatusSources, plane: PlaneSnapshot) -> Iterator[Metric]:
        labels = ("model", "kind")
        failures = CounterMetricFamily("chiron_instance_failures", "Instances that failed, at any age.", labels=labels)
        looping = GaugeMetricFamily("chiron_crash_looping", "1: starts of a kind keep failing.", labels=labels)
        for state in plane.models:
            model = state.spec.name
            for kind in state.spec.kinds:
                report = around.fleet.kinds.get(kind.name)
                if report is not None and (starts := report.starts) is not None:
                    failures.add_metric((model, kind.name), starts.failures_total)
                    looping.add_metric((model, kind.name), starts.state == "crash-looping")
        yield from (failures, looping)
        yield from self._sleepers(around, plane)

    def _sleepers(self, around: StatusSources, plane: PlaneSnapshot) -> Iterator[Metric]:
        """Of kinds that can sleep."""
        labels = ("model", "kind")
        asleep = GaugeMetricFamily("chiron_instances_asleep", "Engines that sleep in host memory.", labels=labels)
        memory = GaugeMetricFamily(
            "chiron_sleepers_memory_bytes", "Host memory that they take, by sleeper_gb.", labels=labels
        )
        wakes = CounterMetricFamily("chiron_instance_wakes", "Starts that woke one of them.", labels=labels)
        failures = CounterMetricFamily(
            "chiron_sleep_failures",
            "Engines that did not sleep or wake as they should and were stopped; lost: while they slept.",
            labels=(*labels, "what"),
        )
        took = GaugeMetricFamily("chiron_wake_seconds", "Measured time that a wake takes.", labels=("model",))
        for state in plane.models:
            model = state.spec.name
            kinds = [(kind.name, around.fleet.kinds.get(kind.name)) for kind in state.spec.kinds]
            for kind, sleep in [(kind, each.sleep) for kind, each in kinds if each is not None and each.sleep]:
                assert sleep is not None
                asleep.add_metric((model, kind), sleep.asleep)
                memory.add_metric((model, kind), sleep.memory_gb * 1e9)
                wakes.add_metric((model, kind), sleep.wakes)
                for what, count in (
                    ("sleep", sleep.failed_sleeps),
                    ("wake", sleep.failed_wakes),
                    ("lost", sleep.lost),
                ):
                    failures.add_metric((model, kind, what), count)
            if "memory" in state.start_s:
                took.add_metric((model,), state.start_s["memory"])
        yield from (asleep, memory, wakes, failures, took)

    def _bills(self, now_s: float) -> Iterator[Metric]:
        labels = ("model", "gpu")
        seconds = CounterMetricFamily(
            "chiron_gpu_seconds", "GPU-seconds of instances, from creation to end.", labels=labels
        )
        cost = CounterMetricFamily("chiron_gpu_cost", "Their cost, by price_per_gpu_hour.", labels=labels)
        recorder = self._journal.recorder
        for key, bill in recorder.billed(now_s).items() if recorder is not None else ():
            seconds.add_metric(key, bill.gpu_seconds)
            cost.add_metric(key, bill.cost)
        yield from (seconds, cost)

    def _cascades(self, around: StatusSources) -> Iterator[Metric]:
        """As their clients see them. The metrics of models have the two calls of a request one by one."""
        requests = CounterMetricFamily("chiron_cascade_requests", "Requests of clients to a cascade.", labels=_CLASS)
        escalated = CounterMetricFamily(
            "chiron_cascade_escalated", "Those for which the second model was asked.", labels=(*_CLASS, "reason")
        )
        answered = CounterMetricFamily(
            "chiron_cascade_answered", "Those that were answered, by which of its models.", labels=(*_CLASS, "by")
        )
        ttft = _histogram(
            "cascade_time_to_first_token_seconds", "From the client's request to what it can read of an answer first."
        )
        slo = CounterMetricFamily("chiron_cascade_ttft_slo", "By whether that met the SLO.", labels=(*_CLASS, "met"))
        for key, tally in around.cascades.items():
            requests.add_metric(key, tally.requests)
            for reason, count in tally.escalated.items():
                escalated.add_metric((*key, reason), count)
            answered.add_metric((*key, "first"), tally.answered_first)
            answered.add_metric((*key, "then"), tally.answered_then)
            ttft.add_metric(key, _buckets(tally.ttft), tally.ttft.sum)
            slo.add_metric((*key, "true"), tally.ttft_met)
            slo.add_metric((*key, "false"), tally.ttft_missed)
        yield from (requests, escalated, answered, ttft, slo)

    def _batches(self, around: StatusSources) -> Iterator[Metric]:
        items = GaugeMetricFamily("chiron_batch_items", "Items of open batches.", labels=("model", "state"))
        jobs = GaugeMetricFamily("chiron_batches", "Open batches.", labels=("model", "status"))
        counts: dict[tuple[str, str], int] = {}
        statuses: dict[tuple[str, str], int] = {}
        for batch in around.batches:
            if batch.status in ENDED:
                continue
            model, running = batch.model or "", around.batch_in_flight.get(batch.id, 0)
            pending = max(0, batch.total - batch.completed - batch.failed - running)
            parts = {"pending": pending, "running": running, "done": batch.completed, "failed": batch.failed}
            for state, count in parts.items():
                counts[model, state] = counts.get((model, state), 0) + count
            statuses[model, batch.status] = statuses.get((model, batch.status), 0) + 1
        for key, count in sorted(counts.items()):
            items.add_metric(key, count)
        for key, count in sorted(statuses.items()):
            jobs.add_metric(key, count)
        yield from (items, jobs)

    def _gateway(self, around: StatusSources, plane: PlaneSnapshot) -> Iterator[Metric]:
        decisions = CounterMetricFamily("chiron_decisions", "Decisions by reason.", labels=("kind", "reason"))
        for key, count in sorted(self._journal.decision_counts.items()):
            decisions.add_metric(key, count)
        responses = CounterMetricFamily("chiron_http_responses", "HTTP responses.", labels=("code",))
        for code, count in sorted(self._journal.responses.items()):
            responses.add_metric((str(code),), count)
        yield from (decisions, responses)
        yield CounterMetricFamily("chiron_migrations", "Requests migrated to another instance.", value=plane.migrations)
        yield CounterMetricFamily(
            "chiron_event_log_dropped_lines", "Lines that the event log lacks.", value=self._journal.dropped_lines
        )
        yield GaugeMetricFamily("chiron_open_connections", "Client connections.", value=around.connections)
        if around.relays_started:
            yield GaugeMetricFamily("chiron_relays", "Relay processes that serve clients.", value=len(around.relays))
            yield CounterMetricFamily("chiron_relay_starts", "Relay processes started.", value=around.relays_started)
        if around.leader is not None:
            yield from _leader(around.leader)
        yield GaugeMetricFamily(
            "chiron_event_loop_lag_seconds", "The event loop's worst delay in ten seconds.", value=around.loop_lag_s
        )
        build = GaugeMetricFamily("chiron_build_info", "Always 1.", labels=("version", "python", "policy", "advise"))
        advise = "true" if around.advise else "false"
        policy = around.policy or plane.policy
        build.add_metric((around.version, platform.python_version(), policy, advise), 1)
        yield build


def _leader(leader: LeaderReport) -> Iterator[Metric]:
    which = GaugeMetricFamily("chiron_leader_info", "Always 1: which gateway leads.", labels=("gateway", "address"))
    which.add_metric((leader.gateway, leader.address), 1)
    yield which
    yield GaugeMetricFamily("chiron_leader_term", "Higher with each brain that leads.", value=leader.term)
    yield GaugeMetricFamily(
        "chiron_leader_settling", "1 while a new brain waits for relays to tell what runs.", value=leader.settling
    )
    yield GaugeMetricFamily(
        "chiron_relays_missing", "Relays that are known and have not told what runs there.", value=leader.relays_missing
    )
    yield CounterMetricFamily(
        "chiron_relay_fallback_placements",
        "Placements that relays chose while they had no brain, as far as they have told.",
        value=leader.fallback_placements,
    )
    yield CounterMetricFamily(
        "chiron_relay_expired_requests",
        "Requests that relays gave up because they had no brain for too long, as far as they have told.",
        value=leader.expired_requests,
    )


def _histogram(stem: str, about: str) -> HistogramMetricFamily:
    return HistogramMetricFamily(f"chiron_{stem}", about, labels=_CLASS)


def _buckets(seen: Histogram) -> list[tuple[str, float]]:
    bounds = [*(str(bound) for bound in seen.bounds), "+Inf"]
    return [(bound, float(count)) for bound, count in zip(bounds, accumulate(seen.counts), strict=True)]
