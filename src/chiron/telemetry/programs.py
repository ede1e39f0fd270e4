"""Programs as a whole, from what became of their calls."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from chiron.telemetry.run_data import BLAMELESS, OUTCOMES, ProgramPoint

_Ints = npt.NDArray[np.integer]
_Floats = npt.NDArray[np.float64]


def program_points(
    *,
    kinds: Sequence[str],
    kind: _Ints,
    start_s: _Floats,
    deadline_s: _Floats,
    of: _Ints,
    came: npt.NDArray[np.bool_],
    finished: npt.NDArray[np.bool_],
    finish_s: _Floats,
    output_tokens: _Ints,
) -> tuple[ProgramPoint, ...]:
    """Those of which a call came, in order of arrival. The first four are by program (``kinds`` are the names that
    ``kind`` means), the rest by call; ``of``: its program, -1 for a request of its own."""
    mine = of >= 0
    of, count = of[mine], len(start_s)
    done = finished[mine]
    tokens = np.bincount(of, weights=np.where(done, output_tokens[mine], 0), minlength=count)
    ends = np.full(count, -1.0)
    np.maximum.at(ends, of, np.where(done, finish_s[mine], -1.0))
    calls_done = np.bincount(of, weights=done, minlength=count)
    calls = np.bincount(of, minlength=count)
    begun = np.bincount(of, weights=came[mine], minlength=count) > 0
    return tuple(
        ProgramPoint(
            kind=kinds[int(kind[i])],
            start_s=float(start_s[i]),
            finish_s=float(ends[i]) if calls_done[i] == calls[i] else -1.0,
            deadline_s=float(deadline_s[i]),
            calls=int(calls[i]),
            calls_finished=int(calls_done[i]),
            output_tokens=int(tokens[i]),
        )
        for i in np.argsort(start_s, kind="stable").tolist()
        if begun[i]
    )


BREAKING = ("failed", "shed", "unfinished")
"""Outcomes of a call that cost its program the calls after it. Not those that can be held against nobody."""


def lost_calls(of: _Ints, came: npt.NDArray[np.bool_], outcome: _Ints) -> _Ints:
    """Calls that never came because one before them failed, was shed or is not over: who drops the first call of a
    program has served none of the others. Columns by call."""
    broken, blameless = (
        of[came & np.isin(outcome, [OUTCOMES.index(name) for name in names])] for names in (BREAKING, BLAMELESS)
    )
    lost: _Ints = np.flatnonzero((of >= 0) & ~came & np.isin(of, broken) & ~np.isin(of, blameless))
    return lost
