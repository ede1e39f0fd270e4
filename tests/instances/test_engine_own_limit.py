"""An engine that runs fewer requests than Chiron lets in is noticed, and nothing else is taken for that."""

from __future__ import annotations

from collections.abc import Iterable

from chiron.gateway.instances.engine_limit import LOOKS, OwnLimit


def said(rows: Iterable[tuple[int, int, float]], *, cap: int = 128, works: bool = True) -> list[int]:
    """What is found over scrapes of (running, waiting, KV in use)."""
    limit, found = OwnLimit(), []
    for step, (running, waiting, usage) in enumerate(rows):
        figures = {"running": running, "waiting": waiting, "kv_usage": usage, "steps": float(step if works else 0)}
        found.append(limit.look(figures, cap))
    return [each for each in found if each]


def test_requests_that_wait_though_kv_is_free_show_the_limit_and_it_is_said_once() -> None:
    assert said([(32, 84, 0.2)] * 5 * LOOKS) == [32]
    assert said([(32, 84, 0.2), (11, 84, 0.2)] * LOOKS) == [32], "a wave of ends is no new limit"


def test_a_burst_that_is_still_let_in_shows_none() -> None:
    assert said([(number, 90, 0.2) for number in range(80)]) == []


def test_full_kv_a_full_gate_an_empty_queue_and_a_long_step_show_none() -> None:
    assert said([(32, 84, 0.95)] * 3 * LOOKS) == []
    assert said([(128, 3, 0.2)] * 3 * LOOKS) == []
    assert said([(32, 84, 0.2)] * LOOKS + [(32, 0, 0.2)] + [(32, 84, 0.2)] * LOOKS) == []
    assert said([(32, 84, 0.2)] * 3 * LOOKS, works=False) == []


def test_an_engine_without_metrics_shows_none() -> None:
    limit = OwnLimit()
    assert [limit.look({}, 8) for _ in range(3 * LOOKS)] == [0] * 3 * LOOKS
