"""What happened to each row of a plan, as columns, while it happens and afterwards."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import numpy as np

from chiron.core.types import Outcome
from chiron.load.exchange import Exchange
from chiron.load.plan import LoadPlan
from chiron.telemetry.run_data import OUTCOMES
from chiron.workload.types import Floats

ERROR_KINDS_MAX = 50
OTHER = "other errors"
UNFINISHED = OUTCOMES.index("unfinished")
_OUTCOME = {name: index for index, name in enumerate(OUTCOMES)}


@dataclass(frozen=True, slots=True, kw_only=True)
class ClassProgress:
    """One class, so far. Seconds; nan without data."""

    name: str
    planned: int
    sent: int
    done: int
    failed: int
    ttft_p50_s: float
    ttft_p99_s: float
    itl_p50_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """A run, so far."""

    elapsed_s: float
    total_s: float
    """When the last request is due to be sent."""
    planned: int
    sent: int
    running: int
    done: int
    not_sent: int
    late_max_s: float
    sent_per_s: float
    """Over the last few seconds."""
    errors: dict[str, int]
    classes: tuple[ClassProgress, ...]
    jobs: tuple[str, ...]
    """A line per batch job."""
    stopping: bool


class Record:
    """Columns as long as the plan's workload. Seconds since the start of the run; -1 for what never happened."""

    def __init__(self, plan: LoadPlan) -> None:
        count = len(plan.workload)
        self.due_s = plan.workload.arrival_s.copy()
        """When each was to be sent; of a call that waits for others, once they have ended."""
        self.sent_s = np.full(count, -1.0)
        self.first_s = np.full(count, -1.0)
        self.last_s = np.full(count, -1.0)
        self.input_tokens = plan.workload.input_tokens.copy()
        """As counted by the server where it said so."""
        self.output_tokens = np.zeros(count, dtype=np.int64)
        self.counted = np.zeros(count, dtype=np.bool_)
        """The server's usage said how many tokens there were."""
        self.outcome = np.full(count, UNFINISHED, dtype=np.int8)
        self.status = np.zeros(count, dtype=np.int16)
        self.gap_p99_s = np.full(count, np.nan)
        self.gap_max_s = np.full(count, np.nan)
        self.attempted = np.zeros(count, dtype=np.bool_)
        """Its time came before the run was stopped."""
        self.errors: Counter[str] = Counter()
        self.examples: dict[str, str] = {}
        """The first message of each kind of error."""
        self.not_sent = 0
        """Held back because too many were in flight."""
        self.sent = 0
        self.done = 0
        self._plan = plan

    def ended(self, exchange: Exchange, start_s: float) -> None:
        """A single request is over. ``start_s``: the run's start, in the exchange's clock."""
        row = exchange.row
        assert exchange.outcome is not None
        self.done += 1
        self.outcome[row] = _OUTCOME[exchange.outcome]
        self.status[row] = exchange.status
        if exchange.first_s:
            self.first_s[row] = exchange.first_s - start_s
            self.last_s[row] = exchange.last_s - start_s
        if exchange.completion_tokens >= 0:
            self.counted[row] = True
            self.input_tokens[row] = exchange.prompt_tokens
            self.output_tokens[row] = exchange.completion_tokens
        else:
            self.output_tokens[row] = exchange.pieces
        if exchange.gaps:
            ordered = sorted(exchange.gaps)
            self.gap_max_s[row] = ordered[-1]
            self.gap_p99_s[row] = ordered[min(len(ordered) - 1, int(0.99 * len(ordered)))]
        if exchange.error:
            self.fault(exchange.error, exchange.message)

    def held_back(self, row: int) -> None:
        """A request that was due and not sent, for the limit of requests in flight."""
        self.not_sent += 1
        self.attempted[row] = True
        self.outcome[row] = _OUTCOME["failed"]
        self.fault("not sent", "as many requests were in flight as are allowed (--in-flight-max)")

    def item(self, row: int, outcome: Outcome, at_s: float, tokens: tuple[int, int] | None, error: str = "") -> None:
        """An item of a batch job is over; ``tokens``: prompt and output, if the server counted them."""
        self.outcome[row] = _OUTCOME[outcome]
        self.last_s[row] = at_s
        if tokens is not None:
            self.counted[row] = True
            self.input_tokens[row], self.output_tokens[row] = tokens
        if error:
            self.fault(error, "")

    def fault(self, kind: str, message: str) -> None:
        """Count an error. The number of kinds is bounded: a server's codes are not ours."""
        if kind not in self.errors and len(self.errors) >= ERROR_KINDS_MAX:
            kind = OTHER
        self.errors[kind] += 1
        self.examples.setdefault(kind, message)

    def late_s(self) -> Floats:
        """How long after its time each single request was sent."""
        rows = self._plan.single
        rows = rows[self.sent_s[rows] >= 0]
        return np.maximum(self.sent_s[rows] - self.due_s[rows], 0.0)

    def by_class(self) -> tuple[ClassProgress, ...]:
        """The classes, so far."""
        work = self._plan.workload
        finished = self.outcome == 0
        ttft_s = np.where(self.first_s >= 0, self.first_s - self.due_s, np.nan)
        streamed = finished & (self.output_tokens > 1) & (self.first_s >= 0)
        itl_s = np.full(len(work), np.nan)
        np.divide(self.last_s - self.first_s, self.output_tokens - 1, out=itl_s, where=streamed)
        made = []
        for index, cls in enumerate(work.classes):
            mine = work.cls == index
            made.append(
                ClassProgress(
                    name=cls.name,
                    planned=int(mine.sum()),
                    sent=int((mine & (self.sent_s >= 0)).sum()),
                    done=int((mine & (self.outcome != UNFINISHED)).sum()),
                    failed=int((mine & (self.outcome != UNFINISHED) & ~finished).sum()),
                    ttft_p50_s=quantile(ttft_s[mine], 0.5),
                    ttft_p99_s=quantile(ttft_s[mine], 0.99),
                    itl_p50_s=quantile(itl_s[mine], 0.5),
                )
            )
        return tuple(made)


def quantile(values: Floats, share: float) -> float:
    """Of the values that are not nan; nan without one."""
    seen = values[~np.isnan(values)]
    return float(np.quantile(seen, share)) if len(seen) else float("nan")
