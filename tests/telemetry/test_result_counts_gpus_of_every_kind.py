"""The fleet over time holds the GPUs of the instances that there are, also where the kinds of a model differ."""

from __future__ import annotations

import pytest

from chiron.control.model import instance_view
from chiron.core.types import Instance, InstanceKind
from chiron.telemetry.recording import Timeline
from policy_factory import fleet, model


def kind(name: str, gpus: int) -> InstanceKind:
    return InstanceKind(name=name, gpu=name, gpus=gpus, price_per_gpu_hour=1.0, kv_capacity_tokens=1000, max_num_seqs=8)


@pytest.mark.parametrize(("gpus", "total"), [((1, 1), 2), ((1, 4), 5), ((4, 1, 8), 13), ((), 0)])
def test_gpus_are_those_of_each_instance(gpus: tuple[int, ...], total: int) -> None:
    instances = [Instance(i, "llama", kind(f"k{i}", count), "mixed", 0.0) for i, count in enumerate(gpus)]
    timeline = Timeline()
    timeline.observe(fleet(model(instance_view(each, 10.0) for each in instances)), {})
    assert [point.gpus for point in timeline.fleet] == [total]
