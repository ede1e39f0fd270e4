"""``accelgen``: AccelGen's batching (2025) in every engine of a fixed fleet.

Every request has a slack at each step, how much later than now its part of it could be::

    first token  : deadline - now - time of the prompt that is left
    later tokens : due - now, where token n is due n - 1 ITL SLOs after the first
    batch work   : (deadline - now - service that is expected) / steps that are expected: what it may wait, spread over
                   what is left

A step is then composed so::

    size   : saturating_tokens * SLO / time of a step of saturating_tokens; SLO: the tightest ITL of those that decode
    first  : prompts whose slack is less than the next step, least first. Where one finds no place or no KV, those that
             decode with the largest slack give way
    then   : of the prompts whose slack is within ``window_s`` of the least, the one whose need of tokens and KV is
             nearest to what is left of both; and so on. While a prompt that takes several steps is under way, no other
             such prompt begins

Sequences that decode all get their token. Source: arXiv 2503.13737, and notes about it. It schedules one engine;
requests go to the one with the fewest outstanding. What is filled in is in docs/policies/schedulers.md.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import ceil, hypot, inf
from typing import Annotated, Final

from chiron.core.types import Request
from chiron.policies.checks import above, at_least
from chiron.policies.composers.decoding import Decodes, Decoding, tokens_left
from chiron.policies.policy import Estimates, Policy, Preempter
from chiron.policies.ranges import AnyOf, Between
from chiron.policies.rivals.scalers.static import decide_fleet, initial_roles
from chiron.policies.views import StepView

CANDIDATES_MAX: Final = 16
"""Prompts that are looked at for the next place in a step, of each kind of deadline."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AccelGenSettings:
    saturating_tokens: Annotated[int, Between(256, 2048, log=True)] = 768
    """The least tokens of a step that saturate the GPU: the paper's profile of a 13B model (1,280 for 175B)."""
    window_s: Annotated[float, Between(0.05, 3.0, log=True)] = 0.75
    """Prompts whose slack differs by no more than this are matched by resources."""
    preempts: bool = True
    """Those with the largest slack give way to prompts that must run."""
    exclusive: bool = True
    """One long prompt at a time."""
    predicts: Annotated[bool, AnyOf((True, False))] = True
    """Answers have predicted lengths; False: the mean of their class."""
    length_error: float = 0.5
    """Standard deviation of log(predicted / true). Ours: the paper's predictor is not in the public notes."""
    instances: int = 0
    """Instances of each model; 0: the fleet stays that there is at the start."""
    fleet_factor: Annotated[float, Between(0.5, 4.0, log=True)] = 1.0
    """That one is the initial fleet, so many times as large, rounded up."""
    max_num_seqs: Annotated[int, Between(32, 512, log=True)] = 256
    """Static max batch size: vLLM's default."""

    def __post_init__(self) -> None:
        above(0, self, "fleet_factor", "saturating_tokens", "window_s", "max_num_seqs")
        at_least(0, self, "instances", "length_error")


def step_tokens(settings: AccelGenSettings, saturated_s: float, slo_s: float) -> float:
    """Tokens of a step, decoding included, that takes as long as the tightest SLO allows, where a saturating one takes
    ``saturated_s``."""
    return settings.saturating_tokens * slo_s / saturated_s


def distance(need: tuple[float, float], free: tuple[float, float], size: tuple[float, float]) -> float:
    """Between the tokens and KV that a prompt takes and those that are left, each as a share of what there is."""
    return hypot((need[0] - free[0]) / max(1.0, size[0]), (need[1] - free[1]) / max(1.0, size[1]))


class _Prompt:
    __slots__ = ("begun", "deadline", "key", "left", "number", "request", "steps", "total")

    def __init__(self, request: Request, number: int) -> None:
        self.request = request
        self.number = number
        self.begun = False
        self.total = self.left = 0
        self.key = inf
        """Its slack is this, less now, over ``steps``."""
        self.steps = 1.0
        self.deadline = not request.interactive
        """It is due as a whole."""

    def slack_s(self, now_s: float) -> float:
        return (self.key - now_s) / self.steps


_Entry = tuple[float, int, _Prompt]


class AccelGen:
    """The composer, and who preempts for it."""

    swaps = False

    def __init__(self, settings: AccelGenSettings, estimates: Estimates) -> None:
        self.preempter: Preempter | None = self if settings.preempts else None
        self._settings = settings
        self._estimates = estimates
        self._prompts: dict[int, _Prompt] = {}
        self._fresh: tuple[list[_Entry], list[_Entry]] = ([], [])
        """Sorted: those due by their first token, and as a whole."""
        self._begun: dict[int, _Prompt] = {}
        self._decoding = Decoding()
        self._added = 0
        self._step_s = 0.0
        """Time of the next step, and of a token of prompt in it: as of the last one that was composed."""
        self._token_s = 0.0
        self._tokens_max = 1.0
        # What is left of the step that is being composed.
        self._tokens = 0
        self._kv_tokens = 0
        self._kv_capacity = 1
        self._places = 0
        self._alone = False
        """Nothing decodes."""

    # -- prompts ---------------------------------------------------------------------------------------------------

    def add(self, request: Request, tokens: int, begun: bool) -> None:
        prompt = self._prompts.get(request.id)
        if prompt is None:
            self._added += 1
            prompt = self._prompts[request.id] = _Prompt(request, self._added)
        self._take_out(prompt)
        prompt.begun, prompt.left = begun, tokens
        if not begun:
            prompt.total = tokens
        self._rank(prompt)
        if begun:
            self._begun[request.id] = prompt
        else:
            insort(self._fresh[prompt.deadline], (prompt.key, prompt.number, prompt))

    def _rank(self, prompt: _Prompt) -> None:
        request = prompt.request
        made = prompt.total - request.input_tokens
        prefill_s = prompt.left * self._token_s
        if prompt.deadline:
            answer = tokens_left(self._estimates, request, made)
            prompt.steps = answer + ceil(prompt.left / self._tokens_max)
            prompt.key = request.deadline_s - prefill_s - answer * self._step_s
        elif request.first_token_s < 0.0:
            prompt.key = request.arrival_s + request.ttft_slo_s - prefill_s
        else:  # It was preempted.
            prompt.key = request.first_token_s + max(1, made) * request.itl_slo_s - prefill_s

    def _take_out(self, prompt: _Prompt) -> None:
        if self._begun.pop(prompt.request.id, None) is None:
            entries = self._fresh[prompt.deadline]
            place = bisect_left(entries, (prompt.key, prompt.number))
            if place < len(entries) and entries[place][2] is prompt:
                del entries[place]

    def forget(self, request: Request) -> None:
        prompt = self._prompts.pop(request.id, None)
        if prompt is not None:
            self._take_out(prompt)

    def remove_head(self, request: Request) -> None:
        prompt = self._prompts[request.id]
        self._take_out(prompt)
        self._tokens -= min(prompt.left, self._tokens)
        if not prompt.begun:
            self._kv_tokens -= prompt.total
            self._places -= 1

    def head(self, now_s: float, begun: bool) -> Request | None:
        ranked = [(p.slack_s(now_s), p.number, p) for p in (self._begun.values() if begun else self._candidates())]
        if not ranked:
            return None
        least_s, _, first = min(ranked)
        if begun or least_s < self._step_s:
            return first.request
        latest_s = least_s + self._settings.window_s
        near = [p for slack_s, _, p in ranked if slack_s <= latest_s and self._fits(p)]
        if near:
            return min(near, key=lambda p: (self._distance(p), p.number)).request
        if self._begun:
            return min(self._begun.values(), key=lambda p: (p.slack_s(now_s), p.number)).request
        return first.request if self._alone else None  # An engine with nothing to decode does not idle.

    def _candidates(self) -> Iterator[_Prompt]:
        yield from self._begun.values()
        for entries in self._fresh:
            for entry in entries[:CANDIDATES_MAX]:
                yield entry[2]

    def _fits(self, prompt: _Prompt) -> bool:
        if prompt.begun:
            return True
        if self._settings.exclusive and self._begun and prompt.left > self._tokens:
            return False
        return prompt.total <= self._kv_tokens and self._places > 0

    def _distance(self, prompt: _Prompt) -> float:
        need = float(min(prompt.left, self._tokens)), 0.0 if prompt.begun else float(prompt.total)
        return distance(need, (self._tokens, self._kv_tokens), (self._tokens_max, self._kv_capacity))

    # -- steps -----------------------------------------------------------------------------------------------------

    def tokens(self, view: StepView) -> int:
        settings, tokens = self._settings, view.tokens_max
        slo_s = self._decoding.tightest_s()
        if slo_s < inf:
            saturated_s = view.step_s(min(view.tokens_max, max(1, settings.saturating_tokens - view.decoding)), 0)
            tokens = min(tokens, max(0, int(step_tokens(settings, saturated_s, slo_s)) - view.decoding))
        self._tokens = tokens
        self._kv_tokens, self._kv_capacity = view.kv_free_tokens - view.decoding, view.kv_capacity_tokens
        self._places, self._alone = view.places_free, view.decoding == 0
        if tokens:
            self._tokens_max = float(tokens)
            self._step_s = view.step_s(tokens, 0)
            self._token_s = self._step_s / tokens
        return tokens

    def planned(self, tokens: int, step_s: float) -> None:
        """What is predicted is exact."""

    def began(self, request: Request, generated: int, step: int, now_s: float) -> None:
        self._decoding.began(request, generated, step, now_s)

    def left(self, request: Request) -> None:
        self._decoding.left(request)

    # -- who gives way ---------------------------------------------------------------------------------------------

    def steps_left(self, step: int) -> int:
        return 1

    def gives_way(self, view: StepView) -> Sequence[Request]:
        fresh = [entries[0][2] for entries in self._fresh if entries]
        first = min(fresh, key=lambda p: (p.slack_s(view.now_s), p.number), default=None)
        if first is None or first.slack_s(view.now_s) >= self._step_s:
            return ()
        places, tokens = 1 - view.places_free, first.total - (view.kv_free_tokens - view.decoding)
        if places <= 0 and tokens <= 0:
            return ()
        leaving: list[Request] = []
        for decodes in self._largest_slack(view):
            leaving.append(decodes.request)
            places -= 1
            tokens -= decodes.held_tokens(view.step) + 1
            if places <= 0 and tokens <= 0:
                return leaving
        return ()

    def _largest_slack(self, view: StepView) -> list[Decodes]:
        """Those that can wait for a step and for their prefill; whoever has just begun has its token first."""
        slacks = [
            (self._slack_s(each, view), -each.request.id, each) for each in self._decoding if each.step < view.step
        ]
        able = [each for each in slacks if each[0] > self._step_s + self._token_s * each[2].held_tokens(view.step)]
        return [each[2] for each in sorted(able, reverse=True, key=lambda each: each[:2])]

    def _slack_s(self, decodes: Decodes, view: StepView) -> float:
        request = decodes.request
        if request.interactive:
            return decodes.next_due_s(view.step) - view.now_s
        left = tokens_left(self._estimates, request, decodes.made(view.step))
        return (request.deadline_s - view.now_s - left * self._step_s) / left

    def victim(self) -> Request | None:
        """The batch request that is due last: it can wait longest."""
        batch = (each.request for each in self._decoding if not each.request.interactive)
        return max(batch, key=lambda request: (request.deadline_s, request.id), default=None)


def compose(settings: AccelGenSettings, estimates: Estimates) -> AccelGen:
    return AccelGen(settings, estimates)


def make_accelgen(settings: AccelGenSettings) -> Policy:
    return Policy(
        name="accelgen",
        settings=settings,
        fleet=decide_fleet,
        initial_roles=initial_roles,
        fleet_period_s=30.0,
        compose=compose,
        initial_max_batch_size=settings.max_num_seqs,
    )
