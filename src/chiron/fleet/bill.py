"""What a modelled fleet costs."""

from __future__ import annotations

from chiron.core.types import Instance


class Bill:
    """GPU-seconds and cost by model, and peaks. The GPUs of a pipeline are those of its replicas, which come and go by
    themselves."""

    def __init__(self) -> None:
        self.gpu_seconds: dict[str, float] = {}
        self.loading_gpu_seconds = 0.0
        """The part of them before an instance or a replica was ready."""
        self.cost: dict[str, float] = {}
        self.gpus = 0
        self.gpus_peak = 0
        self.instances = 0
        self.instances_peak = 0
        self.cold_starts = 0
        self.warm_starts = 0
        self.wakes = 0
        """Starts that woke a sleeper."""
        self.memory_gb_seconds = 0.0
        """Of host memory, by sleepers."""

    def open(self, instance: Instance) -> None:
        self.instances += 1
        self.instances_peak = max(self.instances_peak, self.instances)
        if instance.kind.pipeline is None:
            self.open_gpus(instance.kind.gpus)

    def close(self, instance: Instance, seconds: float) -> None:
        self.instances -= 1
        if instance.kind.pipeline is None:
            self.close_gpus(instance.model, instance.kind.gpus, instance.kind.price_per_gpu_hour, seconds)

    def open_gpus(self, gpus: int) -> None:
        self.gpus += gpus
        self.gpus_peak = max(self.gpus_peak, self.gpus)

    def close_gpus(self, model: str, gpus: int, price_per_gpu_hour: float, seconds: float) -> None:
        self.gpus -= gpus
        gpu_seconds = seconds * gpus
        self.gpu_seconds[model] = self.gpu_seconds.get(model, 0.0) + gpu_seconds
        self.cost[model] = self.cost.get(model, 0.0) + gpu_seconds / 3600.0 * price_per_gpu_hour

    def count_start(self, *, warm: bool, wakes: bool = False) -> None:
        """A start that is billed, of an instance or a replica."""
        self.wakes += wakes
        self.warm_starts += warm and not wakes
        self.cold_starts += not warm and not wakes

    def count_memory(self, model: str, gb: float, price_per_gb_hour: float, seconds: float) -> None:
        """Of a sleeper."""
        self.memory_gb_seconds += gb * seconds
        if price_per_gb_hour:
            self.cost[model] = self.cost.get(model, 0.0) + gb * seconds / 3600.0 * price_per_gb_hour
