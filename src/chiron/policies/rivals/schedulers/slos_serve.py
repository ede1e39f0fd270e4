"""``slos-serve``: SLOs-Serve (2025): a fleet that admits what it can serve in time, and the rest as best effort.

Each engine keeps to those whose prompt it has admitted. With new requests it plans again: prompts in order of the time
at which their first token is due, d, and between two of those as many tokens as steps leave that are no longer than
the tightest ITL SLO of those who decode by then::

    budget = steps in d_i - d_(i-1) * (tokens of a step - those who decode), whole ones and the rest of the time
    admit i : carried + budget >= tokens of the prompt, and KV for its end; carried on is what is left of it
    else    : carried on is carried + budget
    most    : over who is admitted, by how many of each ITL SLO, as many requests as possible

A step is as long as the tightest ITL SLO of those admitted that decode allows, admitted prompts in it by d, then best
effort: what was not admitted, and batch work. That gives way with place and KV, and is computed again.

A request goes to the instance with the fewest; if its plan has no room for it, to the next ones, up to ``hops_max``;
if none has, to the first, as best effort. Source: arXiv 2504.08784, notes about it, and the reproduction in
UIUC-MLSys/JITServe. What is filled in is in docs/policies/schedulers.md.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from heapq import heapify, heappop, heappush
from math import floor, inf, isfinite
from typing import Annotated, Final, NamedTuple

from chiron.core.types import Instance, Placement, Request
from chiron.policies.checks import above, at_least
from chiron.policies.composers.decoding import Decoding, tokens_left
from chiron.policies.composers.prompt_queue import PromptQueue
from chiron.policies.policy import Estimates, Policy, Preempter
from chiron.policies.ranges import AnyOf, Between
from chiron.policies.rivals.scalers.static import decide_fleet, initial_roles
from chiron.policies.size import placed
from chiron.policies.views import StepView

NEW_MAX: Final = 16
"""Requests that are planned at once; what comes with more of them waits for the next step."""
ADMITTED, DECLINED, BATCH = 0.0, 1.0, 2.0


@dataclass(frozen=True, slots=True, kw_only=True)
class SlosServeSettings:
    hops_max: Annotated[int, Between(0, 8)] = 3
    """Further instances that are asked."""
    caps_carry: bool = False
    """True: no more than a step's tokens are carried on, as the reproduction has it."""
    predicts: Annotated[bool, AnyOf((True, False))] = True
    """Answers have predicted lengths; False: the mean of their class."""
    length_error: float = 0.0
    """Standard deviation of log(predicted / true). The paper, by notes, and the reproduction know the length."""
    instances: int = 0
    """Instances of each model; 0: the fleet stays that there is at the start."""
    fleet_factor: Annotated[float, Between(0.5, 4.0, log=True)] = 1.0
    """That one is the initial fleet, so many times as large, rounded up."""
    max_num_seqs: Annotated[int, Between(32, 512, log=True)] = 256
    """Static max batch size: vLLM's default."""

    def __post_init__(self) -> None:
        above(0, self, "fleet_factor", "max_num_seqs")
        at_least(0, self, "hops_max", "instances", "length_error")


class Prompt(NamedTuple):
    """To be planned."""

    due_s: float
    """Its first token."""
    tokens: int
    """Of it that are left."""
    itl_s: float
    kv_tokens: float
    """At its end."""
    new: bool


class Steps(NamedTuple):
    """What an engine's steps hold."""

    within: Callable[[float], tuple[float, float]]
    """Tokens of the largest that is no longer than this, and how long it takes."""
    decodes: Mapping[float, int]
    """How many decode, by ITL SLO."""
    kv_tokens: float
    """For new ones."""


_State = tuple[float, float, int, tuple[int, ...]]
"""Tokens that are carried on, KV tokens that are left, how many prompts that were admitted before would be late, and
the new ones that are admitted, by their place among the prompts."""


def plan(settings: SlosServeSettings, now_s: float, prompts: Sequence[Prompt], steps: Steps) -> set[int]:
    """Which of the new prompts are admitted, by their place; prompts are in order of ``due_s``. Of the states with the
    same ITL SLOs admitted, sorted, the best is kept."""
    states: dict[tuple[float, ...], _State] = {(): (0.0, steps.kv_tokens, 0, ())}
    passed_s, pace_s = 0.0, min(steps.decodes, default=inf)
    count = sum(steps.decodes.values())
    held = _Held(steps.within)
    for place, (due_s, tokens, itl_s, need, new) in enumerate(prompts):
        began_s, passed_s = passed_s, max(passed_s, due_s - now_s)
        able_tokens = steps.within(itl_s)[0] if new else 0.0
        found: dict[tuple[float, ...], _State] = {}
        seen_s, of_step, begin, end = -1.0, 0.0, _NOTHING, _NOTHING
        for tiers, (carried, kv_tokens, late, admitted) in states.items():
            tightest_s = min(pace_s, tiers[0]) if tiers else pace_s
            if tightest_s != seen_s:  # Of most states it is the same.
                seen_s, of_step = tightest_s, held.step(tightest_s)[0]
                begin, end = held.parts(tightest_s, began_s), held.parts(tightest_s, passed_s)
            decoding = count + len(tiers)
            each = of_step - decoding
            if each > 0.0 and began_s < passed_s:
                # Counted from now on: of a step in which a prompt is due, the rest is there for the next one.
                before = begin[0] * each + max(0.0, begin[1] - decoding)
                carried += end[0] * each + max(0.0, end[1] - decoding) - before
            left = carried - tokens
            cap = max(0.0, each) if settings.caps_carry else inf
            if not new:  # Of what is late nothing is left for others until it is done.
                found[tiers] = (min(cap, left), kv_tokens, late + (left < 0), admitted)
                continue
            _keep(found, tiers, (min(cap, carried), kv_tokens, late, admitted))
            if left >= 0 and kv_tokens >= need and able_tokens > decoding:
                with_it = tuple(sorted((*tiers, itl_s)))
                _keep(found, with_it, (min(cap, left), kv_tokens - need, late, (*admitted, place)))
        if not new:
            pace_s, count = min(pace_s, itl_s), count + 1
        states = found
    least_late = states[()][2]
    kept = [state for state in states.values() if state[2] <= least_late]
    return set(max(kept, key=lambda state: (len(state[3]), state[0]))[3])


def _keep(found: dict[tuple[float, ...], _State], tiers: tuple[float, ...], state: _State) -> None:
    other = found.get(tiers)
    if other is None or (-state[2], state[0]) > (-other[2], other[0]):
        found[tiers] = state


_NOTHING: Final = (0.0, 0.0)


class _Held:
    """What a pace's steps hold in so much time, each computed once."""

    def __init__(self, within: Callable[[float], tuple[float, float]]) -> None:
        self._within = within
        self._steps: dict[float, tuple[float, float]] = {}
        self._parts: dict[tuple[float, float], tuple[float, float]] = {}

    def step(self, pace_s: float) -> tuple[float, float]:
        found = self._steps.get(pace_s)
        if found is None:
            found = self._steps[pace_s] = self._within(pace_s)
        return found

    def parts(self, pace_s: float, passed_s: float) -> tuple[float, float]:
        """Whole steps, and the tokens of a shorter one in the rest."""
        found = self._parts.get((pace_s, passed_s))
        if found is None:
            if isfinite(passed_s):
                takes_s = self.step(pace_s)[1]
                whole = floor(passed_s / takes_s)
                found = float(whole), self._within(passed_s - whole * takes_s)[0]
            else:
                found = inf, 0.0
            self._parts[pace_s, passed_s] = found
        return found


def largest(step_s: Callable[[int], float], most: int, within_s: float) -> int:
    """Tokens of prompt of the largest step that is no longer."""
    if step_s(most) <= within_s:
        return most
    low, high = 0, most  # Too long at ``high``; at ``low`` not, or nothing is short enough.
    while high - low > 1:
        middle = (low + high) // 2
        if step_s(middle) <= within_s:
            low = middle
        else:
            high = middle
    return low


# -- the composer --------------------------------------------------------------------------------------------------


class _Prompt:
    __slots__ = ("begun", "left", "request", "tier", "total")

    def __init__(self, request: Request) -> None:
        self.request = request
        self.tier = DECLINED if request.interactive else BATCH
        self.begun = False
        self.total = self.left = 0

    @property
    def due_s(self) -> float:
        return self.request.arrival_s + self.request.ttft_slo_s

    @property
    def key(self) -> tuple[float, float]:
        return self.tier, self.due_s if self.tier == ADMITTED else self.request.arrival_s


class SlosServe:
    """The composer, and who preempts for it."""

    swaps = False

    def __init__(self, settings: SlosServeSettings, estimates: Estimates) -> None:
        self.preempter: Preempter | None = self
        self._settings = settings
        self._estimates = estimates
        self._queue = PromptQueue()
        self._prompts: dict[int, _Prompt] = {}
        """Everybody inside."""
        self._pending: dict[int, _Prompt] = {}
        """Of these, admitted ones whose prompt is not done."""
        self._new: dict[int, _Prompt] = {}
        self._decoding, self._best_effort = Decoding(), Decoding()
        self._booked_tokens = 0.0
        """KV of those admitted, at their end."""
        self._booked: dict[int, float] = {}

    # -- prompts ---------------------------------------------------------------------------------------------------

    def add(self, request: Request, tokens: int, begun: bool) -> None:
        prompt = self._prompts.get(request.id)
        if prompt is None:
            prompt = self._prompts[request.id] = _Prompt(request)
            if request.interactive:
                self._new[request.id] = prompt
        prompt.left, prompt.begun = tokens, begun
        if not begun:
            prompt.total = tokens
        if prompt.tier == ADMITTED:
            self._pending[request.id] = prompt
        self._queue.add(request, prompt.key, begun)

    def forget(self, request: Request) -> None:
        self._prompts.pop(request.id, None)
        self._new.pop(request.id, None)
        self._pending.pop(request.id, None)
        self._booked_tokens -= self._booked.pop(request.id, 0.0)
        if not self._booked:
            self._booked_tokens = 0.0  # Sums of floats leave dust behind.
        self._queue.remove(request)

    def head(self, now_s: float, begun: bool) -> Request | None:
        return self._queue.head(begun)

    def remove_head(self, request: Request) -> None:
        self._queue.remove(request)

    # -- steps -----------------------------------------------------------------------------------------------------

    def tokens(self, view: StepView) -> int:
        self._decide(view)
        return self._within(view, self._decoding.tightest_s())

    def _within(self, view: StepView, within_s: float) -> int:
        return largest(lambda tokens: view.step_s(tokens, 0), max(0, view.tokens_max), within_s)

    def _decide(self, view: StepView) -> None:
        if not self._new:
            return
        new = list(self._new.values())[:NEW_MAX]
        prompts = sorted([*self._pending.values(), *new], key=lambda p: (p.due_s, p.request.id))
        planned = [self._planned(each) for each in prompts]
        admitted = plan(self._settings, view.now_s, planned, self._steps(view))
        for place, prompt in enumerate(prompts):
            request = prompt.request
            if request.id not in self._new:
                continue
            del self._new[request.id]
            if place in admitted:
                prompt.tier = ADMITTED
                self._pending[request.id] = prompt
                self._booked[request.id] = planned[place].kv_tokens
                self._booked_tokens += planned[place].kv_tokens
                self._queue.add(request, prompt.key, prompt.begun)

    def _planned(self, prompt: _Prompt) -> Prompt:
        request = prompt.request
        answer = tokens_left(self._estimates, request, prompt.total - request.input_tokens)
        return Prompt(prompt.due_s, prompt.left, request.itl_slo_s, prompt.total + answer, request.id in self._new)

    def _steps(self, view: StepView) -> Steps:
        found: dict[float, tuple[float, float]] = {}

        def within(within_s: float) -> tuple[float, float]:
            if within_s not in found:
                tokens = self._within(view, within_s)
                fits = tokens > 0 and view.step_s(tokens, 0) <= within_s
                found[within_s] = (tokens + view.decoding if fits else 0.0, view.step_s(tokens, 0))
            return found[within_s]

        decodes = dict(self._decoding.paces())
        decodes[inf] = decodes.get(inf, 0) + view.decoding - self._decoding.count()
        return Steps(within, decodes, view.kv_capacity_tokens - self._booked_tokens)

    def planned(self, tokens: int, step_s: float) -> None:
        """What is predicted is exact."""

    def began(self, request: Request, generated: int, step: int, now_s: float) -> None:
        self._pending.pop(request.id, None)
        self._new.pop(request.id, None)
        self._of(request).began(request, generated, step, now_s)

    def left(self, request: Request) -> None:
        self._of(request).left(request)

    def _of(self, request: Request) -> Decoding:
        prompt = self._prompts.get(request.id)
        return self._decoding if prompt is not None and prompt.tier == ADMITTED else self._best_effort

    # -- who gives way ---------------------------------------------------------------------------------------------

    def steps_left(self, step: int) -> int:
        return 1

    def gives_way(self, view: StepView) -> Sequence[Request]:
        self._decide(view)
        first = self._queue.head(False)
        if first is None or self._prompts[first.id].tier != ADMITTED or self._prompts[first.id].begun:
            return ()
        places = 1 - view.places_free
        tokens = self._prompts[first.id].total - (view.kv_free_tokens - view.decoding)
        leaving: list[Request] = []
        for decodes in reversed(self._best_effort):
            if places <= 0 and tokens <= 0:
                break
            if decodes.step < view.step:  # Whoever has just begun has its token first.
                leaving.append(decodes.request)
                places -= 1
                tokens -= decodes.held_tokens(view.step) + 1
        return leaving if places <= 0 and tokens <= 0 else ()

    def victim(self) -> Request | None:
        return next((decodes.request for decodes in reversed(self._best_effort)), None)


def compose(settings: SlosServeSettings, estimates: Estimates) -> SlosServe:
    return SlosServe(settings, estimates)


# -- placement -----------------------------------------------------------------------------------------------------


def _in_places(counts: Mapping[float, int], places: int) -> dict[float, int]:
    """Who decodes, of those that an instance has by ITL SLO: no more than there are places, batch work last."""
    found: dict[float, int] = {}
    for pace_s in sorted(counts):
        count = min(counts[pace_s], places)
        if count > 0:
            found[pace_s] = count
            places -= count
    return found


class _Note:
    __slots__ = ("open", "pending", "version")

    def __init__(self) -> None:
        self.open = True
        self.version = 0
        self.pending: dict[int, Request] = {}
        """Requests that its plan had room for and that had no first token when it was last looked at."""


class NextReplica:
    """The router: the instance with the fewest requests whose plan has room, of the first few; else the first."""

    def __init__(self, settings: SlosServeSettings, estimates: Estimates) -> None:
        self.room_tokens = 0
        self._settings = settings
        self._estimates = estimates
        self._heap: list[tuple[int, int, int, Instance]] = []
        self._heap_max = 64
        self._itl_s: dict[str, float] = {}
        """Of each class that came."""

    def add(self, instance: Instance) -> None:
        if instance.index is None:
            instance.index = _Note()
        instance.index.open = True
        self.changed(instance)

    def remove(self, instance: Instance) -> None:
        instance.index.open = False
        instance.index.version += 1

    def changed(self, instance: Instance) -> None:
        note: _Note = instance.index
        if note.open:
            note.version += 1
            heappush(self._heap, (len(instance.requests), instance.id, note.version, instance))
            if len(self._heap) > self._heap_max:
                self._heap = [entry for entry in self._heap if entry[2] == entry[3].index.version]
                heapify(self._heap)
                self._heap_max = 64 + 2 * len(self._heap)

    def place(self, request: Request, waited_s: float) -> Placement | None:
        self._itl_s[request.class_name] = request.itl_slo_s if request.interactive else inf
        asked: list[tuple[int, int, int, Instance]] = []
        too_small: list[tuple[int, int, int, Instance]] = []
        chosen: Instance | None = None
        while self._heap and chosen is None and len(asked) <= self._settings.hops_max:
            entry = heappop(self._heap)
            instance = entry[3]
            if not instance.index.open or instance.index.version != entry[2]:
                continue
            if request.input_tokens >= instance.kv_capacity_tokens:
                too_small.append(entry)  # Never asked, else nobody who could hold it might be.
            else:
                asked.append(entry)
                if not request.interactive or self._has_room(instance, request, request.arrival_s + waited_s):
                    chosen = instance
        for entry in (*asked, *too_small):
            heappush(self._heap, entry)
        if chosen is not None and request.interactive:
            chosen.index.pending[request.id] = request
        if chosen is None and asked:
            chosen = asked[0][3]
        return None if chosen is None else placed(self._estimates, request, chosen)

    def relieve(self, request: Request, waited_s: float) -> Sequence[Request]:
        return ()

    def _has_room(self, instance: Instance, request: Request, now_s: float) -> bool:
        pending = instance.index.pending
        for each in list(pending.values()):
            if each.first_token_s >= 0.0 or each.instance is not instance or each.outcome is not None:
                del pending[each.id]
        prompts = [self._prompt(each, new=each is request) for each in (*pending.values(), request)]
        prompts.sort()
        return bool(plan(self._settings, now_s, prompts, self._steps(instance)))

    def _prompt(self, request: Request, *, new: bool) -> Prompt:
        answer = request.predicted_tokens or self._estimates.expected_output[request.class_name]
        kv_tokens = request.input_tokens + answer
        return Prompt(request.arrival_s + request.ttft_slo_s, request.input_tokens, request.itl_slo_s, kv_tokens, new)

    def _steps(self, instance: Instance) -> Steps:
        """As the step times that were learned have it."""
        times, pending = self._estimates.step_times, instance.index.pending
        decodes: dict[float, int] = {}
        for name, count in instance.class_counts.items():
            pace_s = self._itl_s.get(name, inf)
            decodes[pace_s] = decodes.get(pace_s, 0) + count
        for each in pending.values():
            decodes[each.itl_slo_s] = decodes.get(each.itl_slo_s, 0) - 1
        decodes = _in_places(decodes, instance.max_batch_size)
        count = sum(decodes.values())
        sample = instance.sample
        context = sample.kv_used_tokens if sample is not None else 0
        base_s = times.fixed_s + times.per_sequence_s * count + times.per_context_token_s * context
        most = float(instance.kind.max_num_batched_tokens)

        def within(within_s: float) -> tuple[float, float]:
            tokens = min(most - count, (within_s - base_s) / times.per_prefill_token_s)
            if tokens <= 0:
                return 0.0, base_s
            return tokens + count, base_s + tokens * times.per_prefill_token_s

        # Batch work gives way.
        taken_tokens = instance.running_interactive * self._estimates.usual.need_tokens
        return Steps(within, decodes, instance.kv_capacity_tokens - taken_tokens)


def make_slos_serve(settings: SlosServeSettings) -> Policy:
    return Policy(
        name="slos-serve",
        settings=settings,
        place=NextReplica,
        fleet=decide_fleet,
        initial_roles=initial_roles,
        fleet_period_s=30.0,
        compose=compose,
        initial_max_batch_size=settings.max_num_seqs,
    )
