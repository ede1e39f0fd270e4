"""A small Llama with random weights, as a GGUF file: a real model to load, whose text is noise.

It exists so that a machine without any model can run real engines: real prefill, real KV, real step times that grow
with the batch. What it says means nothing. The vocabulary is 256 bytes and some syllables, so that it takes any text
and its own reads as made-up words. Each next token depends on the whole context, as in a trained model; sampled at
temperature 1, an answer ends by itself after some hundreds of tokens, and greedy ones hardly ever do.

Same settings and seed, same bytes. The tokenizer (byte-level BPE) is part of the file, as is a chat template.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy as np
    from numpy.typing import NDArray

NAME = "chiron-toy"
FORMAT = 1
"""Part of the cached file's name: raised when the same settings would give other bytes."""

_BOS, _EOS = "<|begin|>", "<|end|>"
_SPACE = "Ġ"  # How byte-level BPE writes the space byte.
_CONSONANTS = "bdfghklmnprstvz"
_VOWELS = "aeiou"
_CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message['role'] + ': ' + message['content'] + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant:' }}{% endif %}"
)

_EMBEDDING_STD = 0.5
_OUTPUT_STD = 0.2
"""Logits spread by this times the root of the hidden size: sampled text prefers some tokens, and no token always."""
_BIAS = 4.0
"""Channel 0 of every embedding. No layer reads or writes it, so the output weights of channel 0 act as a bias."""
_END_BIAS = 1.2
"""Of the end token: by measurement, an answer sampled at temperature 1 ends after a few hundred tokens."""
_UNSPOKEN_BIAS = -8.0
"""Of bytes that are no text by themselves, and of the begin token."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ToySettings:
    """The model's shape. The default has 4 M parameters: 8 MB, and steps of a millisecond on a laptop's core."""

    hidden: int = 256
    """Width; a multiple of 64, one attention head each."""
    layers: int = 4
    context_tokens: int = 4096
    """Prompt and answer together."""
    seed: int = 0

    def __post_init__(self) -> None:
        for name, least, most in (("hidden", 64, 8192), ("layers", 1, 128), ("context_tokens", 16, 1 << 20)):
            value = getattr(self, name)
            if not least <= value <= most:
                raise ValueError(f"toy model: {name} is {value}; it must be from {least} to {most}")
        if self.hidden % 64:
            raise ValueError(f"toy model: hidden is {self.hidden}; it must be a multiple of 64")
        if self.seed < 0:
            raise ValueError(f"toy model: seed is {self.seed}; it must be at least 0")


def default_cache() -> Path:
    """Where generated models are kept: the platform's cache directory for one user."""
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "chiron"
    base = os.environ.get("LOCALAPPDATA") if sys.platform == "win32" else os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "chiron"


def toy_model(settings: ToySettings | None = None, directory: Path | None = None) -> Path:
    """The file of the toy model, made unless it is there already. Raises OSError, or ImportError without ``gguf``."""
    settings = settings or ToySettings()
    name = f"toy-{FORMAT}-h{settings.hidden}-l{settings.layers}-c{settings.context_tokens}-s{settings.seed}.gguf"
    path = (directory or default_cache()) / name
    if not path.exists():
        write_toy(path, settings)
    return path


def write_toy(path: Path, settings: ToySettings) -> None:
    """Write the model. Whoever looks meanwhile sees the whole file or none. Raises OSError or ImportError."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    os.close(handle)
    try:
        _write(temporary, settings)
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def _write(path: str, settings: ToySettings) -> None:
    gguf = _gguf()
    tokens, kinds, merges = _vocabulary(gguf)
    hidden, heads, feed_forward = settings.hidden, settings.hidden // 64, settings.hidden * 4
    kv_heads = heads if heads % 2 else heads // 2
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name(NAME)
    writer.add_description("random weights; the text is noise")
    writer.add_context_length(settings.context_tokens)
    writer.add_embedding_length(hidden)
    writer.add_block_count(settings.layers)
    writer.add_feed_forward_length(feed_forward)
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(64)
    writer.add_vocab_size(len(tokens))
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_F16)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    writer.add_token_merges(merges)
    writer.add_bos_token_id(tokens.index(_BOS))
    writer.add_eos_token_id(tokens.index(_EOS))
    writer.add_add_bos_token(False)
    writer.add_chat_template(_CHAT_TEMPLATE)
    for name, tensor in _tensors(settings, tokens, feed_forward, kv_heads):
        writer.add_tensor(name, tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _tensors(
    settings: ToySettings, tokens: Sequence[str], feed_forward: int, kv_heads: int
) -> list[tuple[str, NDArray[Any]]]:
    import numpy as np

    hidden, kv = settings.hidden, kv_heads * 64
    random = np.random.default_rng(settings.seed)

    def weights(*shape: int, std: float) -> NDArray[np.float16]:
        return (random.standard_normal(shape, dtype=np.float32) * np.float32(std)).astype(np.float16)

    ones = np.ones(hidden, np.float32)
    embedding, output = (weights(len(tokens), hidden, std=std) for std in (_EMBEDDING_STD, _OUTPUT_STD))
    embedding[:, 0] = _BIAS
    output[:, 0] = [_bias(token) for token in tokens]
    named: list[tuple[str, NDArray[Any]]] = [
        ("token_embd.weight", embedding),
        ("output_norm.weight", ones),
        ("output.weight", output),
    ]
    # What all layers together add is kept the same for any depth.
    depth = (4 / settings.layers) ** 0.5
    for layer in range(settings.layers):
        shapes = {
            "attn_q": (hidden, hidden),
            "attn_k": (kv, hidden),
            "attn_v": (kv, hidden),
            "attn_output": (hidden, hidden),
            "ffn_gate": (feed_forward, hidden),
            "ffn_up": (feed_forward, hidden),
            "ffn_down": (hidden, feed_forward),
        }
        named += [(f"blk.{layer}.attn_norm.weight", ones), (f"blk.{layer}.ffn_norm.weight", ones)]
        for name, shape in shapes.items():
            adds = name in ("attn_output", "ffn_down")
            tensor = weights(*shape, std=shape[1] ** -0.5 * (depth if adds else 1.0))
            if adds:
                tensor[0] = 0
            else:
                tensor[:, 0] = 0
            named.append((f"blk.{layer}.{name}.weight", tensor))
    return named


def _vocabulary(gguf: Any) -> tuple[list[str], list[int], list[str]]:
    """Tokens, their kinds and the merges: every byte, then syllables with and without a space before them."""
    tokens = list(_byte_letters().values())
    kinds = [int(gguf.TokenType.NORMAL)] * len(tokens)
    pairs = [(_SPACE, consonant) for consonant in _CONSONANTS]
    pairs += [(_SPACE + consonant, vowel) for consonant in _CONSONANTS for vowel in _VOWELS]
    pairs += [(consonant, vowel) for consonant in _CONSONANTS for vowel in _VOWELS]
    tokens += [first + second for first, second in pairs]
    kinds += [int(gguf.TokenType.NORMAL)] * len(pairs)
    tokens += [_BOS, _EOS]
    kinds += [int(gguf.TokenType.CONTROL)] * 2
    return tokens, kinds, [f"{first} {second}" for first, second in pairs]


def _byte_letters() -> dict[int, str]:
    """The letter that stands for each byte in byte-level BPE: itself where printable, else one from 256 up."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = (byte for byte in range(256) if byte not in printable)
    return {byte: chr(byte) for byte in printable} | {byte: chr(256 + n) for n, byte in enumerate(others)}


def _bias(token: str) -> float:
    if token == _EOS:
        return _END_BIAS
    spoken = token in ".,!?" or (len(token) > 1 and token[-1] in _VOWELS)
    return 0.0 if spoken else _UNSPOKEN_BIAS


def _gguf() -> Any:
    try:
        import gguf
    except ImportError:
        raise ImportError("making the toy model needs gguf: pip install 'chiron-serving[openvino]'") from None
    return gguf


def main() -> None:
    """``python -m chiron.engines.serve.toy out.gguf``"""
    default = ToySettings()
    parser = argparse.ArgumentParser(description="Write a small GGUF model with random weights. Its text is noise.")
    parser.add_argument("path", type=Path)
    parser.add_argument("--hidden", type=int, default=default.hidden, help="width, a multiple of 64")
    parser.add_argument("--layers", type=int, default=default.layers)
    parser.add_argument("--context-tokens", type=int, default=default.context_tokens)
    parser.add_argument("--seed", type=int, default=default.seed)
    given = vars(parser.parse_args())
    path = given.pop("path")
    try:
        write_toy(path, ToySettings(**given))
    except (ValueError, OSError, ImportError) as error:
        parser.error(str(error))
    print(f"{path}: {path.stat().st_size / 1e6:.1f} MB, random weights; its text is noise")


if __name__ == "__main__":
    main()
