"""What an engine that is a pipeline tells of its stages, read with care."""

from __future__ import annotations

from collections.abc import Mapping
from math import isfinite, nan
from typing import Any

import msgspec

from chiron.core.stages import PipelineSample, StageSample


def read_stages(body: bytes, now_s: float) -> PipelineSample | None:
    """None: it is not what a pipeline says."""
    try:
        said = msgspec.json.decode(body)
        return PipelineSample(
            taken_s=now_s,
            stages=tuple(_stage(each) for each in said["stages"]),
            running=_whole(said["running"]),
            waiting=_whole(said["waiting"]),
            context_tokens=_real(said["context_tokens"]),
        )
    except (msgspec.MsgspecError, ValueError, KeyError, TypeError, AttributeError):
        return None


def _stage(said: Mapping[str, Any]) -> StageSample:
    start_s = _real(said.get("start_s", 0.0))
    return StageSample(
        ready=_whole(said["ready"]),
        starting=_whole(said.get("starting", 0)),
        draining=_whole(said.get("draining", 0)),
        busy_s=_real(said["busy_s"]),
        passes=_real(said["passes"]),
        tokens=_real(said["tokens"]),
        waiting=_real(said["waiting"]),
        kv_used_tokens=_whole(said["kv_used_tokens"]),
        start_s=start_s if start_s > 0.0 else nan,
    )


def _whole(value: Any) -> int:
    if type(value) is not int or not 0 <= value < 1 << 62:
        raise ValueError(value)
    return value


def _real(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not isfinite(value) or value < 0:
        raise ValueError(value)
    return float(value)
