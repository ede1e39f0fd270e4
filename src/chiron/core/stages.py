"""What is known of a pipeline's stages at one moment: what a scrape brings of an instance that is a pipeline."""

from __future__ import annotations

from dataclasses import dataclass
from math import nan


@dataclass(frozen=True, slots=True, kw_only=True)
class StageSample:
    """One stage, over all its replicas. Sums count from the start of the pipeline and never fall."""

    ready: int
    """Replicas that take new sequences."""
    starting: int
    draining: int
    busy_s: float
    """Seconds that replicas have worked, added up."""
    passes: float
    """Batches that replicas have run."""
    tokens: float
    """Tokens in them: one for each decoding sequence, and those of prompts."""
    waiting: float = 0.0
    """Sequences that wait for a replica of it."""
    kv_used_tokens: int = 0
    """On the fullest ready replica."""
    start_s: float = nan
    """What the latest start of a replica took; nan: none has been timed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PipelineSample:
    """All stages of one pipeline, in the order of its layers."""

    taken_s: float
    stages: tuple[StageSample, ...]
    running: int
    """Sequences that are on their way through the stages."""
    waiting: int
    """Requests that wait for room in front of the first stage."""
    context_tokens: float = 0.0
    """Contexts of the running sequences, added up."""
