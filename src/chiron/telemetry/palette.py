"""Colours: one per policy, the same in every chart of a report. Told apart with any colour vision, on white and on
near-black (hues after Okabe and Ito); the marker differs as well."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

COLOURS = ("#2f7fc1", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#8c6bb1", "#8a8a8a")
MARKERS = (
    ("circle", "o"),
    ("square", "s"),
    ("diamond", "D"),
    ("triangle-up", "^"),
    ("cross", "P"),
    ("x", "X"),
    ("star", "*"),
    ("triangle-down", "v"),
)
"""As plotly and matplotlib call them."""

ROLE_COLOURS = {"interactive": "#2b5c8a", "mixed": "#7fb0d6", "batch": "#e3b04b"}
INSTANCE_COLOURS = ("#2b5c8a", "#4f92ac", "#96bb96", "#e3b04b")
"""Stops of a ramp: instances in one chart."""
GROUP_COLOURS = ("#7d5206", "#e3b04b", "#f6e3b8")
"""Stops of a ramp: batch groups, the earliest deadline darkest."""
STARTING_COLOUR = "#b5b5b5"
DRAINING_COLOUR = "#d9d9d9"
LIMIT_COLOUR = "#c0392b"
"""SLOs, targets and deadlines."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Look:
    """How one policy is drawn."""

    colour: str
    plotly_marker: str
    matplotlib_marker: str


def looks(policies: Sequence[str]) -> dict[str, Look]:
    """A look for each policy: ``chiron`` always takes the first, the others follow by name, so that a colour does not
    depend on who won."""
    ordered = sorted(set(policies), key=lambda name: (name != "chiron", name))
    return {
        name: Look(
            colour=COLOURS[i % len(COLOURS)],
            plotly_marker=MARKERS[i % len(MARKERS)][0],
            matplotlib_marker=MARKERS[i % len(MARKERS)][1],
        )
        for i, name in enumerate(ordered)
    }
