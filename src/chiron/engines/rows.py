"""Engines as a table: where each answers health checks, and what it calls the figures that Chiron reads.

An engine is anything that speaks OpenAI's HTTP API. What differs between engines is data, so it stands in rows here
and not in classes. Metric names are listed newest first: engines rename them now and then, and a fleet may run two
versions at once.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineRow:
    """What is particular about one kind of engine."""

    name: str
    health_path: str = "/health"
    """Answers 200 when the engine can serve."""
    metrics_path: str = "/metrics"
    """Prometheus text; empty when there is none."""
    metrics: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Our name to the engine's names, newest first. ``NAME/LABEL`` reads a number from a label of an ``_info`` metric.

    Ours are: ``running``, ``waiting`` (sequences now); ``kv_usage`` (0 to 1); ``kv_blocks``, ``block_size``,
    ``kv_capacity_tokens``, ``kv_used_tokens``; and totals since the start: ``preemptions``, ``generation_tokens``,
    ``prompt_tokens``, ``itl_sum_s``, ``itl_count``, ``steps``, ``busy_s``, ``context_tokens``. Engines of ours tell
    the rest of what a ``Sample`` holds too: ``decode_tokens`` (without first tokens), ``prefill_tokens`` (with those
    computed again), ``waiting_tokens``, ``head_tokens``."""
    context_path: str = "/v1/models"
    """Tells the context, in tokens: prompt and answer of one request together. Empty when nothing does."""
    context_keys: tuple[tuple[str, ...], ...] = (("max_model_len",), ("context_length",), ("meta", "n_ctx"))
    """Where it stands in the JSON, the first that is there; in a list of models, in the model's entry."""
    limits_path: str = ""
    """Takes PUT {"limit": n}: the max batch size inside the engine, live. Empty when the engine has no such thing; a
    404 from vLLM means that its plugin is not installed. The gate in front of the engine holds either way."""
    resumes: bool = False
    """Accepts ``resume_token_ids``: goes on with an answer that was interrupted."""
    keepalive: bool = True
    """Whether a connection may be used again after a stream."""
    minds_model_name: bool = True
    """False: it answers whatever the request calls its model."""
    serve_module: str = ""
    """``python -m`` this to start one; empty for engines that we do not ship."""


_VLLM = {
    "running": ("vllm:num_requests_running",),
    "waiting": ("vllm:num_requests_waiting",),
    "kv_usage": ("vllm:kv_cache_usage_perc", "vllm:gpu_cache_usage_perc"),
    "kv_blocks": ("vllm:cache_config_info/num_gpu_blocks",),
    "block_size": ("vllm:cache_config_info/block_size",),
    "preemptions": ("vllm:num_preemptions_total", "vllm:num_preemptions"),
    "generation_tokens": ("vllm:generation_tokens_total", "vllm:generation_tokens"),
    "prompt_tokens": ("vllm:prompt_tokens_total", "vllm:prompt_tokens"),
    "itl_sum_s": ("vllm:inter_token_latency_seconds_sum", "vllm:time_per_output_token_seconds_sum"),
    "itl_count": ("vllm:inter_token_latency_seconds_count", "vllm:time_per_output_token_seconds_count"),
    "steps": ("vllm:iteration_tokens_total_count",),
}

# Our own servers speak vLLM's names, so that dashboards work, and add what the control plane learns from.
_OURS = _VLLM | {
    "kv_capacity_tokens": ("chiron:engine_kv_capacity_tokens",),
    "kv_used_tokens": ("chiron:engine_kv_used_tokens",),
    "steps": ("chiron:engine_steps_total",),
    "busy_s": ("chiron:engine_busy_seconds_total",),
    "context_tokens": ("chiron:engine_context_tokens_total",),
    "decode_tokens": ("chiron:engine_decode_tokens_total",),
    "prefill_tokens": ("chiron:engine_prefill_tokens_total",),
    "waiting_tokens": ("chiron:engine_waiting_tokens",),
    "head_tokens": ("chiron:engine_head_tokens",),
}

# SGLang counts generated and prompt tokens when a request ends; its count of ITLs moves with every token.
_SGLANG = {
    "running": ("sglang:num_running_reqs",),
    "waiting": ("sglang:num_queue_reqs",),
    "kv_usage": ("sglang:token_usage",),
    "kv_capacity_tokens": ("sglang:max_total_num_tokens",),
    "kv_used_tokens": ("sglang:num_used_tokens",),
    "preemptions": ("sglang:num_retracted_requests_total", "sglang:num_retracted_reqs_total"),
    "generation_tokens": ("sglang:generation_tokens_total",),
    "prompt_tokens": ("sglang:prompt_tokens_total",),
    "itl_sum_s": ("sglang:inter_token_latency_seconds_sum", "sglang:time_per_output_token_seconds_sum"),
    "itl_count": ("sglang:inter_token_latency_seconds_count", "sglang:time_per_output_token_seconds_count"),
}

# TGI's ITL is a histogram of means per finished request: long answers weigh no more than short ones.
_TGI = {
    "running": ("tgi_batch_current_size",),
    "waiting": ("tgi_queue_size",),
    "generation_tokens": ("tgi_request_generated_tokens_sum",),
    "prompt_tokens": ("tgi_request_input_length_sum",),
    "itl_sum_s": ("tgi_request_mean_time_per_token_duration_sum",),
    "itl_count": ("tgi_request_mean_time_per_token_duration_count",),
    "steps": ("tgi_batch_inference_count",),
}

# Of a request with n tokens llama.cpp times n - 1 gaps and counts n, so short answers look a little too fast.
_LLAMACPP = {
    "running": ("llamacpp:requests_processing",),
    "waiting": ("llamacpp:requests_deferred",),
    "kv_usage": ("llamacpp:kv_cache_usage_ratio",),
    "kv_used_tokens": ("llamacpp:kv_cache_tokens",),
    "generation_tokens": ("llamacpp:tokens_predicted_total",),
    "prompt_tokens": ("llamacpp:prompt_tokens_total",),
    "itl_sum_s": ("llamacpp:tokens_predicted_seconds_total",),
    "itl_count": ("llamacpp:tokens_predicted_total",),
    "steps": ("llamacpp:n_decode_total",),
}

_ROWS = (
    EngineRow(name="vllm", metrics=_VLLM, limits_path="/chiron/limits"),
    EngineRow(name="sglang", metrics=_SGLANG),
    EngineRow(
        name="tgi",
        metrics=_TGI,
        minds_model_name=False,
        context_path="/info",
        context_keys=(("max_total_tokens",), ("max_input_tokens",)),
    ),
    # It resets connections that are used again after a stream.
    EngineRow(
        name="llamacpp",
        metrics=_LLAMACPP,
        keepalive=False,
        minds_model_name=False,
        # Of one slot: a prompt that is longer is refused.
        context_path="/props",
        context_keys=(("default_generation_settings", "n_ctx"),),
        serve_module="chiron.engines.serve.llamacpp",
    ),
    EngineRow(
        name="openvino",
        metrics=_OURS,
        limits_path="/chiron/limits",
        resumes=True,
        serve_module="chiron.engines.serve.openvino",
    ),
    EngineRow(
        name="emulated",
        metrics=_OURS,
        limits_path="/chiron/limits",
        resumes=True,
        serve_module="chiron.engines.serve.emulated",
    ),
    # Anything else that speaks the API. The list of models is the one thing that they all answer.
    EngineRow(name="openai", health_path="/v1/models", metrics_path=""),
)

ENGINES: dict[str, EngineRow] = {row.name: row for row in _ROWS}
"""Every engine by name."""
