"""Sequences through stages: paths, micro-batches, and what happens when a replica comes, goes or dies.

Each replica has an outbox. What comes out of one stage lies in the outbox of the replica of the next one that the
sequence goes through, and is sent when less than two calls are under way there: one that is computed and one that
waits, so that no replica pauses for the head. The first stage takes sequences as their turn comes, and starts at most
M micro-batches (``staged.micro_batches``), each of at most 1/M of the sequences.
"""

from __future__ import annotations

import logging
import ssl
from collections.abc import Callable, Iterable
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, field
from itertools import accumulate
from math import ceil
from typing import Any

from chiron.engines.staged.handover import BYTES_PER_S, Handover, part_tokens, replay_s
from chiron.engines.staged.messages import HeadHello, Result
from chiron.engines.staged.micro_batches import StageTimes, micro_batches
from chiron.engines.staged.replica import Call, LinkSettings, Replica, ReplicaEvents, read_address
from chiron.engines.staged.sequence import Group, Piece, Sequence
from chiron.engines.staged.split import StageRange

log = logging.getLogger("chiron.staged")

_CALLS_AT_ONCE = 2
"""Under way at one replica."""
HANDOVERS_AT_ONCE = 8
"""Under way from one replica, or to one: what a stage lets wait is bounded, and steps have to come between."""
_REFUSALS_HERE = 3
"""After so many, without a token between them, another replica has the sequence, or the same one from its start."""
_REFUSALS_MAX = 8
"""After more than that it fails: otherwise one broken replica would be asked for ever, and its client never told."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PipelineSettings:
    max_num_batched_tokens: int = 512
    """In one step: chunks of prompts besides the sequences' next tokens."""
    micro_batches: int = 0
    """0: as many as make a round shortest."""
    absent_s: float = 30.0
    """Requests wait for a stage that has no replica for this long, and fail then."""
    drain_s: float = 10.0
    """Sequences on a replica that is to go may end there for this long; then they are moved."""
    hand_over: bool | None = None
    """Whether their KV is handed over; None: if that is estimated to be quicker than to compute it again."""
    link: LinkSettings = field(default_factory=LinkSettings)


@dataclass(slots=True, kw_only=True)
class StageSums:
    """Of all replicas that a stage has had, since the start."""

    busy_s: float = 0.0
    calls: int = 0
    tokens: int = 0


class Pipeline(ReplicaEvents):
    """Used on the loop's thread."""

    def __init__(
        self,
        stages: SequenceOf[StageRange],
        hello: Callable[[StageRange], HeadHello],
        settings: PipelineSettings,
        *,
        call_later: Callable[[float, Callable[[], None]], Any],
        time_s: Callable[[], float],
        changed: Callable[[], None],
        context: ssl.SSLContext | None = None,
        row_bytes: int,
        kv_token_bytes: SequenceOf[int],
    ) -> None:
        """``changed``: room may have come, or gone. ``row_bytes``: of one position's hidden state; ``kv_token_bytes``:
        of one position's KV, in each stage."""
        self.stages = tuple(stages)
        self.replicas: list[list[Replica]] = [[] for _ in stages]
        self.sums = [StageSums() for _ in stages]
        self.running: dict[Sequence, None] = {}
        self.replayed_tokens = 0
        self.handed_over_tokens = 0
        self.bytes_per_s = BYTES_PER_S
        """Of KV on its way from a replica to the head, or from the head to one: what was measured last."""
        self.losses = 0
        """Replicas that were lost."""
        self._ready: dict[Sequence, None] = {}
        """With something to send to the first stage, whose turn comes in this order."""
        self._groups: list[Group] = []
        self._hello = hello
        self._settings = settings
        self.token_budget = settings.max_num_batched_tokens
        """Of prompts' chunks in one step, now."""
        self._call_later = call_later
        self._time_s = time_s
        self._absent_since_s: list[float | None] = [time_s()] * len(self.stages)
        """When each stage was seen to have no replica for new sequences."""
        self._complete = False
        """Each stage had one, at some time."""
        self._changed = changed
        self._context = context
        self._row_bytes = row_bytes
        self._kv_token_bytes = tuple(kv_token_bytes)
        self._handovers: dict[Sequence, Handover] = {}
        self._micro_batches = 1
        self._answers = 0
        self._tasks: list[Any] = []

    # -- replicas ----------------------------------------------------------------------------------------------

    def set_replicas(self, addresses: SequenceOf[SequenceOf[str]]) -> None:
        """Which there should be, of each stage. Others are drained, and left. Raises StagedModelError, and then nothing
        is changed."""
        for wanted in addresses:
            for address in wanted:
                read_address(address)
        for stage, wanted in enumerate(addresses):
            have = {replica.address: replica for replica in self.replicas[stage]}
            for address in dict.fromkeys(wanted):
                if address not in have:
                    hello = self._hello(self.stages[stage])
                    replica = Replica(stage, address, hello, self, self._settings.link, self._context)
                    self.replicas[stage].append(replica)
                    replica.start()
                elif have[address].leaving:
                    have[address].leaving = have[address].draining = have[address].overdue = False
            for replica in self.replicas[stage]:
                if replica.address not in wanted and not replica.leaving:
                    # One that has said so itself drains already, and its time has begun.
                    drains, replica.leaving, replica.draining = replica.draining, True, True
                    if not drains:
                        self.replica_draining(replica)
        self.pump()

    def look(self) -> None:
        """Which stages have no replica now, and since when. Called again and again; fails what has waited too long."""
        now_s = self._time_s()
        for stage in range(len(self.stages)):
            if self._usable(stage):
                self._absent_since_s[stage] = None
            elif self._absent_since_s[stage] is None:
                self._absent_since_s[stage] = now_s
        self._complete = self._complete or not any(since is not None for since in self._absent_since_s)
        for handover in [each for each in self._handovers.values() if each.until_s < now_s]:
            self._replay(handover)
        for replica in [each for replicas in self.replicas for each in replicas if each.overdue and each.up]:
            self._move_away(replica)
        if why := self.broken():
            for sequence in [each for each in self.running if not each.placed]:
                self._give_up(sequence, why)

    def broken(self) -> str:
        """Which stage has had no replica for longer than requests wait, and why; empty: none."""
        return self._absent(self._settings.absent_s)

    def unready(self) -> str:
        """Why this pipeline should get no requests now; empty: it may. One that is complete may lose a replica for as
        long as requests wait for it."""
        return self.broken() if self._complete else self._absent(0.0)

    def _absent(self, longer_s: float) -> str:
        now_s = self._time_s()
        for stage, since_s in enumerate(self._absent_since_s):
            if since_s is not None and now_s - since_s >= longer_s and not self._usable(stage):
                troubles = [f"{each.address}: {each.trouble}" for each in self.replicas[stage] if each.trouble]
                why = f" ({'; '.join(troubles)[:300]})" if troubles else ""
                return f"no replica of layers {self.stages[stage]} is ready{why}"
        return ""

    def left(self) -> list[Replica]:
        """Replicas that are no longer wanted and have nothing to do any more; to be closed."""
        found = []
        for replicas in self.replicas:
            for replica in list(replicas):
                if replica.leaving and not (replica.up and replica.sequences):
                    replicas.remove(replica)
                    found.append(replica)
        return found

    def replica_up(self, replica: Replica) -> None:
        log.info("stage %d has the replica %s", replica.stage, replica.address)
        for sequence in list(self.running):
            if not sequence.placed:
                self._place(sequence)
        for other in self.replicas[replica.stage]:
            if other.overdue and other is not replica:
                self._move_away(other)
        self.pump()
        self._changed()

    def replica_down(self, replica: Replica, why: str) -> None:
        log.warning("stage %d has lost the replica %s: %s", replica.stage, replica.address, why)
        self.losses += 1
        replica.outbox.clear()
        under_way = {piece.sequence for call in replica.calls.values() for piece in call.pieces if not piece.stale}
        replica.calls.clear()
        for handover in [each for each in self._handovers.values() if replica in (each.source, each.target)]:
            self._replay(handover)
        for sequence in under_way:  # It may be what the replica cannot bear.
            if sequence not in self.running:
                continue
            sequence.refusals += 1
            if sequence.refusals > _REFUSALS_MAX:
                self._fail(sequence, replica, "replicas were lost while they computed it, one after the other")
        self._move(list(replica.sequences), replica)
        self.pump()
        self._changed()

    def replica_draining(self, replica: Replica) -> None:
        log.info("stage %d drains the replica %s", replica.stage, replica.address)
        replica.drains += 1
        drain = replica.drains
        self._call_later(self._settings.drain_s, lambda: self._drained(replica, drain))

    def _drained(self, replica: Replica, drain: int) -> None:
        if replica.draining and replica.drains == drain:
            replica.overdue = True
            self._move_away(replica)

    def _move_away(self, replica: Replica) -> None:
        if any(other is not replica for other in self._usable(replica.stage)):
            for handover in [each for each in self._handovers.values() if each.target is replica]:
                self._replay(handover)
            here = sorted(replica.sequences, key=lambda each: each.id)
            self._move([each for each in here if not self._hand_over(each, replica)], replica)
            self.pump()

    # -- KV that is handed over --------------------------------------------------------------------------------

    def _hand_over(self, sequence: Sequence, source: Replica) -> bool:
        """Whether its KV goes to another replica, now or when its turn comes: until then it goes on where it is. If
        not, it has to be computed again there."""
        if (under_way := self._handovers.get(sequence)) is not None:
            return under_way.source is source
        stage, length = source.stage, sequence.held[source.stage]
        if not length or not source.up or not (others := self._others(source, sequence)):
            return False
        free = [] if self._moves(source) >= HANDOVERS_AT_ONCE else others
        free = [other for other in free if self._moves(other) < HANDOVERS_AT_ONCE]
        token_bytes = self._kv_token_bytes[stage]
        handover = Handover(
            sequence=sequence,
            source=source,
            target=_least_loaded(free or others),
            length=length,
            part=part_tokens(token_bytes),
            token_bytes=token_bytes,
            until_s=self._time_s() + self._settings.link.call_s,
        )
        if not (self._quicker(handover) if self._settings.hand_over is None else self._settings.hand_over):
            return False
        if not free:
            return True
        sequence.path[stage] = None
        sequence.lose(stage)
        self._ready.pop(sequence, None)
        handover.target.sequences.add(sequence)
        self._handovers[sequence] = handover
        self._next_part(handover)
        return True

    def _moves(self, replica: Replica) -> int:
        """Handovers from it and to it, and those that it has not answered although nobody waits for them any more."""
        under_way = sum(1 for each in self._handovers.values() if replica in (each.source, each.target))
        return under_way + sum(1 for each in replica.moves.values() if each.over)

    def _quicker(self, handover: Handover) -> bool:
        figures = [[each.figures for each in replicas] for replicas in self.replicas[: handover.stage + 1]]
        replayed_s = replay_s(figures, handover.length, self._settings.max_num_batched_tokens)
        return handover.seconds(self.bytes_per_s) < replayed_s

    def _next_part(self, handover: Handover) -> None:
        handover.asked_s = self._time_s()
        handover.source.fetch(handover)

    def replica_moved(self, replica: Replica, handover: Handover, sound: bool, body: memoryview) -> None:
        size = handover.part_bytes if sound and replica is handover.source else 0
        if len(body) != size:
            raise ValueError(f"KV of {len(body)} bytes; it must have {size}")
        if not sound or not handover.target.up:
            self._replay(handover)
        elif replica is handover.source:
            handover.target.keep(handover, body)
        else:
            self.bytes_per_s = handover.measured(self.bytes_per_s, self._time_s() - handover.asked_s)
            handover.at = handover.end
            if handover.at < handover.length:
                self._next_part(handover)
            else:
                self._handed_over(handover)
        if handover.over and handover.source.overdue:
            self._move_away(handover.source)
        self.pump()

    def _handed_over(self, handover: Handover) -> None:
        sequence = handover.sequence
        self._handovers.pop(sequence)
        handover.over = True
        handover.source.free(sequence)
        sequence.path[handover.stage] = handover.target
        sequence.held[handover.stage] = handover.length
        self.handed_over_tokens += handover.length
        if sequence.placed:
            self._ready[sequence] = None

    def _stop_handover(self, sequence: Sequence) -> Handover | None:
        handover = self._handovers.pop(sequence, None)
        if handover is not None:
            handover.over = True
            handover.source.free(sequence)
            handover.target.free(sequence)
        return handover

    def _replay(self, handover: Handover) -> None:
        """It did not work, so it is computed again."""
        if self._stop_handover(handover.sequence) is not None:
            self.replayed_tokens += handover.length
            self._place(handover.sequence)

    def _move(self, sequences: Iterable[Sequence], replica: Replica) -> None:
        """They go on elsewhere, from their tokens."""
        for sequence in sorted(sequences, key=lambda each: each.id):
            self.replayed_tokens += sequence.held[replica.stage]
            replica.free(sequence)
            sequence.path[replica.stage] = None
            sequence.lose(replica.stage)
            self._place(sequence)

    def _usable(self, stage: int) -> list[Replica]:
        return [replica for replica in self.replicas[stage] if replica.up and not replica.draining]

    # -- sequences ---------------------------------------------------------------------------------------------

    def add(self, sequence: Sequence) -> bool:
        """False: some stage has no replica with room for it now."""
        need = len(sequence.tokens) + 1
        chosen = []
        for stage in range(len(self.stages)):
            fits = [replica for replica in self._usable(stage) if replica.room_tokens >= need]
            if not fits:
                return False
            chosen.append(_least_loaded(fits))
        sequence.held = [0] * len(self.stages)
        sequence.path = list(chosen)
        for replica in chosen:
            replica.sequences.add(sequence)
        self.running[sequence] = None
        self._ready[sequence] = None
        return True

    def remove(self, sequence: Sequence) -> None:
        """It has ended, or has to wait; its KV is freed."""
        self.running.pop(sequence, None)
        self._ready.pop(sequence, None)
        self._stop_handover(sequence)
        sequence.start_over()
        for replica in sequence.path:
            if replica is not None:
                replica.free(sequence)
        sequence.path, sequence.held = [], []

    def _place(self, sequence: Sequence) -> None:
        """A replica for each stage that it has none of; where there is none it waits for one."""
        handover = self._handovers.get(sequence)
        for stage, replica in enumerate(sequence.path):
            if handover is not None and handover.stage == stage:
                continue
            if replica is None and (usable := self._usable(stage)):
                need = len(sequence.tokens) + 1
                found = _least_loaded([r for r in usable if r.room_tokens >= need] or usable)
                sequence.path[stage] = found
                sequence.held[stage] = 0
                found.sequences.add(sequence)
        if sequence.placed:
            self._ready[sequence] = None

    # -- flow --------------------------------------------------------------------------------------------------

    def pump(self) -> None:
        """Send whatever can be sent."""
        share = self._share()
        for replicas in self.replicas[1:]:
            for replica in replicas:
                while replica.up and replica.outbox and len(replica.calls) < _CALLS_AT_ONCE:
                    pieces = self._from_outbox(replica, share)
                    if pieces:
                        replica.send(pieces)
        for replica in self.replicas[0]:
            while replica.up and len(replica.calls) < _CALLS_AT_ONCE:
                pieces = self._from_ready(replica, share)
                if not pieces:
                    break
                replica.send(pieces)

    def _share(self) -> int:
        """Sequences of one micro-batch, at most."""
        if self._settings.micro_batches:
            self._micro_batches = self._settings.micro_batches
        elif self._answers % 16 == 0:
            self._micro_batches = micro_batches(self.stage_times(), len(self.running), self._step_max())
        return max(1, min(ceil(len(self.running) / self._micro_batches), self._step_max(), self._tokens_max() // 2))

    def _tokens_max(self) -> int:
        """In one step, of any replica."""
        return min((r.tokens_max for replicas in self.replicas for r in replicas if r.up), default=2)

    def _budget(self, share: int) -> int:
        """Tokens of chunks in one step: with one of each sequence besides, a step is not too long for any replica."""
        return max(1, min(self.token_budget, self._tokens_max() - share))

    def set_token_budget(self, tokens: int) -> None:
        """Tokens of chunks in one step from now on, at most those that it was made with."""
        self.token_budget = max(1, min(tokens, self._settings.max_num_batched_tokens))

    def _step_max(self) -> int:
        return min((r.limit for replicas in self.replicas for r in replicas if r.up), default=1)

    def stage_times(self) -> list[StageTimes]:
        times = []
        for replicas in self.replicas:
            known = [r.figures for r in replicas if r.up and r.figures.calls]
            lines = [figures.line() for figures in known] or [(0.0, 0.0)]
            times.append(
                StageTimes(
                    fixed_s=sum(line[0] for line in lines) / len(lines),
                    sequence_s=sum(line[1] for line in lines) / len(lines),
                    hop_s=sum(figures.hop_s for figures in known) / max(1, len(known)),
                    replicas=max(1, sum(1 for r in replicas if r.up)),
                )
            )
        return times

    def _from_outbox(self, replica: Replica, share: int) -> list[Piece]:
        pieces: list[Piece] = []
        tokens, most = 0, self._budget(share) + share
        while replica.outbox and len(pieces) < share:
            piece = replica.outbox[0]
            count = piece.end - piece.start
            if pieces and tokens + count > most:
                break
            replica.outbox.popleft()
            if not piece.stale:
                pieces.append(piece)
                tokens += count
        return pieces

    def _from_ready(self, replica: Replica, share: int) -> list[Piece]:
        """The next micro-batch: next tokens first, then prompts in chunks. While prompts are long more micro-batches
        may be under way, of chunks alone, so that one chunk follows another through the stages."""
        self._groups = [group for group in self._groups if group.open]
        decodes = len(self._groups) < self._micro_batches
        if not decodes and len(self._groups) >= self._micro_batches + len(self.stages) - 1:
            return []
        group = Group()
        pieces: list[Piece] = []
        budget = self._budget(share)
        widest = max(range(len(self.stages)), key=lambda stage: sum(r.up for r in self.replicas[stage]))
        for sequence in self._in_turn(replica, decodes):
            if pieces and sequence.path[widest] is not pieces[0].sequence.path[widest]:
                continue  # Else each of its replicas would pay the fixed part of a step for a few of them.
            span = sequence.next_span(budget) if budget > 0 else None
            if span is None or len(pieces) >= share:
                break
            pieces.append(self._piece(sequence, span, group))
            budget -= span[1] - span[0]
        if pieces:
            self._groups.append(group)
        return pieces

    def _in_turn(self, replica: Replica, decodes: bool) -> list[Sequence]:
        """Who could go through this replica now: next tokens, then prompts."""
        nexts, prompts, nothing = [], [], []
        for sequence in self._ready:
            if sequence.path and sequence.path[0] is not replica:
                continue
            span = sequence.next_span(2)
            if span is None:
                nothing.append(sequence)
            elif span[1] - span[0] > 1:
                prompts.append(sequence)
            elif decodes:
                nexts.append(sequence)
        for sequence in nothing:  # Something will happen to them that puts them here again.
            self._ready.pop(sequence)
        return nexts + prompts

    def _piece(self, sequence: Sequence, span: tuple[int, int, int], group: Group) -> Piece:
        start, end, last = span
        whole = end == len(sequence.tokens) and last == len(self.stages) - 1
        piece = Piece(
            sequence=sequence,
            epoch=sequence.epoch,
            start=start,
            end=end,
            last=last,
            want=sequence.want if whole else 0,
            group=group,
            rows=_ids(sequence.tokens[start:end]),
        )
        group.open += 1
        sequence.flying.append(piece)
        self._ready.pop(sequence)
        return piece

    def replica_answered(self, replica: Replica, call: Call, result: Result, body: memoryview) -> None:
        self._answers += 1
        sums = self.sums[replica.stage]
        sums.busy_s += result.step_s
        sums.calls += 1
        sums.tokens += sum(piece.end - piece.start for piece in call.pieces)
        refused = dict(result.refused)
        pieces = [(place, piece) for place, piece in enumerate(call.pieces)]
        if not all(0 <= place < len(call.pieces) for place in refused):
            raise ValueError("it refused entries that it was not sent")
        passed = [piece for place, piece in pieces if place not in refused]
        if replica.stage == len(self.stages) - 1:
            self._tokens(passed, result.tops, body)
        else:
            self._onward(replica.stage, passed, body)
        for place, held in refused.items():
            self._refused(replica, call.pieces[place], held)
        self.pump()

    def _onward(self, stage: int, pieces: list[Piece], body: memoryview) -> None:
        width, at = self._row_bytes, 0
        if len(body) != width * sum(piece.end - piece.start for piece in pieces):
            raise ValueError(f"a result of {len(body)} bytes, which are not the rows that were sent")
        for piece in pieces:
            rows = body[at : at + width * (piece.end - piece.start)]
            at += len(rows)
            if piece.stale:
                continue
            sequence = piece.sequence
            sequence.held[stage] = piece.end
            if piece.last > stage:
                piece.stage, piece.rows = stage + 1, rows
                onto = sequence.path[stage + 1]
                assert onto is not None
                onto.outbox.append(piece)
                if piece.stage == 1 and piece.end < len(sequence.tokens):
                    self._ready[sequence] = None
            else:
                self._over(piece)

    def _over(self, piece: Piece) -> None:
        piece.group.open -= 1
        piece.sequence.flying.remove(piece)
        self._ready[piece.sequence] = None

    def _tokens(self, pieces: list[Piece], tops: list[int], body: memoryview) -> None:
        wanted = [piece for piece in pieces if piece.want]
        rows = 4 * sum(tops)
        if len(tops) != len(wanted) or min(tops, default=1) < 1 or len(body) != 2 * rows + 4 * len(wanted):
            raise ValueError(f"a result of {len(body)} bytes with {len(tops)} rows for {len(wanted)} sequences")
        logits, ids, mass = body[:rows], body[rows : 2 * rows], body[2 * rows :].cast("f")
        ends = list(accumulate(4 * top for top in tops))
        stage = len(self.stages) - 1
        for piece in pieces:
            if not piece.stale:
                piece.sequence.held[stage] = piece.end
        for at, piece in enumerate(wanted):
            if piece.stale:
                continue
            self._over(piece)
            sequence, part = piece.sequence, slice(ends[at] - 4 * tops[at], ends[at])
            token = sequence.listener.token(logits[part], ids[part], mass[at])
            if token is None:
                self.remove(sequence)
                self._changed()
            else:
                sequence.tokens.append(token)
                sequence.refusals = 0
        for piece in pieces:
            if not piece.want and not piece.stale:
                self._over(piece)

    def _refused(self, replica: Replica, piece: Piece, held: int) -> None:
        """A replica has no KV for a sequence, or not what it needs to go on (it was there before a restart)."""
        if piece.stale:
            return
        sequence = piece.sequence
        sequence.refusals += 1
        if held >= 0:
            self._not_held(replica, sequence, held)
            return
        if sequence.refusals <= _REFUSALS_MAX and self._others(replica, sequence):
            self._move_on(replica, sequence)
            return
        youngest = max(replica.sequences, key=lambda each: each.id)
        self.remove(youngest)
        youngest.listener.preempted()
        if youngest is not sequence:
            sequence.start_over()
            self._ready[sequence] = None

    def _not_held(self, replica: Replica, sequence: Sequence, held: int) -> None:
        if sequence.refusals > _REFUSALS_MAX:
            self._fail(sequence, replica, f"stage {replica.stage} did not keep what it was sent")
            self._changed()
        elif sequence.refusals % _REFUSALS_HERE == 0:
            self._move_on(replica, sequence)
        else:
            sequence.held[replica.stage] = min(held, sequence.held[replica.stage])
            sequence.start_over()
            self._ready[sequence] = None

    def _fail(self, sequence: Sequence, replica: Replica, why: str) -> None:
        log.error("sequence %d is given up at %s", sequence.id, replica.address)
        self._give_up(sequence, why)

    def _give_up(self, sequence: Sequence, why: str) -> None:
        log.error("sequence %d fails: %s", sequence.id, why)
        self.remove(sequence)
        sequence.listener.failed(why)

    def _others(self, replica: Replica, sequence: Sequence) -> list[Replica]:
        """Replicas of the same stage that have room for it."""
        need = len(sequence.tokens) + 1
        return [r for r in self._usable(replica.stage) if r is not replica and r.room_tokens >= need]

    def _move_on(self, replica: Replica, sequence: Sequence) -> None:
        """Onto another replica, from its tokens; where there is none, onto the same one."""
        replica.free(sequence)
        sequence.lose(replica.stage)
        others = self._others(replica, sequence)
        sequence.path[replica.stage] = _least_loaded(others) if others else None
        if others:
            _least_loaded(others).sequences.add(sequence)
        self._place(sequence)


def _least_loaded(replicas: SequenceOf[Replica]) -> Replica:
    return min(replicas, key=lambda replica: (len(replica.sequences), -replica.room_tokens, replica.address))


def _ids(tokens: list[int]) -> memoryview:
    return memoryview(b"".join(token.to_bytes(4, "little") for token in tokens))
