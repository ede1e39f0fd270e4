"""Prometheus text to numbers, without a client library: every instance is scraped every second.

Tolerant by design: a line that is not a sample, and a value that is not finite, are as if they were not there. What
is missing must be treated as missing by the caller, never as zero.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import cache
from math import isfinite

from chiron.engines.claims import figures
from chiron.engines.rows import EngineRow

_SAMPLE = re.compile(r'([A-Za-z_:][\w:]*)[ \t]*(\{(?:[^"{}]|"(?:[^"\\]|\\.)*")*\})?[ \t]+(\S+)', re.ASCII)
_LABEL = re.compile(r'([A-Za-z_]\w*)="([0-9][0-9.eE+-]*)"', re.ASCII)

_MAXIMA = frozenset({"kv_usage", "block_size"})
"""Shares and sizes: of several series (one per engine core, say) the largest counts, not the sum."""


def parse_metrics(text: str) -> dict[str, float]:
    """Metric name to value, summed over labels. Histograms keep ``_sum`` and ``_count``; buckets are left out.

    Of ``_info`` metrics, labels that hold a number appear as ``NAME/LABEL``.
    """
    sums: dict[str, float] = {}
    for name, value in _series(text, None):
        sums[name] = sums.get(name, 0.0) + value
    return sums


def read_row(row: EngineRow, text: str) -> dict[str, float]:
    """Our names that this engine's metrics hold; of several names for one thing the newest that is present. What cannot
    be (``claims.figures``) is left out.

    ``kv_capacity_tokens`` is the product of blocks and block size where the engine does not say it itself.
    """
    sums: dict[str, float] = {}
    maxima: dict[str, float] = {}
    for name, value in _series(text, _part(row.part_label)):
        sums[name] = sums.get(name, 0.0) + value
        maxima[name] = max(maxima.get(name, value), value)
    found: dict[str, float] = {}
    for ours, names in row.metrics.items():
        values = maxima if ours in _MAXIMA else sums
        newest = next((name for name in names if name in values), None)
        if newest is not None:
            found[ours] = values[newest]
    if "kv_capacity_tokens" not in found and "kv_blocks" in found and "block_size" in found:
        found["kv_capacity_tokens"] = found["kv_blocks"] * found["block_size"]
    return figures(found)


@cache
def _part(label: str) -> re.Pattern[str] | None:
    """Finds series in which the label is not empty."""
    return re.compile(rf'\b{re.escape(label)}="[^"]') if label else None


def _series(text: str, part: re.Pattern[str] | None) -> Iterator[tuple[str, float]]:
    for line in text.split("\n"):
        if not line or line[0] == "#" or "_bucket{" in line:
            continue
        match = _SAMPLE.match(line)
        if match is None:
            continue
        name, labels, number = match.groups()
        if part is not None and labels is not None and part.search(labels):
            continue
        value = _number(number)
        if value is None:
            continue
        yield name, value
        if labels is not None and name.endswith("_info"):
            for label, content in _LABEL.findall(labels):
                parsed = _number(content)
                if parsed is not None:
                    yield f"{name}/{label}", parsed


def _number(text: str) -> float | None:
    try:
        value = float(text)
    except ValueError:
        return None
    return value if isfinite(value) else None
