"""Where a model's tensors are, which of them a stage holds, and how large they are: from the files' headers alone.

A safetensors file begins with a JSON header, so sizes need neither torch nor the weights. A stage opens only the files
that hold tensors of its own.
"""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from chiron.engines.staged.architecture import Architecture, read_architecture
from chiron.engines.staged.errors import StagedModelError
from chiron.engines.staged.split import StageRange

_HEADER_MAX_BYTES = 100 << 20
_DTYPES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}
_SAMPLES, _SAMPLE_BYTES = 4, 256
"""Of each tensor's data, which the fingerprint covers: spread evenly, with the first and the last bytes."""

EMBEDDING = "model.embed_tokens.weight"
NORM = "model.norm.weight"
HEAD = "lm_head.weight"


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorPlace:
    """One tensor as its file's header has it."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelFiles:
    """A model's directory, read but for the weights."""

    directory: Path
    architecture: Architecture
    tensors: Mapping[str, TensorPlace]
    fingerprint: str
    """Equal for copies of the same model, and for nothing else: of its config, all headers, and samples of each tensor,
    by which fine-tunes of one model differ. Not of the tokenizer: only heads have one, and stages get token ids."""

    def stage_tensors(self, stage: StageRange) -> dict[str, TensorPlace]:
        """Those of a stage, by name. Raises StagedModelError if one is missing or has another shape or type."""
        return {name: self._place(name, shape) for name, shape in _wanted(self.architecture, stage).items()}

    def stage_bytes(self, stage: StageRange) -> int:
        return sum(place.bytes for place in self.stage_tensors(stage).values())

    def _place(self, name: str, shape: tuple[int, ...]) -> TensorPlace:
        place = self.tensors.get(name)
        if place is None:
            raise StagedModelError(f"{self.directory}: tensor {name} is missing from its safetensors files")
        if place.shape != shape:
            raise StagedModelError(
                f"{place.file}: tensor {name} has the shape {list(place.shape)}; it must be {list(shape)}"
            )
        if place.dtype not in _DTYPES:
            raise StagedModelError(
                f"{place.file}: tensor {name} is of type {place.dtype}; it must be one of {', '.join(_DTYPES)}"
            )
        return place


def read_model_files(directory: Path) -> ModelFiles:
    """Raises StagedModelError for what is no model that can be served."""
    architecture = read_architecture(directory)
    files = sorted(directory.glob("*.safetensors"))
    if not files:
        raise StagedModelError(f"{directory}: no *.safetensors file there")
    tensors: dict[str, TensorPlace] = {}
    digest = hashlib.sha256((directory / "config.json").read_bytes())
    for file in files:
        found, header = _read_header(file)
        twice = set(found) & set(tensors)
        if twice:
            name = min(twice)
            raise StagedModelError(f"{file}: tensor {name} is in {tensors[name].file.name} too")
        tensors |= found
        digest.update(header)
        _sample(file, header, found, digest.update)
    return ModelFiles(
        directory=directory, architecture=architecture, tensors=tensors, fingerprint=digest.hexdigest()[:32]
    )


def layer_tensors(architecture: Architecture, layer: int) -> dict[str, tuple[int, ...]]:
    """Shapes of one layer's tensors by their names in the files."""
    a = architecture
    queries, keys = a.heads * a.head_dim, a.kv_heads * a.head_dim
    shapes: dict[str, tuple[int, ...]] = {
        "input_layernorm.weight": (a.hidden,),
        "self_attn.q_proj.weight": (queries, a.hidden),
        "self_attn.k_proj.weight": (keys, a.hidden),
        "self_attn.v_proj.weight": (keys, a.hidden),
        "self_attn.o_proj.weight": (a.hidden, queries),
        "post_attention_layernorm.weight": (a.hidden,),
        "mlp.gate_proj.weight": (a.intermediate, a.hidden),
        "mlp.up_proj.weight": (a.intermediate, a.hidden),
        "mlp.down_proj.weight": (a.hidden, a.intermediate),
    }
    if a.attention_bias:
        shapes |= {
            "self_attn.q_proj.bias": (queries,),
            "self_attn.k_proj.bias": (keys,),
            "self_attn.v_proj.bias": (keys,),
        }
    if a.output_bias:
        shapes["self_attn.o_proj.bias"] = (a.hidden,)
    if a.head_norms:
        shapes |= {"self_attn.q_norm.weight": (a.head_dim,), "self_attn.k_norm.weight": (a.head_dim,)}
    if a.mlp_bias:
        shapes |= {
            "mlp.gate_proj.bias": (a.intermediate,),
            "mlp.up_proj.bias": (a.intermediate,),
            "mlp.down_proj.bias": (a.hidden,),
        }
    return {f"model.layers.{layer}.{name}": shape for name, shape in shapes.items()}


def _wanted(architecture: Architecture, stage: StageRange) -> dict[str, tuple[int, ...]]:
    a = architecture
    if stage.end > a.layers:
        raise StagedModelError(f"layers {stage}: this model has layers 0 to {a.layers - 1}")
    wanted: dict[str, tuple[int, ...]] = {}
    last = stage.end == a.layers
    if stage.begin == 0 or (last and a.tied):
        wanted[EMBEDDING] = (a.vocabulary, a.hidden)
    for layer in range(stage.begin, stage.end):
        wanted |= layer_tensors(a, layer)
    if last:
        wanted[NORM] = (a.hidden,)
        if not a.tied:
            wanted[HEAD] = (a.vocabulary, a.hidden)
    return wanted


def _read_header(file: Path) -> tuple[dict[str, TensorPlace], bytes]:
    try:
        with file.open("rb") as opened:
            (length,) = struct.unpack("<Q", opened.read(8))
            if length > _HEADER_MAX_BYTES:
                raise ValueError(f"its header has {length} bytes; allowed: {_HEADER_MAX_BYTES}")
            header = opened.read(length)
        entries = json.loads(header)
        places = {
            name: TensorPlace(
                file=file,
                dtype=str(entry["dtype"]),
                shape=tuple(entry["shape"]),
                bytes=entry["data_offsets"][1] - entry["data_offsets"][0],
            )
            for name, entry in entries.items()
            if name != "__metadata__"
        }
    except (OSError, ValueError, KeyError, TypeError, IndexError, AttributeError, struct.error) as error:
        raise StagedModelError(f"{file}: is no safetensors file: {error}") from None
    end = 8 + length + sum(place.bytes for place in places.values())
    size = file.stat().st_size
    if size != end:
        raise StagedModelError(f"{file}: has {size} bytes; its header speaks of {end}")
    return places, header


def _sample(file: Path, header: bytes, places: Mapping[str, TensorPlace], take: Callable[[bytes], None]) -> None:
    offsets = {name: entry["data_offsets"] for name, entry in json.loads(header).items() if name in places}
    with file.open("rb") as opened:
        for begin, end in sorted(offsets.values()):
            last = max(begin, end - _SAMPLE_BYTES)
            for at in sorted({begin + (last - begin) * n // (_SAMPLES - 1) for n in range(_SAMPLES)}):
                opened.seek(8 + len(header) + at)
                take(opened.read(min(_SAMPLE_BYTES, end - at)))
