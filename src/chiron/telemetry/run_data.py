"""What is recorded of one run: every request as columns, the fleet over time, every decision, and the figures."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from chiron.core.types import RequestClass
from chiron.telemetry.format import amount, percent

OUTCOMES = ("finished", "rejected", "failed", "cancelled", "unfinished", "shed")
BLAMELESS = ("rejected",)
"""Outcomes that are neither attained nor missed: something was wrong with the request itself."""
EXCUSED = ("cancelled", "unfinished")
"""Of a live run these count only if an SLO was missed by then: the client left in time, or may yet be served."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class RequestTable:
    """Every request of a run, in order of arrival; columns of equal length. Calls that a program never came to make are
    not among them."""

    model: npt.NDArray[np.int16]
    """Index into ``Result.models``."""
    cls: npt.NDArray[np.int16]
    """Index into ``Result.classes``."""
    arrival_s: npt.NDArray[np.float64]
    dispatch_s: npt.NDArray[np.float64]
    """First dispatch; -1 if none, as in the next two."""
    first_token_s: npt.NDArray[np.float64]
    finish_s: npt.NDArray[np.float64]
    deadline_s: npt.NDArray[np.float64]
    """Absolute; inf without one."""
    input_tokens: npt.NDArray[np.int64]
    output_tokens: npt.NDArray[np.int64]
    outcome: npt.NDArray[np.int8]
    """Index into ``OUTCOMES``."""
    evictions: npt.NDArray[np.int16]

    def __repr__(self) -> str:
        return f"RequestTable({len(self.arrival_s):,} requests)"

    def ttft_s(self) -> npt.NDArray[np.float64]:
        """Seconds to the first token; nan where there was none."""
        return np.where(self.first_token_s >= 0, self.first_token_s - self.arrival_s, np.nan)

    def itl_s(self) -> npt.NDArray[np.float64]:
        """Mean seconds between a request's tokens; nan with fewer than two tokens or no finish.

        A request that finished without a first token being seen (a batch job tells only its results) has none."""
        gaps = self.output_tokens - 1
        with np.errstate(divide="ignore", invalid="ignore"):
            mean = (self.finish_s - self.first_token_s) / gaps
        return np.where((self.outcome == 0) & (gaps > 0) & (self.first_token_s >= 0), mean, np.nan)

    def attained(self, classes: tuple[RequestClass, ...]) -> npt.NDArray[np.bool_]:
        """Finished, with TTFT, mean ITL and deadline all met. One token has no ITL to miss."""
        ttft = np.array([c.ttft_s for c in classes])[self.cls]
        itl = np.array([c.itl_s for c in classes])[self.cls]
        itl_seen = np.nan_to_num(self.itl_s(), nan=0.0)
        on_time: npt.NDArray[np.bool_] = (
            (self.outcome == 0)
            & (self.first_token_s - self.arrival_s <= ttft)
            & (itl_seen <= itl)
            & (self.finish_s <= self.deadline_s)
        )
        return on_time

    def judged(self, classes: tuple[RequestClass, ...], now_s: float | None = None) -> npt.NDArray[np.bool_]:
        """All but those that can be held against nobody: something was wrong with the request itself. With ``now_s``
        also those whose client left before an SLO was missed, or that are still open then and not late yet."""
        blameless: npt.NDArray[np.bool_] = ~np.isin(self.outcome, [OUTCOMES.index(name) for name in BLAMELESS])
        if now_s is None:
            return blameless
        ttft = np.array([c.ttft_s for c in classes])[self.cls]
        finish_s = np.where(self.outcome == OUTCOMES.index("unfinished"), now_s, self.finish_s)
        first_s = np.where(self.first_token_s >= 0, self.first_token_s, finish_s)
        broken = (first_s - self.arrival_s > ttft) | (finish_s > self.deadline_s)
        pending = np.isin(self.outcome, [OUTCOMES.index(name) for name in EXCUSED])
        held: npt.NDArray[np.bool_] = (~pending | broken) & blameless
        return held


@dataclass(frozen=True, slots=True, kw_only=True)
class ProgramPoint:
    """One program (an agent, a chat) that began, from its arrival to the end of its last call."""

    kind: str
    """Its name in the scenario."""
    start_s: float
    finish_s: float
    """-1: not all of its calls finished."""
    deadline_s: float
    """Absolute; inf without one."""
    calls: int
    """That it makes if all finish."""
    calls_finished: int
    output_tokens: int
    """Of those."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FleetPoint:
    """One model's fleet at one moment (one row per model and fleet tick)."""

    t_s: float
    model: str
    ready: dict[str, int]
    """Ready instances by role: interactive, mixed, batch."""
    starting: int
    draining: int
    gpus: int
    """GPUs billed: starting, ready and draining instances."""
    planned: int
    """Instances that the policy wants."""
    running_interactive: int
    running_batch: int
    waiting_interactive: int
    waiting_batch: int
    ibp: float
    """Interactive backpressure; nan where the policy has none, as for the next two."""
    ibp_target: float
    bbp: float
    groups: tuple[tuple[float, int], ...]
    """Queued batch groups: (deadline, requests), earliest first; at most 16."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchSizePoint:
    """One instance's max batch size from ``t_s`` on: when it became ready, at each change, and when it was gone."""

    t_s: float
    instance_id: int
    model: str
    max_batch_size: int
    """0: the instance is gone."""
    running: int
    itl_s: float
    """Measured when it changed; nan if unknown."""
    itl_slo_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class DecisionPoint:
    """A decision with its reason and numbers, as logged."""

    t_s: float
    kind: str
    subject: str
    before: float
    after: float
    reason: str
    numbers: dict[str, float]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class RunData:
    """One policy, one seed."""

    policy: str
    seed: int | None
    """None of a live run: nothing in it was drawn."""
    scenario: str
    """Name of the scenario."""
    scenario_text: str
    """The scenario as TOML; of a simulation: with policy and seed it reproduces the run."""
    settings: dict[str, Any]
    """The policy's settings, all of them."""
    models: tuple[str, ...]
    classes: tuple[RequestClass, ...]
    summary: dict[str, Any]
    """The object that ``--json`` writes (``data/result.schema.json``)."""
    requests: RequestTable
    fleet: tuple[FleetPoint, ...]
    batch_sizes: tuple[BatchSizePoint, ...]
    decisions: tuple[DecisionPoint, ...]
    programs: tuple[ProgramPoint, ...] = ()
    """In order of arrival."""
    began: str | None = None
    """Of a live run the wall time at second 0, as ``2026-01-31T12:41:00.000Z``."""


def headline(run: RunData) -> str:
    """One run in a line. Names are shortened: they may be of any length."""
    summary = run.summary
    parts = [f"policy={brief(run.policy)}", f"scenario={brief(run.scenario)}"]
    parts += [] if run.seed is None else [f"seed={run.seed}"]
    parts.append(f"{len(run.requests.arrival_s):,} requests")
    shares = list(summary.get("attainment", {}).values())
    parts += [f"{percent(min(shares))} in SLO in its worst class"] if shares else []
    hours = summary.get("gpu_hours")
    parts += [] if hours is None else [f"{amount(hours)} GPU-hours"]
    return ", ".join(parts)


def brief(name: str) -> str:
    """A name in quotes, of at most 40 characters."""
    return repr(name if len(name) <= 40 else f"{name[:39]}…")
