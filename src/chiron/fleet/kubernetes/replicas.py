"""Whose the replicas of a workload are, and how many it is to have: the arithmetic, without a cluster.

Chiron's *own* are as many as there are instances that have one or wait for one. The *surplus* is what somebody else
asked for, or was there before; of it, *found* is what instances should take over. A number that Chiron did not write is
somebody else's: more are left to them, and after a cut Chiron asks for no more than what is left for a while.
"""

from __future__ import annotations


class Replicas:
    """Of one workload."""

    def __init__(self, *, advise: bool, follows: bool, yield_s: float) -> None:
        """``advise``: the number is never written; ``follows``: another scaler is the one to write it. ``yield_s``: so
        long after somebody else has cut it, no more are asked for."""
        self.number: int | None = None
        """As last read or written by Chiron."""
        self.attempted: int | None = None
        """What a write said whose answer never came."""
        self.surplus = 0
        self.found = 0
        self.fewest = 0
        """Of which none should go yet, where another scaler sets the number."""
        self.most: int | None = None
        """What somebody else has cut it to."""
        self.most_until_s = 0.0
        self.foreign = ""
        """What somebody else has done, in words."""
        self._advise = advise
        self._follows = follows
        self._yield_s = yield_s

    def wanted(self, own: int, claims: int, now_s: float) -> int:
        """How many there are to be. ``claims``: instances of another gateway whose pods have yet to be found."""
        if self.most is not None and now_s >= self.most_until_s:
            self.most, self.foreign = None, ""
        wanted = own + (self.found if self._follows else self.surplus)
        if claims and self.number is not None:  # There may be no such pod: none is started for them.
            wanted = max(wanted - claims, min(wanted, self.number))
        return wanted if self.most is None else min(wanted, self.most)

    def take(self) -> None:
        """One that nobody has, if there is one, for an instance."""
        if self.surplus:
            self.surplus -= 1
            self.found = max(0, self.found - 1)

    def give_back(self, own: int) -> None:
        """One that an instance had, or was said to have, is to be taken over by another one."""
        if self.number is not None and own + self.surplus < self.number:
            self.surplus += 1
            self.found = min(self.found + 1, self.surplus)

    def find_all(self, own: int) -> None:
        """All that are not Chiron's are to be taken over."""
        if self.number is not None:
            self.surplus = self.found = max(0, self.number - own)

    def observe(self, replicas: int, *, own: int, holds: int, now_s: float) -> bool:
        """It has so many. ``holds``: instances that have one or wait for one, those included that are to leave theirs.
        True: somebody else has changed the number, as ``foreign`` says."""
        before, self.number = self.number, replicas
        attempted, self.attempted = self.attempted, None
        if self._advise or self._follows:
            self.surplus = max(0, replicas - own)
            self.found = min(self.found, self.surplus)
        if before is None:
            self.find_all(own)
            self.fewest = max(replicas, own)
            return False
        if replicas in (before, attempted) or self._advise or self._follows:
            return False
        if replicas > before:
            self.surplus = max(self.surplus, replicas - own)
            self.most = None
        else:
            self.surplus = min(self.surplus, max(0, replicas - own))
            self.found = min(self.found, self.surplus)
            # Also those whose pods go already: it may be for this that they do.
            if replicas < holds + self.surplus:
                self.most = replicas
                self.most_until_s = now_s + self._yield_s
        self.foreign = f"somebody else has scaled it from {before} to {replicas} replicas"
        return True
