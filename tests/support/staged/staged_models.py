"""Tiny models for tests of the staged engine, each made once in a run; skips where torch cannot be had."""

from __future__ import annotations

import random
import tempfile
from functools import cache
from pathlib import Path

import pytest

from chiron.engines.staged.tiny import TinySettings, write_tiny

FAMILIES = ("llama", "qwen2", "qwen3", "mistral")


def need_torch() -> None:
    torch = pytest.importorskip("torch", reason="torch is not installed", exc_type=ImportError)
    torch.set_num_threads(1)  # As a stage has it: two threads on busy cores take ten times as long.


@cache
def _directory() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="chiron-staged-", ignore_cleanup_errors=True)


@cache
def tiny(family: str = "llama", dtype: str = "float32") -> Path:
    settings = TinySettings(family=family, layers=4, hidden=64, heads=4, kv_heads=2, dtype=dtype, spread=0.16)
    return write_tiny(Path(_directory().name) / f"{family}-{dtype}", settings)


def prompts(count: int, *, seed: int = 0, longest: int = 90) -> list[list[int]]:
    """Random token ids of any length."""
    source = random.Random(seed)
    return [[source.randrange(400) for _ in range(source.randint(1, longest))] for _ in range(count)]
