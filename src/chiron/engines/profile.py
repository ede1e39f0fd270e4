"""Profiles: how long one engine step takes, and how much KV fits.

One closed form, the *knee* (times in seconds inside, milliseconds in files because the tables are)::

    step = h + (w0^4 + (f*(n + B))^4)^(1/4) + c*S + q*A

with B decoding sequences, S the sum of their contexts (tokens), n prefill tokens in the step and A the attention
work of those tokens, (o+n)^2 - o^2 for a chunk of n tokens at offset o. ``w0`` is the time to read the weights,
``f`` the time per token once the GPU is compute bound; between the two the fourth power bends the knee. On the packaged
grid its error is 3-6 % on average and 10-22 % at worst, the linear form's 4-7 % and 19-33 % (``chiron profile list``).

For a fixed B a decode-only step is linear in S, so k steps still have a closed form: the simulator's fast-forward.

Two refinements that no packaged profile has, as measurements have them for single GPUs only: engines that replay
captured graphs pad a step to a captured size (``captured_sizes``), and a prompt that is let in costs its first step
something (``admission_ms``). docs/sensitivity.md shows what they change.
"""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass
from math import isfinite

from chiron.core.errors import InputError


class ProfileError(InputError):
    """A profile, its file or the data to fit it is unusable. The message names the field, value, what is allowed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Profile:
    """Step-time model and KV capacity of (model, GPU, TP, engine)."""

    name: str
    """For example ``llama-3.1-8b/a100/tp1``."""
    model: str
    gpu: str
    tp: int
    """GPUs of one instance."""
    engine: str
    h_ms: float
    w0_ms: float
    f_ms_per_token: float
    c_ms_per_context_token: float
    q_ms_per_token_squared: float
    kv_capacity_tokens: int
    kv_bytes_per_token: int
    """Over all GPUs of the instance; sets what saving and restoring KV costs."""
    max_num_seqs: int = 1024
    max_num_batched_tokens: int = 2048
    """Token budget of one step: decodes first, the rest for prefill chunks (vLLM's name and default)."""
    step_overhead_ms: float = 0.0
    """CPU time per step that the GPU waits for."""
    request_overhead_ms: float = 0.0
    """Per request, before its prefill can start (tokenizer, HTTP)."""
    captured_sizes: tuple[int, ...] = ()
    """Tokens of a step (n + B) for which the engine has captured graphs, ascending: a step takes the ``base_s`` of the
    next one, and above the largest its own. Empty: each size its own."""
    admission_ms: float = 0.0
    """What each prompt adds to the step in which its prefill begins."""
    price_per_gpu_hour: float = 0.0
    source: str = ""
    mape: float = 0.0
    """Mean absolute error against the measured grid, as a fraction."""
    max_error: float = 0.0
    """Worst error against that grid, as a fraction."""
    linear_mape: float = 0.0
    """The same two figures for the best linear form a + b*B + p*n + c*S + q*A on that grid: what the knee buys."""
    linear_max_error: float = 0.0

    def __post_init__(self) -> None:
        for name, least in _LEAST.items():
            value = getattr(self, name)
            if not (isfinite(value) and value >= least):
                raise ProfileError(
                    f"profile {self.name!r}: {name} is {value!r}; it must be finite and at least {least}"
                )
        sizes = self.captured_sizes
        if any(size < 1 for size in sizes) or list(sizes) != sorted(set(sizes)):
            raise ProfileError(
                f"profile {self.name!r}: captured_sizes is {list(sizes)}; they must be at least 1, and ascend"
            )
        if not self.base_s(1) > 0:
            raise ProfileError(
                f"profile {self.name!r}: h_ms, w0_ms and f_ms_per_token are all 0; a step must take some time"
            )

    def base_s(self, tokens: int) -> float:
        """Seconds of a step that handles this many tokens (n + B), before attention."""
        place = bisect_left(self.captured_sizes, tokens)
        if place < len(self.captured_sizes):
            tokens = self.captured_sizes[place]
        knee = (self.w0_ms**4 + (self.f_ms_per_token * tokens) ** 4) ** 0.25
        return float(self.h_ms + self.step_overhead_ms + knee) / 1000.0

    def step_s(
        self, *, decoding: int, context_tokens: float, prefill_tokens: int = 0, prefill_offset: int = 0
    ) -> float:
        """Seconds of one step (plain floats; the engine model quantises these coefficients to be exact), admissions
        apart."""
        attention = (prefill_offset + prefill_tokens) ** 2 - prefill_offset**2
        return (
            self.base_s(prefill_tokens + decoding)
            + (self.c_ms_per_context_token * context_tokens + self.q_ms_per_token_squared * attention) / 1000.0
        )


_LEAST = {
    "tp": 1,
    "kv_capacity_tokens": 1,
    "kv_bytes_per_token": 1,
    "max_num_seqs": 1,
    "max_num_batched_tokens": 1,
    "h_ms": 0,
    "w0_ms": 0,
    "f_ms_per_token": 0,
    "c_ms_per_context_token": 0,
    "q_ms_per_token_squared": 0,
    "step_overhead_ms": 0,
    "request_overhead_ms": 0,
    "admission_ms": 0,
    "price_per_gpu_hour": 0,
    "mape": 0,
    "max_error": 0,
    "linear_mape": 0,
    "linear_max_error": 0,
}
"""The least value of each number in a profile."""
