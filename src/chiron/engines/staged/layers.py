"""A range of a model's layers: packed batches in, packed batches out.

All tokens of a step, some sequences' next ones and some chunks of prompts, go through the layers as one matrix
``[tokens, hidden]`` without padding; only attention knows which row belongs to which sequence.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from chiron.engines.staged.architecture import Architecture
from chiron.engines.staged.kv import Entry, KvStore
from chiron.engines.staged.split import StageRange
from chiron.engines.staged.torch_parts import safe_open, torch
from chiron.engines.staged.weights import EMBEDDING, HEAD, NORM, ModelFiles


@dataclass(frozen=True, slots=True, kw_only=True)
class Likely:
    """The likeliest next tokens after one of a step's entries, likeliest first."""

    logits: Any
    ids: Any
    mass: Any
    """Logarithm of the sum of all exponentials: what log probabilities are relative to."""


class StageLayers:
    """Weights of one stage. ``run`` is called by one thread at a time."""

    def __init__(self, files: ModelFiles, stage: StageRange, *, dtype: str = "", device: str = "cpu") -> None:
        """``dtype``: of weights and activations; empty: as the weights are stored. Raises StagedModelError."""
        self.stage = stage
        self.architecture: Architecture = files.architecture
        self.dtype_name = dtype or files.architecture.dtype
        self.dtype = getattr(torch, self.dtype_name)
        self.device = torch.device(device)
        self.first = stage.begin == 0
        self.last = stage.end == files.architecture.layers
        places = files.stage_tensors(stage)
        self.weights_bytes = sum(place.bytes for place in places.values())
        weights = _load(files, places, self.dtype, self.device)
        self._embedding = weights.pop(EMBEDDING, None)
        self._norm = weights.pop(NORM, None)
        self._head = self._embedding if self.last and self.architecture.tied else weights.pop(HEAD, None)
        if not self.first:
            self._embedding = None
        self._layers = [
            {name.split(".", 3)[3]: weights[name] for name in weights if name.startswith(f"model.layers.{layer}.")}
            for layer in range(stage.begin, stage.end)
        ]
        frequencies = self.architecture.rope.frequencies(self.architecture.head_dim)
        self._frequencies = torch.tensor(frequencies, dtype=torch.float32, device=self.device)

    def run(self, given: Any, entries: Sequence[Entry], kv: KvStore) -> tuple[Any, list[Likely]]:
        """One step. ``given`` is token ids ``[tokens]`` in the first stage and hidden states ``[tokens, hidden]`` in
        others; KV must be reserved. Hidden states, and in the last stage the likeliest tokens of each entry that wants
        some."""
        with torch.inference_mode():
            hidden = given.to(self.device)
            if self.first:
                hidden = torch.nn.functional.embedding(hidden, self._embedding)
            turn = self._turn(entries)
            for index, weights in enumerate(self._layers):
                hidden = self._layer(index, weights, hidden, turn, entries, kv)
            if not self.last:
                return hidden, []
            return hidden, self._likely(hidden, entries)

    def _turn(self, entries: Sequence[Entry]) -> tuple[Any, Any]:
        """Cosines and sines of all positions."""
        positions = torch.cat([torch.arange(each.position, each.end, device=self.device) for each in entries])
        angles = positions.to(torch.float32).unsqueeze(1) * self._frequencies
        angles = torch.cat((angles, angles), dim=1).unsqueeze(1)
        return angles.cos().to(self.dtype), angles.sin().to(self.dtype)

    def _layer(
        self, index: int, weights: Mapping[str, Any], hidden: Any, turn: tuple[Any, Any], entries: Any, kv: KvStore
    ) -> Any:
        a = self.architecture
        normal = self._normal(hidden, weights["input_layernorm.weight"])
        queries = _linear(normal, weights, "self_attn.q_proj").view(-1, a.heads, a.head_dim)
        keys = _linear(normal, weights, "self_attn.k_proj").view(-1, a.kv_heads, a.head_dim)
        values = _linear(normal, weights, "self_attn.v_proj").view(-1, a.kv_heads, a.head_dim)
        if a.head_norms:
            queries = self._normal(queries, weights["self_attn.q_norm.weight"])
            keys = self._normal(keys, weights["self_attn.k_norm.weight"])
        window = a.windows[self.stage.begin + index]
        seen = kv.attend(index, window, entries, _turned(queries, turn), _turned(keys, turn), values)
        hidden = hidden + _linear(seen, weights, "self_attn.o_proj")
        normal = self._normal(hidden, weights["post_attention_layernorm.weight"])
        gate = torch.nn.functional.silu(_linear(normal, weights, "mlp.gate_proj"))
        return hidden + _linear(gate * _linear(normal, weights, "mlp.up_proj"), weights, "mlp.down_proj")

    def _normal(self, hidden: Any, weight: Any) -> Any:
        """In float32, as the models were trained."""
        wide = hidden.to(torch.float32)
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.architecture.norm_epsilon)
        return weight * wide.to(self.dtype)

    def _likely(self, hidden: Any, entries: Sequence[Entry]) -> list[Likely]:
        rows, wants, at = [], [], 0
        for entry in entries:
            at += entry.count
            if entry.want:
                rows.append(at - 1)
                wants.append(min(entry.want, self.architecture.vocabulary))
        if not rows:
            return []
        normal = self._normal(hidden[torch.tensor(rows, device=self.device)], self._norm)
        logits = torch.nn.functional.linear(normal, self._head).to(torch.float32)
        mass = logits.logsumexp(dim=-1).cpu()
        found: list[Likely | None] = [None] * len(rows)
        # Those that want all of the vocabulary cost the others nothing.
        for want in dict.fromkeys(wants):
            places = [place for place, each in enumerate(wants) if each == want]
            some = logits if len(places) == len(rows) else logits[torch.tensor(places, device=self.device)]
            top, ids = some.topk(want, dim=-1)
            top, ids = top.cpu(), ids.to(torch.int32).cpu()
            for row, place in enumerate(places):
                found[place] = Likely(logits=top[row], ids=ids[row], mass=mass[place])
        return [each for each in found if each is not None]


def _load(files: ModelFiles, places: Mapping[str, Any], dtype: Any, device: Any) -> dict[str, Any]:
    """The stage's own tensors, from the files that hold them; mapped and shared between processes while the type is as
    stored."""
    weights: dict[str, Any] = {}
    for file in sorted({place.file for place in places.values()}):
        with safe_open(str(file), "pt") as opened:
            for name, place in places.items():
                if place.file == file:
                    weights[name] = opened.get_tensor(name).to(dtype=dtype, device=device)
    return weights


def _linear(given: Any, weights: Mapping[str, Any], name: str) -> Any:
    return torch.nn.functional.linear(given, weights[f"{name}.weight"], weights.get(f"{name}.bias"))


def _turned(vectors: Any, turn: tuple[Any, Any]) -> Any:
    """Rotary positions: each pair of channels, half a head apart, is turned by its angle."""
    cosines, sines = turn
    half = vectors.shape[-1] // 2
    swapped = torch.cat((-vectors[..., half:], vectors[..., :half]), dim=-1)
    return vectors * cosines + swapped * sines
