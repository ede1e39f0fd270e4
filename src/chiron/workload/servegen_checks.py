"""Checks columns and tables of ServeGen clients before anything is computed from them.

A file of clients comes from elsewhere: an error in it is reported with the file, the row or the client, the value
and what is allowed, and never shows as an index that points nowhere.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from chiron.workload.errors import TraceFormatError
from chiron.workload.types import Floats, Ints

CLIENTS_MAX = 32_768
WINDOWS_MAX = 32_768
CELLS_MAX = 50_000_000
"""Clients times windows; each takes 9 bytes."""
COUNT_MAX = 2**31 - 1
SHAPE_MIN, SHAPE_MAX = 0.006, 1e6
"""Below it the mean of a Weibull distribution is beyond what a float holds. Published shapes are 0.0067 to 853."""
TABLES = {"counts": 2, "patterns": 2, "shapes": 2, "length_client": 1, "length_window": 1, "input_table": 2,
          "output_table": 2}  # fmt: skip
"""The arrays of the packaged form, and how many dimensions each has."""


def whole(path: Path, name: str, column: npt.NDArray[Any], most: int) -> Ints:
    """The column as whole numbers in 0..``most``."""
    values = real(path, name, column, 0.0, float(most))
    _refuse(path, name, column, values != np.floor(values), f"a whole number in 0..{most:,}")
    return values.astype(np.int64)


def real(path: Path, name: str, column: npt.NDArray[Any], least: float, most: float) -> Floats:
    """The column as finite numbers in ``least``..``most``; a missing value is none."""
    try:
        values = np.asarray(column, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise TraceFormatError(f"{path}: column {name} does not hold numbers: {error}") from None
    _refuse(path, name, column, ~((values >= least) & (values <= most)), f"in {least:g}..{most:g}")
    return values


def _refuse(path: Path, name: str, column: npt.NDArray[Any], wrong: npt.NDArray[np.bool_], allowed: str) -> None:
    if wrong.any():
        row = int(np.argmax(wrong))
        raise TraceFormatError(f"{path}: row {row + 1}: {name} is {column[row]}; it must be {allowed}")


def check_size(path: Path, clients: int, windows: int) -> None:
    """Tables of clients by windows are dense."""
    if clients * windows > CELLS_MAX:
        raise TraceFormatError(
            f"{path}: {clients:,} clients (the largest number and one) times {windows:,} windows; at most "
            f"{CELLS_MAX:,} are allowed in all"
        )


def check_clients(known: npt.NDArray[Any], asked: npt.NDArray[Any], rates: str, lengths: str) -> None:
    """Every client with lengths must have rates: else the two are not of one model."""
    strange = np.setdiff1d(asked, known)
    if len(strange):
        more = f" and {len(strange) - 1:,} others have" if len(strange) > 1 else " has"
        raise TraceFormatError(
            f"{lengths}: client {strange[0]}{more} lengths and no rates in {rates}, whose clients are "
            f"{known.min()} to {known.max()}; are both of one model?"
        )


def check_shapes(path: Path, shapes: npt.NDArray[Any], active: npt.NDArray[np.bool_]) -> None:
    """Of the windows in which something is sent."""
    seen = shapes[active]
    wrong = ~((seen >= SHAPE_MIN) & (seen <= SHAPE_MAX))
    if wrong.any():
        raise TraceFormatError(
            f"{path}: shape parameter (pat_arg1) is {seen[np.argmax(wrong)]:g}; it must be in "
            f"{SHAPE_MIN:g}..{SHAPE_MAX:g} where something is sent"
        )


def check_tables(path: Path, arrays: Mapping[str, npt.NDArray[Any]], bins: int) -> None:
    """The packaged form: shapes that fit one another, whole numbers, clients and windows that exist."""
    for name, dimensions in TABLES.items():
        array, kind = arrays[name], "f" if name == "shapes" else "iu"
        if array.ndim != dimensions or array.dtype.kind not in kind:
            raise TraceFormatError(
                f"{path}: {name} is {array.ndim}-d {array.dtype}; it must be {dimensions}-d and of "
                f"{'floats' if kind == 'f' else 'whole numbers'}"
            )
    size, rows = arrays["counts"].shape, len(arrays["length_client"])
    wanted = {"patterns": size, "shapes": size, "length_window": (rows,), "input_table": (rows, bins),
              "output_table": (rows, bins)}  # fmt: skip
    for name, shape in wanted.items():
        if arrays[name].shape != shape:
            raise TraceFormatError(f"{path}: {name} has the shape {arrays[name].shape}; it must be {shape}")
    if 0 in size or rows == 0:
        raise TraceFormatError(f"{path}: it holds no client, no window or no lengths")
    check_size(path, *size)
    _check_ranges(path, arrays)
    check_clients(np.arange(size[0]), arrays["length_client"], "counts", f"{path}: length_client")
    check_shapes(path, arrays["shapes"], arrays["counts"] > 0)


def _check_ranges(path: Path, arrays: Mapping[str, npt.NDArray[Any]]) -> None:
    ranges = {"counts": (0, COUNT_MAX), "patterns": (0, 2), "length_window": (0, WINDOWS_MAX - 1),
              "input_table": (1, COUNT_MAX), "output_table": (1, COUNT_MAX)}  # fmt: skip
    for name, (least, most) in ranges.items():
        low, high = int(arrays[name].min()), int(arrays[name].max())
        if low < least or high > most:
            raise TraceFormatError(f"{path}: {name} holds {low:,} to {high:,}; allowed are {least:,} to {most:,}")
    if (arrays["counts"][arrays["patterns"] == 0] > 0).any():
        raise TraceFormatError(f"{path}: counts above 0 where patterns is 0: something is sent, and nobody knows how")
