"""``jitserve`` and ``tempo``: scheduling by service gain over the time that it takes (2025, NSDI '26).

What a request brings is its tokens, those of the answer ``decode_weight`` times, each part less the later it is::

    batch work  : (prompt + 8 * answer) * r^p,  r = deadline / time at which it will have ended, at most 1
    interactive : prompt * (TTFT / time of the first token)^p + 8 * answer * r^p, likewise; its deadline is TTFT and an
                  ITL SLO for each token. Once it has a first token, the answer is what is left of it
    density     : what it brings / time that is left, at ``unit`` a token: the mean step of late

Every ``frame_steps`` steps the engine's places go to the greatest density, of those that decode and those that wait.
``jitserve`` lets everybody have just the bandwidth that it needs: its density counts times the share of the time until
its deadline (until TTFT, before the first token) that its service takes. And it groups: of all whose density is at
least 0.95 of the last that would get a place, sorted by length, the run of as many as there are places that brings
most. Whoever decodes gives way only to one that brings more in a frame than the stall costs; KV is swapped. Between
frames, prompts go by density where a place is free.

Source: UIUC-MLSys/JITServe, jitserve/scheduler/policy.py and slo_scheduler.py, and its changed vLLM's config.py; arXiv
2504.20068. What is filled in is in docs/policies/schedulers.md.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from math import exp, inf
from typing import Annotated, Final, NamedTuple

from chiron.core.types import Request
from chiron.policies.checks import above, at_least
from chiron.policies.composers.decoding import Decoding, tokens_left
from chiron.policies.composers.prompt_queue import PromptQueue
from chiron.policies.policy import Estimates, Policy, Preempter
from chiron.policies.ranges import AnyOf, Between
from chiron.policies.rivals.scalers.static import decide_fleet, initial_roles
from chiron.policies.size import prefill_s
from chiron.policies.views import StepView

UNIT_S: Final = 0.02
"""A step before the first."""
UNITS: Final = 10
"""Frames over which the mean goes."""
QUANTILE_SD: Final = 1.645
"""Of a normal distribution: 95 % are less than so many standard deviations above its mean."""
RATIO_MIN: Final = 1e-6
FALLEN: Final = 0.98
"""A prompt whose density has fallen is found when it is first; it keeps its place if it is still so much of that."""
RISEN: Final = 64
"""Of those that wait, so many are computed again at each frame, in turn: what has risen is found by that."""


@dataclass(frozen=True, slots=True, kw_only=True)
class JitServeSettings:
    frame_steps: Annotated[int, Between(10, 400, log=True)] = 50
    """Steps between two choices of who decodes."""
    penalty: Annotated[float, Between(0.5, 100.0, log=True)] = 1.0
    """The exponent p; the artifact's benchmarks have 100, where late tokens are worth next to nothing."""
    decode_weight: float = 8.0
    chunk_tokens: Annotated[int, Between(128, 2048, log=True)] = 512
    """Of a step in all: vLLM's default with chunked prefill, of the version that the artifact changes."""
    groups: bool = True
    """Of like length; False: the greatest densities."""
    kept_share: float = 0.95
    margin: bool = True
    """Whoever has time to spare counts less."""
    swaps_max: int = 3
    """That give way at one choice: the artifact's default."""
    length_factor: Annotated[float, Between(1.0, 4.0)] = 2.0
    """Answers whose length nobody predicts count as so many times the mean length of their class."""
    predicts: Annotated[bool, AnyOf((True, False))] = True
    """Answers have predicted lengths; False: the mean of their class."""
    length_error: float = 0.5
    """Standard deviation of log(predicted / true), of whose 95 % quantile the length is. Ours: the published forest is
    of one model's answers to one set of prompts."""
    itl_guard: Annotated[bool, AnyOf((True, False))] = True
    """While steps take longer than the tightest ITL SLO, there are ``swaps_max`` places fewer."""
    instances: int = 0
    """Instances of each model; 0: the fleet stays that there is at the start."""
    fleet_factor: Annotated[float, Between(0.5, 4.0, log=True)] = 1.0
    """That one is the initial fleet, so many times as large, rounded up."""
    max_num_seqs: Annotated[int, Between(16, 512, log=True)] = 64
    """Static max batch size: what is chosen from. The artifact's benchmarks have 32."""

    def __post_init__(self) -> None:
        above(
            0,
            self,
            "fleet_factor",
            "frame_steps",
            "penalty",
            "chunk_tokens",
            "decode_weight",
            "length_factor",
            "swaps_max",
            "max_num_seqs",
        )
        at_least(0, self, "instances", "length_error")
        if not 0 < self.kept_share <= 1:
            raise ValueError(f"kept_share is {self.kept_share}; it must be above 0 and at most 1")


@dataclass(frozen=True, slots=True, kw_only=True)
class TempoSettings(JitServeSettings):
    """The first version, as the artifact has it: service gain density alone."""

    groups: bool = False
    margin: bool = False


def ratio(allowed_s: float, takes_s: float) -> float:
    if takes_s <= allowed_s:
        return 1.0
    return max(RATIO_MIN, allowed_s / takes_s)


def gain(settings: JitServeSettings, request: Request, made: int, left: float, unit_s: float, served_s: float) -> float:
    """What it brings, of whose answer so many tokens are made and so many left, ``served_s`` after it arrived."""
    p, remain_s = settings.penalty, unit_s * left
    answer = made + left
    if not request.interactive:
        on_time = ratio(request.deadline_s - request.arrival_s, served_s + remain_s)
        return (request.input_tokens + settings.decode_weight * answer) * float(on_time**p)
    on_time = ratio(request.ttft_slo_s + request.itl_slo_s * answer, served_s + remain_s)
    first_s = request.first_token_s
    began = ratio(request.ttft_slo_s, served_s + unit_s if first_s < 0.0 else first_s - request.arrival_s)
    worth = answer if first_s < 0.0 else left
    return request.input_tokens * float(began**p) + settings.decode_weight * worth * float(on_time**p)


def bandwidth(request: Request, prefill_s: float, remain_s: float, answer: float, served_s: float) -> float:
    """Share of the time that is left that its service takes; 1: all of it, or it is late already."""
    if not request.interactive:
        return _share(prefill_s + remain_s, request.deadline_s - request.arrival_s - served_s)
    whole = _share(remain_s, request.ttft_slo_s + request.itl_slo_s * answer - served_s)
    return whole if request.first_token_s >= 0.0 else max(whole, _share(prefill_s, request.ttft_slo_s - served_s))


def _share(takes_s: float, left_s: float) -> float:
    return 1.0 if left_s <= takes_s else takes_s / left_s


class Candidate(NamedTuple):
    """For a place in the next frame."""

    density: float
    request: Request
    tokens: int
    """Of KV that it holds or needs at first."""
    decodes: bool


def chosen(settings: JitServeSettings, candidates: list[Candidate], places: int, kv_tokens: int) -> list[Candidate]:
    """Who has a place in the next frame."""
    by_density = sorted(candidates, key=lambda each: (-each.density, each.request.id))
    held = count = 0
    for each in by_density[:places]:
        held += each.tokens
        if held > kv_tokens:
            break
        count += 1
    if not settings.groups or not 0 < count < len(by_density):
        return by_density[:count]
    least = settings.kept_share * by_density[count - 1].density
    kept = sorted((e for e in by_density if e.density >= least), key=lambda each: (each.tokens, each.request.id))
    brings = best = sum(each.density for each in kept[:count])
    start = 0
    for last in range(count, len(kept)):
        brings += kept[last].density - kept[last - count].density
        if brings > best * (1.0 + 1e-12):
            best, start = brings, last - count + 1
    return kept[start : start + count]


class _Prompt:
    __slots__ = ("begun", "density", "made", "request", "total")

    def __init__(self, request: Request) -> None:
        self.request = request
        self.begun = False
        self.total = 0
        self.made = 0
        """Tokens of the answer that are prefilled again."""
        self.density = 0.0
        """As it was last computed."""


class JitServe:
    """The composer, and who preempts for it."""

    swaps = True

    def __init__(self, settings: JitServeSettings, estimates: Estimates) -> None:
        self.preempter: Preempter | None = self
        self._settings = settings
        self._estimates = estimates
        self._queue = PromptQueue()
        self._prompts: dict[int, _Prompt] = {}
        """Those that wait or are under way."""
        self._begun = 0
        self._let_in: set[int] = set()
        """Those that have a place and are in no queue, by id: between steps their KV is on its way in."""
        self._decoding = Decoding()
        self._turns: deque[int] = deque()
        """Those whose density is computed again, by id."""
        self._favoured: set[int] = set()
        """Those that wait and have a place in this frame, by id."""
        self._units: deque[float] = deque(maxlen=UNITS)
        self._unit_s = UNIT_S
        self._since = (0, 0.0)
        """The step, and the time, since which the next one of these is measured."""
        self._now_s = 0.0
        self._quantile_factor = exp(QUANTILE_SD * settings.length_error)
        self._room = inf
        """Places that are left to prompts of which nothing is done, in the step that is being composed; inf: as
        many as the engine has."""

    # -- prompts ---------------------------------------------------------------------------------------------------

    def add(self, request: Request, tokens: int, begun: bool) -> None:
        prompt = self._prompts.get(request.id)
        if prompt is None:
            prompt = self._prompts[request.id] = _Prompt(request)
            self._turns.append(request.id)
        self._let_in.discard(request.id)
        self._begun += begun - prompt.begun
        prompt.begun = begun
        if not begun:
            prompt.total = tokens
            prompt.made = tokens - request.input_tokens
        prompt.density = self._density(request, prompt.made, max(self._now_s, request.arrival_s))
        self._enqueue(prompt)

    def _enqueue(self, prompt: _Prompt) -> None:
        request = prompt.request
        if request.id in self._let_in:
            return
        self._queue.add(request, (float(request.id not in self._favoured), -prompt.density), prompt.begun)

    def _density(self, request: Request, made: int, now_s: float) -> float:
        settings = self._settings
        factor = self._quantile_factor if request.predicted_tokens else settings.length_factor
        left = tokens_left(self._estimates, request, made, factor)
        served_s, remain_s = now_s - request.arrival_s, self._unit_s * left
        density = gain(settings, request, made, left, self._unit_s, served_s) / remain_s
        if not settings.margin:
            return density
        own_s = prefill_s(self._estimates, request.input_tokens)
        return density * max(RATIO_MIN, bandwidth(request, own_s, remain_s, made + left, served_s))

    def forget(self, request: Request) -> None:
        prompt = self._prompts.pop(request.id, None)
        if prompt is not None:
            self._begun -= prompt.begun
            self._queue.remove(request)
        self._favoured.discard(request.id)
        self._let_in.discard(request.id)

    def head(self, now_s: float, begun: bool) -> Request | None:
        while (request := self._queue.head(begun or self._room <= 0)) is not None:
            prompt = self._prompts[request.id]
            before, prompt.density = prompt.density, self._density(request, prompt.made, now_s)
            if prompt.density >= FALLEN * before:
                return request
            self._enqueue(prompt)
        return None

    def remove_head(self, request: Request) -> None:
        self._queue.remove(request)
        self._let_in.add(request.id)
        self._room -= not self._prompts[request.id].begun

    # -- steps -----------------------------------------------------------------------------------------------------

    def tokens(self, view: StepView) -> int:
        self._now_s = view.now_s
        self._measure(view)
        guarded = self._guarded(view)
        self._room = view.places_free - guarded if guarded else inf
        return max(0, min(view.tokens_max, self._settings.chunk_tokens - view.decoding))

    def planned(self, tokens: int, step_s: float) -> None:
        """How long steps take is measured, frame by frame."""

    def _guarded(self, view: StepView) -> int:
        """Places that are not given now: steps take longer than who decodes with the tightest ITL SLO can bear."""
        settings = self._settings
        if not settings.itl_guard or self._unit_s <= self._decoding.tightest_s():
            return 0
        return max(0, min(settings.swaps_max, view.places - 1))

    def _measure(self, view: StepView) -> None:
        steps = view.step - self._since[0]
        if not view.decoding:  # Maybe it was idle.
            self._since = (view.step, view.now_s)
        elif steps >= self._settings.frame_steps:
            self._units.append((view.now_s - self._since[1]) / steps)
            self._unit_s = sum(self._units) / len(self._units)
            self._since = (view.step, view.now_s)

    def began(self, request: Request, generated: int, step: int, now_s: float) -> None:
        self.forget(request)
        self._decoding.began(request, generated, step, now_s)

    def left(self, request: Request) -> None:
        self._decoding.left(request)

    # -- who gives way ---------------------------------------------------------------------------------------------

    def steps_left(self, step: int) -> int:
        return self._settings.frame_steps - step % self._settings.frame_steps

    def gives_way(self, view: StepView) -> Sequence[Request]:
        if view.step % self._settings.frame_steps:
            return ()
        self._now_s = view.now_s
        self._measure(view)
        self._compute_some_again(view.now_s)
        guarded = self._guarded(view)
        self._room = inf  # Whoever waits is looked at, whatever is free.
        places = view.places - guarded - self._begun - sum(not self._prompts[id].begun for id in self._let_in)
        decoding = [
            Candidate(
                self._density(each.request, each.made(view.step), view.now_s), each.request,
                each.held_tokens(view.step), True,
            )
            for each in self._decoding
        ]  # fmt: skip
        least = min((each.density for each in decoding), default=0.0) if len(decoding) >= places else 0.0
        waiting = self._first_waiting(places, self._settings.kept_share * least, view.now_s)
        kv_tokens = view.kv_free_tokens + sum(each.tokens for each in decoding)
        has_place = chosen(self._settings, decoding + waiting, places, kv_tokens)
        staying = {each.request.id for each in has_place}
        able = {each.request.id for each in self._decoding if each.step < view.step}
        leaving = [each for each in decoding if each.request.id not in staying and each.request.id in able]
        coming = [each for each in has_place if not each.decodes]
        comes, given = self._swapped(coming, leaving, view.places_free - guarded, view.kv_free_tokens - view.decoding)
        self._favour(comes)
        return given

    def _compute_some_again(self, now_s: float) -> None:
        for _ in range(min(RISEN, len(self._turns))):
            prompt = self._prompts.get(self._turns.popleft())
            if prompt is not None:
                self._turns.append(prompt.request.id)
                prompt.density = self._density(prompt.request, prompt.made, now_s)
                if not prompt.begun:
                    self._enqueue(prompt)

    def _first_waiting(self, count: int, least: float, now_s: float) -> list[Candidate]:
        """The greatest densities of those of which nothing is done, none below ``least``."""
        found: list[Candidate] = []
        passed: list[_Prompt] = []
        while len(found) < count and (request := self.head(now_s, False)) is not None:
            prompt = self._prompts[request.id]
            self._queue.remove(request)
            passed.append(prompt)
            if not prompt.begun:
                found.append(Candidate(prompt.density, request, prompt.total, False))
                if prompt.density < least and request.id not in self._favoured:
                    break
        for prompt in passed:
            self._enqueue(prompt)
        return found

    def _favour(self, requests: list[Request]) -> None:
        before, self._favoured = self._favoured, {request.id for request in requests}
        for id in sorted(before ^ self._favoured):
            if id in self._prompts:
                self._enqueue(self._prompts[id])

    def _swapped(
        self, coming: list[Candidate], leaving: list[Candidate], places: int, tokens: int
    ) -> tuple[list[Request], list[Request]]:
        """Who comes, the one that brings most first, and who gives way for it, those that bring least: no more than it
        takes for place and KV, as long as that pays for the stall. Who would not fit even so does not come."""
        settings = self._settings
        coming.sort(key=lambda each: (-each.density, each.request.id))
        leaving.sort(key=lambda each: (each.density, each.request.id))
        able = leaving[: settings.swaps_max]
        comes: list[Request] = []
        given = 0
        for each in coming:
            upto, free, room = given, places, tokens
            while (free <= 0 or room < each.tokens) and upto < len(able):
                free, room, upto = free + 1, room + able[upto].tokens + 1, upto + 1
            if free > 0 and room >= each.tokens and self._pays(each, able[given:upto]):
                comes.append(each.request)
                given, places, tokens = upto, free - 1, room - each.tokens
        return comes, [each.request for each in able[:given]]

    def _pays(self, comes: Candidate, leaving: list[Candidate]) -> bool:
        """For nobody, always."""
        settings = self._settings
        frame_s = settings.frame_steps * self._unit_s
        stall_s = sum(prefill_s(self._estimates, each.tokens) for each in leaving)
        gains = (comes.density - sum(each.density for each in leaving)) * frame_s
        return not leaving or gains > stall_s * settings.decode_weight / self._unit_s

    def victim(self) -> Request | None:
        return None


def compose(settings: JitServeSettings, estimates: Estimates) -> JitServe:
    return JitServe(settings, estimates)


def make_jitserve(settings: JitServeSettings) -> Policy:
    return Policy(
        name="jitserve" if settings.groups else "tempo",
        settings=settings,
        fleet=decide_fleet,
        initial_roles=initial_roles,
        fleet_period_s=30.0,
        compose=compose,
        initial_max_batch_size=settings.max_num_seqs,
    )
