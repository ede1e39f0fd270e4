"""The local loop: learn from scrapes, and set the max batch size of each instance."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from chiron.control.actuators import Actuators
from chiron.control.eviction import Evictor
from chiron.control.model import ModelState, local_view
from chiron.core.clock import VirtualClock
from chiron.core.kept import Kept
from chiron.core.ports import Journal
from chiron.core.types import Decision, Instance, Sample
from chiron.policies.policy import Policy
from chiron.policies.views import LocalDecision, TokenBudget

LEARN_PER_SCRAPE = 8
"""Instances whose scrape is learned from, per model and round: more say little new and cost time."""


class BatchSizes:
    """Asks the policy's ``batch_size`` hook at each scrape, and whenever what an instance serves has changed."""

    def __init__(
        self, *, clock: VirtualClock, journal: Journal, policy: Policy, actuators: Actuators, evictor: Evictor
    ) -> None:
        self._clock = clock
        self._journal = journal
        self._hook = policy.batch_size
        self._settings = policy.settings
        self._learned_hook = policy.learned_sizes
        self._restore_hook = policy.restore_sizes
        self._kept: dict[str, list[Kept]] = {}
        """By model: what earlier instances knew, for those to come."""
        self._actuators = actuators
        self._evictor = evictor

    def sampled(
        self,
        models: Mapping[str, ModelState],
        instances: Mapping[int, Instance],
        samples: Iterable[Sample],
        learned: dict[str, int],
    ) -> None:
        """A part of a round of scrapes. ``learned`` counts, by model, what the round has been learned from."""
        news: set[str] = set()
        fresh: list[Instance] = []
        for sample in samples:
            instance = instances.get(sample.instance_id)
            if instance is None or instance.state == "starting":
                continue
            state = models[instance.model]
            if instance.sample is not None and sample.taken_s <= instance.sample.taken_s:
                continue  # It was overtaken, or has come twice.
            before, instance.previous_sample, instance.sample = instance.sample, instance.sample, sample
            square = instance.prefill_square_total - instance.prefill_square_sampled
            instance.prefill_square_sampled = instance.prefill_square_total
            self._evictor.end_pause(state, instance)
            if before is None:
                continue
            fresh.append(instance)
            count = learned.get(instance.model, 0)
            if count < LEARN_PER_SCRAPE and sample.steps - before.steps >= 4:
                learned[instance.model] = count + 1
                news.add(instance.model)
                state.learner.observe(before, sample, square)
        for name in sorted(news):
            models[name].learner.publish()
        for instance in fresh:
            if instance.state == "ready":
                self.retune(models[instance.model], instance)

    def learned(self, state: ModelState) -> dict[str, Any]:
        """What the hook knows of each instance of a model, in the order of their ids, as plain data."""
        if self._learned_hook is None:
            return {}
        known = [state.instances[id].local for id in sorted(state.instances)]
        return {
            str(place): self._learned_hook(self._settings, each, self._clock.now_s) for place, each in enumerate(known)
        }

    def restore(self, model: str, kept: Kept) -> None:
        """The same of an earlier run: for the first so many instances that there will be."""
        if self._restore_hook is not None:
            self._kept[model] = [part for _, part in kept.parts()][::-1]

    def retune(self, state: ModelState, instance: Instance) -> None:
        """Ask for this instance's max batch size."""
        if self._hook is None:
            return
        if instance.local is None and self._restore_hook is not None and self._kept.get(instance.model):
            instance.local = self._restore_hook(self._settings, self._kept[instance.model].pop(), self._clock.now_s)
        view = local_view(state, instance, self._clock.now_s)
        decision, instance.local = self._hook(self._settings, instance.local, view)
        if decision is None:
            return
        before, size = self._actuators.batch_size(state, instance, decision)
        if size != before:
            self._tell(instance, before, size, decision)
        if decision.token_budget is not None and instance.kind.live_token_budget:
            self._set_token_budget(instance, decision.token_budget)
        if decision.evicts and instance.running_interactive:
            self._evictor.trim(state, instance)

    def _set_token_budget(self, instance: Instance, budget: TokenBudget) -> None:
        before, after = self._actuators.token_budget(instance, budget.max_num_batched_tokens)
        if after != before:
            decision = Decision(
                kind="token_budget",
                subject=f"{instance.model}#{instance.id}",
                before=before,
                after=after,
                reason=budget.reason,
                numbers=budget.numbers,
            )
            self._journal.decided(self._clock.now_s, decision)

    def _tell(self, instance: Instance, before: int, size: int, decision: LocalDecision) -> None:
        self._journal.decided(
            self._clock.now_s,
            Decision(
                kind="batch_size",
                subject=f"{instance.model}#{instance.id}",
                before=before,
                after=size,
                reason=decision.reason,
                numbers={"running": len(instance.requests), **decision.numbers},
            ),
        )
