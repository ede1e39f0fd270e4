"""Measured step times: the points that a profile is fitted to and drawn against.

A CSV (``.gz`` too) with a header. Required columns: ``decode_batch`` (decoding sequences), ``context_len`` (mean
context of each, tokens), ``prefill_tokens`` (in the same step), ``latency_ms``. Optional: ``prefill_offset`` (tokens
of the prompt that earlier chunks did; default 0), ``phase``, and ``model``, ``tp``, ``system`` to choose rows by.

``phase`` follows aiconfigurator's grid, which the packaged profiles come from:

- ``decode``: no prefill;
- ``prefill``: whole prompts and nothing else; ``decode_batch`` is the number of prompts, none of them decoding;
- ``mixed``: without a ``prefill_offset``, the prefill tokens are an *average* chunk of prompts of ``context_len``
  tokens: the tables give it the prompt's attention time divided by its number of chunks. The mean of
  (o+n)^2 - o^2 over the chunks of a prompt of L tokens is n*L.

Without ``phase`` a row means what it says: ``decode_batch`` decodes and one chunk of ``prefill_tokens``.
"""

from __future__ import annotations

import csv
import gzip
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from io import TextIOWrapper
from math import isfinite
from pathlib import Path

from chiron.engines.profile import Profile, ProfileError
from chiron.engines.profile_store import PACKAGED

GRID = PACKAGED / "grid.csv.gz"
"""The step times behind the packaged profiles."""

COLUMNS = ("decode_batch", "context_len", "prefill_tokens", "latency_ms")
PHASES = ("decode", "prefill", "mixed")


@dataclass(frozen=True, slots=True, kw_only=True)
class StepPoint:
    """One measured engine step, or the mean of several alike."""

    phase: str
    decoding: float
    """Sequences that decode in the step."""
    context_len: float
    """Their mean context, tokens."""
    prefill_tokens: float
    attention: float
    """Attention work of the prefill tokens, tokens squared: (o+n)^2 - o^2 of a chunk of n at offset o."""
    latency_ms: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Measurements:
    """The points of one (model, system, TP), and its names as far as they are known."""

    model: str | None
    system: str | None
    tp: int | None
    points: tuple[StepPoint, ...]


def read_points(
    path: str | Path, *, model: str | None = None, system: str | None = None, tp: int | None = None
) -> Measurements:
    """The points of one (model, system, TP) in a CSV. Raises ProfileError: what is wrong, in which line.

    The filters are needed only when the file holds more than one, and only bind where it has such a column; ``model``
    and ``system`` match the end of a name in any case (``8B`` finds ``meta-llama/Meta-Llama-3.1-8B``) or its start
    (``h100`` finds ``h100_sxm``).
    """
    wanted = {"model": model, "system": system, "tp": None if tp is None else str(tp)}
    points: list[StepPoint] = []
    kinds: dict[tuple[str, ...], None] = {}
    chosen: dict[tuple[str, ...], None] = {}
    for line, row in _rows(path):
        kind = tuple(row.get(name) or "" for name in wanted)
        kinds[kind] = None
        if all(
            not (value and text) or _matches(value, text) for value, text in zip(kind, wanted.values(), strict=True)
        ):
            chosen[kind] = None
            points.append(_point(row, f"{path}, line {line}"))
    if not points:
        asked = ", ".join(f"{name}={text}" for name, text in wanted.items() if text is not None)
        raise ProfileError(
            f"{path}: no rows" + (f" match {asked}; the file holds: {_kinds_text(kinds)}" if kinds else "")
        )
    if len(chosen) > 1:
        raise ProfileError(f"{path}: choose one with model, system and tp; these all match: {_kinds_text(chosen)}")
    found_model, found_system, found_tp = next(iter(chosen))
    if found_tp and not (found_tp.isdecimal() and int(found_tp) > 0):
        raise ProfileError(f"{path}: tp is {found_tp!r}; expected a whole number, 1 or more")
    return Measurements(
        model=found_model or model,
        system=found_system or system,
        tp=int(found_tp) if found_tp else tp,
        points=tuple(points),
    )


def grid_points(profile: Profile) -> list[StepPoint]:
    """The packaged points of the same model, GPU and TP; none when we have none."""
    wanted = (profile.model, str(profile.tp), profile.gpu)
    return [
        _point(row, f"{GRID.name}, line {line}")
        for line, row in _rows(GRID)
        if (row["model"], row["tp"], row["system"]) == wanted
    ]


def _rows(path: str | Path) -> Iterator[tuple[int, dict[str, str]]]:
    try:
        with Path(path).open("rb") as raw:
            packed = raw.read(2) == b"\x1f\x8b"
            raw.seek(0)
            binary = gzip.GzipFile(fileobj=raw) if packed else raw
            with TextIOWrapper(binary, encoding="utf-8-sig", newline="") as text:
                reader = csv.DictReader(text)
                _check_header(reader.fieldnames, path)
                for row in reader:
                    yield reader.line_num, row
    except (OSError, EOFError, UnicodeDecodeError, csv.Error) as error:
        raise ProfileError(f"{path}: cannot be read: {error}") from None


def _check_header(names: Iterable[str] | None, path: str | Path) -> None:
    missing = [name for name in COLUMNS if name not in (names or ())]
    if missing:
        found = ", ".join(names or ()) or "none"
        raise ProfileError(f"{path}: column {', '.join(missing)} is missing; the header has: {found}")


def _point(row: dict[str, str], where: str) -> StepPoint:
    batch = _number(row, "decode_batch", where)
    context = _number(row, "context_len", where)
    tokens = _number(row, "prefill_tokens", where)
    latency_ms = _number(row, "latency_ms", where)
    phase = row.get("phase") or ""
    if phase and phase not in PHASES:
        raise ProfileError(f"{where}: phase is {phase!r}; allowed: {', '.join(PHASES)}")
    if not latency_ms > 0:
        raise ProfileError(f"{where}: latency_ms is {row['latency_ms']}; it must be above 0")
    if tokens + batch == 0:
        raise ProfileError(f"{where}: decode_batch and prefill_tokens are both 0; a step does some work")
    if phase == "decode" and tokens > 0:
        raise ProfileError(f"{where}: phase is decode but prefill_tokens is {row['prefill_tokens']}; it must be 0")
    if row.get("prefill_offset"):
        offset = _number(row, "prefill_offset", where)
        attention = (offset + tokens) ** 2 - offset**2
    elif phase == "mixed":
        attention = tokens * context
    elif phase == "prefill":
        attention = tokens * tokens / max(batch, 1.0)
    else:
        attention = tokens * tokens
    return StepPoint(
        phase=phase or ("decode" if tokens == 0 else "mixed" if batch else "prefill"),
        decoding=0 if phase == "prefill" else batch,
        context_len=context,
        prefill_tokens=tokens,
        attention=attention,
        latency_ms=latency_ms,
    )


def _number(row: dict[str, str], column: str, where: str) -> float:
    text = row.get(column) or ""
    try:
        value = float(text)
    except ValueError:
        value = float("nan")
    if not (isfinite(value) and value >= 0):
        raise ProfileError(f"{where}: {column} is {text!r}; expected a number, 0 or more")
    return value


def _matches(name: str, wanted: str) -> bool:
    low, want = name.lower(), wanted.lower()
    return low == want or low.endswith(("-" + want, "/" + want)) or low.startswith(want + "_")


def _kinds_text(kinds: Iterable[tuple[str, ...]]) -> str:
    return "; ".join(f"model={model or '-'} system={system or '-'} tp={tp or '-'}" for model, system, tp in kinds)
