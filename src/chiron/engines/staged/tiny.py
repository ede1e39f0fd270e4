"""Small models with random weights as Hugging Face directories: real models to load and split, whose text is noise.

    python -m chiron.engines.staged.tiny out/tiny-llama --family llama --layers 8

They have a byte-level tokenizer and a chat template. Weights are drawn wide (0.08): with the usual 0.02 greedy text of
a random model repeats one to four tokens for ever, and two engines that differ would not be told apart by it. Same
settings, same bytes. Needs numpy and no torch.
"""

from __future__ import annotations

import argparse
import json
import os
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from chiron.engines.staged.architecture import FAMILIES, read_architecture
from chiron.engines.staged.weights import EMBEDDING, HEAD, NORM, layer_tensors

BEGIN, END = "<|begin|>", "<|end|>"
_SYLLABLES = [c + v for c in "bdfghklmnprstvz" for v in "aeiou"]
_CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message['role'] + ': ' + message['content'] + '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant:' }}{% endif %}"
)
_DTYPES = {"float32": "F32", "bfloat16": "BF16"}


@dataclass(frozen=True, slots=True, kw_only=True)
class TinySettings:
    family: str = "llama"
    layers: int = 8
    hidden: int = 256
    heads: int = 8
    kv_heads: int = 4
    context_tokens: int = 4096
    window: int = 32
    """Tokens that a Mistral attends to."""
    dtype: str = "float32"
    files: int = 2
    """That the weights are spread over."""
    spread: float = 0.08
    """Standard deviation of the weights."""
    seed: int = 0

    def __post_init__(self) -> None:
        if self.family not in FAMILIES.values():
            raise ValueError(f"family is {self.family!r}; it must be one of {', '.join(FAMILIES.values())}")
        if self.dtype not in _DTYPES:
            raise ValueError(f"dtype is {self.dtype!r}; it must be one of {', '.join(_DTYPES)}")
        if self.hidden % self.heads or self.heads % self.kv_heads or (self.hidden // self.heads) % 2:
            raise ValueError("hidden must be an even multiple of heads, and heads a multiple of kv_heads")


def write_tiny(directory: Path, settings: TinySettings | None = None) -> Path:
    """Write a model into this directory, which is made; nothing is there before all of it is. Raises OSError."""
    settings = settings or TinySettings()
    if (directory / "config.json").exists():
        return directory
    beside = directory.with_name(f".{directory.name}.{os.getpid()}")
    beside.mkdir(parents=True)
    tokens = _vocabulary()
    (beside / "config.json").write_text(json.dumps(_config(settings, len(tokens)), indent=1))
    _write_tokenizer(beside, tokens)
    _write_weights(beside, settings)
    os.replace(beside, directory)
    return directory


def _config(settings: TinySettings, vocabulary: int) -> dict[str, Any]:
    name = next(name for name, family in FAMILIES.items() if family == settings.family)
    config: dict[str, Any] = {
        "architectures": [name],
        "model_type": settings.family,
        "hidden_size": settings.hidden,
        "num_hidden_layers": settings.layers,
        "num_attention_heads": settings.heads,
        "num_key_value_heads": settings.kv_heads,
        "head_dim": settings.hidden // settings.heads,
        "intermediate_size": 2 * settings.hidden,
        "vocab_size": vocabulary,
        "rms_norm_eps": 1e-5,
        "hidden_act": "silu",
        "max_position_embeddings": settings.context_tokens,
        "tie_word_embeddings": settings.family == "qwen2",
        "torch_dtype": settings.dtype,
        "bos_token_id": vocabulary - 2,
        "eos_token_id": vocabulary - 1,
        "rope_theta": 10_000.0,
        "initializer_range": settings.spread,
    }
    if settings.family == "llama":
        config["rope_theta"] = 500_000.0
        config["rope_scaling"] = {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 128,
        }
    if settings.family == "mistral":
        config["sliding_window"] = settings.window
    return config


def _write_weights(directory: Path, settings: TinySettings) -> None:
    import numpy as np

    architecture = read_architecture(directory)
    shapes: dict[str, tuple[int, ...]] = {EMBEDDING: (architecture.vocabulary, architecture.hidden)}
    for layer in range(architecture.layers):
        shapes |= layer_tensors(architecture, layer)
    shapes[NORM] = (architecture.hidden,)
    if not architecture.tied:
        shapes[HEAD] = (architecture.vocabulary, architecture.hidden)
    random = np.random.default_rng(settings.seed)
    names = list(shapes)
    index: dict[str, str] = {}
    size = -(-len(names) // settings.files)
    for number in range(settings.files):
        own = names[number * size : (number + 1) * size]
        file = f"model-{number + 1:05}-of-{settings.files:05}.safetensors"
        data = {}
        for name in own:
            if name.endswith("norm.weight"):
                values = 1 + random.standard_normal(shapes[name], dtype=np.float32) * np.float32(0.1)
            else:
                values = random.standard_normal(shapes[name], dtype=np.float32) * np.float32(settings.spread)
            data[name] = _stored(values, settings.dtype)
        _write_safetensors(directory / file, data, {name: shapes[name] for name in own}, _DTYPES[settings.dtype])
        index |= dict.fromkeys(own, file)
    (directory / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))


def _stored(values: Any, dtype: str) -> bytes:
    if dtype == "float32":
        return bytes(values.tobytes())
    # bfloat16 is the upper half of float32, rounded to even.
    bits = values.view("uint32")
    return bytes(((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype("uint16").tobytes())


def _write_safetensors(file: Path, data: dict[str, bytes], shapes: dict[str, tuple[int, ...]], dtype: str) -> None:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for name, stored in data.items():
        header[name] = {"dtype": dtype, "shape": list(shapes[name]), "data_offsets": [at, at + len(stored)]}
        at += len(stored)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    file.write_bytes(struct.pack("<Q", len(text)) + text + b"".join(data.values()))


def _write_tokenizer(directory: Path, tokens: list[str]) -> None:
    """Byte-level BPE: every byte, then syllables with and without a space before them."""
    merges = [["Ġ", c] for c in "bdfghklmnprstvz"]
    merges += [["Ġ" + s[0], s[1]] for s in _SYLLABLES] + [[s[0], s[1]] for s in _SYLLABLES]
    special = [
        {
            "id": tokens.index(each),
            "content": each,
            "special": True,
            **dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False),
        }
        for each in (BEGIN, END)
    ]
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    tokenizer = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": special,
        "normalizer": None,
        "pre_tokenizer": byte_level,
        "post_processor": None,
        "decoder": byte_level,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": {token: id for id, token in enumerate(tokens[:-2])},
            "merges": merges,
        },
    }
    (directory / "tokenizer.json").write_text(json.dumps(tokenizer, ensure_ascii=False))
    (directory / "tokenizer_config.json").write_text(
        json.dumps({"bos_token": BEGIN, "eos_token": END, "chat_template": _CHAT_TEMPLATE})
    )


def _vocabulary() -> list[str]:
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = (byte for byte in range(256) if byte not in printable)
    letters = {byte: chr(byte) for byte in printable} | {byte: chr(256 + n) for n, byte in enumerate(others)}
    tokens = [letters[byte] for byte in range(256)]
    tokens += ["Ġ" + c for c in "bdfghklmnprstvz"]
    return [*tokens, *("Ġ" + each for each in _SYLLABLES), *_SYLLABLES, BEGIN, END]


def main() -> None:
    default = TinySettings()
    parser = argparse.ArgumentParser(description="Write a small model with random weights. Its text is noise.")
    parser.add_argument("directory", type=Path)
    parser.add_argument("--family", choices=sorted(FAMILIES.values()), default=default.family)
    parser.add_argument("--layers", type=int, default=default.layers)
    parser.add_argument("--hidden", type=int, default=default.hidden)
    parser.add_argument("--dtype", choices=sorted(_DTYPES), default=default.dtype)
    parser.add_argument("--seed", type=int, default=default.seed)
    given = vars(parser.parse_args())
    directory = given.pop("directory")
    try:
        write_tiny(directory, TinySettings(**given))
    except (ValueError, OSError) as error:
        parser.error(str(error))
    print(f"{directory}: random weights; its text is noise")


if __name__ == "__main__":
    main()
