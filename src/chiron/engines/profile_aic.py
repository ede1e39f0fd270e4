"""Profiles for other models, GPUs and engines from aiconfigurator-core (extra ``aic``, 82 MB of measured kernel times).

Its step-latency model is sampled on the grid that the packaged profiles use, and fitted as any other measurement.
The KV capacity is its own estimate too. Nothing else in Chiron needs the package, and it is imported only here.
"""

from __future__ import annotations

from collections.abc import Iterator
from importlib.metadata import version
from importlib.util import find_spec
from itertools import product
from pathlib import Path
from typing import Any

from chiron.engines.profile import Profile, ProfileError
from chiron.engines.profile_fit import fit_profile
from chiron.engines.profile_hardware import DEFAULT_PRICE_PER_GPU_HOUR, MEMORY_FRACTION
from chiron.engines.profile_points import StepPoint

BACKENDS = {"vllm": "of_total", "sglang": "of_total", "trtllm": "of_free"}
"""Engines, and whether their memory fraction is of all memory or of what the weights leave."""

DECODE_BATCHES = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 160, 192, 256, 384, 512, 768, 1024)
DECODE_CONTEXTS = (64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)
PREFILL_TOKENS = (1, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)
MIXED_BATCHES = (0, 1, 8, 16, 32, 64, 128, 256)
MIXED_CONTEXTS = (256, 1024, 4096)
MIXED_PREFILL_TOKENS = (64, 128, 256, 512, 1024, 2048, 4096, 8192)


def profile_from_aic(
    model: str,
    system: str,
    backend: str = "vllm",
    tp: int = 1,
    *,
    name: str | None = None,
    price_per_gpu_hour: float | None = None,
    max_num_batched_tokens: int = 2048,
) -> Profile:
    """Fit a profile to aiconfigurator's model of ``model`` (a Hugging Face name) on ``tp`` GPUs of ``system``.

    Raises ProfileError: package missing, or a combination that its tables do not cover. A model whose configuration
    the package does not carry makes it ask Hugging Face for one.
    """
    if find_spec("aiconfigurator_core") is None:
        raise ProfileError("aiconfigurator-core is not installed; install it with: pip install 'chiron-serving[aic]'")
    from aiconfigurator_core.sdk.utils import HuggingFaceDownloadError

    _check(system, backend, tp)
    what = f"model={model} system={system} backend={backend} tp={tp}"
    try:
        release = _release(system, backend)
        points = list(_points(_compile(model, system, backend, release, tp)))
        memory = _memory(model, system, backend, release, tp, max_num_batched_tokens)
    # Its failures share no base class; these are what a combination without data raises.
    except (ValueError, RuntimeError, LookupError, OSError, HuggingFaceDownloadError) as error:
        raise ProfileError(f"aiconfigurator-core cannot model {what}: {error}") from error
    gpu = system.removesuffix("_sxm")
    default_name = f"{model.rsplit('/', 1)[-1].lower()}/{gpu}/tp{tp}" + ("" if backend == "vllm" else f"/{backend}")
    price = DEFAULT_PRICE_PER_GPU_HOUR.get(gpu, 0.0) if price_per_gpu_hour is None else price_per_gpu_hour
    return fit_profile(points).profile(
        name=name or default_name,
        model=model,
        gpu=gpu,
        tp=tp,
        engine=backend,
        kv_capacity_tokens=int(memory["total_kv_size_tokens"]),
        # The estimate is of one GPU, which holds its share of the heads of every token.
        kv_bytes_per_token=round(memory["kv_size_per_token_bytes"] * tp),
        max_num_batched_tokens=max_num_batched_tokens,
        price_per_gpu_hour=price,
        source=f"fit to {len(points)} step times of aiconfigurator-core {version('aiconfigurator-core')} ({what},"
        f" {backend} {release})."
        " GPU time only: no CPU, tokenizer or HTTP. KV capacity estimated.",
    )


def _check(system: str, backend: str, tp: int) -> None:
    import aiconfigurator_core

    known = sorted(path.stem for path in (Path(aiconfigurator_core.__file__).parent / "systems" / "data").iterdir())
    if system not in known:
        raise ProfileError(f"system {system!r} is unknown to aiconfigurator-core; known: {', '.join(known)}")
    if backend not in BACKENDS:
        raise ProfileError(f"backend {backend!r} is unknown; allowed: {', '.join(BACKENDS)}")
    if tp < 1:
        raise ProfileError(f"tp is {tp}; it must be at least 1")


def _release(system: str, backend: str) -> str:
    """The engine release that its tables call current for this system."""
    from aiconfigurator_core.sdk.perf_database import resolve_query_version

    return str(resolve_query_version(system, backend, "current"))


def _compile(model: str, system: str, backend: str, release: str, tp: int) -> Any:
    from aiconfigurator_core.sdk.engine import EngineHandle

    # Experts are split over the same GPUs as everything else; a dense model ignores it.
    return EngineHandle.compile(model, system, backend, backend_version=release, tp_size=tp, moe_tp_size=tp)


def _memory(
    model: str, system: str, backend: str, release: str, tp: int, max_num_batched_tokens: int
) -> dict[str, Any]:
    from aiconfigurator_core.sdk.memory import estimate_kv_cache

    estimate: dict[str, Any] = estimate_kv_cache(
        model,
        system,
        backend,
        release,
        max_num_tokens=max_num_batched_tokens,
        max_batch_size=256,
        memory_fraction_kind=BACKENDS[backend],
        memory_fraction_value=MEMORY_FRACTION,
        tp_size=tp,
        moe_tp_size=tp,
    )
    return estimate


def _points(engine: Any) -> Iterator[StepPoint]:
    # Its "output length" of 2 asks for the step at exactly this context, not for a mean over a longer answer.
    for batch, context in product(DECODE_BATCHES, DECODE_CONTEXTS):
        yield _point("decode", batch, context, 0, 0.0, engine.decode_step_latency(batch, context, 2))
    for tokens in PREFILL_TOKENS:
        latency_ms = engine.predict_prefill_latency(1, tokens)
        yield _point("prefill", 0, tokens, tokens, float(tokens) ** 2, latency_ms)
    for batch, context, tokens in product(MIXED_BATCHES, MIXED_CONTEXTS, MIXED_PREFILL_TOKENS):
        # An average chunk of prompts of ``context`` tokens: see ``profile_points``.
        latency_ms = engine.mixed_step_latency(tokens, batch, context, 2)
        yield _point("mixed", batch, context, tokens, float(tokens) * context, latency_ms)


def _point(phase: str, batch: int, context: int, tokens: int, attention: float, latency_ms: float) -> StepPoint:
    return StepPoint(
        phase=phase,
        decoding=batch,
        context_len=context,
        prefill_tokens=tokens,
        attention=attention,
        latency_ms=latency_ms,
    )
