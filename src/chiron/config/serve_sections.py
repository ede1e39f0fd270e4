"""The tables of the serve config that describe models and what they run on."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from math import inf
from typing import Literal

from chiron.config.read import ConfigError, join, keys_of, read_record, suggest
from chiron.config.sections import require
from chiron.engines.rows import ENGINES

_DEVICE = re.compile(r"[a-z]{2,20}(:\d{1,3})?")
SourceName = Literal["process", "endpoints", "kubernetes", "ray"]

_KEYS_OF: Mapping[SourceName, tuple[str, ...]] = {
    "process": ("command", "model_path", "args", "env", "threads", "pace", "stages", "stages_plan", "sleeper_gb"),
    "endpoints": ("endpoints", "api_key_file"),
    "kubernetes": ("kubernetes", "api_key_file"),
    "ray": ("ray", "command", "model_path", "args", "env", "threads", "pace"),
}
"""Keys that mean something for one source of instances only."""
_OWNERS: Mapping[SourceName, str] = {
    "process": "engines that Chiron starts",
    "endpoints": "endpoints",
    "kubernetes": "kubernetes",
    "ray": "ray",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class ServeKubernetesSection:
    """The workload whose pods are the instances. One of the first three keys is required."""

    deployment: str = ""
    """Name of a Deployment."""
    statefulset: str = ""
    """Name of a StatefulSet. Its pods go from the last one only, so an instance may have to move first."""
    leaderworkerset: str = ""
    """Name of a LeaderWorkerSet: each group is an instance, at its leader's address."""
    namespace: str = ""
    """Default: the one that Chiron runs in, or the kubeconfig's."""
    port: int = 8000
    """Where the engine listens in each pod."""
    kubeconfig: str = ""
    """A file; default: the service account of Chiron's pod, else ``KUBECONFIG`` or ``~/.kube/config``."""
    context: str = ""
    """Of the kubeconfig; default: its current one."""
    yield_s: float = 600.0
    """After somebody else has scaled it down, Chiron asks for no more than what is left for so long."""
    scaler: str = "chiron"
    """Who sets its number of replicas: Chiron, or another one (KEDA, an HPA) that reads ``/chiron/desired``."""
    opt_in: bool = False
    """Only while the workload has the label ``chiron-serving.io/scale=allowed``; always so for a ChironModel's."""

    def __post_init__(self) -> None:
        names = [each for each in (self.deployment, self.statefulset, self.leaderworkerset) if each]
        if len(names) != 1:
            raise ValueError("give one of deployment, statefulset and leaderworkerset")
        require(1 <= self.port <= 65_535, "port", self.port, "1 to 65535")
        require(self.yield_s > 0, "yield", self.yield_s, "above 0")


@dataclass(frozen=True, slots=True, kw_only=True)
class ServeRaySection:
    """The Ray cluster that runs the instances, and what one of them needs there."""

    address: str = "auto"
    """``auto``: the cluster that this machine belongs to; else ``HOST:PORT``, or ``ray://HOST:PORT`` (Ray Client)."""
    namespace: str = "chiron"
    """Of the actors. Gateways that share a cluster need one each."""
    python: str = ""
    """A Python that has the cluster's version of Ray; default: the one that runs Chiron (extra ``ray``)."""
    nodes: int = 1
    """Nodes that one instance spans; each gets its share of the GPUs, and runs the command."""
    gpus: float | None = None
    """GPUs of one instance, by Ray's count; default: ``gpus`` of the kind, for engines that use them."""
    cpus: float = 1.0
    """CPUs on each node."""
    memory: float = 0.0
    """Bytes on each node, by Ray's count; 0: not asked for."""
    resources: Mapping[str, float] = field(default_factory=dict)
    """Other resources that your nodes declare, on each node: ``{ a100 = 1 }``."""
    follower_args: tuple[str, ...] = ()
    """Added to the command on all nodes but the first, such as ``--headless``."""
    absent_after_s: float = 300.0
    """An instance that has waited for a node for longer counts as absent in decisions; it is not given up."""
    on_stop: str = "keep"
    """When Chiron is stopped: ``keep`` what runs for the next one, or ``remove`` it."""

    def __post_init__(self) -> None:
        require(self.nodes >= 1, "nodes", self.nodes, "1 or more")
        require(self.gpus is None or self.gpus >= 0, "gpus", self.gpus, "0 or more")
        require(self.cpus >= 0, "cpus", self.cpus, "0 or more")
        require(self.memory >= 0, "memory", self.memory, "0 or more")
        require(self.absent_after_s > 0, "absent_after", self.absent_after_s, "above 0")


@dataclass(frozen=True, slots=True, kw_only=True)
class ServeStageSection:
    """One stage of the pipeline that an instance is."""

    layers: str = ""
    """Such as ``0-9``, both included. Required."""
    min: int = 1
    """Replicas at least, and at most."""
    max: int = 1
    device: str = "cpu"
    """``cpu``, ``cuda`` or ``cuda:N``; replicas are given no GPUs of their own, so with one there is one replica."""
    gpus: int = 1
    """Of one replica, for costs."""
    price_per_gpu_hour: float = 0.0
    kv_capacity_tokens: int | None = None
    """KV of one replica in tokens; default: the instance's key, else 1 GB of it."""
    start_s: float = 10.0
    """What a start takes until one has been timed."""
    pace_s: float = 0.0
    """A step takes at least this: stands for a slower device."""
    pace_per_sequence_s: float = 0.0
    """And this for each of its sequences."""

    def __post_init__(self) -> None:
        require(bool(self.layers), "layers", self.layers, "given, such as '0-9'")
        require(1 <= self.min <= self.max <= 256, "max", self.max, f"min ({self.min}, 1 or more) to 256")
        require(self.gpus >= 1, "gpus", self.gpus, "1 or more")
        require(self.price_per_gpu_hour >= 0, "price_per_gpu_hour", self.price_per_gpu_hour, "0 or more")
        kv = self.kv_capacity_tokens
        require(kv is None or kv >= 64, "kv_capacity_tokens", kv, "64 or more")
        require(bool(_DEVICE.fullmatch(self.device)), "device", self.device, "cpu, cuda, cuda:0, ...")
        alone = self.device == "cpu" or self.max == 1
        require(alone, "max", self.max, "1 with a GPU as device: replicas would share it")
        require(0 <= self.start_s < 3600, "start", self.start_s, "0 to an hour")
        for key in ("pace", "pace_per_sequence"):
            require(0 <= getattr(self, f"{key}_s") <= 60, key, getattr(self, f"{key}_s"), "0 to a minute")


@dataclass(frozen=True, slots=True, kw_only=True)
class ServeInstanceSection:
    """A kind of instance: an engine that runs already, or one that Chiron starts."""

    engine: str = ""
    """A row of the table of engines. Required."""
    name: str = ""
    """What logs and metrics call it; default: the engine's name. Needed if two kinds of one model would be alike."""
    endpoints: tuple[str, ...] = ()
    """Base URLs of engines that run already, such as ``http://127.0.0.1:8001``. Chiron does not start or stop them."""
    kubernetes: ServeKubernetesSection | None = None
    """The pods of a workload, which Chiron scales: ``{ deployment = "NAME", namespace = "NAME" }``."""
    ray: ServeRaySection | None = None
    """Engines that Chiron starts on a Ray cluster: ``{ address = "auto" }``."""
    command: tuple[str, ...] = ()
    """Program and arguments of one engine process. ``{port}`` stands for a free port, ``{model}`` for the model's
    name, ``{model_path}`` for ``model_path``."""
    model_path: str = ""
    """What to load: a directory or a hub name, or a GGUF file for the engines that Chiron ships (without one: a toy
    model whose text is noise)."""
    profile: str = ""
    """What an engine that only has the timing of another is timed by: a packaged profile (``chiron profile list``) or
    a path."""
    pace: str = ""
    """A profile whose step times the engine keeps at least, so that small machines can host a fleet."""
    stages: tuple[ServeStageSection, ...] = ()
    """Of an engine that is a pipeline: its stages, ``[{ layers = "0-9", min = 1, max = 4 }, ...]``."""
    stages_plan: str = ""
    """What ``chiron stages plan --json`` wrote: step times of the stages, for policies that plan with them."""
    args: tuple[str, ...] = ()
    """Added to the command of an engine that Chiron starts."""
    env: Mapping[str, str] = field(default_factory=dict)
    """Added to the environment of its process."""
    sleeper_gb: float | None = None
    """Instances of this kind may sleep instead of being stopped, and this is what one takes then of
    ``sleepers.host_memory_gb``: its weights, and what its process keeps besides. GB (1e9 bytes)."""
    threads: int | None = None
    """Inference threads of a process on CPUs; default: the engine's own choice."""
    max_num_seqs: int | None = None
    """Most sequences that the engine runs at once: give it the engine's own setting. Default: the
    profile's, else the engine's row."""
    max_num_batched_tokens: int | None = None
    """The engine's token budget of one step. Default: the profile's, else the engine's row."""
    kv_capacity_tokens: int | None = None
    """Tokens of KV that fit one engine. Default: what its metrics say, and until then a guess."""
    context_tokens: int | None = None
    """Longest prompt and answer together that it takes. Default: what it says, if it does."""
    gpu: str = ""
    """Type of GPU, for ``[gpus]`` and prices. Default: the profile's, else the engine's row."""
    gpus: int | None = None
    """GPUs of one instance; default 1, or the profile's."""
    price_per_gpu_hour: float | None = None
    """Default: the profile's, else 0."""
    max_instances: int | None = None
    """Of this kind; default: as many as there are endpoints, else no bound besides the model's."""
    start_timeout_s: float = 300.0
    """From the start of a process to its first good health check. A pod that takes longer is not given up, and counts
    as absent in decisions until it is ready."""
    stop_timeout_s: float = 10.0
    """Between SIGTERM and SIGKILL of a process."""
    log_bytes_max: int = 8 << 20
    """Size at which the log of one process is rotated, once; it takes at most twice that."""
    served_model_name: str = ""
    """The model's name inside the engine; default: the name in this file."""
    api_key_file: str = ""
    """A file that holds the key which the endpoints or pods want; kept out of this file on purpose."""

    def __post_init__(self) -> None:
        if not self.engine:
            raise ValueError(f"engine is missing; one of: {', '.join(ENGINES)}")
        if self.engine not in ENGINES:
            raise ValueError(f"engine is {self.engine!r}; {suggest(self.engine, ENGINES)}")
        whole = (
            "threads",
            "max_num_seqs",
            "max_num_batched_tokens",
            "kv_capacity_tokens",
            "context_tokens",
            "gpus",
            "max_instances",
        )
        for key in whole:
            value = getattr(self, key)
            require(value is None or value >= 1, key, value, "1 or more")
        for key in ("start_timeout", "stop_timeout"):
            require(getattr(self, f"{key}_s") > 0, key, getattr(self, f"{key}_s"), "above 0")
        require(self.log_bytes_max >= 1, "log_bytes_max", self.log_bytes_max, "1 or more")
        gb = self.sleeper_gb
        require(gb is None or 0 < gb < inf, "sleeper_gb", gb, "above 0, and finite")
        if gb is not None and ENGINES[self.engine].sleep is None:
            owners = " or ".join(repr(row.name) for row in ENGINES.values() if row.sleep is not None)
            raise ValueError(f"sleeper_gb is {gb}; it belongs to engine = {owners}")
        price = self.price_per_gpu_hour
        require(price is None or price >= 0, "price_per_gpu_hour", price, "0 or more")
        if self.endpoints and self.command:
            raise ValueError("give either endpoints (engines that run already) or command (to start them)")
        if self.kubernetes and (self.endpoints or self.command):
            raise ValueError("give kubernetes (pods that Chiron scales) or endpoints or command, not two of them")
        if self.ray and (self.endpoints or self.kubernetes):
            raise ValueError("give ray (engines that Chiron starts there) or endpoints or kubernetes, not two of them")
        staged = bool(ENGINES[self.engine].stages_path)
        # One that runs elsewhere may be used as any engine, without its stages being scaled.
        if staged and not self.stages and self.started and not self.command:
            raise ValueError("stages is missing: [{ layers = '0-9', min = 1, max = 4 }, ...]")
        if self.stages and not staged:
            owners = " or ".join(repr(row.name) for row in ENGINES.values() if row.stages_path)
            raise ValueError(f"stages: a list of {len(self.stages)}; it belongs to engine = {owners}")
        for source, keys in _KEYS_OF.items():
            # Keys that have no meaning here are a mistake, and not to be ignored silently.
            for key in keys if source != self.source else ():
                if key in _KEYS_OF[self.source]:
                    continue
                if getattr(self, key):
                    here = " as processes on this machine" if source == "process" and self.source == "ray" else ""
                    raise ValueError(f"{key} is {getattr(self, key)!r}; it belongs to {_OWNERS[source]}{here}")

    @property
    def source(self) -> SourceName:
        """What its instances come from: the keys say it. Here and nowhere else."""
        if self.kubernetes:
            return "kubernetes"
        return "endpoints" if self.endpoints else "ray" if self.ray else "process"

    @property
    def started(self) -> bool:
        """Chiron starts its engines, with a command line of its own."""
        return self.source in ("process", "ray")


@dataclass(frozen=True, slots=True, kw_only=True)
class ServeModelSection:
    """A served model. The keys of an instance may stand here too: alone they are its one kind of instance, beside
    ``instances`` they are defaults of each."""

    instances: tuple[ServeInstanceSection, ...]
    """Kinds of instances in order of preference."""
    min_instances: int | None = None
    """Default: 1; all of them if there are only endpoints, since they run anyway. 0: scale to zero."""
    max_instances: int | None = None
    """Default: as many as there are endpoints, plus what the engine's row says if Chiron starts
    engines."""
    classes: tuple[str, ...] = ()
    """Request classes that it serves; default: all."""
    default_class: str = ""
    """Class of a request that does not say; default: the first interactive one."""
    batch_class: str = ""
    """Class of batch items and of ``service_tier: flex``; default: the first batch one."""
    aliases: tuple[str, ...] = ()
    """Other names that clients may use for it."""

    @classmethod
    def keys(cls) -> list[str]:
        """All that its table may have."""
        own = [key for key in keys_of(cls) if key != "instances"]
        return ["instances", *own, *(key for key in keys_of(ServeInstanceSection) if key not in (*own, "name"))]

    @classmethod
    def from_table(cls, table: object, path: str) -> ServeModelSection:
        own = [key for key in keys_of(cls) if key != "instances"]
        shared_keys = [key for key in keys_of(ServeInstanceSection) if key not in (*own, "name")]
        if not isinstance(table, Mapping):
            raise ConfigError(f"{path}: {table!r} must be a table with engine and, for example, endpoints")
        allowed = cls.keys()
        for key, value in table.items():
            if key not in allowed:
                raise ConfigError(f"{join(path, key)}: unknown key (value {value!r}); {suggest(key, allowed)}")
        shared = {key: table[key] for key in shared_keys if key in table}
        entries = table.get("instances")
        if entries is None:
            instances = [read_record(ServeInstanceSection, shared, path)]
        elif not isinstance(entries, list) or not entries:
            raise ConfigError(f"{path}.instances: {entries!r} must be a list of tables, such as {{ engine = 'vllm' }}")
        else:
            instances = [_read_instance(entry, shared, f"{path}.instances[{i}]") for i, entry in enumerate(entries)]
        rest = {key: table[key] for key in own if key in table}
        return read_record(cls, rest, path, instances=tuple(instances))

    def __post_init__(self) -> None:
        least, most = self.min_instances, self.max_instances
        require(least is None or least >= 0, "min_instances", least, "0 or more")
        require(most is None or most >= 1, "max_instances", most, "1 or more")
        if least is not None and most is not None:
            require(least <= most, "min_instances", least, f"at most max_instances ({most})")


def _read_instance(entry: object, shared: Mapping[str, object], path: str) -> ServeInstanceSection:
    if not isinstance(entry, Mapping):
        raise ConfigError(f"{path}: {entry!r} must be a table, such as {{ engine = 'vllm' }}")
    return read_record(ServeInstanceSection, {**shared, **entry}, path)
