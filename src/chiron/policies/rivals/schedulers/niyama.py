"""``niyama``: Niyama's scheduler (ASPLOS '26, also QoServe) in every engine of a fixed fleet.

Each prompt that waits has a deadline for its first token, d: TTFT for an interactive request; for a batch one the time
for which its answer must begin, at ``batch_pace_s`` a token over a guessed length. Then, at each step::

    order      : least d + weight_s * (tokens of the prompt that are left) first: earliest deadline, mixed with
                 shortest remaining prefill
    relegation : a prompt of which nothing is done and that would be late, now + left / prefill speed > d, waits behind
                 all that are not, whoever they are, for good
    chunk      : the largest step of a fixed list whose predicted time, times 1.2, ends before the earliest deadline of
                 a token that is decoded; the smallest if that is over already. Where KV runs out, small steps only

The prefill speed is a slow mean of what steps have done. Sequences that decode all get their token.

Source: microsoft/sarathi-serve, branch niyama_asplos2026, sarathi/core/scheduler/deadline_scheduler.py and
sarathi/core/datatypes/sequence.py. It schedules one replica; requests go to the one with the fewest outstanding. What
is filled in is in docs/policies/schedulers.md.
"""

from __future__ import annotations

from dataclasses import dataclass
from heapq import heapify, heappop, heappush
from math import inf, isfinite
from typing import Annotated, Final

from chiron.core.types import Request
from chiron.policies.checks import above, at_least
from chiron.policies.composers.prompt_queue import PromptQueue
from chiron.policies.policy import Estimates, Policy, Preempter
from chiron.policies.ranges import Between
from chiron.policies.rivals.scalers.static import decide_fleet, initial_roles
from chiron.policies.views import StepView

STEP_TOKENS: Final[tuple[int, ...]] = (128, *range(256, 2049, 256), 2552)
"""Sizes of a step that are tried, in tokens, decoding included."""
STEP_TOKENS_LOW: Final[tuple[int, ...]] = (128, 256, 384, 512)
"""Where KV runs out."""
KV_STEPS: Final = 32
"""It does when fewer than ``KV_LOW_TOKENS`` are free for each of so many steps."""
KV_LOW_TOKENS: Final = 1000


@dataclass(frozen=True, slots=True, kw_only=True)
class NiyamaSettings:
    weight_s: Annotated[float, Between(0.0, 0.05)] = 0.008
    """Seconds of deadline that a token of prompt counts as; 0: earliest deadline first (the artifact's default; its
    figure 8 has 0.016)."""
    relegates: bool = True
    """Prompts that would be late wait behind the others (likewise, as all that follow but the last three)."""
    chunks: bool = True
    """Steps are as long as the earliest deadline allows. False: as the engine's token budget allows."""
    batch_pace_s: float = 0.4
    """A batch request's time for a token."""
    batch_output_tokens: int = 15
    """The guess of how long a batch request's answer is."""
    caution: float = 1.2
    """Predicted times count as so many times as long."""
    prefill_tokens_per_s: float = 8500.0
    """Speed of prefill before the first step."""
    prefill_memory: float = 0.995
    """Share of the mean speed that stays at a step."""
    early_credit: bool = False
    """True, as published: a first token that is early gives the later ones the time. Ours: deadlines of later tokens
    count from the first one, because the SLO that all are judged by is the mean ITL from there on."""
    instances: int = 0
    """Instances of each model; 0: the fleet stays that there is at the start."""
    fleet_factor: Annotated[float, Between(0.5, 4.0, log=True)] = 1.0
    """That one is the initial fleet, so many times as large, rounded up."""
    max_num_seqs: Annotated[int, Between(32, 1024, log=True)] = 1000
    """Static max batch size. The artifact's scheduler has none that binds; its scripts have this for the others."""

    def __post_init__(self) -> None:
        above(0, self, "fleet_factor", "batch_pace_s", "caution", "prefill_tokens_per_s", "max_num_seqs")
        at_least(0, self, "weight_s", "batch_output_tokens", "instances")
        if not 0 <= self.prefill_memory < 1:
            raise ValueError(f"prefill_memory is {self.prefill_memory}; it must lie in 0..1, 1 excluded")


def first_due_s(settings: NiyamaSettings, request: Request) -> float:
    """When its first token is due; inf: never."""
    lasts_s = settings.batch_output_tokens * settings.batch_pace_s
    return min(request.arrival_s + request.ttft_slo_s, request.deadline_s - (0.0 if request.interactive else lasts_s))


def step_tokens(settings: NiyamaSettings, view: StepView, done: int, slack_s: float) -> int:
    """Tokens of the next step, decoding included, for a prompt of which so many tokens are done."""
    sizes = STEP_TOKENS if view.kv_free_tokens // KV_STEPS >= KV_LOW_TOKENS else STEP_TOKENS_LOW
    best = sizes[0]
    for size in sizes:  # A larger one takes longer.
        prompt_tokens = min(max(0, size - view.decoding), view.tokens_max)
        if settings.caution * view.step_s(prompt_tokens, done) > slack_s:
            break
        best = size
    return best


_Due = tuple[float, int, int]
"""When a token would have been due at step 0, number, request."""


class _Prompt:
    __slots__ = ("left", "relegated", "total")

    def __init__(self) -> None:
        self.total = 0
        self.left = 0
        self.relegated = False


class Niyama:
    """The composer."""

    preempter: Preempter | None = None

    def __init__(self, settings: NiyamaSettings) -> None:
        self._settings = settings
        self._queue = PromptQueue()
        self._prompts: dict[int, _Prompt] = {}
        self._speed = settings.prefill_tokens_per_s
        self._decoding: dict[int, int] = {}
        """By request that decodes, the number of its entry."""
        self._due: dict[float, list[_Due]] = {}
        """By seconds a token."""
        self._entries = 0
        """In all of those."""
        self._entered = 0

    # -- prompts ---------------------------------------------------------------------------------------------------

    def add(self, request: Request, tokens: int, begun: bool) -> None:
        prompt = self._prompts.get(request.id)
        if prompt is None:
            prompt = self._prompts[request.id] = _Prompt()
        if not begun:
            prompt.total = tokens
        prompt.left = tokens
        self._enqueue(request, prompt, begun)

    def _enqueue(self, request: Request, prompt: _Prompt, begun: bool) -> None:
        due_s = first_due_s(self._settings, request) + self._settings.weight_s * prompt.left
        self._queue.add(request, (float(prompt.relegated), due_s), begun)

    def forget(self, request: Request) -> None:
        self._prompts.pop(request.id, None)
        self._queue.remove(request)

    def head(self, now_s: float, begun: bool) -> Request | None:
        while (request := self._queue.head(begun)) is not None and self._would_be_late(request, now_s):
            prompt = self._prompts[request.id]
            prompt.relegated = True
            self._enqueue(request, prompt, False)
        return request

    def _would_be_late(self, request: Request, now_s: float) -> bool:
        prompt = self._prompts[request.id]
        if not self._settings.relegates or prompt.relegated or prompt.left < prompt.total:
            return False
        return now_s + prompt.left / self._speed > first_due_s(self._settings, request)

    def remove_head(self, request: Request) -> None:
        self._queue.remove(request)

    # -- steps -----------------------------------------------------------------------------------------------------

    def tokens(self, view: StepView) -> int:
        if not self._settings.chunks:
            return view.tokens_max
        first = self._queue.head(False)
        prompt = self._prompts[first.id] if first is not None else _Prompt()
        total = step_tokens(self._settings, view, prompt.total - prompt.left, self._slack_s(view))
        return max(0, total - view.decoding)

    def planned(self, tokens: int, step_s: float) -> None:
        kept = self._settings.prefill_memory
        self._speed = kept * self._speed + (1.0 - kept) * (tokens / step_s)

    def _slack_s(self, view: StepView) -> float:
        """Until the earliest deadline of the next token of a sequence that decodes."""
        least = inf
        for pace_s, heap in self._due.items():
            while heap and self._decoding.get(heap[0][2]) != heap[0][1]:
                heappop(heap)
                self._entries -= 1
            if heap:
                least = min(least, heap[0][0] + pace_s * view.step - view.now_s)
        return least

    def began(self, request: Request, generated: int, step: int, now_s: float) -> None:
        """Token n of its answer is due n - 1 times its pace after the first, or as published."""
        settings, first_s = self._settings, request.first_token_s
        if first_s < 0.0:
            first_s = now_s
        pace_s = request.itl_slo_s if request.interactive else settings.batch_pace_s
        if settings.early_credit or not request.interactive:
            first_s = max(first_s, first_due_s(settings, request)) + pace_s
        if not settings.chunks or not isfinite(pace_s) or not isfinite(first_s):
            return
        self._entered += 1
        self._decoding[request.id] = self._entered
        entry = (first_s + pace_s * (generated - step), self._entered, request.id)
        self._entries += 1
        heappush(self._due.setdefault(pace_s, []), entry)
        if self._entries > 64 + 2 * len(self._decoding):
            # While steps are faster than the pace, later entries are less: those that are over never surface.
            self._due = {pace_s: self._current(heap) for pace_s, heap in self._due.items()}
            self._entries = sum(map(len, self._due.values()))

    def _current(self, heap: list[_Due]) -> list[_Due]:
        kept = [entry for entry in heap if self._decoding.get(entry[2]) == entry[1]]
        heapify(kept)
        return kept

    def left(self, request: Request) -> None:
        self._decoding.pop(request.id, None)


def compose(settings: NiyamaSettings, estimates: Estimates) -> Niyama:
    return Niyama(settings)


def make_niyama(settings: NiyamaSettings) -> Policy:
    return Policy(
        name="niyama",
        settings=settings,
        fleet=decide_fleet,
        initial_roles=initial_roles,
        fleet_period_s=30.0,
        compose=compose,
        initial_max_batch_size=settings.max_num_seqs,
    )
