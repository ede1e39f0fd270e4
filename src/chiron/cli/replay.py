"""``chiron replay``: does a control plane that is told the same do the same? Read from an input log."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from chiron.runtime.replay import replay as replay_lines
from chiron.telemetry.event_log import read_event_log


def replay(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="What telemetry.input_log named.")],
) -> None:
    """Tell a control plane again what a gateway's was told, and compare every decision and placement.

    The policy and the models are in the log. Exits with 1 at the first difference, which it shows. The log must have
    the beginning of its run: keep enough of it (telemetry.rotate_bytes, rotate_keep).

    Examples:

    - `chiron replay chiron-data/inputs.jsonl`
    """
    done = replay_lines(read_event_log(file, last_run=True))
    print(
        f"{done.inputs:,} inputs over {done.ends_s:,.1f} s made {done.decisions:,} decisions and "
        f"{done.placements:,} placements"
    )
    if done.difference:
        print(f"Then they differ: {done.difference}")
        raise typer.Exit(1)
    print("All of them are those of the log, to the last bit.")
