"""Colours: one per policy, the same in every chart of a report. Each stands out from white and from near-black by 3:1
at least; hues after Okabe and Ito, for any colour vision, and the marker differs, too."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

COLOURS = ("#2f7fc1", "#d55e00", "#00946c", "#c2609c", "#a67c00", "#7d62c9", "#8f5f45", "#7f7f7f")
MARKERS = (
    ("circle", "o"),
    ("square", "s"),
    ("diamond", "D"),
    ("triangle", "^"),
    ("cross", "P"),
    ("x", "X"),
    ("star", "*"),
    ("triangle-down", "v"),
)
"""As the page and matplotlib call them."""
DASHES = ("", "7 3", "2 2", "9 3 2 3")
"""Of lines, when there are more policies than colours."""

ROLE_COLOURS = {"interactive": "#2566a0", "mixed": "#4b95cd", "batch": "#bf7d10"}
INSTANCE_COLOURS = ("#2b6ca3", "#3d8fa0", "#5a9a68", "#b5811a")
"""Stops of a ramp: instances in one chart."""
GROUP_COLOURS = ("#8a5a06", "#c98a1b", "#e2bd76")
"""Stops of a ramp: batch groups, the earliest deadline darkest."""
STARTING_COLOUR = "#8d8d8d"
DRAINING_COLOUR = "#b9b9b9"
LIMIT_COLOUR = "#d0402f"
"""SLOs, targets and deadlines."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Look:
    """How one policy is drawn."""

    colour: str
    shape: str
    matplotlib_marker: str
    dash: str


def looks(policies: Sequence[str]) -> dict[str, Look]:
    """A look for each policy: ``chiron`` always takes the first, the others follow by name, so that a colour does not
    depend on who won."""
    ordered = sorted(set(policies), key=lambda name: (name != "chiron", name))
    return {
        name: Look(
            colour=COLOURS[i % len(COLOURS)],
            shape=MARKERS[i % len(MARKERS)][0],
            matplotlib_marker=MARKERS[i % len(MARKERS)][1],
            dash=DASHES[i // len(COLOURS) % len(DASHES)],
        )
        for i, name in enumerate(ordered)
    }
