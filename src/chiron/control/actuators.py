"""What happens to decisions about the fleet and about batch sizes: they are carried out, or only reported.

Which of the two is chosen at assembly. Under ``NullActuators`` the control plane decides and writes
down as always; the fleet stays as it was started, and engines and batch sizes stay as they were.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol, cast

from chiron.control.model import ModelState
from chiron.core.ports import StagedEngine, TokenBudgetEngine
from chiron.core.types import Instance, Role
from chiron.policies.views import LocalDecision


class Actuators(Protocol):
    def plan(self, state: ModelState, counts: dict[Role, int]) -> Mapping[Role, int] | None:
        """A plan for the fleet. Returns the one before; None: it is the first advice, which is worth a word also where
        it agrees with what there is."""

    def begin(self, instance: Instance) -> None:
        """Its engine is ready, and has not been told its max batch size."""

    def batch_size(self, state: ModelState, instance: Instance, decision: LocalDecision) -> tuple[int, int]:
        """A decision of the local loop. Returns the max batch size before and after."""

    def token_budget(self, instance: Instance, tokens: int) -> tuple[int, int]:
        """Another token budget for an engine that takes it while it runs. Returns the one before and the one after."""

    def stages(self, engine: StagedEngine, replicas: Sequence[int]) -> None:
        """A plan of the stage loop for one pipeline."""


class DirectActuators:
    """Plans become the fleet, limits go to routers and engines."""

    def plan(self, state: ModelState, counts: dict[Role, int]) -> Mapping[Role, int]:
        before, state.planned = state.planned, counts
        return before

    def begin(self, instance: Instance) -> None:
        assert instance.engine is not None
        instance.engine.set_max_batch_size(instance.max_batch_size)
        if instance.kind.live_token_budget:  # Always: another brain may have set a smaller one.
            cast(TokenBudgetEngine, instance.engine).set_max_num_batched_tokens(instance.max_num_batched_tokens)

    def batch_size(self, state: ModelState, instance: Instance, decision: LocalDecision) -> tuple[int, int]:
        if decision.prefill_limit_s != instance.prefill_limit_s:
            instance.prefill_limit_s = decision.prefill_limit_s
            instance.prefill_step_s = decision.prefill_step_s
            instance.prefill_share = decision.prefill_share
            state.router.changed(instance)
        if decision.batch_limit != instance.batch_limit:
            instance.batch_limit = decision.batch_limit
            state.router.changed(instance)
        before, size = instance.max_batch_size, _within(instance, decision)
        if size != before:
            instance.max_batch_size = state.batch_size_hint = size
            assert instance.engine is not None
            instance.engine.set_max_batch_size(size)
            state.router.changed(instance)
        return before, size

    def token_budget(self, instance: Instance, tokens: int) -> tuple[int, int]:
        before, after = instance.max_num_batched_tokens, _budget_within(instance, tokens)
        if after != before:
            instance.max_num_batched_tokens = after
            cast(TokenBudgetEngine, instance.engine).set_max_num_batched_tokens(after)
        return before, after

    def stages(self, engine: StagedEngine, replicas: Sequence[int]) -> None:
        engine.scale(replicas)


class NullActuators:
    """Nothing is touched."""

    def __init__(self) -> None:
        self._sizes: dict[int, int] = {}
        """Max batch size last reported of an instance."""
        self._budgets: dict[int, int] = {}
        """Likewise its token budget."""

    def plan(self, state: ModelState, counts: dict[Role, int]) -> Mapping[Role, int] | None:
        before, state.advised = state.advised or None, counts
        return before

    def begin(self, instance: Instance) -> None:
        """It keeps its own limit."""

    def batch_size(self, state: ModelState, instance: Instance, decision: LocalDecision) -> tuple[int, int]:
        before, size = self._sizes.get(instance.id, instance.max_batch_size), _within(instance, decision)
        self._sizes[instance.id] = size
        return before, size

    def token_budget(self, instance: Instance, tokens: int) -> tuple[int, int]:
        before = self._budgets.get(instance.id, instance.max_num_batched_tokens)
        after = self._budgets[instance.id] = _budget_within(instance, tokens)
        return before, after

    def stages(self, engine: StagedEngine, replicas: Sequence[int]) -> None:
        """It keeps the replicas it has."""


def _within(instance: Instance, decision: LocalDecision) -> int:
    return max(1, min(decision.max_batch_size, instance.kind.max_num_seqs))


def _budget_within(instance: Instance, tokens: int) -> int:
    return max(1, min(tokens, instance.kind.max_num_batched_tokens))
