"""What a line of an input log may be: a file is trusted no further than it can be checked.

``RecordedInputs`` writes inputs of these kinds with these arguments. Anything else in a line, and a time that goes
back or is none, is an error; what is right line by line and wrong together, the replay finds as a difference.
"""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal

import msgspec

from chiron.core.errors import InputError
from chiron.runtime.input_log import SAMPLE_FIELDS

Line = dict[str, Any]

TIME_MAX_S = 1e9
"""Thirty years after the run began."""
SHOWN_MAX = 400
"""Characters of a line in a message."""

_Figure = (
    Annotated[int, msgspec.Meta(ge=-(2**53), le=2**53)] | Annotated[float, msgspec.Meta(ge=-1e300, le=1e300)] | None
)
"""JSON has no infinity, and nothing that is no number: both are null."""
_Text = Annotated[str, msgspec.Meta(pattern=r"\A[^\ud800-\udfff]*\Z")]
"""Half a character can be in JSON, and not be written again."""
_Time = Annotated[float, msgspec.Meta(ge=-1e11, le=1e11)]
"""Below 0: before the run began, as a job's deadline may be; -1 of a first token: not yet."""
_Far = _Time | None
"""null: never."""
_Span = Annotated[float, msgspec.Meta(ge=0.0, le=1e11)]
_Id = Annotated[int, msgspec.Meta(ge=-1, le=2**63 - 1)]
_Count = Annotated[int, msgspec.Meta(ge=0, le=2**53)]
_Change = Annotated[int, msgspec.Meta(ge=-(2**53), le=2**53)]
_Square = Annotated[float, msgspec.Meta(ge=-1e100, le=1e100)]
_Instances = Annotated[int, msgspec.Meta(ge=0, le=1_000_000)]
_Promise = Annotated[float, msgspec.Meta(gt=0.0)] | None
_Weight = Annotated[float, msgspec.Meta(gt=0.0, le=1e300)]
_Class = tuple[_Text, Literal["interactive", "batch"], _Promise, _Promise, _Promise, _Weight]
_Told = tuple[_Id, _Count, _Time, _Count, _Id]
_ToldWhy = tuple[_Id, _Count, _Time, _Count, _Id, _Text]
_Sample = Annotated[list[_Figure], msgspec.Meta(min_length=len(SAMPLE_FIELDS), max_length=len(SAMPLE_FIELDS))]
_Whole = Annotated[int, msgspec.Meta(ge=0, le=2**62)]
_Stage = tuple[_Whole, _Whole, _Whole, _Figure, _Figure, _Figure, _Figure, _Whole, _Figure]
"""``STAGE_FIELDS``, ``PIPELINE_FIELDS``."""
_Pipeline = tuple[_Time, _Whole, _Whole, _Figure]
ARGUMENTS: dict[str, Any] = {
    "start": tuple[()],
    "begin": tuple[dict[_Text, _Instances], bool],
    "restore": tuple[_Text, _Time],
    "take_over": tuple[_Span],
    "adopt_instance": tuple[_Text, _Text, Literal["interactive", "mixed", "batch"], _Id, _Count, bool],
    "adopt_running": tuple[
        _Id,
        _Text,
        _Class,
        _Time,
        _Count,
        _Far,
        _Count | None,
        bool,
        bool,
        _Text,
        _Count,
        _Count,
        _Count,
        _Text,
        _Id,
        _Count,
        _Count,
        _Time,
        _Time,
    ],
    "told_all": tuple[()],
    "submit": tuple[
        _Id, _Text, _Class, _Time, _Count, _Far, _Count | None, bool, bool, _Text, _Count, _Count, _Count, _Text
    ],
    "cancel": tuple[_Id],
    "cut_off": tuple[_Id],
    "announce_batch": tuple[_Text, _Far, _Text, _Change, _Change, _Square],
    "shed_lost": tuple[_Text],
    "first_token": _Told,
    "prefilled": _Told,
    "finished": _Told,
    "evicted": _Told,
    "lost": _Told,
    "refused": _ToldWhy,
    "failed": _ToldWhy,
    "avoid": tuple[_Id, _Span],
    "sampled": tuple[list[_Sample]],
    "stages_sampled": tuple[_Id, list[_Stage], _Pipeline],
    "capacity_told": tuple[_Id, _Count],
    "instance_ready": tuple[_Id, _Time],
    "instance_ready_from": tuple[_Id, _Time, Literal["node", "disk", "peer", "memory"]],
    "instance_failed": tuple[_Id, list[_Told]],
    "kinds_limited": tuple[dict[_Text, _Count]],
    "kinds_found": tuple[dict[_Text, _Count]],
    "instance_asleep": tuple[_Id],
    "kinds_asleep": tuple[dict[_Text, _Count]],
    "instance_leaving": tuple[_Id],
}
"""Of each kind of input, in order."""


class ReplayError(InputError):
    """A log that cannot be replayed: no input log, without its beginning, with lines lost or with wrong ones."""


class _Input(msgspec.Struct):
    """What every input has: its kind, how many timers had fired, how deep inside another one it came, arguments."""

    k: str
    n: int
    d: int
    a: list[Any]


def checked(line: Line, now_s: float) -> Line:
    """A line that is an input, an output or a decision, once ``now_s`` is reached. Raises ReplayError."""
    if not now_s <= line["t"] <= TIME_MAX_S:
        raise ReplayError(
            f"a line of {shown(line['t'])} s after one of {now_s} s; times never go back, and no run takes "
            f"{TIME_MAX_S:g} s"
        )
    if line["event"] != "in":
        return line
    try:
        told = msgspec.convert(line, _Input)
        arguments = ARGUMENTS.get(told.k)
        if arguments is None:
            raise ReplayError(f"at {line['t']} s: input {shown(told.k)} is unknown")
        return {**line, "a": msgspec.convert(told.a, arguments)}
    except msgspec.ValidationError as error:
        raise ReplayError(f"at {line['t']} s: {shown(line)} is no input as a gateway writes them: {error}") from None


def shown(value: object) -> str:
    """For a message: short, whatever it is."""
    try:
        text = repr(value) if isinstance(value, str) else json.dumps(value)
    except RecursionError:
        return "what is nested too deep to be shown"
    return text if len(text) <= SHOWN_MAX else f"{text[: SHOWN_MAX - 3]}..."
