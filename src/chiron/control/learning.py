"""What the control plane learns of one model while it serves: step times and request lengths.

Step times: least squares, older scrapes fading, on what scrapes show. Over a scrape interval an engine was busy for::

    busy = fixed*steps + per_sequence*decode_tokens + per_context_token*context + per_prefill_token*n + per_square*n^2

Each scrape of a busy instance is one equation, divided by its own size so that relative errors count. A weak prior
(ridge) stands in for what the traffic has not shown; one or two hundred steps outweigh it. The learned form is linear
where engines have a knee: it holds around where they have been running, which is where it is used.

A scrape may be wrong (an engine miscounts, a stall is billed to a few steps), so none has much to say alone:

- Its size is the larger of what it shows and what the model expected: with that, neither side of its equation exceeds
  one, and no scrape weighs more than one, however far it is off.
- One that is off by more than a factor of ``OUTLIER`` waits for a second that is off in the same direction. One alone
  is noise, two are news; and both weigh less the further they are off.
- Hardware that really changed shows in every scrape, and in all coefficients alike: when the median of the last errors
  is beyond ``CHANGE``, all that is known is scaled by it, and fades.

Lengths: exponential means over about a thousand requests, by class: of prompts once their first token is there, of
outputs once they are over. What never ran teaches nothing.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import deque
from collections.abc import Sequence
from math import exp, inf, isfinite, log
from statistics import median
from typing import Any, Final

from chiron.core.kept import Kept
from chiron.core.types import Request, RequestClass, Sample
from chiron.policies.policy import Estimates, UsualSize
from chiron.policies.size import prefill_s
from chiron.policies.views import ClassMix, StepTimes

PRIOR = (0.012, 4e-5, 6e-8, 6e-5, 1.5e-9)
"""Weak: an 8B model on an A100, within a factor of a few for any other."""
PRIOR_OUTPUT_TOKENS = 200.0
PRIOR_INPUT_TOKENS = 1000.0
_RIDGE = 0.001
"""Weight of the prior: that of one equation with 3 % error against a prior sure within a factor of about two."""
_FADE = 0.998
"""Weight that an equation keeps when the next one comes: a few hundred are remembered."""
_MEMORY = 1000
"""Requests that a mean of lengths remembers."""
OUTLIER = 3.0
"""Factor between a scrape and the model beyond which it needs a second one like it."""
_FIRST = 8
"""Scrapes that are taken as they come, before there is a model to hold others against."""
_PATIENCE = 100
"""Scrapes for which one that was off waits for another."""
CHANGE = 1.4
"""Factor between scrapes and the model, as the median of the last ``_RECENT``, that no noise explains."""
_RECENT = 8
_KEPT = 0.02
"""Weight that what was known keeps after a change."""
_TRUSTED_UPDATES = 4
_Equation = tuple[list[float], float, float]
"""Coefficients in units of the prior, what they add up to, weight."""
LEAD_PRIOR = 0.1
"""Time from dispatch to first token before any was seen, beyond the request's own prefill: this share of TTFT."""
_COUNT_MAX: Final = 1_000_000_000_000
"""Most that is believed of what an earlier run has kept, as the next three."""
_TOKENS_MAX: Final = 1e8
_TIME_MAX_S: Final = 1e5
_SUM_MAX: Final = 1e6
_FEW = 0.02
"""Share of requests that may be shorter than ``output_low``: a request whose ITL SLO is a mean is at least so long."""
_TAIL = 0.05
"""Share of prompts that ``input_tail`` tells of at least, the longest."""
_FEW_SEEN = 500
"""Finished requests before anything is said of the shortest of them: as many as the share of missed ITL SLOs remembers,
so that packing starts no sooner than its misses would be noticed."""


class Mix:
    """Running means of one class's lengths."""

    __slots__ = (
        "cls",
        "counts",
        "finished",
        "input_counts",
        "input_mean",
        "input_square",
        "output_mean",
        "output_square",
        "seen",
    )

    def __init__(self, cls: RequestClass) -> None:
        self.cls = cls
        self.seen = 0
        self.finished = 0
        self.input_mean = PRIOR_INPUT_TOKENS
        self.input_square = 2 * PRIOR_INPUT_TOKENS**2
        self.output_mean = PRIOR_OUTPUT_TOKENS
        self.output_square = 2 * PRIOR_OUTPUT_TOKENS**2
        self.counts = [0.0] * 32
        """Outputs of 0, 1, 2-3, 4-7 ... tokens; all are halved when they reach twice the memory."""
        self.input_counts = [0.0] * 128
        """Prompts, in quarters of such spans, likewise."""

    def ran(self, input_tokens: int) -> None:
        self.seen += 1
        weight = 1.0 / (self.seen if self.seen < _MEMORY else _MEMORY)
        self.input_mean += weight * (input_tokens - self.input_mean)
        self.input_square += weight * (input_tokens * input_tokens - self.input_square)
        self.input_counts[_quarter(input_tokens)] += 1.0
        if self.seen % _MEMORY == 0:
            self.input_counts = [0.5 * count for count in self.input_counts]

    def made(self, output_tokens: int) -> None:
        self.finished += 1
        # The prior counts as ten requests: the first to finish are the short ones.
        weight = 1.0 / (self.finished + 10 if self.finished < _MEMORY else _MEMORY)
        self.output_mean += weight * (output_tokens - self.output_mean)
        self.output_square += weight * (output_tokens * output_tokens - self.output_square)
        self.counts[min(output_tokens.bit_length(), 31)] += 1.0
        if self.finished % _MEMORY == 0:
            self.counts = [0.5 * count for count in self.counts]

    def learned(self) -> dict[str, Any]:
        return {
            "seen": self.seen,
            "finished": self.finished,
            "input_mean": self.input_mean,
            "input_square": self.input_square,
            "output_mean": self.output_mean,
            "output_square": self.output_square,
            "counts": list(self.counts),
            "input_counts": list(self.input_counts),
        }

    def restore(self, kept: Kept) -> bool:
        """All or nothing: the figures belong together."""
        seen, finished = kept.whole("seen", 0, _COUNT_MAX), kept.whole("finished", 0, _COUNT_MAX)
        means = [kept.number(name, 0.0, _TOKENS_MAX) for name in ("input_mean", "output_mean")]
        squares = [kept.number(name, 0.0, _TOKENS_MAX**2) for name in ("input_square", "output_square")]
        counts = kept.numbers("counts", 0.0, _COUNT_MAX, least=32, most=32)
        # Those who kept it before they counted prompts have none.
        input_counts = kept.numbers("input_counts", 0.0, _COUNT_MAX, least=128, most=128)
        if seen is None or finished is None or counts is None or None in means or None in squares:
            return False
        self.seen, self.finished, self.counts = seen, finished, counts
        self.input_counts = input_counts or [0.0] * 128
        self.input_mean, self.output_mean = (mean or 0.0 for mean in means)
        self.input_square, self.output_square = (square or 0.0 for square in squares)
        return True

    def input_tail(self) -> tuple[tuple[float, float], ...]:
        """(tokens, share of prompts that are about so long) of the longest, longest first; empty until enough have been
        seen."""
        total = sum(self.input_counts)
        if total < _FEW_SEEN:
            return ()
        tail: list[tuple[float, float]] = []
        above = 0.0
        for index in range(len(self.input_counts) - 1, -1, -1):
            count = self.input_counts[index]
            if count >= 0.5:
                above += count
                tail.append((_quarter_middle(index), count / total))
                if above > _TAIL * total:
                    break
        return tuple(tail)

    def output_low(self) -> int:
        """Tokens that all but a few of the outputs have: a power of two. 1 until enough have been seen."""
        if self.finished < _FEW_SEEN:
            return 1
        few = _FEW * sum(self.counts)
        below = 0.0
        for bits, count in enumerate(self.counts):
            below += count
            if below > few:
                return 1 << bits >> 1 or 1
        return 1

    def view(self) -> ClassMix:
        variance = self.output_square - self.output_mean**2
        return ClassMix(
            cls=self.cls,
            input_tokens=self.input_mean,
            input_square=self.input_square,
            output_tokens=self.output_mean,
            output_sd=variance**0.5 if variance > 0 else 0.0,
            output_low=self.output_low(),
            input_tail=self.input_tail(),
            finished=self.finished,
        )


def _quarter(tokens: int) -> int:
    """Index of the span that holds this length: four of them from each power of two to the next."""
    bits = min(tokens.bit_length(), 31)
    return 4 * bits + ((tokens >> (bits - 3)) & 3 if bits >= 3 else 0)


def _quarter_middle(index: int) -> float:
    bits, quarter = divmod(index, 4)
    return (4.5 + quarter) * (1 << bits - 3) if bits >= 3 else 0.75 * (1 << bits)


class Lead:
    """The time from dispatch to first token, beyond a request's own prefill, that few of the last ones exceeded: the
    third longest of 64, and never more than half of TTFT, since one more patient would give up on everybody."""

    WINDOW: Final = 64
    RANK: Final = 3

    __slots__ = ("_recent", "_sorted", "most_s", "value_s")

    def __init__(self, ttft_s: float) -> None:
        self.most_s = 0.5 * ttft_s
        self.value_s = LEAD_PRIOR * ttft_s if isfinite(ttft_s) else 0.0
        self._recent: deque[float] = deque()
        self._sorted: list[float] = []

    def observe(self, time_s: float) -> None:
        self._recent.append(time_s)
        insort(self._sorted, time_s)
        if len(self._recent) > self.WINDOW:
            self._sorted.pop(bisect_left(self._sorted, self._recent.popleft()))
        elif len(self._recent) < self.WINDOW // 4:
            return
        self.value_s = min(self._sorted[-self.RANK], self.most_s)

    def learned(self) -> list[float]:
        return list(self._recent)


class Learner(Estimates):
    """Keeps what policies ask for each request up to date, of one model."""

    def __init__(self, classes: tuple[RequestClass, ...]) -> None:
        super().__init__(
            _step_times(PRIOR), max((c.ttft_s for c in classes if c.interactive and c.ttft_s != inf), default=inf)
        )
        self.ttft_told_s = min((c.ttft_s for c in classes if c.interactive), default=inf)
        self.mixes = {c.name: Mix(c) for c in classes}
        self.expected_output = {c.name: PRIOR_OUTPUT_TOKENS for c in classes}
        self.mix_views = {c.name: self.mixes[c.name].view() for c in classes}
        self._leads = {c.name: Lead(c.ttft_s) for c in classes}
        self.first_token_lead_s = {name: lead.value_s for name, lead in self._leads.items()}
        self.updates = 0
        self._seen = 0
        """Scrapes, those set aside included."""
        self._aside: tuple[int, float, _Equation] | None = None
        """The last scrape that was off: which one it was, the logarithm of its factor, what it says."""
        self._recent: deque[float] = deque(maxlen=_RECENT)
        """Logarithms of the factor between the last scrapes and the model."""
        # Normal equations for the coefficients in units of the prior.
        self._normal = [[0.0] * 5 for _ in range(5)]
        self._moment = [0.0] * 5
        self._values = list(PRIOR)
        self._prior = 1.0
        """Of each coefficient in its unit: another one on other hardware."""

    def learned(self) -> dict[str, Any]:
        """As plain data."""
        return {
            "classes": {
                name: {**mix.learned(), "lead_s": self._leads[name].learned()} for name, mix in self.mixes.items()
            },
            "usual": _means(self.usual),
            "usual_batch": _means(self.usual_batch),
            "steps": {
                "updates": self.updates,
                "prior": self._prior,
                "moment": list(self._moment),
                "normal": [value for row in self._normal for value in row],
            },
        }

    def restore(self, kept: Kept) -> None:
        """What an earlier run has learned, as far as it is sound; classes that are no longer there are passed over."""
        classes = kept.part("classes")
        for name, mix in self.mixes.items():
            if name not in classes:
                continue
            told = classes.part(name)
            if not mix.restore(told):
                continue
            self.expected_output[name] = mix.output_mean
            if mix.seen and mix.cls.interactive:
                self.ttft_min_s = min(self.ttft_min_s, mix.cls.ttft_s)
            for time_s in told.numbers("lead_s", 0.0, _TIME_MAX_S, least=0, most=Lead.WINDOW) or ():
                self._leads[name].observe(time_s)
            self.first_token_lead_s[name] = self._leads[name].value_s
        for name, usual in (("usual", self.usual), ("usual_batch", self.usual_batch)):
            if (means := kept.numbers(name, 0.0, _TOKENS_MAX**2, least=3, most=3)) is not None:
                usual.input_tokens, usual.input_square, usual.need_tokens = means
        self._restore_steps(kept.part("steps"))

    def _restore_steps(self, kept: Kept) -> None:
        updates = kept.whole("updates", 0, _COUNT_MAX)
        prior = kept.number("prior", 0.05, 50.0)
        moment = kept.numbers("moment", -_SUM_MAX, _SUM_MAX, least=5, most=5)
        normal = kept.numbers("normal", -_SUM_MAX, _SUM_MAX, least=25, most=25)
        if updates is None or prior is None or moment is None or normal is None:
            return
        rows = [normal[5 * i : 5 * i + 5] for i in range(5)]
        if not _is_normal(rows, prior):
            kept.drop("these are not sums of squares", "normal")
            return
        self.updates, self._prior, self._moment, self._normal = updates, prior, moment, rows
        self._seen = updates
        self.publish()

    @property
    def trusted(self) -> bool:
        return self.updates >= _TRUSTED_UPDATES

    def shortest_s(self, name: str) -> float:
        """What a mean answer of this class takes at the least: its steps without any other request."""
        return self.expected_output[name] * self.step_times.fixed_s if self.trusted else 0.0

    def seen_names(self) -> list[str]:
        """Classes that this model has had requests of; all of them before the first. SLOs of
        another model do not matter to this one."""
        return [name for name, mix in self.mixes.items() if mix.seen] or list(self.mixes)

    def ran(self, request: Request) -> None:
        """An engine made its first token."""
        name, tokens = request.class_name, request.input_tokens
        mix = self.mixes[name]
        mix.ran(tokens)
        usual = self.usual if request.interactive else self.usual_batch
        usual.ran(tokens, tokens + self.expected_output[name])
        if request.interactive and mix.seen == 1:
            # As configured: what one client asked for must not hold everybody else up.
            self.ttft_min_s = min(self.ttft_min_s, mix.cls.ttft_s)

    def made(self, request: Request) -> None:
        """It is over, and ``tokens_done`` is what it made."""
        mix = self.mixes[request.class_name]
        mix.made(request.tokens_done)
        self.expected_output[request.class_name] = mix.output_mean

    def first_token(self, request: Request) -> None:
        """Of one that had waited for its dispatch, and ran without interruption since."""
        own_s = prefill_s(self, request.input_tokens)
        lead = self._leads[request.class_name]
        lead.observe(max(0.0, request.first_token_s - request.dispatch_s - own_s))
        self.first_token_lead_s[request.class_name] = lead.value_s

    def observe(self, before: Sample, after: Sample, prefill_square: float) -> None:
        """Learn from one instance's scrape interval; intervals that were mostly idle say nothing."""
        busy_s = after.busy_s - before.busy_s
        steps = after.steps - before.steps
        if not (steps >= 4 and 0.0 < busy_s < inf):
            return
        raw = (
            steps,
            after.decode_tokens - before.decode_tokens,
            after.context_tokens - before.context_tokens,
            after.prefill_tokens - before.prefill_tokens,
            prefill_square,
        )
        parts = [value * prior for value, prior in zip(raw, PRIOR, strict=True)]
        if not (all(map(isfinite, parts)) and min(parts) >= 0.0):
            return  # One broken scrape must not spoil what is known.
        if self.updates < _FIRST:
            self._learn([part / busy_s for part in parts], 1.0, 1.0)
            return
        self._seen += 1
        expected_s = sum(value * known for value, known in zip(raw, self._values, strict=True))
        off = log(busy_s / expected_s)
        self._recent.append(off)
        if len(self._recent) == _RECENT and abs(change := median(self._recent)) > log(CHANGE):
            self._scale(exp(change))
            expected_s *= exp(change)
            off -= change
        size = max(busy_s, expected_s)
        most = log(OUTLIER)
        equation = [part / size for part in parts], busy_s / size, min(1.0, (most / max(abs(off), 1e-9)) ** 2)
        if abs(off) > most:
            aside, self._aside = self._aside, (self._seen, off, equation)
            if aside is None or aside[1] * off < 0.0 or self._seen - aside[0] > _PATIENCE:
                return
            self._learn(*aside[2])
            self._aside = None
        self._learn(*equation)

    def _learn(self, x: list[float], y: float, weight: float) -> None:
        moment = self._moment
        for i, row in enumerate(self._normal):
            x_i = weight * x[i]
            for j in range(5):
                row[j] = _FADE * row[j] + x_i * x[j]
            moment[i] = _FADE * moment[i] + x_i * y
        self.updates += 1

    def _scale(self, factor: float) -> None:
        """Everything takes so many times as long."""
        self._normal = [[_KEPT * value / factor**2 for value in row] for row in self._normal]
        self._moment = [_KEPT * value / factor for value in self._moment]
        self._values = [value * factor for value in self._values]
        self._prior = min(50.0, max(0.05, self._prior * factor))
        self._aside = None
        self._recent.clear()

    def publish(self) -> None:
        """Make what was learned visible. A coefficient that noise drove to nothing keeps a twentieth of its prior."""
        theta = _solve(self._normal, self._moment, self._prior)
        self._values = values = [min(50.0, max(0.05, t)) * prior for t, prior in zip(theta, PRIOR, strict=True)]
        self.mix_views = {name: mix.view() for name, mix in self.mixes.items()}
        self.step_times = _step_times(values)
        self.prefill_token_s = values[3]
        self.prefill_square_s = values[4]


def _means(usual: UsualSize) -> list[float]:
    return [usual.input_tokens, usual.input_square, usual.need_tokens]


def _step_times(values: Sequence[float]) -> StepTimes:
    return StepTimes(
        fixed_s=values[0],
        per_sequence_s=values[1],
        per_context_token_s=values[2],
        per_prefill_token_s=values[3],
        per_prefill_square_s=values[4],
    )


def _is_normal(rows: list[list[float]], prior: float) -> bool:
    """Whether it can be a sum of equations times their transposes: symmetric, and, but for rounding, positive
    semidefinite, so that with the ridge no pivot of the elimination is below it."""
    if any(abs(rows[i][j] - rows[j][i]) > 1e-9 * (rows[i][i] + rows[j][j]) for i in range(5) for j in range(i)):
        return False
    ridge = _RIDGE / prior**2
    left = [list(row) for row in rows]
    for i, pivot in enumerate(left):
        pivot[i] += ridge
        if pivot[i] < 0.5 * ridge:
            return False
        for row in left[i + 1 :]:
            factor = row[i] / pivot[i]
            for j in range(i, 5):
                row[j] -= factor * pivot[j]
    return True


def _solve(normal: list[list[float]], moment: list[float], prior: float) -> list[float]:
    """The ridge solution around ``prior``, by elimination: with the ridge the matrix is positive definite, so no pivot
    vanishes."""
    size = len(moment)
    rows = [[*row, right + _RIDGE / prior] for row, right in zip(normal, moment, strict=True)]
    for i in range(size):
        rows[i][i] += _RIDGE / prior**2
    for i in range(size):
        pivot = rows[i]
        for row in rows[i + 1 :]:
            factor = row[i] / pivot[i]
            for j in range(i, size + 1):
                row[j] -= factor * pivot[j]
    solution = [0.0] * size
    for i in reversed(range(size)):
        known = sum(rows[i][j] * solution[j] for j in range(i + 1, size))
        solution[i] = (rows[i][size] - known) / rows[i][i]
    return solution
