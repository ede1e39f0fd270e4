"""The head's connection to one replica of a stage: made again when it is lost, watched, with calls that end.

A replica that dies is noticed by its connection. One that hangs is not, so it is asked twice a second, and given up
when nothing has come from it for a while, or when a call takes longer than any may; closing the connection also keeps
late answers away.
"""

from __future__ import annotations

import asyncio
import logging
import ssl
from collections import deque
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from chiron.engines.staged.errors import StagedModelError
from chiron.engines.staged.handover import Handover
from chiron.engines.staged.messages import (
    Draining,
    Failed,
    Fetch,
    Free,
    FromStage,
    HeadHello,
    Keep,
    Kept,
    Ping,
    Pong,
    Result,
    StageHello,
    Step,
    StepEntry,
    hello_trouble,
)
from chiron.engines.staged.sequence import Piece, Sequence
from chiron.engines.staged.wire import FrameWire

log = logging.getLogger("chiron.staged")

_SMOOTH = 0.2
_PROMPT_TOKENS = 8
"""A step with so many tokens more than sequences tells what prompts take."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LinkSettings:
    """Seconds."""

    ping_s: float = 0.5
    silent_s: float = 5.0
    """A replica that has said nothing for this long is given up."""
    call_s: float = 120.0
    """Longest that a call may take, its wait in the stage's queue included."""
    connect_s: float = 5.0
    retry_s: float = 0.5
    """Between attempts to connect, and before the next one to a replica that was up for less than this."""


@dataclass(slots=True, kw_only=True, eq=False)
class Call:
    pieces: list[Piece]
    sent_s: float


class ReplicaEvents:
    """What a pipeline hears."""

    def replica_up(self, replica: Replica) -> None: ...
    def replica_down(self, replica: Replica, why: str) -> None: ...
    def replica_draining(self, replica: Replica) -> None: ...
    def replica_answered(self, replica: Replica, call: Call, result: Result, body: memoryview) -> None: ...
    def replica_moved(self, replica: Replica, handover: Handover, sound: bool, body: memoryview) -> None: ...


@dataclass(slots=True, kw_only=True)
class ReplicaFigures:
    """Means that follow what is measured. Seconds."""

    step_s: float = 0.0
    hop_s: float = 0.0
    """There and back, without the wait and the computing."""
    waited_s: float = 0.0
    calls: int = 0
    busy_s: float = 0.0
    """Total of computing, of this head's calls."""
    token_s: float = 0.0
    """Of a step with prompts, for each of its tokens."""
    fit: list[float] = field(default_factory=lambda: [0.0] * 5)
    """Fading sums for a line through (sequences, seconds): 1, x, y, xx, xy."""

    def add(self, sequences: int, tokens: int, result: Result, took_s: float) -> None:
        new = 1.0 if not self.calls else _SMOOTH
        hop_s = max(0.0, took_s - result.step_s - result.waited_s)
        self.step_s += new * (result.step_s - self.step_s)
        self.waited_s += new * (result.waited_s - self.waited_s)
        self.hop_s += new * (hop_s - self.hop_s)
        if tokens >= sequences + _PROMPT_TOKENS:
            self.token_s += (_SMOOTH if self.token_s else 1.0) * (result.step_s / tokens - self.token_s)
        self.calls += 1
        self.busy_s += result.step_s
        x, y = float(sequences), result.step_s
        self.fit = [0.98 * old + add for old, add in zip(self.fit, (1.0, x, y, x * x, x * y), strict=True)]

    def line(self) -> tuple[float, float]:
        """Seconds of a step, and of each of its sequences."""
        n, x, y, xx, xy = self.fit
        if not n:
            return 0.0, 0.0
        spread = n * xx - x * x
        slope = max(0.0, (n * xy - x * y) / spread) if spread > 1e-6 * n * xx else 0.0
        fixed = (y - slope * x) / n
        return (fixed, slope) if fixed >= 0 else (0.0, y / x)


class Replica:
    """One replica. Used on the loop's thread."""

    def __init__(
        self,
        stage: int,
        address: str,
        hello: HeadHello,
        events: ReplicaEvents,
        settings: LinkSettings,
        context: ssl.SSLContext | None = None,
    ) -> None:
        self.stage = stage
        self.address = address
        self.up = False
        self.draining = False
        """It takes no new sequences."""
        self.leaving = False
        """It is no longer wanted."""
        self.drains = 0
        """How often it was told to drain."""
        self.overdue = False
        """Its time to drain is over: its sequences leave as soon as there is another replica."""
        self.trouble = ""
        """Why it is not up."""
        self.kv_capacity_tokens = 0
        self.kv_free_tokens = 0
        self.limit = 1
        self.tokens_max = 1
        """In one step."""
        self.sequences: set[Sequence] = set()
        self.outbox: deque[Piece] = deque()
        self.calls: dict[int, Call] = {}
        self.moves: dict[int, Handover] = {}
        """Asked for and not answered yet, whether still wanted or not."""
        self.figures = ReplicaFigures()
        self._hello = hello
        self._events = events
        self._settings = settings
        self._context = context
        self._wire: FrameWire | None = None
        self._greeted: asyncio.Future[StageHello] | None = None
        self._lost = asyncio.Event()
        self._why = ""
        """It was lost."""
        self._ids = 0
        self._frees: list[int] = []
        self._silent_s = 0.0
        self._keeping: asyncio.Task[None] | None = None
        name, _, where = address.rpartition("@")
        self._host, self._port = read_address(where)
        self._name = name or self._host
        """What its certificate says."""

    def start(self) -> None:
        self._keeping = asyncio.get_running_loop().create_task(self._keep())

    async def close(self) -> None:
        if self._keeping is not None:
            self._keeping.cancel()
            await asyncio.gather(self._keeping, return_exceptions=True)
        self.up = False  # What is closed on purpose is not lost.
        if self._wire is not None and not self._wire.over:
            self._wire.close()

    @property
    def room_tokens(self) -> int:
        """KV that is neither used nor needed for what has been placed here."""
        return self.kv_free_tokens - sum(len(s.tokens) - s.held[self.stage] for s in self.sequences if s.held)

    @property
    def waiting(self) -> int:
        """Sequences that wait for it: all but those that it computes."""
        calls = list(self.calls.values())
        return sum(len(call.pieces) for call in calls[1:]) + len(self.outbox)

    def send(self, pieces: list[Piece]) -> None:
        """One call."""
        self._ids += 1
        frees, self._frees = self._frees, []
        entries = [StepEntry(p.sequence.id, p.start, p.end - p.start, p.want) for p in pieces]
        self.calls[self._ids] = Call(pieces=pieces, sent_s=asyncio.get_running_loop().time())
        assert self._wire is not None
        self._wire.send(Step(self._ids, entries, frees), *(piece.rows for piece in pieces))

    def fetch(self, handover: Handover) -> None:
        """The next part of what is handed over, from here."""
        self._move(handover, Fetch)

    def keep(self, handover: Handover, body: memoryview) -> None:
        """That part, here."""
        self._tell_frees()  # The sequence may have been here before.
        self._move(handover, Keep, body)

    def _move(self, handover: Handover, kind: type[Fetch | Keep], *body: memoryview) -> None:
        self._ids += 1
        self.moves[self._ids] = handover
        assert self._wire is not None
        self._wire.send(kind(self._ids, handover.sequence.id, handover.at, handover.end), *body)

    def _tell_frees(self) -> None:
        if self._frees and self._wire is not None:
            frees, self._frees = self._frees, []
            self._wire.send(Free(frees))

    def free(self, sequence: Sequence) -> None:
        """It needs no KV here any more: told with the next call, or soon."""
        self.sequences.discard(sequence)
        if self.up:
            self._frees.append(sequence.id)

    def give_up(self, why: str) -> None:
        if self._wire is not None:
            self._wire.abort(why)

    # -- its life ----------------------------------------------------------------------------------------------

    async def _keep(self) -> None:
        """Connect, watch, and connect again, for ever."""
        while True:
            try:
                await self._connect()
            except (OSError, TimeoutError, ValueError, ssl.SSLError) as error:
                why = getattr(error, "strerror", None) or str(error)
                self._not_up(why or f"no answer within {self._settings.connect_s:g} s")
                await asyncio.sleep(self._settings.retry_s)
                continue
            self.up, self.trouble = True, ""
            began_s = asyncio.get_running_loop().time()
            self._events.replica_up(self)
            await self._watch()
            if asyncio.get_running_loop().time() - began_s < self._settings.retry_s:
                await asyncio.sleep(self._settings.retry_s)

    def _not_up(self, why: str) -> None:
        if why != self.trouble:
            log.warning("stage %d at %s: %s", self.stage, self.address, why)
        self.trouble = why
        if self._wire is not None:
            self._wire.abort(why)

    async def _connect(self) -> None:
        loop = asyncio.get_running_loop()
        self._lost.clear()
        self._greeted = loop.create_future()

        def opened(wire: FrameWire) -> None:
            wire.send(self._hello)

        wire = FrameWire(FromStage, opened=opened, received=self._received, closed=self._closed, speaks_first=True)
        async with asyncio.timeout(self._settings.connect_s):
            self._wire = wire
            name = self._name if self._context is not None else None
            await loop.create_connection(lambda: wire, self._host, self._port, ssl=self._context, server_hostname=name)
            theirs = await self._greeted
        if trouble := hello_trouble(self._hello, theirs):
            raise ValueError(trouble)
        if wire.over:  # What came with its hello ended the connection.
            raise ConnectionError(self._why)
        self.kv_capacity_tokens, self.kv_free_tokens = theirs.kv_capacity_tokens, theirs.kv_free_tokens
        self.limit, self.tokens_max = max(1, theirs.limit), max(1, theirs.tokens_max)
        self.draining = theirs.draining or self.leaving
        self.overdue = self.overdue and self.draining

    async def _watch(self) -> None:
        """Until it is lost. A turn that comes late (this process was stopped) is no silence of the other end's."""
        settings, loop = self._settings, asyncio.get_running_loop()
        self._silent_s, before_s, number = 0.0, loop.time(), 0
        while not self._lost.is_set():
            assert self._wire is not None
            number += 1
            self._wire.send(Ping(number, self.figures.hop_s))
            self._tell_frees()
            with suppress(TimeoutError):
                await asyncio.wait_for(self._lost.wait(), settings.ping_s)
            now_s = loop.time()
            self._silent_s += min(now_s - before_s, 2 * settings.ping_s)
            before_s = now_s
            if self._silent_s > settings.silent_s:
                self.give_up(f"it has said nothing for {settings.silent_s:g} s")
            elif self.calls and now_s - next(iter(self.calls.values())).sent_s > settings.call_s:
                self.give_up(f"a call took longer than {settings.call_s:g} s")

    def _received(self, message: Any, body: memoryview) -> None:
        self._silent_s = 0.0
        if isinstance(message, StageHello):
            if self._greeted is not None and not self._greeted.done():
                self._greeted.set_result(message)
        elif isinstance(message, Result):
            call = self.calls.pop(message.id, None)
            if call is None:
                raise ValueError(f"it answered call {message.id}, which was not made")
            self.kv_free_tokens = message.kv_free_tokens
            took_s = asyncio.get_running_loop().time() - call.sent_s
            tokens = sum(piece.end - piece.start for piece in call.pieces)
            self.figures.add(len(call.pieces), tokens, message, took_s)
            try:
                self._events.replica_answered(self, call, message, body)
            except ValueError:
                self.calls[message.id] = call  # Its sequences are those that the lost replica did not answer.
                raise
        elif isinstance(message, Kept):
            handover = self.moves.pop(message.id, None)
            if handover is None:
                raise ValueError(f"it answered for KV {message.id}, which was not asked for")
            if not handover.over:
                self._events.replica_moved(self, handover, message.sound, body)
        elif isinstance(message, Pong):
            self.kv_free_tokens, self.limit = message.kv_free_tokens, max(1, message.limit)
        elif isinstance(message, Draining):
            drains, self.draining = self.draining, True
            if not drains:
                self._events.replica_draining(self)
        elif isinstance(message, Failed):
            raise ValueError(f"a step failed there: {message.reason[:300]}")

    def _closed(self, why: str) -> None:
        if self._greeted is not None and not self._greeted.done():
            # With TLS 1.3 an end learns only so that its certificate was refused.
            hint = "" if self._context is None else "; it may not accept this head's certificate"
            self._greeted.set_exception(ConnectionError(why + hint))
            self._greeted.exception()  # Who waited may have given up already.
        was_up, self.up = self.up, False
        self._frees.clear()
        self.moves.clear()
        self._lost.set()
        self._why = why
        if was_up:
            self.trouble = why
            self._events.replica_down(self, why)


def read_address(address: str) -> tuple[str, int]:
    """Host and port. Raises StagedModelError."""
    host, _, port = address.rpartition(":")
    if not host or not (port.isascii() and port.isdigit()) or len(port) > 5 or not 0 < int(port) < 65_536:
        raise StagedModelError(f"replica {address!r}: must be HOST:PORT")
    return host.strip("[]"), int(port)
