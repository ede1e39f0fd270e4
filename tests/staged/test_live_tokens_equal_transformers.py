"""Processes of stages, whatever befalls them, generate what transformers does: in batches, and prompts in chunks."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest

from reference import MARGIN, shortfalls
from staged_models import FAMILIES, need_torch, prompts, tiny

need_torch()

from stage_nursery import StageNursery  # noqa: E402
from staged_live import LAYERS, NAMES, Head, Stages, added, killed, removed, stopped  # noqa: E402
from staged_processes import StageProcess  # noqa: E402

TOKENS = 12
AT_ONCE = 20
OPTIONS = (*NAMES, "--max-num-batched-tokens", "32", "--silent", "1.5", "--drain", "0.05")
FAULTS = (killed, added, stopped, removed)
"""One more comes before one goes."""


def answers(family: str, dtype: str, given: list[list[int]]) -> list[list[int]]:
    """Some at a time; in the middle of each time something happens to one of the three stages."""
    times = [given[at : at + AT_ONCE] for at in range(0, len(given), AT_ONCE)]

    async def main(head: Head, stages: Stages) -> list[list[int]]:
        found = []
        for number, together in enumerate(times):
            stage, fault = number % len(LAYERS), FAULTS[number % len(FAULTS)]
            before = await head.until(lambda said: all(s["ready"] >= 2 for s in said))
            asking = asyncio.gather(*(head.ask(prompt, TOKENS) for prompt in together))
            enough = before[stage]["passes"] + 12
            said = await head.until(passed(stage, enough))
            # The one that was added is taken out of the stage that has it.
            stage = max(range(len(LAYERS)), key=lambda s: len(said[s]["replicas"])) if fault is removed else stage
            await fault(head, stages, stage, stages.busiest(stage, said))
            found += await asking
        told = await head.stages()
        assert told["losses"] >= 2 * (len(times) // len(FAULTS))
        assert told["replayed_tokens"] > 0
        return found

    with StageNursery() as nursery:
        stages = Stages(nursery, tiny(family, dtype), "--pace-ms", "2")
        with StageProcess(["head", str(tiny(family, dtype)), *stages.arguments(), *OPTIONS]) as process:
            return asyncio.run(main(Head(process.port), stages))


def passed(stage: int, count: int) -> Callable[[list[Any]], bool]:
    return lambda said: said[stage]["passes"] >= count


def misses(family: str, dtype: str, given: list[list[int]]) -> list[float]:
    """How far each token of the answers is from what transformers chooses after the same ones."""
    found = answers(family, dtype, given)
    pairs = zip(given, found, strict=True)
    below = [short for pair in pairs for short in shortfalls(tiny(family, dtype), *pair, dtype=dtype)]
    assert len(below) == len(given) * TOKENS
    return below


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_in_float32_two_hundred_prompts_are_answered_as_transformers_would(family: str) -> None:
    below = misses(family, "float32", prompts(200, seed=300 + FAMILIES.index(family), longest=120))
    assert max(below) <= 1e-5, "other tokens than the best ones are only those that are as likely"


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_in_bfloat16_every_token_is_nearly_the_best_of_transformers(family: str) -> None:
    below = misses(family, "bfloat16", prompts(60, seed=400 + FAMILIES.index(family), longest=120))
    assert max(below) <= MARGIN
    assert sum(short > 0 for short in below) <= 0.02 * len(below), "most are the best ones"
