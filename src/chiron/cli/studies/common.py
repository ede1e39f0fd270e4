"""What the commands of studies share: who simulates, where it is kept, and how far it is."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn
from rich.progress import Progress as Bars

from chiron.config.read import ConfigError
from chiron.studies.executors import Executor, local_workers, ray_workers
from chiron.studies.journal import Journal
from chiron.studies.runner import Progress, Runner
from chiron.telemetry.errors import need
from chiron.telemetry.format import counted, span

SAID_EVERY_S = 15.0
"""A line of progress where there is no terminal."""

JobsOption = Annotated[
    str, typer.Option("--jobs", "-j", metavar="N|auto", help="Simulations at a time; auto: one per core.")
]
RayOption = Annotated[
    str,
    typer.Option(
        "--ray",
        metavar="ADDRESS",
        help="Simulate on this Ray cluster instead, such as 10.0.0.5:6379 or auto. Its nodes need Python with NumPy; "
        "Chiron itself is sent to them.",
    ),
]
StudyFiguresOption = Annotated[
    Path | None, typer.Option("--figures", metavar="DIR", help="Write the charts as PNG and SVG into this directory.")
]
RayPythonOption = Annotated[
    str, typer.Option("--ray-python", metavar="FILE", help="A Python with the cluster's Ray; default: this one.")
]


def executor(jobs: str, ray: str, ray_python: str) -> Executor:
    if ray:
        if jobs != "auto":
            raise ConfigError("give either --jobs or --ray")
        return ray_workers(ray, ray_python)
    if ray_python:
        raise ConfigError("--ray-python: belongs to --ray")
    return local_workers(jobs_of(jobs))


def jobs_of(text: str) -> int | None:
    if text == "auto":
        return None
    if not text.isdecimal() or int(text) < 1:
        raise ConfigError(f"--jobs is {text!r}; it must be auto, or 1 or more")
    return int(text)


@contextmanager
def running(where: Executor, journal: Path | None, what: str) -> Iterator[Runner]:
    """A runner that tells on stderr how far it is. Who simulates is ended with it."""
    console = Console(stderr=True, markup=False)
    kept = Journal(journal)
    if journal is not None and len(kept):
        count = counted(len(kept), "simulation")
        console.print(f"{count} known already from {journal}", highlight=False, soft_wrap=True)
    if kept.ignored:
        console.print(f"{journal}: {counted(kept.ignored, 'damaged line')} ignored", highlight=False, soft_wrap=True)
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn())
    begun_s = said_s = time.monotonic()
    try:
        with Bars(*columns, console=console, transient=True, disable=not console.is_terminal) as bars:
            task = bars.add_task(what, total=None)

            def show(progress: Progress) -> None:
                nonlocal said_s
                now_s = time.monotonic()
                left = progress.left_s(now_s - begun_s)
                ahead = "" if left is None else f"about {span(left)} left"
                words = f"{what}: {ahead}"
                bars.update(task, description=words, completed=progress.done, total=progress.total)
                if not console.is_terminal and now_s - said_s >= SAID_EVERY_S:
                    said_s = now_s
                    count = f"{progress.done} of {progress.total} simulations"
                    console.print(f"{what}: {count}, {ahead}", highlight=False, soft_wrap=True)

            yield Runner(where, kept, show)
    finally:
        where.close()


def check_file(path: Path, option: str) -> None:
    """Fail before an hour of simulation, not after it."""
    if path.is_dir():
        raise ConfigError(f"{option} {path}: is a directory; name a file")
    if not path.absolute().parent.is_dir():
        raise ConfigError(f"{option} {path}: there is no directory {path.absolute().parent}")


def check_figures(directory: Path | None) -> None:
    if directory is not None:
        need("matplotlib")
        if directory.is_file():
            raise ConfigError(f"--figures {directory}: is a file; name a directory")


def write_whole(path: Path, text: str) -> None:
    """The whole file or the old one, never a part."""
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        beside.write_text(text, encoding="utf-8")
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)
