"""The time by which things expire and are deleted: the wall clock, as far as it can be trusted.

A machine that starts with a wrong clock must not treat everything as old. Neither a wrong clock nor a long time
switched off can be seen from inside, so what nobody saw pass does not count at first: the trusted time goes on from
where it was when it was last kept, as fast as a running process sees time pass. A gap of up to ``gap_s`` is a restart
and is believed at once. A larger one, or one backwards, puts the clock in doubt, across restarts, until a process has
run for as long as the clock jumped, at most ``grace_s``, while the machine's clock was not set.

Pure: state and readings in, state out.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

BACK_S = 60.0
"""Steps backwards that are not worth a doubt: clocks are corrected."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ClockMarks:
    """What is kept from one look to the next, and from one start to the next."""

    seen_s: float | None = None
    """The wall clock at the last look; None: it was never looked at."""
    trusted_s: float | None = None
    doubt_s: float = 0.0
    """For how long the clock must still run before it is believed; 0: it is."""

    @property
    def due_s(self) -> float:
        """What was to go by then may go."""
        assert self.seen_s is not None
        assert self.trusted_s is not None
        return min(self.seen_s, self.trusted_s)


def begin(marks: ClockMarks, wall_s: float, *, gap_s: float, grace_s: float) -> ClockMarks:
    """At a start."""
    if marks.seen_s is None or marks.trusted_s is None:
        return ClockMarks(seen_s=wall_s, trusted_s=wall_s)
    ahead_s = wall_s - marks.trusted_s
    if -BACK_S <= ahead_s <= gap_s:
        return ClockMarks(seen_s=wall_s, trusted_s=wall_s)
    since_s = wall_s - marks.seen_s
    if marks.doubt_s > 0.0 and -BACK_S <= since_s <= gap_s:
        # The same doubt, another process.
        return replace(marks, seen_s=wall_s, trusted_s=marks.trusted_s + max(0.0, since_s))
    return replace(marks, seen_s=wall_s, doubt_s=max(marks.doubt_s, min(abs(ahead_s), grace_s)))


def look(marks: ClockMarks, wall_s: float, *, was_set: bool) -> ClockMarks:
    """While a process runs, whose own wall clock only ever runs on. ``was_set``: the machine's no longer agrees with
    it, so one of the two is wrong."""
    assert marks.seen_s is not None
    assert marks.trusted_s is not None
    passed_s = max(0.0, wall_s - marks.seen_s)
    doubt_s = marks.doubt_s if was_set else max(0.0, marks.doubt_s - passed_s)
    trusted_s = marks.trusted_s + passed_s if doubt_s else wall_s
    return ClockMarks(seen_s=wall_s, trusted_s=trusted_s, doubt_s=doubt_s)


def words(marks: ClockMarks) -> str:
    """Why nothing expires; empty if the clock is believed."""
    if not marks.doubt_s:
        return ""
    assert marks.seen_s is not None
    assert marks.trusted_s is not None
    ahead_s = marks.seen_s - marks.trusted_s
    where = f"{show(abs(ahead_s))} {'ahead of' if ahead_s > 0 else 'behind'}"
    return (
        f"the clock is {where} what this server expects: nothing expires or is deleted by it until it has run "
        f"for another {show(marks.doubt_s)}; if it is wrong, set it and restart"
    )


def show(seconds: float) -> str:
    for unit, size in (("days", 86_400.0), ("hours", 3600.0), ("minutes", 60.0)):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds:.0f} s"
