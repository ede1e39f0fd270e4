"""The tables of a scenario file that are not part of another package's own settings."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from math import inf
from typing import Literal

from chiron.config.read import ConfigError, read_record, suggest
from chiron.policies.cascade import CascadeRule
from chiron.workload.cascades import ByLength, CascadeShape
from chiron.workload.generate import KINDS, Arrivals
from chiron.workload.lengths import LENGTH_MAX, LognormalTokens
from chiron.workload.programs import LognormalNumber


def require(fine: bool, key: str, value: object, allowed: str) -> None:
    """For ``__post_init__``: the reader puts the path of the table in front."""
    if not fine:
        raise ValueError(f"{key} is {value!r}; it must be {allowed}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Telemetry:
    """How soon the control plane learns what engines do."""

    scrape_period_s: float = 1.0
    """Between two looks at an engine."""
    scrape_delay_s: float = 0.2
    """Between an engine's state and the control plane's knowledge of it."""

    def __post_init__(self) -> None:
        require(self.scrape_period_s > 0, "scrape_period", self.scrape_period_s, "above 0")


@dataclass(frozen=True, slots=True, kw_only=True)
class InstanceSection:
    """A kind of instance: a profile, and what to change of it."""

    profile: str
    """Name of a packaged profile (``chiron profile list``), or a path to a profile file."""
    name: str = ""
    """What results call it; default: the profile's name."""
    price_per_gpu_hour: float | None = None
    """Default: the profile's."""
    max_instances: int = 1_000_000
    """Of this kind; besides the model's own bound."""
    max_num_seqs: int | None = None
    """Most sequences that the engine runs at once; default: the profile's, as for the next four."""
    max_num_batched_tokens: int | None = None
    """Token budget of one step."""
    live_token_budget: bool = False
    """The engine takes a smaller one while it runs; else only as it starts."""
    kv_capacity_tokens: int | None = None
    step_overhead_s: float | None = None
    """CPU time per step that the GPU waits for."""
    request_overhead_s: float | None = None
    """Per request, before its prefill can start."""
    captured_sizes: tuple[int, ...] = ()
    """Tokens of a step for which the engine has captured graphs, ascending; empty: the profile's."""
    admission_s: float | None = None
    """What each prompt adds to the step in which its prefill begins; default: the profile's."""

    def __post_init__(self) -> None:
        for key in ("max_instances", "max_num_seqs", "max_num_batched_tokens", "kv_capacity_tokens"):
            value = getattr(self, key)
            require(value is None or value >= 1, key, value, "1 or more")
        price = self.price_per_gpu_hour
        require(price is None or price >= 0, "price_per_gpu_hour", price, "0 or more")
        sizes = self.captured_sizes
        ascend = min(sizes, default=1) >= 1 and list(sizes) == sorted(set(sizes))
        require(ascend, "captured_sizes", list(sizes), "1 or more, and ascend")


@dataclass(frozen=True, slots=True, kw_only=True)
class StageSection:
    """One stage of a pipeline."""

    layers: str
    """``"0-9"``: first and last, counted from 0; or one number."""
    name: str = ""
    """What results call it; default: ``layers``."""
    min: int = 1
    max: int = 8
    """Replicas."""
    initial: int | None = None
    """Replicas that are up at time 0; default: as the model's ``initial`` has it."""
    price_per_gpu_hour: float | None = None
    """Default: the profile's."""

    def __post_init__(self) -> None:
        self.layer_range()
        require(self.min >= 1, "min", self.min, "1 or more")
        require(self.max >= self.min, "max", self.max, f"at least min ({self.min})")
        first = self.initial
        require(first is None or self.min <= first <= self.max, "initial", first, f"{self.min} to {self.max}")
        price = self.price_per_gpu_hour
        require(price is None or price >= 0, "price_per_gpu_hour", price, "0 or more")

    def layer_range(self) -> tuple[int, int]:
        first, _, last = self.layers.partition("-")
        fine = first.isdecimal() and (last.isdecimal() or "-" not in self.layers)
        require(fine, "layers", self.layers, "a range such as '0-9', or one number")
        return int(first), int(last or first)


@dataclass(frozen=True, slots=True, kw_only=True)
class StagesSection:
    """A pipeline of stages that can stand in place of the model's instances: under policies with ``stages``."""

    profile: str
    """A profile by layer: a packaged one, or a path to a file."""
    split: int | None = None
    """Into so many stages of as many layers each; give either this or ``stage``."""
    stage: tuple[StageSection, ...] = ()
    """Each stage by itself."""
    min: int = 1
    max: int = 16
    """Replicas of each stage of ``split``."""
    min_pipelines: int = 1
    max_pipelines: int = 1
    """Whole pipelines, each with replicas of its own: what the policy for the fleet decides about."""
    hop_latency_s: float = 0.0002
    """Of one message from a stage to the next, and from the last back to the first."""
    hop_gbit_per_s: float = 100.0
    """Bandwidth of the link of each replica."""
    micro_batches_max: int = 0
    """Groups of sequences that are on their way at once; 0: twice the stages, for each replica of the stage that has
    most."""
    max_num_seqs: int = 256
    """Most sequences that one replica of a stage runs (vLLM's default)."""
    max_num_batched_tokens: int = 2048
    """Token budget of one pass."""
    step_overhead_s: float = 0.0
    """CPU time of each stage per pass that its GPU waits for."""
    request_overhead_s: float = 0.0
    """Per request, before its prefill can start."""

    def __post_init__(self) -> None:
        if (self.split is None) == (not self.stage):
            raise ValueError("give either split or a list of stage")
        for key in ("min", "max_num_seqs", "max_num_batched_tokens", "min_pipelines"):
            require(getattr(self, key) >= 1, key, getattr(self, key), "1 or more")
        require(self.split is None or self.split >= 1, "split", self.split, "1 or more")
        require(self.max >= self.min, "max", self.max, f"at least min ({self.min})")
        most = self.max_pipelines
        require(most >= self.min_pipelines, "max_pipelines", most, f"at least min_pipelines ({self.min_pipelines})")
        require(self.hop_gbit_per_s > 0, "hop_gbit_per_s", self.hop_gbit_per_s, "above 0")
        require(self.micro_batches_max >= 0, "micro_batches_max", self.micro_batches_max, "0 or more")


@dataclass(frozen=True, slots=True, kw_only=True)
class CascadeSection:
    """Two models that answer for a third: the small one is asked first."""

    first: str
    """Name of the model that is asked first."""
    then: str
    """Name of the model that is asked where the first one is not sure."""
    escalated: float | ByLength
    """Share of the requests for which it is: a number, or one that grows with the prompt."""
    after_tokens: int = 16
    """Tokens of the first model's answer after which that is known; 0: the whole answer."""
    first_wait_s: float | None = None
    """For so long a request waits for an instance of the first model, before the second one is asked; None: half of the
    TTFT of its class, as in a gateway."""

    def __post_init__(self) -> None:
        fine = isinstance(self.escalated, ByLength) or 0 <= self.escalated <= 1
        require(fine, "escalated", self.escalated, "0 to 1, or { half_tokens, power }")
        self.shape()

    def shape(self) -> CascadeShape:
        """Raises ValueError."""
        rule = CascadeRule(after_tokens=self.after_tokens)
        return CascadeShape(
            first=self.first, then=self.then, escalated=self.escalated, rule=rule, first_wait_s=self.first_wait_s
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSection:
    """A served model, the instances it can run on (preferred first), and the bounds of its fleet; or a cascade, for
    which two others answer."""

    instances: tuple[InstanceSection, ...] = ()
    """None: it runs as ``stages`` only."""
    stages: StagesSection | None = None
    cascade: CascadeSection | None = None
    """It has no instances of its own."""
    min_instances: int = 1
    max_instances: int = 50
    initial: Literal["auto"] | int = "auto"
    """Instances that are ready at time 0, the same for every policy. ``"auto"``: what meets the interactive
    SLOs of the first ten minutes, as if the fleet had been running before (``sim.initial``)."""

    def __post_init__(self) -> None:
        if self.cascade is not None:
            own = [
                each.name
                for each in fields(self)
                if each.name != "cascade" and getattr(self, each.name) != each.default
            ]
            if own:
                raise ValueError(f"a cascade has no {', '.join(own)} of its own: give them to its models")
            return
        fine = bool(self.instances) or self.stages is not None
        require(fine, "instances", [], "a list with at least one { profile = ... }")
        require(self.min_instances >= 0, "min_instances", self.min_instances, "0 or more")
        most = self.max_instances
        require(most >= max(1, self.min_instances), "max_instances", most, "1 or more, and at least min_instances")
        if self.initial != "auto":
            require(0 <= self.initial <= most, "initial", self.initial, f"'auto' or 0 to max_instances ({most})")


@dataclass(frozen=True, slots=True, kw_only=True)
class LengthsSection:
    """Prompt and output lengths drawn independently: a number of tokens, or a lognormal."""

    input: int | LognormalTokens
    output: int | LognormalTokens

    def __post_init__(self) -> None:
        for key in ("input", "output"):
            value = getattr(self, key)
            require(not isinstance(value, int) or value >= 1, key, value, "1 or more")


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerateSection:
    """A generated stream: ``kind``, ``duration``, ``lengths``, and the settings of that kind of arrivals."""

    arrivals: Arrivals
    duration_s: float
    lengths: str | LengthsSection
    """A packaged length set or trace, a path, or ``{ input, output }``."""

    @classmethod
    def from_table(cls, table: object, path: str) -> GenerateSection:
        if not isinstance(table, Mapping) or "kind" not in table:
            raise ConfigError(f"{path}: {table!r} must be a table with kind ({', '.join(KINDS)}), duration, lengths")
        if table["kind"] not in KINDS:
            raise ConfigError(f"{path}.kind: {table['kind']!r}; {suggest(str(table['kind']), KINDS)}")
        own = {"duration", "lengths"}
        settings = {key: value for key, value in table.items() if key not in own | {"kind"}}
        arrivals = read_record(KINDS[table["kind"]], settings, path)
        return read_record(cls, {key: table[key] for key in own & table.keys()}, path, arrivals=arrivals)


@dataclass(frozen=True, slots=True, kw_only=True)
class StreamSection:
    """Requests of one model and class: a trace, or a generated stream."""

    model: str
    class_: str
    key: str = ""
    """Name of the API key that they come with: in an overload the keys of a class share it equally."""
    trace: str = ""
    """A packaged trace (``chiron trace list``) or a path; give either this or ``generate``."""
    format: str = "auto"
    """Of a trace file; auto: recognised by its header."""
    generate: GenerateSection | None = None
    start_s: float = 0.0
    """Where in the trace to begin."""
    duration_s: float = inf
    """How much of it to take."""
    rate_scale: float = 1.0
    """Multiplies the rate and keeps the bursts as they are in proportion."""
    repeat: int = 1
    """Play it this many times, one after the other."""
    offset_s: float = 0.0
    """When the stream begins in the simulation."""

    def __post_init__(self) -> None:
        if bool(self.trace) == (self.generate is not None):
            raise ValueError("give either trace or generate")
        if self.generate is not None and (self.start_s, self.duration_s, self.format) != (0.0, inf, "auto"):
            raise ValueError("start, duration and format belong to a trace; generate has a duration of its own")
        require(self.duration_s > 0, "duration", self.duration_s, "above 0")
        require(self.rate_scale > 0, "rate_scale", self.rate_scale, "above 0")
        require(self.repeat >= 1, "repeat", self.repeat, "1 or more")


@dataclass(frozen=True, slots=True, kw_only=True)
class ArrivalsSection:
    """When programs arrive: ``kind``, ``duration``, and the settings of that kind of arrivals."""

    arrivals: Arrivals
    duration_s: float

    @classmethod
    def from_table(cls, table: object, path: str) -> ArrivalsSection:
        kinds = {name: kind for name, kind in KINDS.items() if name != "closed-loop"}
        if not isinstance(table, Mapping) or "kind" not in table:
            raise ConfigError(f"{path}: {table!r} must be a table with kind ({', '.join(kinds)}) and duration")
        if table["kind"] not in kinds:
            raise ConfigError(f"{path}.kind: {table['kind']!r}; {suggest(str(table['kind']), kinds)}")
        own = {"duration"}
        settings = {key: value for key, value in table.items() if key not in own | {"kind"}}
        arrivals = read_record(kinds[table["kind"]], settings, path)
        return read_record(cls, {key: table[key] for key in own & table.keys()}, path, arrivals=arrivals)


@dataclass(frozen=True, slots=True, kw_only=True)
class ProgramSection:
    """Programs, such as agents and chats: calls one after another, each once those before it have ended."""

    model: str
    class_: str
    """Of each call."""
    name: str = ""
    """What results call these programs; default: the class."""
    key: str = ""
    """Name of the API key that their calls come with."""
    arrivals: ArrivalsSection
    """Of programs: ``{ kind, duration }`` and the settings of that kind."""
    steps: int | LognormalNumber
    """Calls in a row."""
    branches: int | LognormalNumber = 1
    """Calls that a step makes at once, from the same prompt; the next step waits for all."""
    first: int | LognormalTokens
    """Tokens of the first prompt."""
    added: int | LognormalTokens
    """Tokens that tool or user add before each later step, to the prompt and answers before it."""
    output: int | LognormalTokens
    """Tokens of each answer."""
    think_s: float | LognormalNumber = 0.0
    """Of tool or user, from the end of a step to the next one; drawn: in seconds."""
    input_max: int = LENGTH_MAX
    """Tokens to which a longer conversation is cut."""
    deadline_s: float = inf
    """SLO of a program: from its arrival to the end of its last call."""

    def __post_init__(self) -> None:
        for key in ("first", "added", "output", "steps", "branches"):
            value = getattr(self, key)
            require(not isinstance(value, int) or value >= 1, key, value, "1 or more")
        require(self.input_max >= 1, "input_max", self.input_max, "1 or more")
        require(self.deadline_s > 0, "deadline", self.deadline_s, "above 0")
        fine = isinstance(self.think_s, LognormalNumber) or self.think_s >= 0
        require(fine, "think", self.think_s, "0 or more")


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchJobSection:
    """Many batch requests that arrive at once."""

    model: str
    class_: str
    requests: int
    lengths: str | LengthsSection
    at_s: float = 0.0
    """When they arrive."""
    deadline_s: float | None = None
    """From the arrival to the last token of each; default: the class's."""

    def __post_init__(self) -> None:
        require(self.requests >= 1, "requests", self.requests, "1 or more")
        require(self.deadline_s is None or self.deadline_s > 0, "deadline", self.deadline_s, "above 0")


@dataclass(frozen=True, slots=True, kw_only=True)
class CalibrationSection:
    """What settings may be tuned on: never what is judged. Give one of the two."""

    first_s: float = 0.0
    """The first part of the workload, such as ``"20m"``. Every command but ``chiron tune`` runs the rest of it."""
    scenarios: tuple[str, ...] = ()
    """Other scenarios: paths, or names of packaged ones."""

    def __post_init__(self) -> None:
        require(self.first_s >= 0, "first", self.first_s, "0 or more")
        if (self.first_s > 0) == bool(self.scenarios):
            raise ValueError("give either first, such as first = '20m', or scenarios")
