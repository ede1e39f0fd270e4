"""Engines as a table: everything that Chiron knows of each kind of engine, in one row.

An engine is anything that speaks OpenAI's HTTP API. What differs between engines is data, so it stands in rows here
and not in classes: where it answers, what it calls its figures, how it is told its limit, what it usually is, how it is
started, and what `chiron init` and `chiron doctor` say of it. Another engine is another row (and a server in
``engines.serve``, if we ship it). Metric names are listed newest first: engines rename them now and then, and a fleet
may run two versions at once.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

METRICS = frozenset(
    {
        *("running", "waiting", "kv_usage", "kv_blocks", "block_size", "kv_capacity_tokens", "kv_used_tokens"),
        *("preemptions", "generation_tokens", "prompt_tokens", "itl_sum_s", "itl_count", "steps", "busy_s"),
        *("context_tokens", "decode_tokens", "prefill_tokens", "waiting_tokens", "head_tokens"),
    }
)
"""Our names of what metrics tell; ``EngineRow.metrics`` says what they are."""
COMMAND_NAMES = frozenset(
    {
        *("python", "port", "model", "model_path", "max_num_seqs", "max_num_batched_tokens", "kv_capacity_tokens"),
        *("context_per_seq", "threads", "profile", "pace", "stages"),
    }
)
"""What a command may name in braces."""
_PLACEHOLDER = re.compile(r"\{(\w+)\}")

Word = str | tuple[str, ...]
"""One argument of a command line, or several that are left out together where a value in them is not known."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LimitRequest:
    """The request that sets the max batch size inside an engine, live; or the token budget of its steps."""

    path: str
    method: str = "PUT"
    body: str = '{"limit": LIMIT}'
    """JSON, with ``LIMIT`` for the number."""

    def __post_init__(self) -> None:
        if not self.path.startswith("/"):
            raise ValueError(f"path is {self.path!r}; it must begin with '/'")
        if "LIMIT" not in self.body:
            raise ValueError(f"body is {self.body!r}; it must hold LIMIT, which stands for the number")

    def message(self, limit: int) -> bytes:
        return self.body.replace("LIMIT", str(limit)).encode()


@dataclass(frozen=True, slots=True, kw_only=True)
class SleepRoutes:
    """How an engine is put to sleep, its weights in host memory, and woken."""

    sleep: str
    """``POST``; answered with 200 once it sleeps."""
    wake: str
    """``POST``; answered with 200 once it is awake."""
    asleep: str
    """``GET``; answers ``{"is_sleeping": true}`` or false."""
    args: tuple[str, ...]
    """What its command needs for that."""
    env: Mapping[str, str] = field(default_factory=dict)
    """What its environment needs for that."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineRow:
    """What is particular about one kind of engine."""

    name: str

    # -- what it answers ---------------------------------------------------------------------------------------

    health_path: str = "/health"
    """Answers 200 when the engine can serve."""
    metrics_path: str = "/metrics"
    """Prometheus text; empty when there is none."""
    metrics_hint: str = ""
    """How its metrics are switched on, where they are off by default."""
    metrics: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Our name to the engine's names, newest first. ``NAME/LABEL`` reads a number from a label of an ``_info`` metric.

    Ours are: ``running``, ``waiting`` (sequences now); ``kv_usage`` (0 to 1); ``kv_blocks``, ``block_size``,
    ``kv_capacity_tokens``, ``kv_used_tokens``; and totals since the start: ``preemptions``, ``generation_tokens``,
    ``prompt_tokens``, ``itl_sum_s``, ``itl_count``, ``steps``, ``busy_s``, ``context_tokens``. Engines of ours tell
    the rest of what a ``Sample`` holds too: ``decode_tokens`` (without first tokens), ``prefill_tokens`` (with those
    computed again), ``waiting_tokens``, ``head_tokens``."""
    part_label: str = ""
    """A series in which this label is not empty is a part of one that is there as well: it does not count again."""
    context_path: str = "/v1/models"
    """Tells the context, in tokens: prompt and answer of one request together. Empty when nothing does."""
    context_keys: tuple[tuple[str, ...], ...] = (("max_model_len",), ("context_length",), ("meta", "n_ctx"))
    """Where it stands in the JSON, the first that is there; in a list of models, in the model's entry."""
    limit: LimitRequest | None = None
    """Sets the max batch size inside the engine, live. None when the engine has no such thing; a 404 from vLLM means
    that its plugin is not installed. The gate in front of the engine holds either way."""
    token_budget: LimitRequest | None = None
    """Sets the token budget of its steps, live, to no more than it was started with."""
    sleep: SleepRoutes | None = None
    """None: it cannot sleep, or not so that its weights come back by themselves."""
    resumes: bool = False
    """Accepts ``resume_token_ids``: goes on with an answer that was interrupted."""
    stages_path: str = ""
    """Where an engine that is a pipeline tells its stages, and is told how many replicas each is to have."""
    keepalive: bool = True
    """Whether a connection may be used again after a stream."""
    text_logprobs_min: int = 0
    """``logprobs`` of ``/v1/completions`` from here on have it say log-probabilities: for llama.cpp 0 is none."""
    minds_model_name: bool = True
    """False: it answers whatever the request calls its model."""

    # -- what it usually is, where the config does not say -----------------------------------------------------

    gpu: str = "gpu"
    """Type of GPU; ``"cpu"`` for engines that need none."""
    uses_gpus: bool = True
    """False: it only has the timing of a GPU, so none of this machine's is handed to it."""
    max_num_seqs: int = 256
    max_num_batched_tokens: int = 2048
    context_per_seq: int = 0
    """KV tokens of each sequence slot, for engines that divide their KV; 0: they share it."""
    max_instances: int = 4
    """Of a model whose engines Chiron starts."""
    profile_key: Literal["", "profile", "pace"] = ""
    """Key of the config that names a profile: ``profile``, which the engine must have and takes its timing, KV and
    limits from, or ``pace``, whose step times it keeps at least."""

    # -- how it is started -------------------------------------------------------------------------------------

    command: tuple[Word, ...] = ()
    """Program and arguments; empty when Chiron does not know how to start it. In braces: ``python``, ``port`` (a free
    one), ``model`` (its name), ``model_path``, ``max_num_seqs``, ``max_num_batched_tokens``, ``kv_capacity_tokens``,
    ``context_per_seq``, ``threads``, ``profile``, ``pace``."""
    announces_port: bool = False
    """It chooses a port and prints it (``chiron-engine ready port=N``), so its command needs no ``{port}``."""
    model_default: str = ""
    """What it loads without ``model_path``; then a path given must be a file. Empty: it needs to be told."""
    extra: str = ""
    """Extra of the package that it needs."""
    modules: tuple[str, ...] = ()
    """What that extra installs and the engine imports."""

    # -- what `chiron init` writes -----------------------------------------------------------------------------

    about: tuple[str, ...] = ()
    """Lines that say what an engine is which Chiron starts without being told a model or an endpoint."""
    usual_port: int = 0
    """Where it usually listens, but 8001 where that would be the gateway's own 8000; 0: nowhere in particular."""
    sample_model: str = "my-model"
    """Name of a model that it runs without being told which."""
    sample_profile: str = ""
    sample_command: tuple[str, ...] = ()
    """Shows the form, for engines whose command only the user knows."""

    def __post_init__(self) -> None:
        for key in ("max_num_seqs", "max_num_batched_tokens", "max_instances"):
            _require(getattr(self, key) >= 1, self.name, key, getattr(self, key), "1 or more")
        _require(self.context_per_seq >= 0, self.name, "context_per_seq", self.context_per_seq, "0 or more")
        for key in ("health_path", "metrics_path", "context_path"):
            path = getattr(self, key)
            _require(path[:1] in ("", "/"), self.name, key, path, "empty or begin with '/'")
        _require(bool(self.health_path), self.name, "health_path", "", "given: what cannot be asked cannot be watched")
        unknown = set(self.metrics) - METRICS
        _require(not unknown, self.name, "metrics", sorted(unknown), f"among {', '.join(sorted(METRICS))}")
        parts = " ".join(part for word in self.command for part in ((word,) if isinstance(word, str) else word))
        named = set(_PLACEHOLDER.findall(parts))
        _require(named <= COMMAND_NAMES, self.name, "command", parts, f"names among {', '.join(sorted(COMMAND_NAMES))}")


def _require(fine: bool, row: str, key: str, value: object, allowed: str) -> None:
    if not fine:
        raise ValueError(f"engine {row!r}: {key} is {value!r}; it must be {allowed}")


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

_TOY = (
    "Chiron starts the engine here. Without model_path it runs a toy model with random weights: it behaves",
    'like an engine, but its text is noise. model_path = "model.gguf" names a real one.',
)

# What engine processes that we ship have in common.
_SERVES = ("--port", "0", "--max-num-seqs", "{max_num_seqs}", "--served-model-name", "{model}")
_LIMIT = LimitRequest(path="/chiron/limits")
_TOKEN_BUDGET = LimitRequest(path="/chiron/limits", body='{"max_num_batched_tokens": LIMIT}')

# vLLM's, whose routes are there in its development mode only.
_SLEEP = SleepRoutes(
    sleep="/sleep?level=1",
    wake="/wake_up",
    asleep="/is_sleeping",
    args=("--enable-sleep-mode",),
    env={"VLLM_SERVER_DEV_MODE": "1"},
)

_ROWS = (
    EngineRow(
        name="vllm",
        metrics=_VLLM,
        limit=_LIMIT,
        sleep=_SLEEP,
        command=(
            *("vllm", "serve", "{model_path}", "--host", "127.0.0.1", "--port", "{port}"),
            *("--served-model-name", "{model}", "--max-num-seqs", "{max_num_seqs}"),
        ),
        usual_port=8001,
    ),
    EngineRow(
        name="sglang",
        metrics=_SGLANG,
        metrics_hint="--enable-metrics",
        # With priority scheduling it gives a total under an empty priority and then its parts.
        part_label="priority",
        command=(
            *("{python}", "-m", "sglang.launch_server", "--model-path", "{model_path}", "--host", "127.0.0.1"),
            *("--port", "{port}", "--served-model-name", "{model}", "--max-running-requests", "{max_num_seqs}"),
            "--enable-metrics",
        ),
        usual_port=30000,
    ),
    EngineRow(
        name="tgi",
        metrics=_TGI,
        minds_model_name=False,
        context_path="/info",
        context_keys=(("max_total_tokens",), ("max_input_tokens",)),
        max_num_seqs=128,
        usual_port=3000,
    ),
    EngineRow(
        name="llamacpp",
        metrics=_LLAMACPP,
        metrics_hint="--metrics",
        # It resets connections that are used again after a stream.
        keepalive=False,
        text_logprobs_min=1,
        minds_model_name=False,
        # Of one slot: a prompt that is longer is refused.
        context_path="/props",
        context_keys=(("default_generation_settings", "n_ctx"),),
        gpu="cpu",
        max_num_seqs=8,
        context_per_seq=2048,
        command=(
            *("{python}", "-m", "chiron.engines.serve.llamacpp", *_SERVES, "--model", "{model_path}"),
            *("--ctx-per-seq", "{context_per_seq}", ("--threads", "{threads}")),
        ),
        announces_port=True,
        model_default="toy",
        extra="llamacpp",
        modules=("xllamacpp", "gguf"),
        about=_TOY,
        sample_model="toy",
    ),
    EngineRow(
        name="openvino",
        metrics=_OURS,
        limit=_LIMIT,
        resumes=True,
        gpu="cpu",
        max_num_seqs=64,
        max_num_batched_tokens=512,
        profile_key="pace",
        command=(
            *("{python}", "-m", "chiron.engines.serve.openvino", *_SERVES, "--model", "{model_path}"),
            *("--max-num-batched-tokens", "{max_num_batched_tokens}"),
            *(("--kv-capacity-tokens", "{kv_capacity_tokens}"), ("--threads", "{threads}"), ("--pace", "{pace}")),
        ),
        announces_port=True,
        model_default="toy",
        extra="openvino",
        modules=("openvino_genai", "gguf"),
        about=_TOY,
        sample_model="toy",
    ),
    EngineRow(
        name="emulated",
        metrics=_OURS,
        limit=_LIMIT,
        token_budget=_TOKEN_BUDGET,
        sleep=replace(_SLEEP, env={}),
        resumes=True,
        uses_gpus=False,
        max_instances=50,
        profile_key="profile",
        command=(
            *("{python}", "-m", "chiron.engines.serve.emulated", *_SERVES, "--profile", "{profile}"),
            *("--kv-capacity-tokens", "{kv_capacity_tokens}"),
        ),
        announces_port=True,
        about=("Engines with the timing of a profile, and random text: to try fleets without GPUs.",),
        sample_model="llama-3.1-8b",
        sample_profile="llama-3.1-8b/a100/tp1",
    ),
    EngineRow(
        name="staged",
        metrics=_OURS,
        limit=_LIMIT,
        token_budget=_TOKEN_BUDGET,
        stages_path="/chiron/stages",
        resumes=True,
        gpu="cpu",
        max_num_seqs=64,
        max_num_batched_tokens=512,
        command=(
            *("{python}", "-m", "chiron.engines.staged.instance", *_SERVES, "--model", "{model_path}"),
            *("--max-num-batched-tokens", "{max_num_batched_tokens}", "--stages", "{stages}"),
            *(("--kv-capacity-tokens", "{kv_capacity_tokens}"), ("--threads", "{threads}")),
        ),
        announces_port=True,
        extra="staged",
        modules=("torch", "safetensors", "tokenizers", "jinja2"),
    ),
    # Anything else that speaks the API. The list of models is the one thing that they all answer.
    EngineRow(name="openai", health_path="/v1/models", metrics_path="", usual_port=8001),
    EngineRow(
        name="command",
        health_path="/v1/models",
        metrics_path="",
        sample_command=("my-engine", "--port", "{port}", "--model", "{model}"),
    ),
)

ENGINES: dict[str, EngineRow] = {row.name: row for row in _ROWS}
"""Every engine by name."""
