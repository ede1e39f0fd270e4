"""An engine that is a pipeline of stages with replicas of their own, exact and in closed form between events.

It batches, books KV, evicts and preempts as the engine of ``engines.model`` does, of which it is a subclass: what
differs is how long a step takes and where KV lies. A step of a pipeline is a *round*, in which every decoding sequence
gets a token and prompts get what is left of the budget. The sequences go through the stages in M micro-batches, each
on its way while others are, so a round takes as long as

    the way     one micro-batch through all stages and hops:  sum_i t_i(tokens/M) + hops
    a replica   all that pass through it, in k passes:        k * t_ij(its tokens / k)
    a link      all activations that leave a replica:         its tokens * bytes per token / bandwidth

whichever is longest (that a line of stations with constant times works so is tested against one that is run message by
message). M makes the round shortest, in multiples of the largest number of replicas, because a micro-batch goes one
way. Each pass reads the weights again and each stage has the engine's overhead, so small batches gain nothing.

A sequence keeps its path, because its KV lies there: on the replica of each stage that had fewest sequences. A replica
that is added gets only new sequences; one that is removed takes none and is stopped when it has none. All sequences
advance in step, at the pace of the busiest replica: after a replica was added, those on its empty neighbour wait for
the others, where a real pipeline would let them run ahead. This errs against pipelines, for as long as answers last.

A replica that dies takes the KV on it with it. At the end of the round under way its sequences queue again in front,
and are prefilled from their tokens through all stages: a real head sends them through those up to the lost one only.

All of these are linear in the steps of a segment, so k rounds have a closed form as in ``engines.model``; where another
of them becomes the longest the segment ends (``_rebase_at``). With one stage, one replica and free hops every number is
that of ``EngineModel``, to the bit. An event costs O(replicas of all stages); a round without events costs nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from heapq import heappop
from math import ceil, inf
from typing import Protocol

from chiron.core.clock import VirtualClock
from chiron.core.ports import EngineEvents
from chiron.core.specs import PipelineKind
from chiron.core.stages import PipelineSample, StageSample
from chiron.core.types import Instance, Request
from chiron.engines.model import (
    PREFILL,
    RESTORING,
    SEGMENT_STEPS_MAX,
    EngineModel,
    EngineSequence,
)
from chiron.engines.pipeline_rounds import Replica, Rounds, Stage, StageTimes
from chiron.engines.profile import Profile
from chiron.policies.views import ReplicaView


class ReplicaSource(Protocol):
    """Where replicas of stages come from."""

    def start(self, instance: Instance, stage: int, up: Callable[[int, float], None]) -> int:
        """Begin to start a replica; ``up`` hears its number and how long it took. Returns the number."""

    def stop(self, replica: int) -> None:
        """Give it back, or give up its start."""


class _Claim:
    """A sequence's place on one replica of each stage."""

    __slots__ = ("kv", "path")

    def __init__(self, path: tuple[Replica, ...], kv: int) -> None:
        self.path = path
        self.kv = kv
        """Tokens that it holds there while it does not decode."""


class PipelineModel(EngineModel):
    """One pipeline; implements ``Engine`` and ``StagedEngine``."""

    __slots__ = (
        "_capacity_told",
        "_claims",
        "_draining",
        "_kind",
        "_left",
        "_rebase_at",
        "_rounds",
        "_route",
        "_source",
        "_stage_times",
        "_stages",
        "_tokens_done",
    )

    def __init__(
        self,
        *,
        clock: VirtualClock,
        instance: Instance,
        kind: PipelineKind,
        profile: Profile,
        stages: Sequence[StageTimes],
        replicas: Sequence[Sequence[int]],
        source: ReplicaSource,
        listener: EngineEvents,
        capacity_told: Callable[[Instance, int], None],
        kv_seconds_per_token: float = 0.0,
        step_mode: bool = False,
        stepped: Callable[[Iterable[int]], None] | None = None,
        route: Callable[[Sequence[ReplicaView], int, int], int] | None = None,
    ) -> None:
        """``profile``: what is the pipeline's own, its request overhead and most sequences; ``replicas``: the numbers
        of those of each stage that are up; ``route``: as a policy has it, None: the replica with fewest sequences."""
        super().__init__(
            clock=clock,
            instance=instance,
            profile=profile,
            times=stages[0].table,
            listener=listener,
            kv_seconds_per_token=kv_seconds_per_token,
            step_mode=step_mode,
            stepped=stepped,
        )
        self._kind = kind
        self._stage_times = list(stages)
        self._source = source
        self._route = route
        self._capacity_told = capacity_told
        self._claims: dict[int, _Claim] = {}
        self._left: tuple[Replica, ...] = ()
        """Path of the sequence that stopped decoding last."""
        self._rebase_at = 0
        self._tokens_done = 0
        self._stages = [Stage() for _ in stages]
        self._rounds = Rounds(kind, self._stage_times, self._stages)
        for number, numbers in enumerate(replicas):
            self._stages[number].replicas = [Replica(number, each) for each in numbers]
        self._recount()

    # -- the StagedEngine port ---------------------------------------------------------------------------------

    def scale(self, replicas: Sequence[int]) -> None:
        for number, wanted in enumerate(replicas):
            stage = self._stages[number]
            live = [each for each in stage.replicas if not each.draining]
            missing = wanted - len(live) - len(stage.starting)
            for each in stage.replicas:
                if each.draining and not each.dead and missing > 0:
                    each.draining = False
                    missing -= 1
            for _ in range(missing):
                self._start(number)
            for _ in range(min(-missing, len(stage.starting))):
                self._source.stop(stage.starting.pop())
                missing += 1
            # The emptiest first, the newest of equals.
            live.sort(key=lambda each: (each.sequences, -each.number))
            for each in live[: max(0, -missing)]:
                each.draining = True
        if not self._in_boundary:
            self._stop_drained()
        self._recount()
        self.tell_capacity()
        if self._waiting:
            self._wake()

    def replica_failed(self, number: int) -> None:
        """It died. Another one is started in its place, as whoever keeps the plan's number would."""
        for at, stage in enumerate(self._stages):
            for replica in stage.replicas:
                if replica.number != number or replica.dead:
                    continue
                if not replica.draining:
                    self._start(at)
                replica.dead = replica.draining = self._draining = True
                self.tell_capacity()
                if self._due_s == inf and not self._in_boundary:
                    self._clock.call_at(self._clock.now_s, self._boundary_when_idle)
                else:
                    self._cut()
                return

    def stage_sample(self) -> PipelineSample:
        """What a scrape of the stages would read now."""
        done = self._steps_passed()
        since = done - self._steps_done
        context = self.context_sum + self.batch * since
        return PipelineSample(
            taken_s=self._clock.now_s,
            stages=tuple(self._sample_stage(stage, done, since) for stage in self._stages),
            running=self.batch + len(self._prefilling) + self._restoring,
            waiting=len(self._waiting),
            context_tokens=float(context),
        )

    def _sample_stage(self, stage: Stage, done: int, since: int) -> StageSample:
        busy_s, passes, tokens = stage.busy_s, stage.passes, self._tokens_done
        if since > 0:
            busy_s += self._charge(stage, done)
            passes += since * stage.round_passes
            tokens += since * self._rounds.tokens
        ready = [each for each in stage.replicas if not each.draining]
        used = max((self._kv_used(each) + each.batch * since for each in ready), default=0)
        return StageSample(
            ready=len(ready),
            starting=len(stage.starting),
            draining=len(stage.replicas) - len(ready),
            busy_s=busy_s,
            passes=float(passes),
            tokens=float(tokens),
            waiting=stage.waiting,
            kv_used_tokens=used,
            start_s=stage.start_s,
        )

    def _start(self, number: int) -> None:
        stage = self._stages[number]

        def up(replica: int, took_s: float) -> None:
            stage.starting.remove(replica)
            stage.start_s = took_s
            stage.replicas.append(Replica(number, replica))
            self._recount()
            self.tell_capacity()
            if self._waiting:
                self._wake()

        stage.starting.append(self._source.start(self.instance, number, up))

    def _stop_drained(self) -> None:
        """Replicas that are to go and hold nothing any more. Between two rounds: in the middle of one, KV may be about
        to be copied out."""
        for stage in self._stages:
            for replica in [each for each in stage.replicas if each.draining and not each.sequences and not each.kv]:
                stage.replicas.remove(replica)
                self._source.stop(replica.number)
        self._recount()

    def _recount(self) -> None:
        """KV of the stage that has least, over all its replicas: no more fits at once, wherever sequences lie. A stage
        that has lost them all will have one again."""
        self._draining = any(each.draining for stage in self._stages for each in stage.replicas)
        times = self._stage_times
        self.kv_capacity_tokens = min(
            max(1, len(stage.replicas)) * times[number].kv_capacity_tokens for number, stage in enumerate(self._stages)
        )

    def tell_capacity(self) -> None:
        """What new sequences can have."""
        times = self._stage_times
        tokens = min(
            sum(not each.draining for each in stage.replicas) * times[number].kv_capacity_tokens
            for number, stage in enumerate(self._stages)
        )
        self._capacity_told(self.instance, tokens)

    # -- where sequences lie -----------------------------------------------------------------------------------

    def start(self, request: Request) -> None:
        longest = min(times.kv_capacity_tokens for times in self._stage_times)
        if request.input_tokens + int(request.payload) > longest:
            sequence = EngineSequence(request)
            self._sequences[request.id] = sequence
            self._clock.call_at(self._clock.now_s, lambda: self._give_up(sequence))
        else:
            super().start(request)

    def fail(self) -> None:
        super().fail()
        self._claims.clear()
        for stage in self._stages:
            for number in stage.starting:
                self._source.stop(number)
            stage.starting.clear()
            for replica in stage.replicas:
                replica.sequences = replica.batch = replica.context = replica.kv = 0

    def _kv_used(self, replica: Replica) -> int:
        return replica.kv + replica.context + replica.batch * self.step

    def _choose(self, need: int, request: Request) -> tuple[Replica, ...] | None:
        """The replica of each stage with fewest sequences and room for this one, or the one that the policy routes it
        to; None: some stage has none."""
        if self._route is not None:
            return self._routed(need, request)
        path = []
        for stage, times in zip(self._stages, self._stage_times, strict=True):
            best: Replica | None = None
            for replica in stage.replicas:
                if replica.draining or replica.sequences >= times.max_num_seqs:
                    continue
                if self._kv_used(replica) + need + replica.batch > times.kv_capacity_tokens:
                    continue
                if best is None or replica.sequences < best.sequences:
                    best = replica
            if best is None:
                return None
            path.append(best)
        return tuple(path)

    def _routed(self, need: int, request: Request) -> tuple[Replica, ...] | None:
        route, path = self._route, []
        assert route is not None
        for number, (stage, times) in enumerate(zip(self._stages, self._stage_times, strict=True)):
            room = [
                each
                for each in stage.replicas
                if not each.draining
                and each.sequences < times.max_num_seqs
                and self._kv_used(each) + need + each.batch <= times.kv_capacity_tokens
            ]
            if not room:
                return None
            first, last = self._kind.stages[number].layers
            views = [
                ReplicaView(
                    layers=last - first + 1,
                    hop_s=self._kind.hop_s,
                    sequences=each.sequences,
                    kv_left_tokens=times.kv_capacity_tokens - self._kv_used(each),
                )
                for each in room
            ]
            path.append(room[route(views, request.input_tokens, request.id)])
        return tuple(path)

    def _release(self, request_id: int) -> None:
        """It holds no place any more."""
        claim = self._claims.pop(request_id)
        for replica in claim.path:
            replica.kv -= claim.kv
            replica.sequences -= 1

    def _join_decoding(self, sequence: EngineSequence, context: int) -> None:
        super()._join_decoding(sequence, context)
        claim = self._claims[sequence.request.id]
        for replica in claim.path:
            replica.kv -= claim.kv
            replica.batch += 1
            replica.context += context - self.step
        claim.kv = 0

    def _leave_decoding(self, sequence: EngineSequence) -> int:
        context = super()._leave_decoding(sequence)
        self._left = self._claims[sequence.request.id].path
        for replica in self._left:
            replica.batch -= 1
            replica.context -= context - self.step
        self._release(sequence.request.id)
        return context

    def _finish_chunks(self) -> None:
        chunks = [sequence for sequence, _ in self._chunks]
        super()._finish_chunks()
        for sequence in chunks:
            if sequence.request.id in self._claims and sequence.request.id not in self._sequences:
                self._release(sequence.request.id)  # It had one token to give.

    def _evict_marked(self) -> None:
        held = [
            sequence.request.id
            for sequence in self._evicting
            if sequence.phase in (PREFILL, RESTORING) and self._sequences.get(sequence.request.id) is sequence
        ]
        super()._evict_marked()
        for request_id in held:
            self._release(request_id)

    def _hold_kv(self, tokens: int) -> None:
        path = self._left
        for replica in path:
            replica.kv += tokens

        def release() -> None:
            for replica in path:
                replica.kv = max(0, replica.kv - tokens)  # All is 0 after a failure.

        # Due at the same time as the engine's own, and before it: that wakes the queue. Capacity goes last.
        held_s = tokens * self.kv_seconds_per_token
        self._clock.call_later(held_s, release)
        super()._hold_kv(tokens)
        self._clock.call_later(held_s, self._stop_drained)

    # -- planning the next round -------------------------------------------------------------------------------

    def _plan(self, changed: bool) -> None:
        if self._ready:
            for sequence in self._ready:
                self._restoring -= 1
                self._join_decoding(sequence, sequence.context)
            self._ready.clear()
            changed = True
        if self._draining and self._lose():
            changed = True
        while (full := self._overfull()) is not None:
            if not self._preempt_on(full):
                # One sequence alone fits (``start`` checked); what is in its way is KV on its way in or out.
                self._due_s = inf
                return
            changed = True
        if self._draining:
            self._stop_drained()  # Also of those that were emptied just now.
        if self._waiting:
            self._admit()  # Who was preempted may have room on another replica, and has none on this one.
        if self._prefilling and self._plan_prefill():
            return
        if self.batch == 0:
            self._due_s = inf
            return
        if changed or self._steps_done >= self._rebase_at:
            self._rebase()
        if self._step_mode:
            self._steps_end = self._steps_done + 1
            step_s = self._base_s + self._growth_s * self._steps_done
            self._due_s = self._segment_start_s + (self._rel_s + step_s)
        else:
            self._steps_end = min(self._steps_done + self._steps_ahead(), self._rebase_at)
            self._due_s = self._segment_start_s + self._duration(self._steps_end)
        self._clock.push(self._due_s, self._key, self._fire)

    def _steps_ahead(self) -> int:
        """Until somebody finishes, or a replica's KV may be full."""
        finishing = self._finishing
        while finishing[0][2].finish_step != finishing[0][0]:
            heappop(finishing)
        count = finishing[0][0] - self.step
        for stage, times in zip(self._stages, self._stage_times, strict=True):
            for replica in stage.replicas:
                if replica.batch:
                    room = (times.kv_capacity_tokens - self._kv_used(replica)) // replica.batch
                    count = min(count, max(room, 1))
        return count

    def _rebase(self) -> None:
        """A new segment: what takes longest now, and until when it does."""
        self._segment_start_s = self._clock.now_s
        self._steps_done = 0
        self._rel_s = 0.0
        found = self._candidates()
        base_s, growth_s = max(found)
        until = SEGMENT_STEPS_MAX
        for other_s, other_growth_s in found:
            if other_growth_s > growth_s:
                until = min(until, max(1, ceil((base_s - other_s) / (other_growth_s - growth_s))))
        self._base_s, self._growth_s, self._rebase_at = base_s, growth_s, until

    def _candidates(self) -> list[tuple[float, float]]:
        """All that a round may wait for, as ``Rounds.candidates`` has it."""
        prompt = attention = 0
        for sequence, tokens in self._chunks:
            prompt += tokens
            attention += tokens * (2 * sequence.prefilled + tokens)
        return self._rounds.candidates(
            batch=self.batch, context=self.context_sum, prompt=prompt, attention=attention, step=self.step
        )

    def _admit(self) -> None:
        waiting, prefilling = self._waiting, self._prefilling
        while waiting and self.batch + len(prefilling) + self._restoring < self.max_batch_size:
            sequence = next(iter(waiting))
            request = sequence.request
            restore = request.kv_saved_tokens if request.kv_saved_on == self.instance.id else 0
            need = restore or sequence.prompt
            path = self._choose(need, request)
            if path is None:
                return
            del waiting[sequence]
            self._waiting_tokens -= sequence.prompt
            self.kv_used_tokens += need
            self._claims[request.id] = _Claim(path, need)
            for replica in path:
                replica.sequences += 1
                replica.kv += need
            if restore:
                self._restore(sequence, restore)
            else:
                sequence.phase = PREFILL
                prefilling.append(sequence)

    def _plan_prefill(self) -> bool:
        """Start a round with chunks of prompts: as many tokens as fill a pass of each stage, of each replica."""
        widest = max(len(stage.replicas) for stage in self._stages)
        # The table's budget is not that of the kind, which is of a pass of one stage: it shrinks in proportion.
        instance = self.instance
        most = self._times.token_budget * instance.max_num_batched_tokens // instance.kind.max_num_batched_tokens
        budget = most * max(widest, len(self._stages)) - self.batch
        if budget <= 0:
            return False
        total = 0
        chunks = self._chunks
        for sequence in self._prefilling:
            tokens = min(sequence.prompt - sequence.prefilled, budget - total)
            total += tokens
            work = tokens * (2 * sequence.prefilled + tokens)
            for replica in self._claims[sequence.request.id].path:
                replica.tokens += tokens
                replica.attention += work
            chunks.append((sequence, tokens))
            if total >= budget:
                break
        self._mixed_s = max(self._candidates())[0]
        for stage in self._stages:
            for replica in stage.replicas:
                replica.tokens = replica.attention = 0
        self._due_s = self._clock.now_s + self._mixed_s
        self._clock.push(self._due_s, self._key, self._fire)
        return True

    def _overfull(self) -> Replica | None:
        """A replica whose decoding sequences would run out of KV."""
        for stage, times in zip(self._stages, self._stage_times, strict=True):
            for replica in stage.replicas:
                if self._kv_used(replica) + replica.batch > times.kv_capacity_tokens:
                    return replica
        return None

    def _preempt_on(self, replica: Replica) -> bool:
        """Recompute preemption of the sequence that was admitted last there; False: it is alone."""
        prefilling = [s for s in self._prefilling if replica in self._claims[s.request.id].path]
        if replica.batch + len(prefilling) < 2:
            return False
        self.preemptions += 1
        if prefilling:
            sequence = prefilling[-1]
            self._prefilling.remove(sequence)
            self.kv_used_tokens -= sequence.prompt
            self._release(sequence.request.id)
        else:
            sequence = next(s for s in reversed(self._decoding.values()) if replica in self._claims[s.request.id].path)
            self._leave_decoding(sequence)
        self._queue_again(sequence)
        return True

    def _lose(self) -> bool:
        """Sequences whose KV died with a replica begin again from their tokens, in front of the queue. Whether there
        were any; saved KV that is on its way in is lost once it is there."""
        lost = [
            sequence
            for number, claim in self._claims.items()
            if any(replica.dead for replica in claim.path)
            for sequence in (self._sequences[number],)
            if sequence.phase != RESTORING
        ]
        for sequence in reversed(lost):
            if sequence.phase == PREFILL:
                self._prefilling.remove(sequence)
                self.kv_used_tokens -= sequence.prompt
                self._release(sequence.request.id)
            else:
                self._leave_decoding(sequence)
            self._queue_again(sequence)
        return bool(lost)

    # -- what the stages have done -----------------------------------------------------------------------------

    def _on_due(self) -> None:
        if self._clock.now_s == self._due_s:
            rounds = 1 if self._mixed_s > 0.0 else self._steps_end - self._steps_done
            for stage in self._stages:
                stage.busy_s += stage.charge_s if self._mixed_s > 0.0 else self._charge(stage, self._steps_end)
                stage.passes += rounds * stage.round_passes
            self._tokens_done += rounds * self._rounds.tokens
        super()._on_due()

    def _charge(self, stage: Stage, end: int) -> float:
        """Work of the segment's steps from those that are done to ``end``."""
        done = self._steps_done
        return (end - done) * stage.charge_s + stage.charge_growth_s * (end * (end - 1) // 2 - done * (done - 1) // 2)
