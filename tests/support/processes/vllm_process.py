"""A real vLLM server as a process of its own, with a tiny model of random weights that is never downloaded. For tests.

The model is two JSON files and a tokenizer of single bytes and letter pairs; vLLM makes up the weights
(``--load-format dummy``). Its text is noise, its scheduling, streams and metrics are real.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from contextlib import AbstractContextManager, suppress
from itertools import product
from pathlib import Path
from string import ascii_lowercase
from typing import Any
from urllib.error import URLError
from urllib.request import urlopen

START_TIMEOUT_S = 240.0
STOP_TIMEOUT_S = 20.0
MODEL = "tiny"
CONTEXT_TOKENS = 2048

_ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_CI_ENV": "1",
}
"""No network, 1 GiB of KV, no compilation; what a GPU build does not know it ignores."""


def byte_letters() -> dict[int, str]:
    """How byte-level BPE writes each byte: as itself where that can be seen, else as a letter from 256 on."""
    seen = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [byte for byte in range(256) if byte not in seen]
    return {byte: chr(byte) for byte in seen} | {byte: chr(256 + i) for i, byte in enumerate(hidden)}


def write_model(directory: Path, *, hidden: int = 256, layers: int = 4) -> Path:
    """The files that vLLM needs beside weights."""
    special = ["<unk>", "<s>", "</s>"]
    pairs = [list(pair) for pair in product(ascii_lowercase, repeat=2)]
    tokens = [*special, *byte_letters().values(), *("".join(pair) for pair in pairs)]
    level: dict[str, Any] = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    tokenizer = {
        "version": "1.0",
        "added_tokens": [{"id": id, "content": word, **flags} for id, word in enumerate(special)],
        "pre_tokenizer": level,
        "decoder": level,
        "model": {"type": "BPE", "vocab": {word: id for id, word in enumerate(tokens)}, "merges": pairs},
    }
    names = dict(zip(("unk_token", "bos_token", "eos_token"), special, strict=True))
    template = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}assistant:"
    shape = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": hidden,
        "intermediate_size": 4 * hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": hidden // 32,
        "num_key_value_heads": hidden // 64,
        "max_position_embeddings": 2 * CONTEXT_TOKENS,
        "vocab_size": len(tokens),
        "bos_token_id": 1,
        "eos_token_id": 2,
        "torch_dtype": "bfloat16",
    }
    files = {
        "config.json": shape,
        "tokenizer.json": tokenizer,
        "tokenizer_config.json": {**names, "tokenizer_class": "PreTrainedTokenizerFast", "chat_template": template},
    }
    directory.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (directory / name).write_text(json.dumps(content))
    return directory


class VllmProcess(AbstractContextManager["VllmProcess"]):
    """``python -m vllm.entrypoints.openai.api_server``; ready when entered, and again after ``start``."""

    def __init__(self, python: str, model: Path, log: Path, port: int, *arguments: str) -> None:
        self.url = f"http://127.0.0.1:{port}"
        self.log = log
        self.process: subprocess.Popen[bytes] | None = None
        self._command = [
            *(python, "-m", "vllm.entrypoints.openai.api_server", "--model", str(model), "--load-format", "dummy"),
            *("--served-model-name", MODEL, "--host", "127.0.0.1", "--port", str(port), "--dtype", "bfloat16"),
            *("--max-model-len", str(CONTEXT_TOKENS), "--enforce-eager", *arguments),
        ]

    def __enter__(self) -> VllmProcess:
        try:
            self.start()
        except BaseException:
            self.kill()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()

    def start(self) -> float:
        """Returns how many seconds it took."""
        began_s = time.monotonic()
        with self.log.open("ab") as log:
            # A session of its own: vLLM is several processes, and a kill must reach all.
            self.process = subprocess.Popen(
                self._command, stdout=log, stderr=log, env=os.environ | _ENVIRONMENT, start_new_session=True
            )
        while not self._healthy():
            assert self.process.poll() is None, f"vLLM ended at its start:\n{self.log.read_text()[-4000:]}"
            assert time.monotonic() < began_s + START_TIMEOUT_S, f"vLLM is not up:\n{self.log.read_text()[-4000:]}"
            time.sleep(0.2)
        return time.monotonic() - began_s

    def kill(self) -> None:
        """kill -9 of all its processes."""
        if self.process is not None:
            with suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait(STOP_TIMEOUT_S)

    def _healthy(self) -> bool:
        try:
            with urlopen(f"{self.url}/health", timeout=2) as answer:
                return bool(answer.status == 200)
        except (URLError, OSError):
            return False
