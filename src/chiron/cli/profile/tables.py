"""Profiles as tables on a terminal."""

from __future__ import annotations

from rich.table import Table
from rich.text import Text

from chiron.engines.profile import Profile
from chiron.engines.profile_fit import FitReport
from chiron.engines.profile_points import StepPoint

BATCHES = (1, 8, 32, 64, 128, 256)
CONTEXTS = (256, 1024, 4096)
PROMPTS = (128, 512, 1024, 2048, 4096, 8192)


def decode_ms(profile: Profile, batch: int, context: int) -> float:
    return 1000 * profile.step_s(decoding=batch, context_tokens=batch * context)


def prefill_ms(profile: Profile, tokens: int) -> float:
    return 1000 * profile.step_s(decoding=0, context_tokens=0, prefill_tokens=tokens)


def _chunked_ms(profile: Profile, tokens: int) -> float:
    budget = profile.max_num_batched_tokens
    return 1000 * sum(
        profile.step_s(decoding=0, context_tokens=0, prefill_tokens=min(budget, tokens - offset), prefill_offset=offset)
        for offset in range(0, tokens, budget)
    )


def facts(profile: Profile) -> Table:
    table = Table(box=None, pad_edge=False, show_header=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column()
    rows = {
        "profile": profile.name,
        "model": profile.model,
        "instance": f"{profile.tp} x {profile.gpu}, {profile.engine}",
        "KV capacity": f"{profile.kv_capacity_tokens:,} tokens of {profile.kv_bytes_per_token:,} bytes",
        "limits": f"max_num_seqs {profile.max_num_seqs:,}, max_num_batched_tokens {profile.max_num_batched_tokens:,}",
        "overheads": f"{profile.step_overhead_ms:g} ms per step, {profile.request_overhead_ms:g} ms per request, "
        f"{profile.admission_ms:g} ms of a step per prompt",
        "captured": ", ".join(map(str, profile.captured_sizes)) or "no sizes: each takes a time of its own",
        "price": f"{profile.price_per_gpu_hour:.2f} $ per GPU-hour",
        "step": "h + (w0^4 + (f*(n + B))^4)^(1/4) + c*S + q*A    B decodes, S their contexts, n prefill tokens,"
        " A = (offset + n)^2 - offset^2",
        "h": f"{profile.h_ms:g} ms",
        "w0": f"{profile.w0_ms:g} ms",
        "f": f"{profile.f_ms_per_token:g} ms per token",
        "c": f"{profile.c_ms_per_context_token:g} ms per token of context",
        "q": f"{profile.q_ms_per_token_squared:g} ms per token squared",
        "error": f"{100 * profile.mape:.1f} % on average, {100 * profile.max_error:.1f} % at worst"
        f" (linear form: {100 * profile.linear_mape:.1f} % and {100 * profile.linear_max_error:.1f} %)",
        "source": profile.source or "not given",
    }
    for key, value in rows.items():
        # As plain text: a name in a user's file may hold what rich takes for markup.
        table.add_row(key, Text(value))
    return table


def decode_table(profile: Profile, points: list[StepPoint]) -> Table:
    grid = {(p.decoding, p.context_len): p.latency_ms for p in points if p.phase == "decode"}
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("context", justify="right")
    for batch in BATCHES:
        table.add_column(f"B={batch}", justify="right")
    for context in CONTEXTS:
        cells = [
            _cell(decode_ms(profile, batch, context), grid.get((batch, context)))
            if batch * context <= profile.kv_capacity_tokens
            else "-"
            for batch in BATCHES
        ]
        table.add_row(f"{context:,}", *cells)
    return table


def prefill_table(profile: Profile, points: list[StepPoint]) -> Table:
    grid = {p.prefill_tokens: p.latency_ms for p in points if p.phase == "prefill"}
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("tokens", justify="right")
    for tokens in PROMPTS:
        table.add_column(f"{tokens:,}", justify="right")
    table.add_row("in one step", *(_cell(prefill_ms(profile, tokens), grid.get(tokens)) for tokens in PROMPTS))
    chunks = f"in chunks of {profile.max_num_batched_tokens:,}"
    table.add_row(chunks, *(f"{_chunked_ms(profile, tokens):.1f}" for tokens in PROMPTS))
    return table


def _cell(fitted_ms: float, measured_ms: float | None) -> str:
    return f"{fitted_ms:.1f}" + ("" if measured_ms is None else f" ({measured_ms:.1f})")


def fit_table(report: FitReport) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("steps")
    for heading in ("points", "mean error %", "worst %"):
        table.add_column(heading, justify="right")
    rows = {**report.by_phase, "all": report.error, "all, linear form": report.linear}
    for label, error in rows.items():
        table.add_row(label, f"{error.points:,}", f"{100 * error.mape:.1f}", f"{100 * error.max_error:.1f}")
    return table
