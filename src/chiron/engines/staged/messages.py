"""What a head and the stages of its pipeline say to each other.

A frame is two lengths, a msgpack array and raw bytes of tensors. The head sends ``Step`` with the rows of some
sequences to a replica of a stage, and gets ``Result`` with what they became, which it sends on to the next stage. So
the head is in every hop: two messages where stages that pass rows on among themselves would need one, but a stage
knows no other, the head knows at any moment how far each sequence has come, and a replica that dies loses nothing but
its KV.

Both ends say hello first, and check that they mean the same model (by fingerprint), layers, type and version.
"""

from __future__ import annotations

from typing import Any

import msgspec

VERSION = 2
MAGIC = b"\x00CST"
"""First bytes of a connection: no HTTP request begins like this, so both are served at one port."""
HEADER_MAX_BYTES = 4 << 20
BODY_MAX_BYTES = 1 << 30
ENTRIES_MAX = 4096
"""In one step."""
MOVE_BYTES = 4 << 20
"""Of KV, in one message, unless one token has more."""


class HeadHello(msgspec.Struct, array_like=True, tag="head", frozen=True):
    version: int
    fingerprint: str
    begin: int
    end: int
    dtype: str


class StageHello(msgspec.Struct, array_like=True, tag="stage", frozen=True):
    version: int
    fingerprint: str
    begin: int
    end: int
    dtype: str
    kv_capacity_tokens: int
    kv_free_tokens: int
    limit: int
    draining: bool
    tokens_max: int
    """In one step."""


class StepEntry(msgspec.Struct, array_like=True, frozen=True):
    """Some successive tokens of one sequence. ``want``: likeliest next tokens to tell, of the last stage."""

    sequence: int
    position: int
    count: int
    want: int


class Step(msgspec.Struct, array_like=True, tag="step", frozen=True):
    """The body is token ids (int32) for the first stage, else hidden states, ``sum of counts`` rows."""

    id: int
    entries: list[StepEntry]
    free: list[int] = []
    """Sequences that have ended or moved away."""


class Result(msgspec.Struct, array_like=True, tag="result", frozen=True):
    """The body is hidden states of the entries that were not refused; of the last stage, for those that wanted some, as
    many as ``tops`` says of each: their logits (float32), then all their ids (int32), then the logs of the sums of all
    exponentials (float32)."""

    id: int
    refused: list[tuple[int, int]]
    """Places in ``entries``, and how much of the sequence is held here, which is too little; -1: KV is full."""
    tops: list[int]
    step_s: float
    """Of computing."""
    waited_s: float
    """In the stage's queue."""
    kv_free_tokens: int


class Failed(msgspec.Struct, array_like=True, tag="failed", frozen=True):
    """A step that could not be run at all."""

    id: int
    reason: str


class Free(msgspec.Struct, array_like=True, tag="free", frozen=True):
    sequences: list[int]


class Fetch(msgspec.Struct, array_like=True, tag="fetch", frozen=True):
    """Asks for KV of some positions of a sequence, which is to be kept elsewhere."""

    id: int
    sequence: int
    begin: int
    end: int


class Keep(msgspec.Struct, array_like=True, tag="keep", frozen=True):
    """The body is KV of some positions, as another replica of the same stage had it: keys of all layers and KV heads,
    then values."""

    id: int
    sequence: int
    begin: int
    end: int


class Kept(msgspec.Struct, array_like=True, tag="kept", frozen=True):
    """To either: whether it could be done. To ``Fetch`` the body is KV as ``Keep`` has it."""

    id: int
    sound: bool


class Ping(msgspec.Struct, array_like=True, tag="ping", frozen=True):
    id: int
    hop_s: float = 0.0
    """What the head measures of calls to this stage beyond waiting and computing; 0: nothing yet."""


class Pong(msgspec.Struct, array_like=True, tag="pong", frozen=True):
    id: int
    kv_free_tokens: int
    queued: int
    limit: int


class Draining(msgspec.Struct, array_like=True, tag="draining", frozen=True):
    """This replica will end: no new sequences."""


FromHead = HeadHello | Step | Free | Fetch | Keep | Ping
FromStage = StageHello | Result | Kept | Failed | Pong | Draining
Message = FromHead | FromStage


def hello_trouble(ours: Any, theirs: Any) -> str:
    """Why two hellos do not fit; empty if they do."""
    if theirs.version != ours.version:
        return f"it speaks version {theirs.version}; this is version {ours.version}"
    if theirs.fingerprint != ours.fingerprint:
        return f"it has another model ({theirs.fingerprint[:8]}, here {ours.fingerprint[:8]})"
    if (theirs.begin, theirs.end) != (ours.begin, ours.end):
        return f"it has layers {theirs.begin}-{theirs.end - 1}; here they are {ours.begin}-{ours.end - 1}"
    if theirs.dtype != ours.dtype:
        return f"it computes in {theirs.dtype}; here it is {ours.dtype}"
    return ""
