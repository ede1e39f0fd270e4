"""Fit the knee form of ``engines.profile`` to measured steps.

Least squares on *relative* errors over all phases together, so that a 5 ms decode step weighs as much as a 500 ms
prefill. The linear form a + b*B + p*n + c*S + q*A is a convex problem with one answer (non-negative least squares);
the knee, which is not, starts from that answer split in several ways and keeps the best end. No randomness.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from chiron.engines.profile import Profile, ProfileError
from chiron.engines.profile_points import PHASES, StepPoint

_SIGNIFICANT_DIGITS = 7
"""Of a coefficient in a report: far below the error of the fit, and the same on every machine."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FitError:
    """Relative error over some points, as fractions."""

    points: int
    mape: float
    max_error: float


@dataclass(frozen=True, slots=True, kw_only=True)
class FitReport:
    """The fitted coefficients (milliseconds) and how far off they are."""

    h_ms: float
    w0_ms: float
    f_ms_per_token: float
    c_ms_per_context_token: float
    q_ms_per_token_squared: float
    error: FitError
    by_phase: Mapping[str, FitError]
    linear: FitError
    """Of the best linear form on the same points."""
    worst: StepPoint
    """The point with the largest relative error."""
    worst_fitted_ms: float

    def profile(
        self,
        *,
        name: str,
        model: str,
        gpu: str,
        tp: int,
        engine: str,
        kv_capacity_tokens: int,
        kv_bytes_per_token: int,
        max_num_batched_tokens: int = 2048,
        price_per_gpu_hour: float = 0.0,
        source: str = "",
    ) -> Profile:
        """A profile with these coefficients and error figures."""
        return Profile(
            name=name,
            model=model,
            gpu=gpu,
            tp=tp,
            engine=engine,
            h_ms=self.h_ms,
            w0_ms=self.w0_ms,
            f_ms_per_token=self.f_ms_per_token,
            c_ms_per_context_token=self.c_ms_per_context_token,
            q_ms_per_token_squared=self.q_ms_per_token_squared,
            kv_capacity_tokens=kv_capacity_tokens,
            kv_bytes_per_token=kv_bytes_per_token,
            max_num_batched_tokens=max_num_batched_tokens,
            price_per_gpu_hour=price_per_gpu_hour,
            source=source,
            mape=round(self.error.mape, 4),
            max_error=round(self.error.max_error, 4),
            linear_mape=round(self.linear.mape, 4),
            linear_max_error=round(self.linear.max_error, 4),
        )


def fit_profile(points: Sequence[StepPoint]) -> FitReport:
    """Fit the knee form. Raises ProfileError when the points cannot determine it."""
    _check_enough(points)
    columns = _Columns.of(points)
    linear, linear_fitted = _fit_linear(columns)
    coefficients = _round(_fit_knee(columns, linear))
    fitted = _knee(coefficients, columns)
    errors = np.abs(fitted / columns.latency - 1.0)
    worst = int(errors.argmax())
    h, w0, f, c, q = (float(value) for value in coefficients)
    return FitReport(
        h_ms=h,
        w0_ms=w0,
        f_ms_per_token=f,
        c_ms_per_context_token=c,
        q_ms_per_token_squared=q,
        error=_error(errors),
        by_phase={
            phase: _error(errors[mask])
            for phase in PHASES
            if (mask := np.array([point.phase == phase for point in points])).any()
        },
        linear=_error(np.abs(linear_fitted / columns.latency - 1.0)),
        worst=points[worst],
        worst_fitted_ms=float(fitted[worst]),
    )


@dataclass(frozen=True, slots=True)
class _Columns:
    decoding: Any
    context: Any
    prefill: Any
    attention: Any
    latency: Any

    @staticmethod
    def of(points: Sequence[StepPoint]) -> _Columns:
        rows = [
            (
                point.decoding,
                point.decoding * point.context_len,
                point.prefill_tokens,
                point.attention,
                point.latency_ms,
            )
            for point in points
        ]
        return _Columns(*np.array(rows, dtype=float).T)


def _knee(coefficients: Any, columns: _Columns) -> Any:
    h, w0, f, c, q = coefficients
    tokens = columns.prefill + columns.decoding
    return h + (w0**4 + (f * tokens) ** 4) ** 0.25 + c * columns.context + q * columns.attention


def _fit_linear(columns: _Columns) -> tuple[Any, Any]:
    """Coefficients (a, b, p, c, q) and the fitted times."""
    terms = [
        np.ones_like(columns.latency),
        columns.decoding,
        columns.prefill,
        columns.context,
        columns.attention,
    ]
    design = np.stack(terms, axis=1)
    relative = design / columns.latency[:, None]
    # Terms differ by nine orders of magnitude; scaled to one length the solver is well conditioned.
    scale = np.sqrt((relative**2).sum(axis=0))
    scale[scale == 0] = 1.0
    from scipy.optimize import nnls  # Here, because it takes 0.4 s that no other command should pay.

    solution = nnls(relative / scale, np.ones_like(columns.latency))[0] / scale
    return solution, design @ solution


def _fit_knee(columns: _Columns, linear: Any) -> Any:
    from scipy.optimize import least_squares

    a, b, p, c, q = linear
    # A term that the linear form has no use for starts small rather than at its bound, where it could not move.
    floor = 1e-3 * float(columns.latency.min())
    per_token = max(float(p), float(b), floor / float((columns.prefill + columns.decoding).max()))
    context = max(float(c), floor / max(float(columns.context.max()), 1.0))
    attention = max(float(q), floor / max(float(columns.attention.max()), 1.0))
    a = max(float(a), floor)
    best: Any = None
    for weights_share in (0.1, 0.5, 0.9):
        for slope in (0.8, 1.3):
            start = np.array([a * (1 - weights_share), a * weights_share, per_token * slope, context, attention])
            found = least_squares(
                lambda x, unit: _knee(x * unit, columns) / columns.latency - 1.0,
                np.ones(5),
                bounds=(0.0, np.inf),
                args=(start,),
                xtol=1e-12,
                ftol=1e-12,
                gtol=1e-12,
            )
            if best is None or found.cost < best[0] * (1 - 1e-9):
                # A coefficient that the data have no use for ends a hair above its bound: it is 0.
                best = (found.cost, np.where(found.x < 1e-6, 0.0, found.x) * start)
    return best[1]


def _round(coefficients: Any) -> Any:
    return np.array([float(f"{value:.{_SIGNIFICANT_DIGITS}g}") for value in coefficients])


def _error(errors: Any) -> FitError:
    return FitError(points=len(errors), mape=float(errors.mean()), max_error=float(errors.max()))


def _check_enough(points: Sequence[StepPoint]) -> None:
    """Each coefficient needs something that varies; without it the fit would invent a cost."""
    decodes = [point for point in points if point.prefill_tokens == 0]
    needs = [
        (len(points), 8, "points"),
        (len({point.decoding for point in decodes}), 2, "batch sizes among the decode-only steps"),
        (len({point.context_len for point in decodes}), 2, "context lengths among the decode-only steps"),
        (len({point.prefill_tokens for point in points} - {0}), 2, "prefill sizes above 0"),
    ]
    for found, least, what in needs:
        if found < least:
            raise ProfileError(f"too few measurements to fit: {found} {what}; at least {least} are needed")
