"""Some rows of a workload."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import numpy.typing as npt

from chiron.workload.types import Cascades, Floats, Programs, Workload

COLUMNS = ("arrival_s", "input_tokens", "output_tokens", "model", "cls", "deadline_s", "tenant", "predicted_tokens")


def begins_s(workload: Workload) -> Floats:
    """When each request arrives; of a call, when its program starts, or its client's request to a cascade comes."""
    if workload.cascades is not None:
        return workload.cascades.start_s
    programs = workload.programs
    if programs is None or not len(programs):
        return workload.arrival_s
    return np.where(programs.of >= 0, programs.start_s[programs.of], workload.arrival_s)


def kept(workload: Workload, rows: slice | npt.NDArray[np.bool_], *, earlier_s: float = 0.0) -> Workload:
    """These rows, ``earlier_s`` earlier. Of a program, and of a request to a cascade, either all calls are among them
    or none."""
    present = {name: column[rows] for name in COLUMNS if (column := getattr(workload, name)) is not None}
    if earlier_s:
        present |= {name: present[name] - earlier_s for name in ("arrival_s", "deadline_s")}
    if workload.cascades is not None:
        present["cascades"] = _cascades(workload.cascades, rows, earlier_s)
    if workload.programs is None:
        return replace(workload, **present)
    chosen = np.zeros(len(workload), dtype=np.bool_)
    chosen[rows] = True
    return replace(workload, **present, programs=_programs(workload.programs, chosen, earlier_s))


def _cascades(cascades: Cascades, rows: slice | npt.NDArray[np.bool_], earlier_s: float) -> Cascades:
    chosen = np.zeros(len(cascades.then), dtype=np.bool_)
    chosen[rows] = True
    follows = cascades.then >= 0
    assert (chosen[follows] == chosen[cascades.then[follows]]).all(), "a request to a cascade is taken whole"
    place = np.append(np.cumsum(chosen) - 1, -1)
    return Cascades(
        then=place[cascades.then[rows]],
        start_s=cascades.start_s[rows] - earlier_s,
        shown_tokens=cascades.shown_tokens[rows],
        other=cascades.other[rows],
        wait_s=cascades.wait_s[rows],
    )


def _programs(programs: Programs, rows: npt.NDArray[np.bool_], earlier_s: float) -> Programs:
    of = programs.of[rows]
    mine = np.unique(of[of >= 0])
    assert not np.isin(programs.of[~rows], mine).any(), "a program is taken whole"
    number = np.full(len(programs) + 1, -1, dtype=np.int64)
    number[mine] = np.arange(len(mine))
    place = np.cumsum(rows) - 1
    counts = np.diff(programs.parents_from)
    return replace(
        programs,
        kind=programs.kind[mine],
        start_s=programs.start_s[mine] - earlier_s,
        deadline_s=programs.deadline_s[mine] - earlier_s,
        of=number[of],
        think_s=programs.think_s[rows],
        earliest_s=programs.earliest_s[rows] - earlier_s,
        parents=place[programs.parents[np.repeat(rows, counts)]],
        parents_from=np.concatenate([[0], np.cumsum(counts[rows])]),
    )
