"""An engine model at the other end of a wire: what a gateway has, in the simulator.

The plain model hears a command and is heard in no time, and an eviction ends when the engine lets go. A gateway's
client of an engine (``InstanceEngine`` and ``Upstream``) knows less, and later, and this is its model, rule by rule:

- Commands arrive ``network_s`` after they are given, tokens and ends as long after the step that made them.
- An eviction is a connection that closes: it is over at once, with the tokens that have arrived, and the engine learns
  of it later. What comes back with its tokens finds its KV if it comes to the same engine, after that has saved it.
- One message about the max batch size is under way at a time; the next says what holds then.
- A request that an engine loses is tried again, the engine is avoided for a while (``losses``).
- Of an answer in one piece nothing arrives before its end (``unseen``).
- What a client sees as it comes begins anew when it is taken away.
- Connections are kept. On one that was used before a request that finds it cut is sent once more, at once: the engine
  may have closed it meanwhile, and has not seen the request.

``tests/laws`` runs the gateway's own client against the emulated engine's server and compares every decision.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field

from chiron.core.clock import Callback, VirtualClock
from chiron.core.ports import RemoteEngineEvents
from chiron.core.types import Instance, Request, Sample
from chiron.engines.losses import Losses
from chiron.engines.model import EngineModel, StepTable
from chiron.engines.profile import Profile
from chiron.engines.saved_kv import SavedKv
from chiron.engines.unseen import presumed_first_token_s, presumed_prefill_s

IDLE_S = 30.0
"""A connection that was not used for longer is not used again."""
SAVED_TOKENS_MAX = 4_000_000
"""Host memory for KV of interrupted requests, in tokens."""
REFUSED = "engine answered 400"
"""Longer than the engine's KV."""

CUT = 0
_LAST = 1 << 62
"""Keys of timers from here on come after all others of the same moment, as asyncio's next turn does."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Wire:
    """What lies between a gateway and its engines, and what goes wrong there."""

    network_s: float
    """One way, seconds."""
    faults: Mapping[int, tuple[int, ...]] = field(default_factory=dict)
    """By request: what becomes of its first tries, in turn. The status with which the engine refuses to run it now, or
    ``CUT``: the connection is cut before the first byte of an answer."""
    pieces: frozenset[int] = frozenset()
    """Interactive requests whose clients want the answer in one piece."""
    notice_s: float = 0.0
    """How long a fleet takes to notice that an instance has died, unless the gateway suspects it. Until then requests
    are lost one by one. A scrape in that time is not modelled."""


class RemoteEngine:
    """Implements the ``Engine`` port. ``Request.payload`` is the true output length."""

    def __init__(
        self,
        *,
        clock: VirtualClock,
        instance: Instance,
        profile: Profile,
        times: StepTable,
        listener: RemoteEngineEvents,
        kv_seconds_per_token: float,
        wire: Wire,
        faults: Mapping[int, Iterator[int]],
        suspect: Callable[[Instance], None],
    ) -> None:
        """``faults`` are those of the wire that are still to come, shared by all engines; ``suspect`` asks the fleet to
        look at the instance."""
        self.instance = instance
        instance.heard_late = True
        inner = Instance(instance.id, instance.model, instance.kind, "mixed", 0.0)
        inner.max_num_batched_tokens = instance.max_num_batched_tokens
        self.model = EngineModel(
            clock=clock,
            instance=inner,
            profile=profile,
            times=times,
            listener=self,
            kv_seconds_per_token=kv_seconds_per_token,
            step_mode=True,
            stepped=self._stepped,
        )
        self._clock = clock
        self._listener = listener
        self._wire = wire
        self._faults = faults
        self._suspect = suspect
        self._dead = False
        self._refusals = 0
        self._runs: dict[int, _Run] = {}
        """What the gateway believes to run here, by request."""
        self._inside: dict[int, _Run] = {}
        """What runs here, by number of its run."""
        self._numbers = 0
        self._saved = SavedKv(SAVED_TOKENS_MAX)
        self._losses = Losses()
        self._pool = _Pool(clock)
        self._limit = _Setting(self, self.model.set_max_batch_size)
        self._token_budget = _Setting(self, self.model.set_max_num_batched_tokens)

    @property
    def preemptions(self) -> int:
        return self.model.preemptions

    # -- the Engine port: the gateway's end ----------------------------------------------------------------------

    def start(self, request: Request) -> None:
        run = _Run(request, streams=not request.pinned or request.id not in self._wire.pieces)
        self._runs[request.id] = run
        self._send(run)
        if not run.streams and request.prefill_cost_s:
            self._clock.call_later(presumed_prefill_s(self.instance), lambda: self._presume(run))

    def evict(self, request: Request) -> None:
        run = self._runs.pop(request.id, None)
        if run is None:
            return  # Its end is under way to the control plane.
        self._pool.drop(run.connection)
        self._carry(lambda: self._cancel(run))
        request.tokens_done = self._safe(run) if request.outcome is None else run.tokens
        request.kv_saved_tokens = request.input_tokens + request.tokens_done if request.tokens_done else 0
        request.kv_saved_on = self.instance.id
        self._clock.call_at(self._clock.now_s, lambda: self._listener.evicted(request))

    def set_max_batch_size(self, max_batch_size: int) -> None:
        self._limit.set(max_batch_size)

    def set_max_num_batched_tokens(self, max_num_batched_tokens: int) -> None:
        self._token_budget.set(max_num_batched_tokens)

    # -- driver side ---------------------------------------------------------------------------------------------

    def look(self, seen: Callable[[Sample], None]) -> None:
        """Scrape it: ask, read when the question arrives, hear of it later."""
        connection, _ = self._pool.take()

        def read() -> None:
            sample = self.model.sample()
            self._carry(lambda: answered(sample))

        def answered(sample: Sample) -> None:
            self._pool.give(connection)
            seen(sample)

        self._carry(read)

    def fail(self) -> None:
        """The process died: its connections are reset, and nobody answers any more."""
        for run in self._runs.values():
            if run.request.outcome is None:
                run.request.tokens_done = self._safe(run)
        self._dead = self._pool.closed = True
        self._inside.clear()
        self.model.fail()
        self._carry(self._reset)

    # -- the wire ------------------------------------------------------------------------------------------------

    def _carry(self, message: Callback) -> None:
        self._clock.call_later(self._wire.network_s, message)

    def _send(self, run: _Run, *, fresh: bool = False) -> None:
        """On a connection that is kept, or on a ``fresh`` one."""
        run.connection, run.reuses = self._pool.take(run, fresh=fresh)
        if run.connection is None:
            self._refused_soon(run)
        else:
            self._carry(lambda: self._arrive(run))

    def _refused_soon(self, run: _Run) -> None:
        """Nobody listens."""
        self._refusals += 1
        key = _LAST + (self.instance.id << 24) + self._refusals
        self._clock.push(self._clock.now_s, key, lambda: self._lose(run, CUT, connect=True))

    def tell(self, told: Callback, answered: Callback) -> None:
        """A message that is no request, over a connection of its own."""
        connection, _ = self._pool.take()

        def arrive() -> None:
            if not self._dead:
                told()
                self._carry(back)

        def back() -> None:
            self._pool.give(connection)
            answered()

        self._carry(arrive)

    # -- the gateway's end: what arrives -------------------------------------------------------------------------

    def _holds(self, run: _Run) -> bool:
        return self.instance.state != "gone" and self._runs.get(run.request.id) is run

    def _reset(self) -> None:
        """All connections, the oldest first."""
        for run in self._pool.reset():
            if run.reuses and not run.told:
                self._refused_soon(run)  # It is sent once more.
            else:
                run.reuses = False
                self._lose(run, CUT)

    def _token(self, run: _Run) -> None:
        run.tokens += 1
        self._first(run)

    def _first(self, run: _Run) -> None:
        if not run.told and self._holds(run):
            run.told = True
            self._listener.first_token(run.request)

    def _end(self, run: _Run, *, token: bool = True) -> None:
        request = run.request
        run.tokens += token
        if not run.streams and self._holds(run):
            run.tokens = request.tokens_done = request.payload
            request.first_token_s = presumed_first_token_s(request, self._clock.now_s)
        self._first(run)
        if not self._holds(run):  # Its prefill is over, and somebody more urgent took the room.
            return
        self._pool.give(run.connection)
        self._losses.answered()
        del self._runs[request.id]
        if request.outcome is None:
            request.tokens_done = run.tokens
        self._listener.finished(request)

    def _refuse(self, run: _Run) -> None:
        if self._holds(run):
            self._pool.give(run.connection)
            self._losses.answered()
            del self._runs[run.request.id]
            if run.request.outcome is None:
                run.request.tokens_done = 0
            self._listener.refused(run.request, REFUSED)

    def _presume(self, run: _Run) -> None:
        if self._holds(run) and not run.told:
            self._listener.prefilled(run.request)

    def _lose(self, run: _Run, status: int, *, connect: bool = False) -> None:
        if not self._holds(run):
            return
        if status != CUT:
            self._pool.give(run.connection)
        else:
            self._pool.drop(run.connection)
            if run.reuses and not connect:
                self._send(run, fresh=True)
                return
        suspected, avoid_s = self._losses.lost(status=status, connect=connect)
        request = run.request
        del self._runs[request.id]
        if request.outcome is None:
            request.tokens_done = self._safe(run)
        if suspected:
            self._suspect(self.instance)
        if avoid_s:
            self._listener.avoid(self.instance, avoid_s)
        self._listener.lost(request)

    def _safe(self, run: _Run) -> int:
        """Output tokens that another run may go on from."""
        return 0 if run.request.pinned else run.tokens

    # -- the engine's end ----------------------------------------------------------------------------------------

    def _arrive(self, run: _Run) -> None:
        if self._dead:
            return
        request = run.request
        fault = next(self._faults.get(request.id, iter(())), None)
        if fault is not None:
            self._carry(lambda: self._lose(run, fault))
            return
        output_tokens = int(request.payload)
        if request.input_tokens + output_tokens > self.model.kv_capacity_tokens:
            self._carry(lambda: self._refuse(run))
            return
        if run.tokens >= output_tokens:  # It was taken away between its last token and its end.
            self._carry(lambda: self._end(run, token=False))
            return
        self._numbers += 1
        inner = Request(self._numbers, request.model, request.cls, self._clock.now_s, request.input_tokens)
        inner.payload = output_tokens
        inner.tokens_done = run.tokens
        if run.tokens and self._saved.generated(request.id) >= run.tokens:
            self._saved.forget(request.id)
            # The last token was sent, but it is the next step that will put it into the KV.
            inner.kv_saved_tokens = request.input_tokens + run.tokens - 1
            inner.kv_saved_on = self.instance.id
        run.inner, run.generated = inner, run.tokens
        self._inside[inner.id] = run
        self.model.start(inner)

    def _cancel(self, run: _Run) -> None:
        if run.inner is not None:
            self.model.evict(run.inner)

    def _stepped(self, ids: Iterable[int]) -> None:
        arriving = []
        for number in ids:
            run = self._inside[number]
            if run.streams and run.generated < run.request.payload - 1:  # The last one comes with the end.
                run.generated += 1
                arriving.append(run)

        def arrive() -> None:
            for run in arriving:
                self._token(run)

        self._carry(arrive)

    def first_token(self, inner: Request) -> None:
        run = self._inside[inner.id]
        if run.streams and run.generated < run.request.payload - 1:
            run.generated += 1
            self._carry(lambda: self._token(run))

    def finished(self, inner: Request) -> None:
        run = self._inside.pop(inner.id)
        self._carry(lambda: self._end(run))

    def evicted(self, inner: Request) -> None:
        run = self._inside.pop(inner.id)
        if inner.kv_saved_tokens:
            self._saved.save(run.request.id, inner.tokens_done, inner.kv_saved_tokens)

    def refused(self, inner: Request, reason: str) -> None:
        raise AssertionError("what is too long is refused when it arrives")


class _Setting:
    """A number that the engine is told, one message at a time; the next says what holds then."""

    def __init__(self, engine: RemoteEngine, tell: Callable[[int], None]) -> None:
        self._engine = engine
        self._tell = tell
        self._wanted = 0
        self._under_way = False

    def set(self, value: int) -> None:
        self._wanted = value
        if not self._under_way:
            self._send()

    def _send(self) -> None:
        sent, self._under_way = self._wanted, True

        def answered() -> None:
            self._under_way = False
            if self._wanted != sent:
                self._send()

        self._engine.tell(lambda: self._tell(sent), answered)


class _Run:
    """One stay of a request in the engine."""

    __slots__ = ("connection", "generated", "inner", "request", "reuses", "streams", "tokens", "told")

    def __init__(self, request: Request, *, streams: bool) -> None:
        self.request = request
        self.connection: int | None = None
        """Its number; None: there is none."""
        self.reuses = False
        """It came on a connection that had been used before."""
        self.streams = streams
        self.inner: Request | None = None
        """As the engine has it, once it has arrived."""
        self.generated = 0
        """Output tokens that the engine has sent, from the request's beginning."""
        self.tokens = request.tokens_done
        """Of those, what has arrived."""
        self.told = False
        """The control plane has heard of its first token."""


class _Pool:
    """Connections to the engine, by number in the order in which they were made, and who uses each."""

    def __init__(self, clock: VirtualClock) -> None:
        self._clock = clock
        self._made = 0
        self._users: dict[int, _Run | None] = {}
        self._idle: list[tuple[int, float]] = []
        """Those that nobody uses, and since when."""
        self.closed = False
        """No more are made."""

    def take(self, run: _Run | None = None, *, fresh: bool = False) -> tuple[int | None, bool]:
        """A connection (None: there is none), and whether it was used before."""
        while self._idle and not fresh:
            number, since_s = self._idle.pop()
            if self._clock.now_s - since_s <= IDLE_S:
                self._users[number] = run
                return number, True
            del self._users[number]
        if self.closed:
            return None, False
        self._made += 1
        self._users[self._made] = run
        return self._made, False

    def give(self, number: int | None) -> None:
        if number not in self._users:
            return  # It was reset.
        self._users[number] = None
        self._idle.append((number, self._clock.now_s))
        oldest, since_s = self._idle[0]
        if self._clock.now_s - since_s > IDLE_S:
            del self._idle[0], self._users[oldest]

    def drop(self, number: int | None) -> None:
        if number is not None:
            self._users.pop(number, None)

    def reset(self) -> list[_Run]:
        """All of them. Returns those that used them."""
        users = [run for run in self._users.values() if run is not None]
        self._users.clear()
        self._idle.clear()
        return users
