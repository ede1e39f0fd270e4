"""Prompt and output lengths: constant, lognormal, or drawn from pairs that were observed."""

from __future__ import annotations

from dataclasses import dataclass
from math import exp, inf, log, sqrt

import numpy as np

from chiron.workload.errors import WorkloadSettingError, require
from chiron.workload.types import Ints, Trace

_Z99 = 2.3263478740408408
"""99th percentile of the standard normal."""

LENGTH_MAX = 131_072


@dataclass(frozen=True, slots=True, kw_only=True)
class ConstantTokens:
    tokens: int

    def __post_init__(self) -> None:
        require(self.tokens >= 1, "tokens", self.tokens, "at least 1")


@dataclass(frozen=True, slots=True, kw_only=True)
class LognormalTokens:
    """Lognormal, given by ``mean`` and ``cv`` or by ``p50`` and ``p99``; rounded, then clipped to 1..``max_tokens``.

    The clip lowers the mean of a heavy tail; ``mean`` is the mean before it.
    """

    mean: float | None = None
    cv: float | None = None
    """Standard deviation / mean."""
    p50: float | None = None
    p99: float | None = None
    max_tokens: int = LENGTH_MAX
    """The longest context that current models commonly serve."""

    def __post_init__(self) -> None:
        require(self.max_tokens >= 1, "max_tokens", self.max_tokens, "at least 1")
        by_moments = (self.mean is not None, self.cv is not None)
        by_quantiles = (self.p50 is not None, self.p99 is not None)
        if {by_moments, by_quantiles} != {(True, True), (False, False)}:
            raise WorkloadSettingError("lognormal lengths need either mean and cv, or p50 and p99")
        if self.mean is not None and self.cv is not None:
            require(1 <= self.mean < inf, "mean", self.mean, "at least 1 and finite")
            require(0 <= self.cv < inf, "cv", self.cv, "at least 0 and finite")
        if self.p50 is not None and self.p99 is not None:
            require(1 <= self.p50 < inf, "p50", self.p50, "at least 1 and finite")
            require(self.p50 <= self.p99 < inf, "p99", self.p99, f"at least p50 ({self.p50:g}) and finite")

    @property
    def mu_sigma(self) -> tuple[float, float]:
        """Mean and standard deviation of the logarithm."""
        return log_moments(self.mean, self.cv, self.p50, self.p99)

    @property
    def expected(self) -> float:
        """Mean before rounding and clipping, tokens."""
        mu, sigma = self.mu_sigma
        return exp(mu + sigma**2 / 2)


def log_moments(mean: float | None, cv: float | None, p50: float | None, p99: float | None) -> tuple[float, float]:
    """Mean and standard deviation of the logarithm of a lognormal that is given by two of these."""
    if mean is not None and cv is not None:
        variance = log(1 + cv**2)
        return log(mean) - variance / 2, sqrt(variance)
    assert p50 is not None
    assert p99 is not None
    return log(p50), log(p99 / p50) / _Z99


FieldLengths = ConstantTokens | LognormalTokens


@dataclass(frozen=True, slots=True, kw_only=True)
class IndependentLengths:
    """Prompt and output lengths drawn independently of each other."""

    input: FieldLengths
    output: FieldLengths


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class EmpiricalLengths:
    """Observed (prompt, output) pairs; drawn as pairs, so their correlation stays."""

    input_tokens: Ints
    output_tokens: Ints
    source: str

    def __post_init__(self) -> None:
        require(len(self.input_tokens) > 0, "lengths", len(self.input_tokens), "at least one pair")
        require(
            len(self.input_tokens) == len(self.output_tokens),
            "output_tokens",
            len(self.output_tokens),
            f"as many as input_tokens ({len(self.input_tokens)})",
        )


Lengths = IndependentLengths | EmpiricalLengths


def lengths_of(trace: Trace) -> EmpiricalLengths:
    return EmpiricalLengths(input_tokens=trace.input_tokens, output_tokens=trace.output_tokens, source=trace.source)


def sample_lengths(lengths: Lengths, count: int, rng: np.random.Generator) -> tuple[Ints, Ints]:
    """``count`` prompt and output lengths, tokens, each >= 1."""
    if isinstance(lengths, EmpiricalLengths):
        pick = rng.integers(0, len(lengths.input_tokens), count)
        return lengths.input_tokens[pick], lengths.output_tokens[pick]
    return sample_field(lengths.input, count, rng), sample_field(lengths.output, count, rng)


def describe_lengths(lengths: Lengths) -> str:
    if isinstance(lengths, EmpiricalLengths):
        return f"lengths of {lengths.source}"
    return f"input {_describe_field(lengths.input)}, output {_describe_field(lengths.output)}"


def parse_field_lengths(text: str) -> FieldLengths:
    """``512``, ``mean=512,cv=1.2`` or ``p50=300,p99=4000``, each with ``,max=8192`` if wanted."""
    allowed = "a whole number, mean=...,cv=..., or p50=...,p99=... (optionally ,max=...)"
    try:
        if "=" not in text:
            return ConstantTokens(tokens=int(text))
        pairs = dict(part.split("=", 1) for part in text.replace(" ", "").split(","))
        limit = int(pairs.pop("max", LENGTH_MAX))
        numbers: dict[str, float] = {key: float(value) for key, value in pairs.items()}
        unknown = sorted(set(numbers) - {"mean", "cv", "p50", "p99"})
        if unknown:
            raise WorkloadSettingError(f"unknown key {unknown[0]!r}")
        return LognormalTokens(
            mean=numbers.get("mean"),
            cv=numbers.get("cv"),
            p50=numbers.get("p50"),
            p99=numbers.get("p99"),
            max_tokens=limit,
        )
    except ValueError as error:
        raise WorkloadSettingError(f"lengths {text!r}: {error}; expected {allowed}") from error


def sample_field(field: FieldLengths, count: int, rng: np.random.Generator) -> Ints:
    """``count`` lengths, tokens, each >= 1."""
    if isinstance(field, ConstantTokens):
        return np.full(count, field.tokens, dtype=np.int64)
    mu, sigma = field.mu_sigma
    drawn = np.rint(np.clip(rng.lognormal(mu, sigma, count), 1, field.max_tokens))
    return drawn.astype(np.int64)


def _describe_field(field: FieldLengths) -> str:
    if isinstance(field, ConstantTokens):
        return f"{field.tokens} tokens"
    if field.mean is not None:
        return f"lognormal mean {field.mean:g} cv {field.cv:g}"
    return f"lognormal p50 {field.p50:g} p99 {field.p99:g}"
