"""The messages between a relay and the brain.

A relay numbers its requests, the brain numbers placements. A request is ``Arrive``, any number of placements, and one
``End``; an item of a batch is ``Item``, and then the same. A placement is ``Place`` and exactly one of ``Answered``,
``Lost`` and ``Evicted``, unless its instance is gone (``InstanceGone``) or its relay is. What comes for a placement
that has ended is late: it is counted and dropped.

A relay may outlive its brain. To the next one it tells, after its ``Hello``, each instance that it knows (``Known``),
what ended meanwhile (``Running``, and its end), what runs (``Running``) and what waits (``Waits``), and then ``Told``;
the brain answers with the instances that it knows under the same numbers, ``Unknown`` for each placement that it does
not count, and ``Ready``. Placements that a relay chose itself meanwhile have numbers from ``OWN_FROM`` on. Times are
told as ages, because clocks of two machines differ.

Structs are arrays on the wire. A change of any of them is a new ``VERSION``; ``VERSION_MIN`` is the lowest that is
still spoken. Both ends speak the lower one of theirs (``Wire.version``): what is new is added at the end, with a
default, and what an older one cannot read is not sent to it. Version 3: ``Hello.gateway``.
Version 4: ``Turn`` and ``Shown``. Version 5: ``Arrive.program``.
"""

from __future__ import annotations

from math import inf
from typing import Annotated

from msgspec import Meta, Struct

VERSION = 5
VERSION_MIN = 2
TURNS_FROM = 4
"""The version from which cascades' turns are told."""
NAME = "chiron-relay"

Count = Annotated[int, Meta(ge=0, le=1 << 62)]
Number = Annotated[int, Meta(ge=1, le=1 << 62)]
Tokens = Annotated[int, Meta(ge=0, le=1 << 40)]
"""Of one request, or made by one instance since the last time: thousands of them add up within 64 bits."""
Prompt = Annotated[int, Meta(ge=1, le=1 << 40)]
Losses = Annotated[int, Meta(ge=0, le=1000)]
"""Placements of a request that were lost. It is given up after a few."""
Seconds = Annotated[float, Meta(ge=0.0)]
SloSeconds = Annotated[float, Meta(gt=0.0)]
Age = Annotated[float, Meta(ge=0.0, le=1e7)]
"""Seconds ago."""
Status = Annotated[int, Meta(ge=0, le=999)]
Name = Annotated[str, Meta(max_length=1024)]
Text = Annotated[str, Meta(max_length=4096)]
TEXT_MAX = 4096
ITEMS_FROM = 1 << 60
"""Numbers of batch items at a relay, beyond those that it gives itself."""
OWN_FROM = 1 << 61
"""Numbers of placements that a relay chose itself, beyond those of any brain."""
TERM_SHIFT = 40
"""Placements of a brain are numbered from its term on, shifted by so much: those of another one are not among them."""
TERM_MAX = (1 << 20) - 1
Term = Annotated[int, Meta(ge=0, le=TERM_MAX)]


class Message(Struct, array_like=True, frozen=True, gc=False):
    """One of them."""


class Hello(Message, tag=0, frozen=True):
    """The first one of each end."""

    name: str = NAME
    version: int = VERSION
    version_min: int = 0
    """The lowest that it still speaks; 0: no other."""
    term: Term = 0
    """A brain's own; each brain of a gateway has a higher one than those before it. A relay's: the highest that it has
    seen."""
    nonce: Name = ""
    """A relay's that stays when its brain is gone: drawn at its start. Empty: it ends with its brain."""
    returns: bool = False
    """It has known a brain before, and tells this one what it knows, up to ``Told``."""
    gateway: Name = ""
    """Of several gateways, the name of this end's."""


# -- up: from a relay ------------------------------------------------------------------------------------------------


class Arrive(Message, tag=1, frozen=True):
    """A client's request, read and sized. Answered by ``Place`` or ``End``."""

    number: Number
    request_id: Name
    model: Name
    cls: Name
    ttft_s: SloSeconds
    """The class's, or what the client asked for; so is the next."""
    itl_s: SloSeconds
    key: Name
    """Name of its API key."""
    input_tokens: Prompt
    peers: Annotated[tuple[Name, ...], Meta(max_length=8)]
    """Whose shares it counts against."""
    sequences: Number
    streams: bool
    prompt_bytes: Count
    collected: bool
    """Its answer is put together at the relay, so that it can be gone on with elsewhere."""
    wait_max_s: Seconds = inf
    program: Name = ""
    """Whose call it is; empty: of none."""


class Left(Message, tag=2, frozen=True):
    """Its client is gone."""

    number: Number
    tokens: Tokens
    """Output tokens that it has had."""


class FirstToken(Message, tag=3, frozen=True):
    """A stream has begun."""

    run: Number
    tokens: Tokens
    """Output tokens so far."""


class Answered(Message, tag=4, frozen=True):
    """A complete answer of an engine, or a refusal that is one. An end."""

    run: Number
    status: Status
    tokens: Tokens
    """Output tokens, as the engine's usage says if that can be."""
    prompt_tokens: Tokens
    """As it says; 0: it does not."""
    seen: Tokens
    """Output tokens that were counted in passing."""


class Lost(Message, tag=5, frozen=True):
    """No answer, or none that counts. An end."""

    run: Number
    status: Status
    """The engine's; 0: it gave none."""
    message: Text
    connect: bool
    """There was no connection."""
    visible: bool
    """A client has seen a part of the answer."""
    kept: Tokens
    """Output tokens that can be gone on with."""
    seen: Tokens


class Evicted(Message, tag=6, frozen=True):
    """The engine was told to stop, as ``Evict`` asked. An end."""

    run: Number
    kept: Tokens
    """Output tokens that can be gone on with; of a request that is over, those that were seen."""
    seen: Tokens


class Silent(Message, tag=7, frozen=True):
    """A stream that decodes says nothing any more."""

    run: Number
    for_s: Seconds
    tokens: Tokens


class Spoke(Message, tag=8, frozen=True):
    """It says something again."""

    run: Number
    tokens: Tokens


class Counted(Message, tag=9, frozen=True):
    """Output tokens that an instance's streams have made since the last time."""

    instance: Count
    tokens: Tokens


class Made(Message, tag=12, frozen=True):
    """Now and then, of answers that are collected: what is kept of them if their instance fails."""

    run: Number
    tokens: Tokens
    """Output tokens so far."""


class Responded(Message, tag=10, frozen=True):
    """So many answers with this status went to clients since the last time."""

    status: Status
    count: Number


class Health(Message, tag=11, frozen=True):
    """Once a second."""

    connections: Count
    """Of clients, now."""
    files_open: Count
    loop_lag_s: Seconds
    """The longest that the relay's loop was held up."""


class Result(Message, tag=14, frozen=True):
    """The answer to an item, just before the ``Answered`` that ends its placement."""

    number: Number
    status: Status
    body: bytes
    """JSON, on one line."""
    cached_tokens: Count
    reasoning_tokens: Count


class Listening(Message, tag=13, frozen=True):
    """It takes clients' connections."""

    port: Annotated[int, Meta(ge=1, le=65535)]
    pid: Count


class Known(Message, tag=15, frozen=True):
    """An instance that a brain before this one has told of."""

    instance: Annotated[int, Meta(ge=0, le=1 << 40)]
    """Those that a brain creates are numbered after it."""
    model: Name
    kind: Name
    url: Text
    max_batch_size: Count
    """As last told; 0: it was not."""
    role: Name


class Running(Message, tag=16, frozen=True):
    """A placement that runs, or has ended while nobody could be told: its end follows at once."""

    request: Arrive
    run: Number
    instance: Count
    tokens_before: Tokens
    """Output tokens that it went on from."""
    tokens: Tokens
    """Output tokens so far."""
    arrived: Age
    """These three are ages as of now, or of its end."""
    placed: Age
    began: Annotated[float, Meta(ge=-1.0, le=1e7)]
    """Since its first token; -1: it has none yet."""
    silent: bool
    losses: Losses


class Waits(Message, tag=17, frozen=True):
    """A request without a placement."""

    request: Arrive
    arrived: Age
    losses: Losses


class Told(Message, tag=18, frozen=True):
    """All that this relay knows."""

    own_placements: Count = 0
    """Placements that it chose itself while there was no brain."""
    expired: Count = 0
    """Requests that it gave up, because there was none for too long."""
    forgotten: Count = 0
    """Ends that it could not keep."""


class Turn(Message, tag=19, frozen=True):
    """Before its ``Arrive``, ``Running`` or ``Waits``: it is asked for a cascade, as ``relay.turns`` has it."""

    number: Number
    cascade: Name
    reason: Name
    before: Age
    counted: bool
    ttft_s: SloSeconds
    streams: bool


class Shown(Message, tag=20, frozen=True):
    """What was held back of this request's answer goes to its client: it will do. Told again after its ``Running`` or
    ``Waits``."""

    number: Number
    ago: Age = 0.0
    """Since when."""


# -- down: from the brain --------------------------------------------------------------------------------------------


class InstanceUp(Message, tag=32, frozen=True):
    """An engine answers at this address."""

    instance: Count
    model: Name
    kind: Name
    url: Text


class InstanceGone(Message, tag=33, frozen=True):
    """Whatever was placed there has ended."""

    instance: Count


class Shape(Message, tag=34, frozen=True):
    """What is known of a model: how long prompts are, and may be."""

    model: Name
    kv_capacity_tokens: Count
    context_tokens: Count
    bytes_per_token: Annotated[float, Meta(gt=0.0)]


class Place(Message, tag=35, frozen=True):
    """Send this request to this instance. Answered by one end."""

    number: Number
    run: Number
    instance: Count
    tokens_done: Tokens
    """Output tokens to go on from."""


class Item(Message, tag=42, frozen=True):
    """An item of a batch, before its first ``Place`` here."""

    number: Number
    """From ``ITEMS_FROM`` on: the brain's."""
    request_id: Name
    model: Name
    path: Name
    body: bytes
    input_tokens: Prompt
    answer_max_bytes: Number


class Evict(Message, tag=36, frozen=True):
    """Stop it. Answered by ``Evicted``, or by the end that is under way."""

    run: Number


class Refusal(Struct, array_like=True, frozen=True, gc=False):
    """An answer of the gateway's own, as ``errors.ApiError`` has it."""

    status: Annotated[int, Meta(ge=400, le=599)]
    message: Text
    type: Name
    code: Name | None = None
    param: Name | None = None
    headers: Annotated[tuple[tuple[bytes, bytes], ...], Meta(max_length=16)] = ()


class End(Message, tag=37, frozen=True):
    """A request is over; its client may still wait for a word."""

    number: Number
    outcome: Name
    """As ``Request.outcome``; ``refused``: it was not taken."""
    dispatched: bool = False
    retries: Losses = 0
    retry_after_s: Seconds = 0.0
    refusal: Refusal | None = None
    """Why the gateway itself ended it."""


class Remind(Message, tag=38, frozen=True):
    """A client that reads a stream may be told what it waits for."""

    number: Number
    words: Text


class Drain(Message, tag=39, frozen=True):
    """Take new requests no more (or again)."""

    on: bool


class Ready(Message, tag=41, frozen=True):
    """All that the brain knows of engines and models has been said: the relay may listen."""


class Stop(Message, tag=40, frozen=True):
    """Accept no more connections, let requests end for so long, then end."""

    grace_s: Seconds


class Limit(Message, tag=43, frozen=True):
    """How full an instance may be, and its role: as they change, for relays that stay."""

    instance: Count
    max_batch_size: Count
    role: Name


class Unknown(Message, tag=44, frozen=True):
    """A placement that the relay has told of is not counted: it runs to its end, and nobody wants to hear of it."""

    run: Number


class Pulse(Message, tag=45, frozen=True):
    """A few times a second, to relays that stay: the brain is there."""

    relays: Number
    """How many share its instances."""


Up = (
    Arrive
    | Left
    | FirstToken
    | Answered
    | Lost
    | Evicted
    | Silent
    | Spoke
    | Counted
    | Made
    | Responded
    | Health
    | Result
    | Listening
    | Known
    | Running
    | Waits
    | Told
    | Turn
    | Shown
)
Down = (
    InstanceUp
    | InstanceGone
    | Shape
    | Item
    | Place
    | Evict
    | End
    | Remind
    | Drain
    | Ready
    | Stop
    | Limit
    | Unknown
    | Pulse
)
