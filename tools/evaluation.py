"""Runs the parts of ``make evaluation`` one after the other, and says how far it is::

    python tools/evaluation.py --make make TARGET=MINUTES ...

Each part is a target of the Makefile with its estimate: minutes on two idle cores when nothing of it is known. A part
that fails costs itself only; what it had simulated is kept in its journal, so the same command goes on from there. The
exit status is 1 if any part failed.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

INTERRUPTED = 130


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    target: str
    minutes: float
    """Estimate."""
    took_s: float = 0.0
    status: int | None = None
    """Of its command; None: it has not run."""


def part_of(text: str) -> Part:
    """``TARGET=MINUTES``. Raises ValueError."""
    target, equals, minutes = text.rpartition("=")
    try:
        estimate = float(minutes)
    except ValueError:
        estimate = -1.0
    if not (target and equals and 0.0 <= estimate < 1e6):
        raise ValueError(f"{text!r}: must be TARGET=MINUTES, minutes from 0 on, such as paper=13")
    return Part(target=target, minutes=estimate)


def left_minutes(done: Sequence[Part], waiting: Sequence[Part]) -> float:
    """By the estimates, at the pace of what has run so far. A part that was known already has no pace, nor has one that
    failed: each is believed from a tenth of its estimate on."""
    ran = [part for part in done if part.status == 0 and part.took_s >= 6.0 * part.minutes]
    planned = 60.0 * sum(part.minutes for part in ran)
    pace = sum(part.took_s for part in ran) / planned if planned else 1.0
    return pace * sum(part.minutes for part in waiting)


def run_all(
    parts: Sequence[Part], run: Callable[[str], int], now_s: Callable[[], float], say: Callable[[str], None]
) -> list[Part]:
    """The parts as they ended."""
    done: list[Part] = []
    for number, part in enumerate(parts):
        left = left_minutes(done, parts[number:])
        say(f"part {number + 1} of {len(parts)}: {part.target}; about {left:.0f} min left")
        begun_s = now_s()
        status = run(part.target)
        done.append(replace(part, took_s=now_s() - begun_s, status=status))
        if status == INTERRUPTED:
            break
    return done


def summary(done: Sequence[Part], planned: int) -> str:
    lines = [
        f"{'ok' if part.status == 0 else f'failed ({part.status})':12} {part.took_s / 60.0:6.1f} min "
        f"(estimate {part.minutes:g})  {part.target}"
        for part in done
    ]
    failed = [part.target for part in done if part.status != 0]
    minutes = sum(part.took_s for part in done) / 60.0
    words = f"{len(done) - len(failed)} of {planned} parts in {minutes:.1f} min"
    if failed:
        words += f"; failed: {', '.join(failed)}. The same command goes on from what is done"
    return "\n".join([*lines, words])


def main() -> None:
    parser = argparse.ArgumentParser(description="Every table and figure of the simulations anew.")
    parser.add_argument("parts", metavar="TARGET=MINUTES", nargs="+")
    parser.add_argument("--make", default="make", help="the program that makes a target")
    given = parser.parse_args()
    try:
        parts = [part_of(text) for text in given.parts]
    except ValueError as error:
        parser.error(str(error))

    def make(target: str) -> int:
        try:
            return subprocess.run([*given.make.split(), "--no-print-directory", target], check=False).returncode
        except KeyboardInterrupt:
            return INTERRUPTED

    def say(words: str) -> None:
        print(f"== {words}", flush=True)

    done = run_all(parts, make, time.monotonic, say)
    print(summary(done, len(parts)), flush=True)
    sys.exit(int(len(done) < len(parts) or any(part.status for part in done)))


if __name__ == "__main__":
    main()
