"""A model loaded into OpenVINO GenAI: its pipeline, its tokenizer, and how much it can hold."""

from __future__ import annotations

import json
import re
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from chiron.engines.serve.openai import Message
from chiron.engines.serve.text import token_bytes
from chiron.engines.serve.tools import Tool

BLOCK_TOKENS = 32
"""Tokens in one KV block of the CPU plugin."""
_CONTEXT_DEFAULT = 4096
"""Where a model does not tell its context length."""
_SPECIAL = re.compile(rb"<.+>|\[.+\]")
"""How special tokens are written; whether one is special is asked of the tokenizer."""


class ModelError(Exception):
    """The model cannot be loaded. The message says what and why."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSettings:
    """How a model is loaded."""

    path: Path
    """A GGUF file, or a directory with OpenVINO's own format."""
    threads: int = 0
    """For inference; 0: as many as OpenVINO takes."""
    precision: str = ""
    """Of inference, such as ``f32``; empty: OpenVINO's choice, bf16 where the CPU has it. In bf16 a token may differ
    between a prefill and a decode step, so a greedy answer that was resumed or met a cached prefix may too."""
    cache_gb: int = 1
    """KV cache, GiB."""
    kv_capacity_tokens: int = 0
    """KV cache in tokens instead; 0: as ``cache_gb`` says."""
    max_num_seqs: int = 64
    max_num_batched_tokens: int = 512
    """Token budget of one step. Small, since a long prefill chunk delays every running stream."""


class Model:
    """The pipeline and what one must know about it."""

    __slots__ = (
        "_genai",
        "_tensor",
        "chat_template",
        "context_tokens",
        "eos_id",
        "kv_blocks",
        "pipeline",
        "settings",
        "tokenizer",
        "vocabulary",
    )

    def __init__(self, settings: ModelSettings) -> None:
        """Load; seconds for large models. Raises ModelError, or ImportError without OpenVINO GenAI."""
        self._genai, self._tensor = _genai()
        self.settings = settings
        if not settings.path.exists():
            raise ModelError(f"model {settings.path}: no such file or directory")
        self.context_tokens = context_length(settings.path)
        try:
            self.pipeline = self._load()
            self.tokenizer = self.pipeline.get_tokenizer()
            self.vocabulary = self._token_bytes()
            self.eos_id = int(self.tokenizer.get_eos_token_id())
            self.chat_template = bool(self.tokenizer.chat_template)
            self.kv_blocks = self._warm_up()
        except RuntimeError as error:
            raise ModelError(f"model {settings.path}: OpenVINO GenAI cannot load it: {_last_line(error)}") from error

    @property
    def kv_capacity_tokens(self) -> int:
        return self.kv_blocks * BLOCK_TOKENS

    def encode(self, text: str, *, special: bool) -> list[int]:
        """Token ids; ``special`` adds the model's begin token where it has one. Raises RuntimeError."""
        ids = self.tokenizer.encode(text, add_special_tokens=special).input_ids
        return [int(id) for id in ids.data[0]] if ids.size else []

    def chat(self, messages: Sequence[Message], tools: Sequence[Tool] = ()) -> str:
        """The prompt of a conversation, by the model's own template. Raises RuntimeError."""
        said = [_templated(message) for message in messages]
        offered = [tool.definition for tool in tools] or None
        return str(self.tokenizer.apply_chat_template(said, add_generation_prompt=True, tools=offered))

    def grammar(self, text: str) -> Any:
        """What a config's ``structured_output_config`` takes. The text must be right: a wrong one ends the engine."""
        return self._genai.StructuredOutputConfig(grammar=text)

    def config(self, **fields: Any) -> Any:
        """A GenerationConfig with the model's end tokens. Raises RuntimeError when fields contradict."""
        config = self._genai.GenerationConfig()
        config.eos_token_id = self.eos_id
        config.stop_token_ids = self.pipeline.get_config().stop_token_ids
        for name, value in fields.items():
            setattr(config, name, value)
        config.validate()
        return config

    def start(self, id: int, token_ids: Sequence[int], config: Any) -> Any:
        """Give a sequence to the pipeline; it takes part in the next step."""
        return self.pipeline.add_request(id, self._tensor(token_ids), config)

    def _load(self) -> Any:
        settings = self.settings
        scheduler = self._genai.SchedulerConfig()
        scheduler.max_num_seqs = settings.max_num_seqs
        scheduler.max_num_batched_tokens = settings.max_num_batched_tokens
        scheduler.dynamic_split_fuse = True
        scheduler.enable_prefix_caching = True
        if settings.kv_capacity_tokens:
            scheduler.num_kv_blocks = -(-settings.kv_capacity_tokens // BLOCK_TOKENS)
            scheduler.cache_size = 0
        else:
            scheduler.cache_size = settings.cache_gb
        properties: dict[str, Any] = {"INFERENCE_NUM_THREADS": settings.threads} if settings.threads else {}
        if settings.precision:
            properties["INFERENCE_PRECISION_HINT"] = settings.precision
        return self._genai.ContinuousBatchingPipeline(str(settings.path), scheduler, "CPU", properties)

    def _token_bytes(self) -> list[bytes]:
        vocabulary = {bytes(token): int(id) for token, id in self.tokenizer.get_vocab().items()}
        candidates = {id: token for token, id in vocabulary.items() if _SPECIAL.fullmatch(token)}
        special = [
            id
            for id in candidates
            if self.tokenizer.decode([id], skip_special_tokens=False)
            and not self.tokenizer.decode([id], skip_special_tokens=True)
        ]
        return token_bytes(vocabulary, special)

    def _warm_up(self) -> int:
        """Run one token, so that the first request pays for nothing else; returns the KV cache's size in blocks.

        The pipeline tells the share of its blocks in use; one token takes one block.
        """
        handle = self.start(0, [0], self.config(max_new_tokens=1, do_sample=False))
        while self.pipeline.has_non_finished_requests():
            self.pipeline.step()
        handle.read()
        share = float(self.pipeline.get_metrics().max_cache_usage) / 100
        if not share > 0:
            raise ModelError(f"model {self.settings.path}: the KV cache does not hold one token")
        return round(1 / share)


def _templated(message: Message) -> dict[str, Any]:
    """A message as chat templates expect it."""
    # Templates that refuse roles they do not know are older than this one.
    role = "system" if message.role == "developer" else message.role
    said: dict[str, Any] = {"role": role, "content": message.content}
    if message.calls:
        said["tool_calls"] = [
            {"id": c.id, "type": "function", "function": {"name": c.name, "arguments": _read(c.arguments)}}
            for c in message.calls
        ]
    if message.call_id:
        said["tool_call_id"] = message.call_id
    return said


def _read(arguments: str) -> Any:
    """Templates write arguments out as JSON themselves."""
    try:
        return json.loads(arguments)
    except (ValueError, RecursionError):
        return arguments


def context_length(path: Path) -> int:
    """Tokens that the model was made for, from its metadata; 4096 where it does not say."""
    if path.is_dir():
        try:
            config = json.loads((path / "config.json").read_text(encoding="utf-8"))
            return int(config["max_position_embeddings"])
        except (OSError, ValueError, KeyError, TypeError):
            return _CONTEXT_DEFAULT
    try:
        with path.open("rb") as file:
            return _gguf_context_length(file) or _CONTEXT_DEFAULT
    except (OSError, ValueError, struct.error) as error:
        raise ModelError(f"model {path}: it is not a GGUF file: {error}") from None


_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
"""GGUF's number types, as ``struct`` writes them."""
_STRING, _ARRAY = 8, 9


def _gguf_context_length(file: BinaryIO) -> int | None:
    """``ARCHITECTURE.context_length`` of a GGUF header. Keys may stand in any order: converters put lists of tags and
    languages before it, and little but the tokenizer's lists after it."""
    if file.read(4) != b"GGUF":
        raise struct.error("it does not begin with the letters GGUF")
    _version, _tensors, keys = struct.unpack("<IQQ", file.read(20))
    for _ in range(keys):
        (length,) = struct.unpack("<Q", file.read(8))
        key = file.read(min(length, 1024))
        (kind,) = struct.unpack("<I", file.read(4))
        if key.endswith(b".context_length") and kind in _SCALARS:
            form = "<" + _SCALARS[kind]
            (value,) = struct.unpack(form, file.read(struct.calcsize(form)))
            return int(value)
        _skip_value(file, kind)
    return None


def _skip_value(file: BinaryIO, kind: int) -> None:
    if kind in _SCALARS:
        file.seek(struct.calcsize("<" + _SCALARS[kind]), 1)
    elif kind == _STRING:
        (length,) = struct.unpack("<Q", file.read(8))
        file.seek(length, 1)
    elif kind == _ARRAY:
        item, count = struct.unpack("<IQ", file.read(12))
        if item in _SCALARS:
            file.seek(count * struct.calcsize("<" + _SCALARS[item]), 1)
            return
        for _ in range(count):
            _skip_value(file, item)
    else:
        raise struct.error(f"value type {kind} is not known")


def _genai() -> tuple[Any, Any]:
    try:
        import numpy as np
        import openvino
        import openvino_genai
    except ImportError as error:
        raise ImportError(
            f"the embedded engine needs OpenVINO GenAI ({error}): pip install 'chiron-serving[openvino]'"
        ) from None

    def tensor(token_ids: Sequence[int]) -> Any:
        return openvino.Tensor(np.array([token_ids], dtype=np.int64))

    return openvino_genai, tensor


def _last_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__
