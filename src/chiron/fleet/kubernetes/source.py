"""What the instances of a kind are: pods of one workload, scaled by its scale subresource."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar, Literal

WorkloadName = Literal["deployment", "statefulset", "leaderworkerset"]
ScalerName = Literal["chiron", "external"]
SCALERS: tuple[ScalerName, ...] = ("chiron", "external")


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkloadRow:
    """How the API has a kind of workload."""

    api: str
    kind: str
    plural: str
    ordinals: bool
    """Its pods are numbered, and only the last can go."""


WORKLOADS: Mapping[WorkloadName, WorkloadRow] = {
    "deployment": WorkloadRow(api="/apis/apps/v1", kind="Deployment", plural="deployments", ordinals=False),
    "statefulset": WorkloadRow(api="/apis/apps/v1", kind="StatefulSet", plural="statefulsets", ordinals=True),
    "leaderworkerset": WorkloadRow(
        api="/apis/leaderworkerset.x-k8s.io/v1", kind="LeaderWorkerSet", plural="leaderworkersets", ordinals=True
    ),
}

CONSENT, CONSENTS = "chiron-serving.io/scale", "allowed"
"""A label of a workload, and its value."""
NAME = re.compile(r"[a-z0-9]([a-z0-9.-]{0,251}[a-z0-9])?")
"""Of objects."""


@dataclass(frozen=True, slots=True, kw_only=True)
class KubernetesSource:
    """The workload of one kind of instance."""

    workload: WorkloadName
    name: str
    namespace: str = ""
    """Empty: the one that Chiron runs in, or the kubeconfig's."""
    port: int = 8000
    """Where each pod's engine listens."""
    health_path: str = "/health"
    """Answers 200 once the engine can take requests."""
    headers: Mapping[str, str] = field(default_factory=dict, repr=False)
    """Sent with health checks, such as the engine's API key; not shown."""
    kubeconfig: str = ""
    """A path; empty: the service account of Chiron's pod, else ``KUBECONFIG`` or ``~/.kube/config``."""
    context: str = ""
    """Of the kubeconfig; empty: its current one."""
    start_timeout_s: float = 300.0
    """A pod that is not ready for longer, seconds, counts as absent in decisions; it is not given up."""
    yield_s: float = 600.0
    """After somebody else has scaled it down, Chiron does not scale it up again for so many seconds."""
    scaler: ScalerName = "chiron"
    """Who sets its number of replicas. Another one is told how many there should be, and which pods may go."""
    opt_in: bool = False
    """Only while the workload itself has the label of ``CONSENT``: whoever names it here may not be its owner."""
    standing: ClassVar[int] = 0
    instances_max: ClassVar[int | None] = None
    gpus: ClassVar[int] = 0

    def __post_init__(self) -> None:
        if self.workload not in WORKLOADS:
            raise ValueError(f"workload is {self.workload!r}; it must be one of {', '.join(WORKLOADS)}")
        if self.scaler not in SCALERS:
            raise ValueError(f"scaler is {self.scaler!r}; it must be one of {', '.join(SCALERS)}")
        for key in ("name", "namespace"):
            value = getattr(self, key)
            if not NAME.fullmatch(value) and (value or key == "name"):
                raise ValueError(f"{key} is {value!r}; it must be a Kubernetes name: a-z, 0-9, - and .")
        if not 1 <= self.port <= 65_535:
            raise ValueError(f"port is {self.port}; it must be 1 to 65535")
        for key in ("start_timeout_s", "yield_s"):
            if not getattr(self, key) > 0:
                raise ValueError(f"{key} is {getattr(self, key)}; it must be above 0")

    @property
    def row(self) -> WorkloadRow:
        return WORKLOADS[self.workload]

    @property
    def summary(self) -> str:
        return f"pods of {self.workload} {self.name}"
