"""A continuous-batching engine under virtual time, exact and in O(1) per step.

The engine is iteration level, as vLLM's: every step decodes one token for each running sequence and spends what is
left of the token budget on prefill chunks, first come first served. KV is counted in tokens; a prompt's KV is taken
when it is admitted. When decode would run out of KV, the sequence admitted last is preempted and recomputed.

A policy's ``compose`` hook can decide instead who is admitted, who gets the tokens that decoding leaves, and who gives
place and KV back for a prompt that waits. While anybody could get some, each step is then planned by itself.

State per instance is B (decoding sequences), S (sum of their contexts), and an iteration counter; a sequence's
finishing iteration is known when its prefill ends. Between events, k decode-only steps take::

    T(k) = k*(base(B) + c*S) + c*B * k*(k-1)/2

so they are one event (a *segment*). A command that arrives meanwhile cuts the segment at the next step boundary.

Exactness: the two terms of T(k) are rounded once a segment to multiples of 2^-32 s (a quarter of a nanosecond), so
that sums and products of them are exact in floats up to 24 days. A segment's steps can then be added one by one
(``step_mode``, the oracle) or in closed form with equal results, bit by bit.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Callable, Iterable
from heapq import heappop, heappush
from math import inf, sqrt

from chiron.core.clock import VirtualClock, engine_key
from chiron.core.ports import EngineEvents
from chiron.core.types import Instance, Request, Sample
from chiron.engines.prefix_cache import PrefixCache
from chiron.engines.profile import Profile
from chiron.policies.policy import Composer, Preempter
from chiron.policies.views import StepView

ROUND = 1.5 * 2.0**20
"""Adding and subtracting this rounds a float below 2^19 to a multiple of 2^-32."""
SEGMENT_STEPS_MAX = 4096


class StepTable:
    """A profile's coefficients, ready for use; shared by all instances of a kind."""

    __slots__ = ("admission_s", "base", "c", "q", "token_budget")

    def __init__(self, profile: Profile) -> None:
        self.token_budget = profile.max_num_batched_tokens
        largest = max(self.token_budget, profile.max_num_seqs)
        self.base = [profile.base_s(tokens) for tokens in range(largest + 1)]
        self.c = profile.c_ms_per_context_token / 1000.0
        self.q = profile.q_ms_per_token_squared / 1000.0
        self.admission_s = profile.admission_ms / 1000.0
        if not 1e-7 < self.base[1] <= self.base[-1] < 3600.0:
            raise ValueError(f"profile {profile.name!r}: a step must take between 1e-7 s and an hour")


class EngineSequence:
    """A request inside this engine."""

    __slots__ = (
        "cached",
        "context",
        "evict",
        "finish_step",
        "generated",
        "join_step",
        "phase",
        "prefilled",
        "prompt",
        "request",
    )

    def __init__(self, request: Request) -> None:
        self.request = request
        self.generated = request.tokens_done
        self.prompt = request.input_tokens + request.tokens_done
        """Tokens to prefill: on a resume without KV, those generated before count as prompt."""
        self.prefilled = 0
        self.cached = 0
        """Tokens of the prompt whose KV was there when it was let in."""
        self.context = 0
        """Tokens in KV when it joined decoding."""
        self.join_step = 0
        self.finish_step = -1
        self.phase = 0
        self.evict = False


WAITING, RESTORING, PREFILL, DECODE = 0, 1, 2, 3


class EngineModel:
    """One instance's engine; implements the ``Engine`` port. ``Request.payload`` is the true output length."""

    __slots__ = (
        "_base_s",
        "_chunks",
        "_clock",
        "_composer",
        "_decoding",
        "_due_s",
        "_evicting",
        "_finishing",
        "_fire",
        "_growth_s",
        "_held_tokens",
        "_in_boundary",
        "_key",
        "_listener",
        "_max_num_seqs",
        "_mixed_s",
        "_preempter",
        "_prefilling",
        "_prefixes",
        "_ready",
        "_rel_s",
        "_restoring",
        "_segment_context",
        "_segment_start_s",
        "_sequences",
        "_serial",
        "_step_mode",
        "_stepped",
        "_steps_done",
        "_steps_end",
        "_times",
        "_token_budget",
        "_waiting",
        "_waiting_tokens",
        "batch",
        "busy_s",
        "context_sum",
        "context_tokens",
        "decode_tokens",
        "instance",
        "kv_capacity_tokens",
        "kv_seconds_per_token",
        "kv_used_tokens",
        "max_batch_size",
        "preemptions",
        "prefill_tokens",
        "prefix_tokens",
        "request_overhead_s",
        "step",
        "steps",
    )

    def __init__(
        self,
        *,
        clock: VirtualClock,
        instance: Instance,
        profile: Profile,
        times: StepTable,
        listener: EngineEvents,
        kv_seconds_per_token: float = 0.0,
        step_mode: bool = False,
        stepped: Callable[[Iterable[int]], None] | None = None,
        composer: Composer | None = None,
        prefixes: PrefixCache | None = None,
    ) -> None:
        """``stepped``, in step mode, hears at the end of each step which requests (by id) decoded a token in it, before
        the listener hears what else the step brought. ``composer``: of this engine alone; None: first come, first
        served. ``prefixes``: of programs, in this engine alone; None: every prompt is prefilled whole."""
        assert stepped is None or step_mode, "a segment of steps has one end"
        self._clock = clock
        self.instance = instance
        self._times = times
        self._token_budget = min(instance.max_num_batched_tokens, times.token_budget)
        self._listener = listener
        self.kv_capacity_tokens = instance.kv_capacity_tokens
        self.kv_seconds_per_token = kv_seconds_per_token
        self.request_overhead_s = profile.request_overhead_ms / 1000.0
        self._max_num_seqs = profile.max_num_seqs
        self.max_batch_size = min(instance.max_batch_size, profile.max_num_seqs)
        self._step_mode = step_mode
        self._stepped = stepped
        self._composer = composer
        self._prefixes = prefixes
        self._preempter: Preempter | None = None if composer is None else composer.preempter
        self._key = engine_key(instance.id)
        self._fire: Callable[[], None] = self._on_due if stepped is None else self._on_due_told
        self._sequences: dict[int, EngineSequence] = {}
        self._waiting: OrderedDict[EngineSequence, None] = OrderedDict()
        """In order of arrival; a composer lets them in in its own, so any of them has to go at once."""
        self._waiting_tokens = 0
        self._prefilling: deque[EngineSequence] = deque()
        self._restoring = 0
        """Sequences whose saved KV is on its way in, or in and waiting for the next boundary (``_ready``)."""
        self._ready: list[EngineSequence] = []
        self._held_tokens = 0
        """KV that is being copied out."""
        self._decoding: dict[int, EngineSequence] = {}
        self._finishing: list[tuple[int, int, EngineSequence]] = []
        self._evicting: list[EngineSequence] = []
        self._chunks: list[tuple[EngineSequence, int]] = []
        self._serial = 0
        self._in_boundary = False
        self._due_s = inf
        # The segment under way: T(k) = k*_base_s + _growth_s*k*(k-1)/2 from _segment_start_s.
        self._segment_start_s = -1.0
        self._segment_context = 0
        self._base_s = 0.0
        self._growth_s = 0.0
        self._steps_done = 0
        self._steps_end = 0
        self._rel_s = 0.0
        self._mixed_s = 0.0
        """Duration of the step with prefill that is under way; 0 when none is."""
        self.batch = 0
        self.context_sum = 0
        self.kv_used_tokens = 0
        self.step = 0
        self.steps = 0
        self.busy_s = 0.0
        self.decode_tokens = 0
        self.prefill_tokens = 0
        self.prefix_tokens = 0
        """Of prompts that needed no prefill."""
        self.context_tokens = 0.0
        self.preemptions = 0

    # -- the Engine port ---------------------------------------------------------------------------------------

    def start(self, request: Request) -> None:
        sequence = EngineSequence(request)
        self._sequences[request.id] = sequence
        if request.input_tokens + int(request.payload) > self.kv_capacity_tokens:
            self._clock.call_at(self._clock.now_s, lambda: self._give_up(sequence))
        elif self.request_overhead_s > 0.0:
            self._clock.call_later(self.request_overhead_s, lambda: self._enqueue(sequence))
        else:
            self._enqueue(sequence)

    def evict(self, request: Request) -> None:
        sequence = self._sequences.get(request.id)
        if sequence is None or sequence.evict:
            return
        sequence.evict = True
        self._evicting.append(sequence)
        if self._due_s == inf and not self._in_boundary:
            self._clock.call_at(self._clock.now_s, self._boundary_when_idle)
        else:
            self._cut()

    def set_max_batch_size(self, max_batch_size: int) -> None:
        self.max_batch_size = min(max_batch_size, self._max_num_seqs)
        if self._waiting:
            self._wake()

    def set_max_num_batched_tokens(self, max_num_batched_tokens: int) -> None:
        """From the next step with prefill on; the profile's budget bounds it."""
        raised = max_num_batched_tokens > self._token_budget
        self._token_budget = min(max_num_batched_tokens, self._times.token_budget)
        if raised and self._prefilling:
            self._cut()  # Decoding alone may have taken all of the budget.

    @property
    def max_num_batched_tokens(self) -> int:
        return self._token_budget

    # -- driver side -------------------------------------------------------------------------------------------

    def sample(self) -> Sample:
        """What a scrape would read now."""
        done = self._steps_passed()
        since, batch = done - self._steps_done, self.batch
        elapsed = 0.0
        context = 0.0
        if since > 0:
            elapsed = self._duration(done) - self._duration(self._steps_done)
            context = since * float(self.context_sum) + batch * (since * (since - 1) // 2)
        return Sample(
            instance_id=self.instance.id,
            taken_s=self._clock.now_s,
            running=batch + len(self._prefilling) + self._restoring,
            waiting=len(self._waiting),
            waiting_tokens=self._waiting_tokens,
            head_tokens=next(iter(self._waiting)).prompt if self._waiting else 0,
            kv_used_tokens=self.kv_used_tokens + batch * since,
            steps=self.steps + since,
            busy_s=self.busy_s + elapsed,
            decode_tokens=self.decode_tokens + batch * since,
            prefill_tokens=self.prefill_tokens,
            context_tokens=self.context_tokens + context,
            preemptions=self.preemptions,
        )

    def look(self, seen: Callable[[Sample], None]) -> None:
        """Scrape it, at no distance."""
        seen(self.sample())

    def fail(self) -> None:
        """The process died: nothing it held comes back."""
        self._sequences.clear()
        self._waiting.clear()
        self._waiting_tokens = 0
        self._prefilling.clear()
        self._decoding.clear()
        self._finishing.clear()
        self._evicting.clear()
        self._chunks.clear()
        self._ready.clear()
        if self._prefixes is not None:
            self._prefixes.clear()
        self.batch = self.context_sum = self.kv_used_tokens = self._restoring = self._held_tokens = 0
        self._mixed_s = 0.0
        self._due_s = inf

    # -- commands ----------------------------------------------------------------------------------------------

    def _enqueue(self, sequence: EngineSequence) -> None:
        if self._sequences.get(sequence.request.id) is not sequence:
            return  # Evicted, or the engine died, before the request overhead was over.
        self._waiting[sequence] = None
        self._waiting_tokens += sequence.prompt
        if self._composer is not None:
            self._composer.add(sequence.request, sequence.prompt, False)
        if self._in_boundary:
            return
        if self._due_s == inf:
            self._plan(changed=True)
        elif len(self._waiting) == 1:
            self._cut_to_admit()

    def _wake(self) -> None:
        if self._in_boundary:
            return
        if self._due_s == inf:
            self._plan(changed=True)
        else:
            self._cut_to_admit()

    def _cut_to_admit(self) -> None:
        """Cut the segment if the head of the queue may fit; KV only fills up meanwhile, so this errs on one side."""
        if not self._waiting or (self._preempter is None and self._places_free() <= 0):
            return
        if self._composer is not None:
            self._cut()  # Who is next is known when it is asked.
        elif self.kv_used_tokens + next(iter(self._waiting)).prompt + self.batch <= self.kv_capacity_tokens:
            self._cut()

    def _cut(self) -> None:
        """End the segment under way at its next step boundary. A step with prefill ends by itself."""
        if self._mixed_s > 0.0 or self._in_boundary:
            return
        steps = self._steps_passed() + 1
        if steps < self._steps_end:
            self._steps_end = steps
            self._due_s = self._segment_start_s + self._duration(steps)
            self._clock.push(self._due_s, self._key, self._fire)

    def _duration(self, steps: int) -> float:
        return steps * self._base_s + self._growth_s * (steps * (steps - 1) // 2)

    def _steps_passed(self) -> int:
        """Steps of the segment that have ended by now, in the clock's total order."""
        if self._in_boundary or self._mixed_s > 0.0 or self._due_s == inf:
            return self._steps_done
        clock = self._clock
        now_s = clock.now_s
        start_s, base_s, growth_s = self._segment_start_s, self._base_s, self._growth_s
        elapsed = now_s - start_s
        slope = base_s - 0.5 * growth_s
        steps = int(2.0 * elapsed / (slope + sqrt(slope * slope + 2.0 * growth_s * elapsed)))
        # The root is a float; the boundary is exact. Ties are ordered by key, as the heap would.
        passed_tie = self._key < clock.key
        while steps > 0:
            end_s = start_s + (steps * base_s + growth_s * (steps * (steps - 1) // 2))
            if end_s < now_s or (end_s == now_s and passed_tie):
                break
            steps -= 1
        while True:
            after = steps + 1
            end_s = start_s + (after * base_s + growth_s * (after * (after - 1) // 2))
            if end_s < now_s or (end_s == now_s and passed_tie):
                steps = after
            else:
                return steps if steps > self._steps_done else self._steps_done

    def _give_up(self, sequence: EngineSequence) -> None:
        if self._sequences.get(sequence.request.id) is sequence:
            del self._sequences[sequence.request.id]
            self._listener.refused(sequence.request, "longer than the instance's KV cache")

    # -- the step boundary -------------------------------------------------------------------------------------

    def _boundary_when_idle(self) -> None:
        if self._due_s == inf:
            self._in_boundary = True
            while self._evicting:
                self._evict_marked()
            self._in_boundary = False
            self._plan(changed=True)
        else:
            self._cut()  # Something started at this very moment.

    def _on_due_told(self) -> None:
        """``_on_due`` for who wants to hear of each step; apart, as most do not and it costs time."""
        if self._clock.now_s == self._due_s and self.batch:
            assert self._stepped is not None
            self._stepped(self._decoding)
        self._on_due()

    def _on_due(self) -> None:
        if self._clock.now_s != self._due_s:
            return  # The timer was moved; this is the old one.
        self._in_boundary = True
        listener = self._listener
        changed = False
        batch = self.batch
        if self._mixed_s > 0.0:
            self.steps += 1
            self.step += 1
            self.busy_s += self._mixed_s
            self._mixed_s = 0.0
            self.decode_tokens += batch
            self.context_tokens += self.context_sum
            self.context_sum += batch
            self.kv_used_tokens += batch
            changed = True
            self._finish_chunks()
        else:
            count = self._steps_end - self._steps_done
            if self._step_mode:
                self._rel_s += self._base_s + self._growth_s * self._steps_done
                self.busy_s += self._base_s + self._growth_s * self._steps_done
            else:
                self.busy_s += self._duration(self._steps_end) - self._duration(self._steps_done)
            self._steps_done = self._steps_end
            self.steps += count
            self.step += count
            grown = batch * count
            self.decode_tokens += grown
            self.context_tokens += count * self.context_sum + batch * (count * (count - 1) // 2)
            self.context_sum += grown
            self.kv_used_tokens += grown
        finishing = self._finishing
        step = self.step
        while finishing and finishing[0][0] <= step:
            finish_step, _, sequence = heappop(finishing)
            if sequence.finish_step != finish_step:
                continue
            changed = True
            self._leave_decoding(sequence)
            request = sequence.request
            del self._sequences[request.id]
            if self._composer is not None:
                self._composer.forget(request)
            request.tokens_done = request.payload
            if self._prefixes is not None:
                self._keep_prefix(request, answered=True)
            listener.finished(request)
        while self._evicting:  # Whoever hears of one may ask for another.
            self._evict_marked()
            changed = True
        self._in_boundary = False
        self._plan(changed)

    def _finish_chunks(self) -> None:
        for sequence, tokens in self._chunks:
            self.prefill_tokens += tokens
            sequence.prefilled += tokens
            if sequence.prefilled < sequence.prompt:
                if self._composer is not None:
                    self._composer.add(sequence.request, sequence.prompt - sequence.prefilled, True)
                continue
            self._prefilling.remove(sequence)
            sequence.generated += 1
            request = sequence.request
            if self._prefixes is not None:
                self._keep_prefix(request, answered=sequence.generated >= request.payload)
            if sequence.generated >= request.payload:
                self.kv_used_tokens -= sequence.prompt
                del self._sequences[request.id]
                if self._composer is not None:
                    self._composer.forget(request)
                request.tokens_done = request.payload
                self._listener.first_token(request)
                self._listener.finished(request)
            else:
                self._join_decoding(sequence, sequence.prompt)
                self._listener.first_token(request)
        self._chunks.clear()

    def _join_decoding(self, sequence: EngineSequence, context: int) -> None:
        request = sequence.request
        sequence.phase = DECODE
        sequence.context = context
        sequence.join_step = self.step
        sequence.finish_step = self.step + request.payload - sequence.generated
        self.batch += 1
        self.context_sum += context
        self._decoding[request.id] = sequence
        self._serial += 1
        heappush(self._finishing, (sequence.finish_step, self._serial, sequence))
        if self._composer is not None:
            self._composer.began(request, sequence.generated, self.step, self._clock.now_s)

    def _leave_decoding(self, sequence: EngineSequence) -> int:
        """Take it out; its context (tokens of KV that it held) is returned."""
        if self._prefixes is not None:  # There is most KV in use now: what it took is gone.
            self._prefixes.fit(self.kv_capacity_tokens - self.kv_used_tokens)
        steps = self.step - sequence.join_step
        context = sequence.context + steps
        sequence.generated += steps
        sequence.finish_step = -1
        self.batch -= 1
        self.context_sum -= context
        self.kv_used_tokens -= context
        del self._decoding[sequence.request.id]
        if self._composer is not None:
            self._composer.left(sequence.request)
        return context

    def _evict_marked(self) -> None:
        marked, self._evicting = self._evicting, []
        for sequence in marked:
            request = sequence.request
            if self._sequences.pop(request.id, None) is None:
                continue  # It finished first.
            saved = 0
            if sequence.phase == DECODE:
                saved = self._leave_decoding(sequence)
                if self.kv_seconds_per_token > 0.0:
                    self._hold_kv(saved)
                else:
                    saved = 0
            elif sequence.phase == PREFILL:
                self._prefilling.remove(sequence)
                self.kv_used_tokens -= sequence.prompt
            elif sequence.phase == RESTORING:
                self._restoring -= 1
                if sequence in self._ready:
                    self._ready.remove(sequence)
                self.kv_used_tokens -= sequence.context
                saved = sequence.context
            else:
                if sequence in self._waiting:  # Else its request overhead is not over.
                    del self._waiting[sequence]
                    self._waiting_tokens -= sequence.prompt
                saved = request.kv_saved_tokens
            if self._composer is not None:
                self._composer.forget(request)
            request.tokens_done = sequence.generated
            request.kv_saved_tokens = saved
            request.kv_saved_on = self.instance.id if saved else -1
            self._listener.evicted(request)

    def _hold_kv(self, tokens: int) -> None:
        """KV being copied to host memory keeps its space until the copy ends."""
        self.kv_used_tokens += tokens
        self._held_tokens += tokens

        def release() -> None:
            if self._held_tokens >= tokens:
                self.kv_used_tokens -= tokens
                self._held_tokens -= tokens
                self._wake()

        self._clock.call_later(tokens * self.kv_seconds_per_token, release)

    def _restore(self, sequence: EngineSequence, tokens: int) -> None:
        """Bring saved KV back in; the sequence decodes from the first boundary after."""
        sequence.phase = RESTORING
        sequence.context = tokens
        sequence.request.kv_saved_tokens = 0
        self._restoring += 1

        def restored() -> None:
            if self._sequences.get(sequence.request.id) is sequence and not sequence.evict:
                self._ready.append(sequence)
                if self._due_s == inf:
                    self._plan(changed=True)
                else:
                    self._cut()

        self._clock.call_later(tokens * self.kv_seconds_per_token, restored)

    # -- planning the next step --------------------------------------------------------------------------------

    def _plan(self, changed: bool) -> None:
        """Start the next step or segment. ``changed``: the decoding set differs from the segment's."""
        if self._ready:
            for sequence in self._ready:
                self._restoring -= 1
                self._join_decoding(sequence, sequence.context)
            self._ready.clear()
            changed = True
        preempted = False
        while self.kv_used_tokens + self.batch > self.kv_capacity_tokens:
            if self.batch + len(self._prefilling) < 2:
                # One sequence alone fits (``start`` checked); what is in its way is KV on its way in or out.
                self._due_s = inf
                return
            self._preempt()
            preempted = changed = True
        composer = self._composer
        if composer is None:
            if self._waiting and not preempted:
                self._admit()
            if self._prefilling and self._plan_prefill():
                return
        else:
            if self._waiting and self._preempter is not None and not preempted:
                changed = self._make_way(self._preempter) or changed
            if self._prompt_may_go() and self._compose(composer, not preempted):
                return
        batch = self.batch
        clock = self._clock
        if batch == 0:
            self._due_s = inf
            return
        if changed or self._steps_done >= SEGMENT_STEPS_MAX:
            self._segment_start_s = clock.now_s
            self._steps_done = 0
            self._rel_s = 0.0
            times = self._times
            self._growth_s = (times.c * batch + ROUND) - ROUND
            self._base_s = (times.base[batch] + times.c * self.context_sum + ROUND) - ROUND
        if self._step_mode:
            self._steps_end = self._steps_done + 1
            step_s = self._base_s + self._growth_s * self._steps_done
            self._due_s = self._segment_start_s + (self._rel_s + step_s)
        else:
            finishing = self._finishing
            while finishing[0][2].finish_step != finishing[0][0]:
                heappop(finishing)
            count = finishing[0][0] - self.step
            if composer is not None:
                if self._prompt_may_go():
                    count = 1
                elif self._waiting and self._preempter is not None:
                    count = min(count, self._preempter.steps_left(self.step))
            room = (self.kv_capacity_tokens - self.kv_used_tokens) // batch
            if room < count:
                count = room if room > 0 else 1
            end = self._steps_done + count
            if end > SEGMENT_STEPS_MAX:
                end = SEGMENT_STEPS_MAX
            self._steps_end = end
            self._due_s = self._segment_start_s + (end * self._base_s + self._growth_s * (end * (end - 1) // 2))
        clock.push(self._due_s, self._key, self._fire)

    def _admit(self) -> None:
        """Move waiting sequences in while a slot and KV for the whole prompt are free."""
        while self._waiting and self._let_in(next(iter(self._waiting))):
            pass

    def _let_in(self, sequence: EngineSequence) -> bool:
        """Move this one in, if a slot and KV for the whole prompt are free."""
        if self._places_free() <= 0:
            return False
        request = sequence.request
        restore = request.kv_saved_tokens if request.kv_saved_on == self.instance.id else 0
        need = restore or sequence.prompt
        if self.kv_used_tokens + need + self.batch > self.kv_capacity_tokens:
            return False
        del self._waiting[sequence]
        self._waiting_tokens -= sequence.prompt
        self.kv_used_tokens += need
        if restore:
            self._restore(sequence, restore)
        else:
            sequence.phase = PREFILL
            self._prefilling.append(sequence)
            if self._prefixes is not None:
                self._find_prefix(self._prefixes, sequence)
        return True

    def _find_prefix(self, prefixes: PrefixCache, sequence: EngineSequence) -> None:
        request = sequence.request
        room_tokens = self.kv_capacity_tokens - self.kv_used_tokens
        prefixes.fit(room_tokens + sequence.prompt)  # As it was until now.
        if request.program:
            sequence.prefilled = prefixes.found((request.tenant, request.program, request.cuts), request.input_tokens)
            sequence.cached = sequence.prefilled
            self.prefix_tokens += sequence.prefilled
        prefixes.fit(room_tokens)

    def _keep_prefix(self, request: Request, *, answered: bool) -> None:
        """Of what its program's next prompt begins with."""
        prefixes = self._prefixes
        if prefixes is None or not request.program:
            return
        tokens = request.input_tokens + (int(request.payload) if answered and request.extends else 0)
        prefixes.keep((request.tenant, request.program, request.cuts), tokens)
        prefixes.fit(self.kv_capacity_tokens - self.kv_used_tokens)

    def _plan_prefill(self) -> bool:
        """Start a step with prefill chunks; False if decoding takes the whole token budget."""
        batch = self.batch
        budget = self._token_budget - batch
        if budget <= 0:
            return False
        total = attention = 0
        chunks = self._chunks
        for sequence in self._prefilling:
            done = sequence.prefilled
            tokens = sequence.prompt - done
            if tokens > budget - total:
                tokens = budget - total
            total += tokens
            attention += tokens * (2 * done + tokens)
            chunks.append((sequence, tokens))
            if total >= budget:
                break
        self._start_mixed(self._mixed_duration(total, attention) + self._admission_s())
        return True

    def _places_free(self) -> int:
        return self.max_batch_size - self.batch - len(self._prefilling) - self._restoring

    def _prompt_may_go(self) -> bool:
        """Whether the next step could hold a part of one. Else nobody is asked before somebody leaves."""
        return bool(self._prefilling) or (bool(self._waiting) and self.batch + self._restoring < self.max_batch_size)

    def _compose(self, composer: Composer, admits: bool) -> bool:
        """``_admit`` and ``_plan_prefill`` in a policy's order. A prompt's KV is taken with its first chunk, so that
        one that comes later may have it first; one that finds no room does not hold up those that have begun."""
        batch, now_s = self.batch, self._clock.now_s
        most = self._token_budget - batch
        if most <= 0:
            return False
        budget = composer.tokens(self._view())
        # An engine with nothing to decode does not idle while a prompt waits.
        budget = min(most, max(budget, 0 if batch else 1))
        total = attention = 0
        chunks = self._chunks
        while total < budget and (request := composer.head(now_s, not admits)) is not None:
            sequence = self._sequences[request.id]
            if sequence.phase == WAITING and not self._let_in(sequence):
                admits = False
                continue
            composer.remove_head(request)
            if sequence.phase == RESTORING:
                continue
            done = sequence.prefilled
            tokens = min(sequence.prompt - done, budget - total)
            total += tokens
            attention += tokens * (2 * done + tokens)
            chunks.append((sequence, tokens))
        if total == 0:
            return False
        self._start_mixed(self._mixed_duration(total, attention) + self._admission_s())
        composer.planned(total, self._mixed_s)
        return True

    def _view(self) -> StepView:
        return StepView(
            now_s=self._clock.now_s,
            step=self.step,
            decoding=self.batch,
            tokens_max=self._token_budget - self.batch,
            kv_free_tokens=self.kv_capacity_tokens - self.kv_used_tokens,
            step_s=self._step_s,
            kv_capacity_tokens=self.kv_capacity_tokens,
            places=self.max_batch_size,
            places_free=self._places_free(),
        )

    def _step_s(self, tokens: int, done: int) -> float:
        """What the next step would take with so many tokens of a prompt of which so many are done."""
        return self._mixed_duration(tokens, tokens * (2 * done + tokens))

    def _mixed_duration(self, tokens: int, attention: int) -> float:
        times = self._times
        step_s = times.base[self.batch + tokens] + (times.c * self.context_sum + times.q * attention)
        return (step_s + ROUND) - ROUND

    def _admission_s(self) -> float:
        """What the prompts that begin in this step add to it."""
        each_s = self._times.admission_s
        if each_s == 0.0:
            return 0.0
        begun = sum(1 for sequence, _ in self._chunks if sequence.prefilled == sequence.cached)
        return (begun * each_s + ROUND) - ROUND

    def _start_mixed(self, step_s: float) -> None:
        self._mixed_s = step_s
        self._due_s = self._clock.now_s + step_s
        self._clock.push(self._due_s, self._key, self._fire)

    def _preempt(self) -> None:
        """Recompute preemption: the sequence admitted last, or whom a composer names, gives its KV back and queues
        first."""
        victim = None if self._preempter is None else self._preempter.victim()
        if victim is not None:
            sequence = self._decoding[victim.id]
            self._leave_decoding(sequence)
        elif self._prefilling:
            sequence = self._prefilling.pop()
            self.kv_used_tokens -= sequence.prompt
        else:
            sequence = self._decoding[next(reversed(self._decoding))]
            self._leave_decoding(sequence)
        self._wait_again(sequence)

    def _make_way(self, preempter: Preempter) -> bool:
        """Take places and KV back as a composer has it; whether anybody had to leave."""
        leaving = preempter.gives_way(self._view())
        for request in leaving:
            sequence = self._decoding[request.id]
            saved = self._leave_decoding(sequence)
            if preempter.swaps and self.kv_seconds_per_token > 0.0:
                self._hold_kv(saved)
                request.kv_saved_tokens = saved
                request.kv_saved_on = self.instance.id
            self._wait_again(sequence)
        return bool(leaving)

    def _wait_again(self, sequence: EngineSequence) -> None:
        self.preemptions += 1
        self._queue_again(sequence)
        if self._composer is not None:
            self._composer.add(sequence.request, sequence.prompt, False)

    def _queue_again(self, sequence: EngineSequence) -> None:
        """Before all others, without its KV."""
        sequence.phase = WAITING
        sequence.prefilled = sequence.cached = 0
        sequence.prompt = sequence.request.input_tokens + sequence.generated
        self._waiting[sequence] = None
        self._waiting.move_to_end(sequence, last=False)
        self._waiting_tokens += sequence.prompt
