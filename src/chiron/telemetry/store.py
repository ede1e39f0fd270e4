"""A result in one file, for ``chiron explain`` and notebooks.

A zip: ``result.json`` (everything but the requests) and ``requests/<column>.npy``. Nothing is pickled. Equal results
give equal bytes. JSON has no nan and no infinity: such a float is written as ``{"float": "inf"}``.
"""

from __future__ import annotations

import io
import json
import os
import zipfile
import zlib
from dataclasses import MISSING, fields
from datetime import datetime
from math import isfinite
from pathlib import Path
from typing import Any, get_type_hints

import numpy as np

from chiron.core.types import RequestClass
from chiron.telemetry.errors import StoreError, SummaryError
from chiron.telemetry.frames import rows_as_columns
from chiron.telemetry.result import Result
from chiron.telemetry.run_data import BatchSizePoint, DecisionPoint, FleetPoint, ProgramPoint, RequestTable
from chiron.telemetry.summary import check_requests, check_summary

FORMAT = "chiron-result"
VERSION = 1

ROWS: dict[str, Any] = {
    "classes": RequestClass,
    "fleet": FleetPoint,
    "batch_sizes": BatchSizePoint,
    "decisions": DecisionPoint,
    "programs": ProgramPoint,
}
"""Fields of ``Result`` that are tuples of dataclasses; stored as columns."""
PLAIN = tuple(f.name for f in fields(Result) if f.name not in ROWS and f.name != "requests")
LATER = {"began", "programs"}
"""Fields that results saved before they existed lack."""
OLDER = {
    "shed": 0,
    **dict.fromkeys(("cold_starts", "warm_starts", "wakes", "sleepers_gb", "throughput_tokens_per_s", "programs")),
}
"""Figures that summaries saved before they existed lack: nothing was shed, the others are not known."""
COLUMNS = tuple(f.name for f in fields(RequestTable))
DTYPES = {
    "model": "int16",
    "cls": "int16",
    "outcome": "int8",
    "evictions": "int16",
    "input_tokens": "int64",
    "output_tokens": "int64",
}
"""Of the columns that are not float64."""


def save_result(result: Result, path: str | Path, *, mode: int = 0o666) -> Path:
    """Write ``result`` to ``path``; an interrupted write leaves no half file. ``mode`` is who may use a new file, less
    what the umask takes. Returns the path."""
    target = Path(path)
    document = {"format": FORMAT, "version": VERSION}
    document |= {name: encode(getattr(result, name), name) for name in PLAIN}
    for name, row_type in ROWS.items():
        document[name] = encode(rows_as_columns(row_type, getattr(result, name)), name)
    partial = target.with_name(target.name + ".partial")
    try:
        partial.unlink(missing_ok=True)
        descriptor = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode)
        with os.fdopen(descriptor, "wb") as file, zipfile.ZipFile(file, "w") as archive:
            add(archive, "result.json", json.dumps(document, allow_nan=False).encode())
            for name in COLUMNS:
                add(archive, f"requests/{name}.npy", npy(getattr(result.requests, name), DTYPES.get(name, "float64")))
        os.replace(partial, target)
    except OSError as error:
        raise StoreError(f"cannot write {target}: {error.strerror or error}") from error
    finally:
        partial.unlink(missing_ok=True)
    return target


def load_result(path: str | Path) -> Result:
    """Read what ``save_result`` wrote; raise ``StoreError`` that says what is wrong with any other file."""
    try:
        with zipfile.ZipFile(path) as archive:
            members = set(archive.namelist())
            expected = {"result.json", *(f"requests/{name}.npy" for name in COLUMNS)}
            if "result.json" not in members:
                raise StoreError(f"{path} is not a saved result: it has no result.json")
            document = json.loads(archive.read("result.json"), object_hook=decode)
            check_document(document, path)
            if members != expected:
                odd = sorted(members ^ expected)
                raise StoreError(f"{path}: members {odd} are missing or unknown; expected are {sorted(expected)}")
            columns = {name: read_column(archive, name, path) for name in COLUMNS}
    except OSError as error:
        raise StoreError(f"cannot read {path}: {error.strerror or error}") from error
    except (zipfile.BadZipFile, zlib.error, NotImplementedError, json.JSONDecodeError, UnicodeDecodeError) as error:
        raise StoreError(f"{path} is not a saved result: {error}") from error
    return build(document, RequestTable(**columns), path)


def check_document(document: Any, path: str | Path) -> None:
    """The format, its version and the keys."""
    if not isinstance(document, dict) or document.get("format") != FORMAT:
        raise StoreError(f"{path} is not a saved result: result.json lacks format = {FORMAT!r}")
    if document.get("version") != VERSION:
        raise StoreError(f"{path}: version is {document.get('version')!r}; this Chiron reads {VERSION}")
    odd = sorted((document.keys() ^ {"format", "version", *PLAIN, *ROWS}) - (LATER - document.keys()))
    if odd:
        raise StoreError(f"{path}: keys {odd} of result.json are missing or unknown")


def build(document: dict[str, Any], requests: RequestTable, path: str | Path) -> Result:
    """The result from its parts, checked against each other."""
    parts: dict[str, Any] = {name: document[name] for name in PLAIN if name in document}
    parts["models"] = tuple(parts["models"])
    if isinstance(parts["summary"], dict) and parts["summary"]:
        parts["summary"] = OLDER | parts["summary"]
    parts |= {
        name: read_rows(document[name], row_type, f"{path}: {name}")
        for name, row_type in ROWS.items()
        if name in document
    }
    check_began(parts.get("began"), path)
    result = Result(**parts, requests=requests)
    try:
        check_requests(requests, result.classes, result.models)
        check_summary(result.summary)
    except SummaryError as error:
        raise StoreError(f"{path}: {error}") from error
    return result


def check_began(value: Any, path: str | Path) -> None:
    """A wall time with its zone, or none."""
    try:
        known = value is None or datetime.fromisoformat(value).tzinfo is not None
    except (TypeError, ValueError):
        known = False
    if not known:
        raise StoreError(f"{path}: began is {value!r}; it must be null or like 2026-01-31T12:41:00.000Z")


def read_rows(columns: Any, row_type: Any, where: str) -> tuple[Any, ...]:
    """Rows from columns; names and lengths must fit. JSON lists become the tuples that the types require."""
    names = [field.name for field in fields(row_type)]
    added = {field.name for field in fields(row_type) if field.default is not MISSING}  # Older files lack these.
    if not isinstance(columns, dict) or not set(names) - added <= columns.keys() <= set(names):
        raise StoreError(f"{where}: columns must be {names}")
    if len({len(column) for column in columns.values()}) > 1:
        raise StoreError(f"{where}: columns differ in length")
    if "groups" in columns:
        columns["groups"] = [tuple((float(due), int(n)) for due, n in groups) for groups in columns["groups"]]
    floats = {name for name, hint in get_type_hints(row_type).items() if hint is float}
    try:
        columns = {name: [float(v) for v in c] if name in floats else c for name, c in columns.items()}
        return tuple(row_type(**dict(zip(columns, row, strict=True))) for row in zip(*columns.values(), strict=True))
    except (TypeError, ValueError) as error:
        raise StoreError(f"{where}: {error}") from error


def read_column(archive: zipfile.ZipFile, name: str, path: str | Path) -> Any:
    """One column of the request table, of the type it must have."""
    try:
        array = np.lib.format.read_array(io.BytesIO(archive.read(f"requests/{name}.npy")), allow_pickle=False)
    except ValueError as error:
        raise StoreError(f"{path}: requests/{name}.npy: {error}") from error
    dtype = DTYPES.get(name, "float64")
    if array.ndim != 1 or array.dtype != np.dtype(dtype):
        raise StoreError(f"{path}: requests/{name}.npy is {array.ndim}-d {array.dtype}; it must be 1-d {dtype}")
    return array


def encode(value: Any, where: str) -> Any:
    """``value`` as strict JSON."""
    match value:
        case None | bool() | str() | int():
            return value
        case float():
            return value if isfinite(value) else {"float": str(value)}
        case np.generic():
            return encode(value.item(), where)
        case dict():
            return {str(key): encode(item, f"{where}.{key}") for key, item in value.items()}
        case list() | tuple():
            return [encode(item, where) for item in value]
        case _:
            raise StoreError(f"cannot save {where}: {value!r} is a {type(value).__name__}, not a plain value")


def decode(value: dict[str, Any]) -> Any:
    """Undo ``encode`` for a float that JSON lacks."""
    written = value.keys() == {"float"} and isinstance(value["float"], str)
    return float(value["float"]) if written else value


def npy(array: Any, dtype: str) -> bytes:
    """``array`` in NumPy's file format."""
    buffer = io.BytesIO()
    np.lib.format.write_array(buffer, np.asarray(array, dtype=dtype), allow_pickle=False)
    return buffer.getvalue()


def add(archive: zipfile.ZipFile, name: str, data: bytes) -> None:
    """Fast compression, and a fixed date so that equal results give equal bytes."""
    info = zipfile.ZipInfo(name)
    info.compress_type = zipfile.ZIP_DEFLATED
    archive.writestr(info, data, compresslevel=1)
