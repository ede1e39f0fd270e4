"""Types of command line options; an error names the value and what is allowed."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from math import isfinite
from pathlib import Path


def add_model(parser: argparse.ArgumentParser, *, positional: bool, help: str) -> None:
    """The model's directory: an option in commands that gateways write, an argument in those that people do."""
    if positional:
        parser.add_argument("model", metavar="MODEL", type=Path, help=help)
    else:
        parser.add_argument("--model", type=Path, required=True, help=help)


def whole(least: int, most: int | None = None) -> Callable[[str], int]:
    """A whole number within bounds."""
    bounds = f"a whole number of at least {least}" if most is None else f"a whole number from {least} to {most}"

    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = least - 1
        if value < least or (most is not None and value > most):
            raise argparse.ArgumentTypeError(f"{text!r}: it must be {bounds}")
        return value

    return parse


def real(least: float, most: float = 1e9) -> Callable[[str], float]:
    """A finite number within bounds."""

    def parse(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = float("nan")
        if not (isfinite(value) and least <= value <= most):
            raise argparse.ArgumentTypeError(f"{text!r}: it must be a number from {least:g} to {most:g}")
        return value

    return parse
