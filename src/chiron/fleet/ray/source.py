"""What the instances of a kind are on a Ray cluster: a command, and what it needs of the nodes."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar, Literal

OnStop = Literal["keep", "remove"]
ON_STOP: tuple[OnStop, ...] = ("keep", "remove")
NAMESPACE = re.compile(r"[A-Za-z0-9_.-]{1,100}")
NODES_MAX = 64
"""Of one instance."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RaySource:
    """How an instance of a kind is started."""

    command: tuple[str, ...]
    """In each bundle. Filled in on its node: ``{python}``, ``{host}`` (the node's address, where the engine must
    listen), ``{port}`` (a free one; without it the engine prints ``chiron-engine ready port=N``), and for several
    nodes ``{rank}``, ``{nodes}``, ``{leader}`` (address of the first), ``{leader_port}`` (a free one there)."""
    follower_args: tuple[str, ...] = ()
    """Added to the command on all nodes but the first."""
    env: Mapping[str, str] = field(default_factory=dict, repr=False)
    """Added to the environment that Ray gives; not shown, it may hold secrets."""
    address: str = "auto"
    """Of the cluster, as for ``ray.init``; ``auto``: the one that this machine belongs to."""
    namespace: str = "chiron"
    """Of the actors. Gateways that share a cluster have one each, gateways that replace each other the same."""
    python: str = ""
    """The Python that has the cluster's version of Ray; empty: the one that runs Chiron."""
    nodes: int = 1
    """That one instance spans, a bundle on each."""
    resources: Mapping[str, float] = field(default_factory=lambda: {"CPU": 1.0})
    """Of each bundle, by Ray's names: ``CPU``, ``GPU``, ``memory`` (bytes), and what your nodes declare."""
    health_path: str = "/health"
    """Answers 200 once the engine can take requests."""
    start_timeout_s: float = 300.0
    """Longest from its placement until it answers, seconds."""
    absent_after_s: float = 300.0
    """One that has waited for nodes for so long counts as absent in decisions; it is not given up."""
    stop_timeout_s: float = 10.0
    """Seconds between SIGTERM and SIGKILL."""
    log_bytes_max: int = 8 * 1024 * 1024
    """Size at which an instance's log on its node is rotated, once: it takes at most twice that."""
    on_stop: OnStop = "keep"
    """When the gateway is stopped: ``keep`` what runs for the next one, or ``remove`` it."""
    standing: ClassVar[int] = 0
    instances_max: ClassVar[int | None] = None
    gpus: ClassVar[int] = 0
    summary: ClassVar[str] = "actors on Ray"

    def __post_init__(self) -> None:
        if not self.command:
            raise ValueError("command is empty; it must name the engine's program")
        if not self.address:
            raise ValueError("address is ''; it must be 'auto', 'HOST:PORT' or 'ray://HOST:PORT'")
        if not NAMESPACE.fullmatch(self.namespace):
            raise ValueError(f"namespace is {self.namespace!r}; it must be letters, digits, _, . and -, at most 100")
        if not 1 <= self.nodes <= NODES_MAX:
            raise ValueError(f"nodes is {self.nodes}; it must be 1 to {NODES_MAX}")
        if self.on_stop not in ON_STOP:
            raise ValueError(f"on_stop is {self.on_stop!r}; it must be one of {', '.join(ON_STOP)}")
        if not any(self.resources.values()):
            raise ValueError("an instance needs something of a node: give cpus, gpus or resources")
        for name, amount in self.resources.items():
            if not amount >= 0:
                raise ValueError(f"resources: {name} is {amount}; it must be 0 or more")
            if amount > 1 and name == "GPU" and amount != int(amount):
                raise ValueError(f"resources: GPU is {amount:g}; more than one must be whole")
        for key in ("start_timeout_s", "absent_after_s", "stop_timeout_s", "log_bytes_max"):
            if not getattr(self, key) > 0:
                raise ValueError(f"{key} is {getattr(self, key)}; it must be above 0")

    @property
    def fingerprint(self) -> str:
        """Of all that decides what runs: an instance with another one was started by another config."""
        what = [self.command, self.follower_args, self.nodes, sorted(self.needs.items()), sorted(self.env.items())]
        return hashlib.sha256(json.dumps(what).encode()).hexdigest()[:12]

    @property
    def needs(self) -> dict[str, float]:
        """Of each bundle; Ray refuses zeros."""
        return {name: amount for name, amount in self.resources.items() if amount}
