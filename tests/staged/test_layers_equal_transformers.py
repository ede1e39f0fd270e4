"""Layers of our own, split and batched, generate what transformers' models do."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest

from reference import MARGIN, clear, generated, recorded, shortfalls
from staged_models import FAMILIES, need_torch, prompts, tiny

need_torch()

import torch  # noqa: E402

from chiron.engines.staged.kv import Entry, KvStore  # noqa: E402
from chiron.engines.staged.layers import Likely, StageLayers  # noqa: E402
from chiron.engines.staged.split import StageRange  # noqa: E402
from chiron.engines.staged.weights import read_model_files  # noqa: E402

TOKENS = 24


class Pipeline:
    """Stages called one after another."""

    def __init__(self, directory: Path, ends: Sequence[int], dtype: str = "float32") -> None:
        files = read_model_files(directory)
        begins = [0, *ends[:-1]]
        self.stages = [
            StageLayers(files, StageRange(begin=a, end=b), dtype=dtype) for a, b in zip(begins, ends, strict=True)
        ]
        self.kvs = [
            KvStore(files.architecture, len(s.stage), capacity_tokens=64_000, dtype=s.dtype, device=s.device)
            for s in self.stages
        ]

    def step(self, tokens: list[int], entries: list[Entry]) -> list[int]:
        given = torch.tensor(tokens)
        likely: list[Likely] = []
        for stage, kv in zip(self.stages, self.kvs, strict=True):
            assert not any(kv.reserve(entry) for entry in entries)
            given, likely = stage.run(given, entries, kv)
        return [int(each.ids[0]) for each in likely]


def generate(pipeline: Pipeline, given: list[list[int]], tokens: int, chunk: int) -> list[list[int]]:
    """All at once, joined one a step: a step has some sequences' next tokens and chunks of others' prompts."""
    known = [list(prompt) for prompt in given]
    done = [0] * len(given)
    joined = 0
    while any(len(k) < len(p) + tokens for k, p in zip(known, given, strict=True)):
        joined = min(joined + 1, len(given))
        entries, step, whose = [], [], []
        for each in range(joined):
            count = min(chunk, len(known[each]) - done[each])
            if len(known[each]) >= len(given[each]) + tokens:
                continue
            ends = done[each] + count == len(known[each])
            entries.append(Entry(key=each, position=done[each], count=count, want=int(ends)))
            step += known[each][done[each] : done[each] + count]
            done[each] += count
            whose += [each] if ends else []
        for each, token in zip(whose, pipeline.step(step, entries), strict=True):
            known[each].append(token)
    return [k[len(p) :] for k, p in zip(known, given, strict=True)]


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_tokens_are_equal_in_batches_and_chunks(family: str) -> None:
    given = prompts(3, seed=FAMILIES.index(family))
    assert generate(Pipeline(tiny(family), (1, 4)), given, TOKENS, chunk=16) == recorded(family)


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_recorded_is_what_transformers_generates(family: str) -> None:
    given = prompts(3, seed=FAMILIES.index(family))
    assert [generated(tiny(family), p, TOKENS) for p in given] == recorded(family)


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_of_two_hundred_prompts(family: str) -> None:
    given = prompts(50, seed=100 + FAMILIES.index(family), longest=200)
    expected = [clear(tiny(family), prompt, TOKENS) for prompt in given]
    assert sum(map(len, expected)) > 0.9 * len(given) * TOKENS
    found = generate(Pipeline(tiny(family), (1, 2, 4)), given, TOKENS, chunk=32)
    assert [tokens[: len(sure)] for tokens, sure in zip(found, expected, strict=True)] == expected


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_in_bfloat16_every_token_is_nearly_the_best_of_transformers(family: str) -> None:
    given = prompts(50, seed=200 + FAMILIES.index(family), longest=200)
    found = generate(Pipeline(tiny(family, "bfloat16"), (1, 2, 4), "bfloat16"), given, TOKENS, chunk=32)
    pairs = zip(given, found, strict=True)
    below = [short for pair in pairs for short in shortfalls(tiny(family, "bfloat16"), *pair)]
    assert len(below) == 50 * TOKENS
    assert max(below) <= MARGIN
    assert sum(short > 0 for short in below) <= 0.02 * len(below), "most are the best ones"


def test_a_step_that_is_sent_again_changes_nothing() -> None:
    pipeline = Pipeline(tiny(), (4,))
    (prompt,) = prompts(1, seed=5, longest=60)
    whole = Entry(key=1, position=0, count=len(prompt), want=1)
    first = pipeline.step(prompt, [whole])
    pipeline.step([7] * 9, [Entry(key=1, position=len(prompt) - 3, count=9)])
    assert pipeline.step(prompt, [whole]) == first


def test_kv_is_refused_when_it_is_full_and_free_again() -> None:
    pipeline = Pipeline(tiny(), (4,))
    (kv,) = pipeline.kvs
    kv.capacity_tokens = 128
    assert kv.reserve(Entry(key=1, position=0, count=100)) == ""
    assert kv.reserve(Entry(key=2, position=0, count=1)) == "KV is full: 1 tokens more, and 0 are free"
    kv.free([1])
    assert kv.reserve(Entry(key=2, position=0, count=1)) == ""
    assert kv.reserve(Entry(key=3, position=5, count=1)) == "position 5, and 0 tokens of this sequence are held here"
