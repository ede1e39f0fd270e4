"""What a model's ``config.json`` says, read strictly: what is not known here is refused by name.

Four families, which are one architecture with switches: Llama; Qwen2 (biases on q, k and v); Qwen3 (norms of q and k
per head); Mistral (a sliding window). All have RMS norms, rotary positions, grouped query attention and SwiGLU. A
model that computes anything else would load and answer nonsense, so an option that changes the computation is either
implemented or an error.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from math import pi
from pathlib import Path
from typing import Any

from chiron.engines.staged.errors import StagedModelError

FAMILIES = {
    "LlamaForCausalLM": "llama",
    "MistralForCausalLM": "mistral",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
}
ROPES = ("default", "linear", "llama3")
DTYPES = ("float32", "bfloat16", "float16")
_LAYERS_MAX = 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class Rope:
    """Rotary positions."""

    theta: float
    kind: str = "default"
    factor: float = 1.0
    low_frequency_factor: float = 1.0
    high_frequency_factor: float = 4.0
    original_context: int = 8192

    def frequencies(self, head_dim: int) -> list[float]:
        """Radians per position, of each pair of channels."""
        plain = [self.theta ** (-2 * i / head_dim) for i in range(head_dim // 2)]
        if self.kind == "linear":
            return [each / self.factor for each in plain]
        return [self._stretched(each) for each in plain] if self.kind == "llama3" else plain

    def _stretched(self, frequency: float) -> float:
        """Llama 3.1: long wavelengths are stretched, short ones are kept, and between them it is blended."""
        wavelength = 2 * pi / frequency
        low, high = self.low_frequency_factor, self.high_frequency_factor
        if wavelength < self.original_context / high:
            return frequency
        if wavelength > self.original_context / low:
            return frequency / self.factor
        smooth = (self.original_context / wavelength - low) / (high - low)
        return (1 - smooth) * frequency / self.factor + smooth * frequency


@dataclass(frozen=True, slots=True, kw_only=True)
class Architecture:
    """The shape of one model."""

    family: str
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocabulary: int
    norm_epsilon: float
    rope: Rope
    tied: bool
    """The head's weights are the embedding's."""
    attention_bias: bool
    """On q, k and v."""
    output_bias: bool
    mlp_bias: bool
    windows: tuple[int, ...]
    """Of each layer: tokens that it attends to, itself included; 0: all."""
    context_tokens: int
    dtype: str
    """Of the weights as they are stored."""
    eos_ids: tuple[int, ...]

    @property
    def head_norms(self) -> bool:
        return self.family == "qwen3"

    def kv_bytes(self, layers: int, item_bytes: int) -> int:
        """KV of one token in so many layers."""
        return 2 * layers * self.kv_heads * self.head_dim * item_bytes


def read_architecture(directory: Path) -> Architecture:
    """The model in a Hugging Face directory. Raises StagedModelError."""
    file = directory / "config.json"
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise StagedModelError(
            f"{directory}: no config.json there; it must be a Hugging Face model directory"
        ) from None
    except (OSError, ValueError) as error:
        raise StagedModelError(f"{file}: cannot be read: {error}") from None
    if not isinstance(data, dict):
        raise StagedModelError(f"{file}: is not an object")
    return _Reader(str(file), data).architecture()


class _Reader:
    """Typed access to a config; each error names the file, the key and what is allowed."""

    def __init__(self, file: str, data: Mapping[str, Any]) -> None:
        self._file = file
        self._data = data

    def architecture(self) -> Architecture:
        family = self._family()
        self._refuse_unknown()
        layers = self._whole("num_hidden_layers", most=_LAYERS_MAX)
        hidden, heads = self._whole("hidden_size"), self._whole("num_attention_heads")
        kv_heads = self._whole("num_key_value_heads", default=heads)
        if heads % kv_heads:
            raise self._error("num_key_value_heads", f"a divisor of num_attention_heads ({heads})")
        if self._data.get("head_dim") is None and hidden % heads:
            raise self._error("hidden_size", f"a multiple of num_attention_heads ({heads})")
        head_dim = self._whole("head_dim", default=hidden // heads)
        if head_dim % 2:
            raise self._error("head_dim", "even")
        attention_bias = family == "qwen2" or self._flag("attention_bias")
        return Architecture(
            family=family,
            layers=layers,
            hidden=hidden,
            heads=heads,
            kv_heads=kv_heads,
            head_dim=head_dim,
            intermediate=self._whole("intermediate_size"),
            vocabulary=self._whole("vocab_size"),
            norm_epsilon=self._real("rms_norm_eps", 1e-6),
            rope=self._rope(),
            tied=self._flag("tie_word_embeddings"),
            attention_bias=attention_bias,
            output_bias=family in ("llama", "qwen3") and self._flag("attention_bias"),
            mlp_bias=family == "llama" and self._flag("mlp_bias"),
            windows=self._windows(family, layers),
            context_tokens=self._whole("max_position_embeddings", default=4096),
            dtype=self._dtype(),
            eos_ids=self._eos(),
        )

    def _family(self) -> str:
        names = self._data.get("architectures")
        name = names[0] if isinstance(names, list) and len(names) == 1 else None
        if not isinstance(name, str) or name not in FAMILIES:
            raise self._error("architectures", f"one of {', '.join(FAMILIES)}")
        return FAMILIES[name]

    def _refuse_unknown(self) -> None:
        if self._data.get("hidden_act", "silu") not in ("silu", "swish"):
            raise self._error("hidden_act", "'silu'")
        if self._data.get("quantization_config"):
            raise self._error("quantization_config", "absent: quantised weights are not implemented")
        if self._data.get("partial_rotary_factor", 1.0) not in (None, 1, 1.0):
            raise self._error("partial_rotary_factor", "1.0")

    def _rope(self) -> Rope:
        """transformers 5 writes ``rope_parameters``; before, it was ``rope_scaling`` and ``rope_theta``."""
        key = "rope_parameters" if self._data.get("rope_parameters") else "rope_scaling"
        said = self._data.get(key) or {}
        if not isinstance(said, dict):
            raise self._error(key, "an object")
        kind = said.get("rope_type", said.get("type", "default"))
        if kind not in ROPES:
            raise self._error(f"{key}.rope_type", f"one of {', '.join(ROPES)}", kind)
        theta = _Reader(self._file, said)._real("rope_theta", self._real("rope_theta", 10_000.0))
        if kind == "default":
            return Rope(theta=theta)
        part = _Reader(self._file, said)
        factor = part._real("factor", None)
        if kind == "linear":
            return Rope(theta=theta, kind=kind, factor=factor)
        return Rope(
            theta=theta,
            kind=kind,
            factor=factor,
            low_frequency_factor=part._real("low_freq_factor", None),
            high_frequency_factor=part._real("high_freq_factor", None),
            original_context=part._whole("original_max_position_embeddings"),
        )

    def _windows(self, family: str, layers: int) -> tuple[int, ...]:
        window = self._data.get("sliding_window")
        if not window or (family != "mistral" and not self._data.get("use_sliding_window", False)):
            return (0,) * layers
        if family == "llama":
            raise self._error("sliding_window", "absent in a Llama model")
        width = self._whole("sliding_window")
        if family == "mistral":
            return (width,) * layers
        kinds = self._data.get("layer_types")
        if kinds is None:
            first = self._whole("max_window_layers", default=layers, least=0)
            return tuple(width if layer >= first else 0 for layer in range(layers))
        if not isinstance(kinds, list) or len(kinds) != layers:
            raise self._error("layer_types", f"a list of {layers}")
        for kind in kinds:
            if kind not in ("full_attention", "sliding_attention"):
                raise self._error("layer_types", "of 'full_attention' and 'sliding_attention'", kind)
        return tuple(width if kind == "sliding_attention" else 0 for kind in kinds)

    def _dtype(self) -> str:
        key = "dtype" if self._data.get("dtype") else "torch_dtype"
        name = self._data.get(key) or "float32"
        if name not in DTYPES:
            raise self._error(key, f"one of {', '.join(DTYPES)}")
        return str(name)

    def _eos(self) -> tuple[int, ...]:
        given = self._data.get("eos_token_id")
        ids = given if isinstance(given, list) else [] if given is None else [given]
        if not all(type(each) is int and each >= 0 for each in ids):
            raise self._error("eos_token_id", "a token's id or a list of them")
        return tuple(ids)

    def _flag(self, key: str) -> bool:
        value = self._data.get(key)
        if value is not None and not isinstance(value, bool):
            raise self._error(key, "true or false")
        return bool(value)

    def _whole(self, key: str, *, default: int | None = None, least: int = 1, most: int = 1 << 30) -> int:
        value = self._data.get(key)
        if value is None and default is not None:
            return default
        if type(value) is not int or not least <= value <= most:
            raise self._error(key, f"a whole number from {least} to {most}")
        return value

    def _real(self, key: str, default: float | None) -> float:
        value = self._data.get(key)
        if value is None and default is not None:
            return default
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 1e18:
            raise self._error(key, "a number above 0")
        return float(value)

    def _error(self, key: str, allowed: str, value: Any = None) -> StagedModelError:
        found = self._data.get(key) if value is None else value
        said = f"is {found!r}"[:200] if found is not None else "is missing"
        return StagedModelError(f"{self._file}: {key} {said}; it must be {allowed}")
