"""CPU of an engine's metrics page: ours (``engines/serve/exposition.py``) beside prometheus_client's.

    python bench/exposition.py

The same kinds and numbers of figures, in turns, in one process.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily

from chiron.engines.serve.exposition import Totals, exposition

GAUGES = {f"vllm:gauge_{i}": 1.5 * i for i in range(6)}
CONFIG = {"block_size": 16, "num_gpu_blocks": 1000}
COUNTERS = 10
HISTOGRAMS = 3
EDGES = 16
PAGES = 300
ROUNDS = 3


class Collector:
    """What an engine would hand to prometheus_client at each scrape."""

    def collect(self) -> Iterator[Any]:
        for name, value in GAUGES.items():
            gauge = GaugeMetricFamily(name, "", labels=["model_name"])
            gauge.add_metric(["m"], value)
            yield gauge
        for number in range(COUNTERS):
            counter = CounterMetricFamily(f"vllm:counter_{number}", "", labels=["model_name"])
            counter.add_metric(["m"], 123456.5)
            yield counter
        ends = CounterMetricFamily("vllm:request_success", "", labels=["model_name", "finished_reason"])
        for reason in ("stop", "length", "error"):
            ends.add_metric(["m", reason], 1000)
        yield ends
        config = GaugeMetricFamily("vllm:cache_config_info", "", labels=["model_name", *CONFIG])
        config.add_metric(["m", *map(str, CONFIG.values())], 1)
        yield config
        for number in range(HISTOGRAMS):
            histogram = HistogramMetricFamily(f"vllm:histogram_{number}", "", labels=["model_name"])
            histogram.add_metric(["m"], [(str(edge), 100 * edge) for edge in range(EDGES)], 5.0)
            yield histogram


def cpu_us(page: Callable[[], object]) -> float:
    """Of one page."""
    started_s = time.process_time()
    for _ in range(PAGES):
        page()
    return (time.process_time() - started_s) / PAGES * 1e6


def main() -> None:
    totals = Totals(steps=123_456, busy_s=4567.891, prompt_tokens=10**7, generation_tokens=10**7)
    for number in range(1000):
        totals.ttft.add(number / 100)
        totals.itl.add(number / 1000)
        totals.e2e.add(number / 10)
    registry = CollectorRegistry()
    registry.register(Collector())  # type: ignore[arg-type]
    print("CPU microseconds a page: ours, prometheus_client, ratio")
    for _ in range(ROUNDS):
        ours = cpu_us(lambda: exposition("m", totals, GAUGES, CONFIG))
        theirs = cpu_us(lambda: generate_latest(registry))
        print(f"{ours:.0f}  {theirs:.0f}  {theirs / ours:.1f}")


if __name__ == "__main__":
    main()
