"""One stage as a service: steps that others ask for, computed one after the other.

A step takes what is there: one call of each head whose calls wait, so that sequences of several pipelines go through
the layers together, up to the max batch size. Of one head it takes a single call, although more may wait: heads keep
micro-batches apart so that all stages have work at any time, and joined in the slowest stage they would go on together
and leave the others idle.

Computing has a thread of its own. The loop meanwhile answers pings, which is how a head tells a stage that is slow from
one that hangs.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import count
from typing import Any

from chiron.engines.staged.kv import Entry, KvStore
from chiron.engines.staged.layers import Likely, StageLayers
from chiron.engines.staged.messages import (
    ENTRIES_MAX,
    MOVE_BYTES,
    VERSION,
    Draining,
    Failed,
    Fetch,
    Free,
    FromHead,
    HeadHello,
    Keep,
    Kept,
    Ping,
    Pong,
    Result,
    StageHello,
    Step,
    hello_trouble,
)
from chiron.engines.staged.torch_parts import torch
from chiron.engines.staged.wire import FrameWire

log = logging.getLogger("chiron.staged")

_CALLS_MAX = 64
"""Of one head that wait."""
QUEUED_MAX_BYTES = 1 << 30
"""Of all heads."""
TOKENS_MAX = 8192
"""In one step, unless it is told another number."""
HEADS_MAX = 64
HELLO_S = 20.0
"""A connection that has not said by then who it is, is cut off."""
SILENT_S = 30.0
"""So is a head that has said nothing for this long: heads ask twice a second. What it held is freed."""
_LOOK_S = 0.5
_HOP_MAX_S = 3600.0
"""What a head says beyond this is not believed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Pace:
    """What a step takes at the least, seconds: stands for a slower device."""

    fixed_s: float = 0.0
    per_sequence_s: float = 0.0

    def seconds(self, sequences: int) -> float:
        return self.fixed_s + self.per_sequence_s * sequences


@dataclass(slots=True, kw_only=True)
class StageTotals:
    """Since the start."""

    steps: int = 0
    tokens: int = 0
    sequences: int = 0
    """Entries of steps, added up."""
    busy_s: float = 0.0
    waited_s: float = 0.0
    """Of calls, in the queue."""
    calls: int = 0
    refused: int = 0
    received_bytes: int = 0
    sent_bytes: int = 0


@dataclass(slots=True, kw_only=True, eq=False)
class _Call:
    head: _Head
    step: Step
    body: memoryview
    arrived_s: float
    waited_s: float = 0.0
    after: list[int] = field(default_factory=list)
    """Sequences to free once it is computed: it may have positions of theirs."""


@dataclass(slots=True, kw_only=True, eq=False)
class _Move:
    """KV that is fetched or kept, in the order of the head's calls."""

    head: _Head
    asked: Fetch | Keep
    body: memoryview
    after: list[int] = field(default_factory=list)


@dataclass(slots=True, kw_only=True, eq=False)
class _Head:
    """One connection."""

    number: int
    wire: FrameWire
    greeted: bool = False
    silent_s: float = 0.0
    """Nothing has come from it for this long."""
    calls: deque[_Call | _Move] = field(default_factory=deque)
    hop_s: float = 0.0
    """As it measures it."""


@dataclass(slots=True, kw_only=True)
class _Answer:
    """What became of one call."""

    refused: list[tuple[int, int]] = field(default_factory=list)
    rows: list[Any] = field(default_factory=list)
    likely: list[Likely] = field(default_factory=list)
    body: list[memoryview] = field(default_factory=list)
    """Rows or likely tokens, as they are sent."""


class StageService:
    """Implements one replica of a stage."""

    def __init__(
        self,
        layers: StageLayers,
        fingerprint: str,
        *,
        kv_capacity_tokens: int,
        limit: int,
        pace: Pace | None = None,
        tokens_max: int = TOKENS_MAX,
        silent_s: float = SILENT_S,
    ) -> None:
        self.layers = layers
        self.limit = limit
        """Max batch size: sequences in one step."""
        self.draining = False
        self.totals = StageTotals()
        self.began_s = time.monotonic()
        self.failed: Callable[[Exception], None] = lambda error: None
        self.kv = KvStore(
            layers.architecture,
            len(layers.stage),
            capacity_tokens=kv_capacity_tokens,
            dtype=layers.dtype,
            device=layers.device,
        )
        self._fingerprint = fingerprint
        self._pace = pace or Pace()
        self._silent_s = silent_s
        self.tokens_max = tokens_max
        self._token_bytes = layers.architecture.kv_bytes(len(layers.stage), layers.dtype.itemsize)
        """Of KV."""
        self._queued_bytes = 0
        self._numbers = count()
        self._heads: deque[_Head] = deque()
        self._frees: list[Any] = []
        """Sequences, and connections, whose KV goes at the next step's beginning: not while one runs."""
        self._woken = asyncio.Event()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="stage")
        self._tasks: list[asyncio.Task[None]] = []
        self._empty = asyncio.Event()

    def start(self) -> None:
        loop = asyncio.get_running_loop()
        self._tasks = [loop.create_task(self._run()), loop.create_task(self._watch())]
        for task in self._tasks:
            task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[None]) -> None:
        """A stage that answers pings and computes nothing would be worse than none."""
        if not task.cancelled() and isinstance(error := task.exception(), Exception):
            log.error("the stage cannot go on", exc_info=error)
            self.failed(error)

    async def warm_up(self) -> None:
        """Reads the weights from the disk, which mapping them did not."""
        await asyncio.get_running_loop().run_in_executor(self._thread, self._warm_up)

    async def drain(self, grace_s: float) -> None:
        """Tell the heads, and wait until none has sequences here."""
        self.draining = True
        for head in self._heads:
            head.wire.send(Draining())
        self._woken.set()
        try:
            async with asyncio.timeout(grace_s):
                while self._heads and self.kv.sequences:
                    self._empty.clear()
                    await self._empty.wait()
        except TimeoutError:
            log.warning("%d sequences were still here after %g s", self.kv.sequences, grace_s)

    async def close(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for head in list(self._heads):
            head.wire.close()
        self._thread.shutdown(wait=False, cancel_futures=True)

    @property
    def queued(self) -> int:
        """Sequences in calls that wait."""
        waiting = (call for head in self._heads for call in head.calls if isinstance(call, _Call))
        return sum(len(call.step.entries) for call in waiting)

    @property
    def heads(self) -> int:
        return len(self._heads)

    @property
    def hop_s(self) -> float:
        """Mean of its heads that have measured it; only they can."""
        known = [head.hop_s for head in self._heads if head.hop_s > 0.0]
        return sum(known) / len(known) if known else 0.0

    # -- connections -------------------------------------------------------------------------------------------

    def accept(self) -> FrameWire:
        """The protocol of one more head."""
        state: list[_Head] = []

        def opened(wire: FrameWire) -> None:
            head = _Head(number=next(self._numbers), wire=wire)
            state.append(head)
            if len(self._heads) >= HEADS_MAX:
                wire.abort(f"{HEADS_MAX} heads are connected, the most there may be")
                return
            self._heads.append(head)
            asyncio.get_running_loop().call_later(HELLO_S, late, head)

        def late(head: _Head) -> None:
            if not head.greeted:
                head.wire.abort(f"it has not said hello within {HELLO_S:g} s")

        def received(message: Any, body: memoryview) -> None:
            self._received(state[0], message, body)

        def closed(why: str) -> None:
            head = state[0]
            if head in self._heads:
                self._heads.remove(head)
            self._queued_bytes -= sum(len(call.body) for call in head.calls)
            head.calls.clear()
            self._frees.append(head.number)
            self._woken.set()
            log.info("head %d is gone: %s", head.number, why)

        return FrameWire(FromHead, opened=opened, received=received, closed=closed, speaks_first=False)

    async def _watch(self) -> None:
        """A turn that comes late (this process was stopped) is no silence of the heads'."""
        loop = asyncio.get_running_loop()
        before_s = loop.time()
        while True:
            await asyncio.sleep(min(_LOOK_S, self._silent_s / 4))
            now_s = loop.time()
            for head in list(self._heads):
                head.silent_s += min(now_s - before_s, 2 * _LOOK_S)
                if head.greeted and head.silent_s > self._silent_s:
                    head.wire.abort(f"it has said nothing for {self._silent_s:g} s")
            before_s = now_s

    def _received(self, head: _Head, message: Any, body: memoryview) -> None:
        head.silent_s = 0.0
        if isinstance(message, HeadHello):
            ours = self._hello()
            head.wire.send(ours)  # Also to one that does not fit: it will say so.
            if trouble := hello_trouble(ours, message):
                raise ValueError(trouble)
            head.greeted = True
            head.wire.body_max = max(self.tokens_max * self._row_bytes, MOVE_BYTES, self._token_bytes)
            return
        if not head.greeted:
            raise ValueError("it did not say hello first")
        if isinstance(message, Ping):
            head.hop_s = message.hop_s if 0.0 <= message.hop_s < _HOP_MAX_S else 0.0
            head.wire.send(Pong(message.id, self.kv.free_tokens, self.queued, self.limit))
        elif isinstance(message, Free):
            if head.calls:
                head.calls[-1].after += message.sequences
            else:
                self._frees += [(head.number, each) for each in message.sequences]
                self._woken.set()
        elif isinstance(message, Fetch | Keep):
            size = (message.end - message.begin) * self._token_bytes
            sound = 0 <= message.begin < message.end <= self.layers.architecture.context_tokens
            if not sound or size > head.wire.body_max or len(body) != (size if isinstance(message, Keep) else 0):
                raise ValueError(f"KV of positions {message.begin} to {message.end} with {len(body)} bytes")
            self._queue(_Move(head=head, asked=message, body=body))
        else:
            self._take(head, message, body)

    def _queue(self, call: _Call | _Move) -> None:
        if len(call.head.calls) >= _CALLS_MAX:
            raise ValueError(f"more than {_CALLS_MAX} steps wait")
        if self._queued_bytes + len(call.body) > QUEUED_MAX_BYTES:
            raise ValueError(f"more than {QUEUED_MAX_BYTES} bytes wait")
        self._queued_bytes += len(call.body)
        self.totals.received_bytes += len(call.body)
        call.head.calls.append(call)
        self._woken.set()

    def _take(self, head: _Head, step: Step, body: memoryview) -> None:
        if not 1 <= len(step.entries) <= ENTRIES_MAX:
            raise ValueError(f"a step of {len(step.entries)} entries; allowed: 1 to {ENTRIES_MAX}")
        context = self.layers.architecture.context_tokens
        for each in step.entries:
            if each.count < 1 or each.position < 0 or each.position + each.count > context or each.want < 0:
                raise ValueError(f"an entry at {each.position} with {each.count} tokens; the context has {context}")
        rows = sum(each.count for each in step.entries)
        if rows > self.tokens_max:
            raise ValueError(f"a step of {rows} tokens; allowed: {self.tokens_max}")
        if len(body) != rows * self._row_bytes:
            raise ValueError(f"a body of {len(body)} bytes for {rows} rows of {self._row_bytes}")
        self._queue(_Call(head=head, step=step, body=body, arrived_s=time.monotonic()))

    @property
    def _row_bytes(self) -> int:
        if self.layers.first:
            return 4
        return int(self.layers.architecture.hidden * self.layers.dtype.itemsize)

    def _hello(self) -> StageHello:
        stage = self.layers.stage
        return StageHello(
            VERSION,
            self._fingerprint,
            stage.begin,
            stage.end,
            self.layers.dtype_name,
            self.kv.capacity_tokens,
            self.kv.free_tokens,
            self.limit,
            self.draining,
            self.tokens_max,
        )

    # -- steps -------------------------------------------------------------------------------------------------

    async def _run(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            self._free_ended()
            if moves := self._next_moves():
                await self._move(moves)
                continue
            calls = self._next_calls()
            if not calls:
                self._woken.clear()
                if not any(head.calls for head in self._heads) and not self._frees:
                    await self._woken.wait()
                continue
            began_s = time.monotonic()
            for call in calls:
                call.waited_s = began_s - call.arrived_s
            try:
                answers = await loop.run_in_executor(self._thread, self._compute, calls)
            except Exception as error:
                log.exception("a step failed")
                for call in calls:
                    call.head.wire.send(Failed(call.step.id, f"{type(error).__name__}: {error}"[:500]))
                self.failed(error)
                continue
            self._answer(calls, answers, time.monotonic() - began_s)
            self._frees += [(call.head.number, each) for call in calls for each in call.after]

    def _next_moves(self) -> list[_Move]:
        """Those before which no step of their head waits."""
        moves: list[_Move] = []
        for head in self._heads:
            while head.calls and isinstance(move := head.calls[0], _Move):
                head.calls.popleft()
                self._queued_bytes -= len(move.body)
                moves.append(move)
        return moves

    async def _move(self, moves: list[_Move]) -> None:
        loop = asyncio.get_running_loop()
        for move in moves:
            try:
                found = await loop.run_in_executor(self._thread, self._moved, move)
            except RuntimeError as error:  # No memory for it, which steps may still have.
                log.warning("KV could not be moved: %s", error)
                found = None
            self.totals.sent_bytes += len(found or b"")
            move.head.wire.send(Kept(move.asked.id, found is not None), *([found] if found else []))
            self._frees += [(move.head.number, each) for each in move.after]

    def _moved(self, move: _Move) -> memoryview | None:
        """In the thread. None: it is not held, or there is no room."""
        asked, key = move.asked, (move.head.number, move.asked.sequence)
        if isinstance(asked, Fetch):
            found = self.kv.read(key, asked.begin, asked.end)
            return None if found is None else _bytes_of(found)
        given = torch.frombuffer(move.body, dtype=self.layers.dtype)
        return None if self.kv.write(key, asked.begin, asked.end, given) else memoryview(b"")

    def _free_ended(self) -> None:
        frees, self._frees = self._frees, []
        gone = {each for each in frees if isinstance(each, int)}
        self.kv.free(each for each in frees if not isinstance(each, int))
        if gone:
            self.kv.free_where(lambda key: key[0] in gone)
        if self.draining and not self.kv.sequences:
            self._empty.set()

    def _next_calls(self) -> list[_Call]:
        """One of each head, beginning with another one each time, while they fit into a step; but one at least."""
        calls: list[_Call] = []
        room = self.limit
        for head in list(self._heads):
            call = head.calls[0] if head.calls else None
            if isinstance(call, _Call) and (not calls or len(call.step.entries) <= room):
                head.calls.popleft()
                self._queued_bytes -= len(call.body)
                calls.append(call)
                room -= len(call.step.entries)
        if calls:
            self._heads.rotate(-1)
        for call in calls:
            self.kv.free((call.head.number, each) for each in call.step.free)
        return calls

    def _compute(self, calls: list[_Call]) -> list[_Answer]:
        """In the thread. Entries for which there is no KV are refused, the others run."""
        answers = [_Answer() for _ in calls]
        whose: list[int] = []
        entries: list[Entry] = []
        given: list[Any] = []
        limit = self.limit
        for number, call in enumerate(calls):
            rows, at = self._rows(call), 0
            for place, said in enumerate(call.step.entries):
                key = (call.head.number, said.sequence)
                entry = Entry(key=key, position=said.position, count=said.count, want=said.want)
                if self.kv.reserve(entry):
                    held = self.kv.holds(key)
                    answers[number].refused.append((place, held if held < said.position else -1))
                else:
                    whose.append(number)
                    entries.append(entry)
                    given.append(rows[at : at + said.count])
                at += said.count
        began_s = time.monotonic()
        for at in range(0, len(entries), limit):
            part = slice(at, at + limit)
            hidden, likely = self.layers.run(torch.cat(given[part]), entries[part], self.kv)
            self._sort(answers, whose[part], entries[part], hidden, likely)
        for answer in answers:  # A GPU has computed it only once it has been read.
            answer.body = _body(answer)
        pause_s = self._pace.seconds(len(entries)) - (time.monotonic() - began_s)
        if pause_s > 0:
            time.sleep(pause_s)
        return answers

    def _rows(self, call: _Call) -> Any:
        if self.layers.first:
            ids = torch.frombuffer(call.body, dtype=torch.int32)
            vocabulary = self.layers.architecture.vocabulary
            # What the embedding has no row for would be read from somebody else's memory on some devices.
            return ids.clamp(0, vocabulary - 1).to(torch.int64)
        return torch.frombuffer(call.body, dtype=self.layers.dtype).view(-1, self.layers.architecture.hidden)

    def _sort(
        self, answers: list[_Answer], whose: list[int], entries: list[Entry], hidden: Any, likely: list[Likely]
    ) -> None:
        at, found = 0, iter(likely)
        for number, entry in zip(whose, entries, strict=True):
            answer = answers[number]
            if not self.layers.last:
                answer.rows.append(hidden[at : at + entry.count])
                at += entry.count
            elif entry.want:
                answer.likely.append(next(found))

    def _answer(self, calls: list[_Call], answers: list[_Answer], step_s: float) -> None:
        totals = self.totals
        totals.steps += 1
        totals.busy_s += step_s
        for call, answer in zip(calls, answers, strict=True):
            totals.calls += 1
            totals.waited_s += call.waited_s
            totals.refused += len(answer.refused)
            totals.sequences += len(call.step.entries)
            totals.tokens += sum(each.count for each in call.step.entries)
            totals.sent_bytes += sum(map(len, answer.body))
            result = Result(
                call.step.id,
                answer.refused,
                [len(each.ids) for each in answer.likely],
                step_s,
                call.waited_s,
                self.kv.free_tokens,
            )
            call.head.wire.send(result, *answer.body)

    def _warm_up(self) -> None:
        entry = Entry(key="warm-up", position=0, count=2, want=1)
        why = self.kv.reserve(entry)
        if why:
            raise ValueError(f"kv_capacity_tokens is {self.kv.capacity_tokens}: {why}")
        a = self.layers.architecture
        given = torch.zeros(2, dtype=torch.int64)
        if not self.layers.first:
            given = torch.zeros(2, a.hidden, dtype=self.layers.dtype)
        self.layers.run(given, [entry], self.kv)
        self.kv.free([entry.key])


def _body(answer: _Answer) -> list[memoryview]:
    if answer.rows:
        return [_bytes_of(torch.cat(answer.rows))]
    if answer.likely:
        return [
            _bytes_of(torch.cat([each.logits for each in answer.likely])),
            _bytes_of(torch.cat([each.ids for each in answer.likely])),
            _bytes_of(torch.stack([each.mass for each in answer.likely])),
        ]
    return []


def _bytes_of(tensor: Any) -> memoryview:
    """numpy has no bfloat16, so it is shown bytes."""
    return memoryview(tensor.contiguous().cpu().view(torch.uint8).numpy()).cast("B")
