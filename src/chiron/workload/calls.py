"""Which calls of programs may come next: what a simulation and a load generator have in common."""

from __future__ import annotations

from itertools import pairwise

import numpy as np

from chiron.workload.types import Programs


class CallOrder:
    """Told of every end. A program of which a call does not finish makes no more."""

    def __init__(self, programs: Programs) -> None:
        parents = programs.parents.tolist()
        begins = programs.parents_from.tolist()
        self._of: list[int] = programs.of.tolist()
        self._left = [end - begin for begin, end in pairwise(begins)]
        """Calls that each row still waits for."""
        self._then: dict[int, list[int]] = {}
        """Rows that wait for a row."""
        for row, (begin, end) in enumerate(pairwise(begins)):
            for parent in parents[begin:end]:
                self._then.setdefault(parent, []).append(row)
        self.waits = np.array(self._left) > 0
        """Rows that come only after others."""
        self._broken: set[int] = set()

    def ended(self, row: int, *, finished: bool) -> list[int]:
        """Rows that waited for this one last: each comes its think time from now on, unless it ``is_off`` by then."""
        program = self._of[row]
        if program < 0:
            return []
        if not finished:
            self._broken.add(program)
            return []
        free = []
        for after in self._then.get(row, ()):
            self._left[after] -= 1
            if not self._left[after]:
                free.append(after)
        return free

    def is_off(self, row: int) -> bool:
        return self._of[row] in self._broken
