"""A control plane over modelled engines under virtual time, with the gateway's journal instead of the simulator's."""

from __future__ import annotations

from pathlib import Path

from chiron.control.actuators import NullActuators
from chiron.control.plane import ControlPlane
from chiron.core.clock import VirtualClock
from chiron.core.types import Instance, InstanceKind, ModelSpec, Request, RequestClass
from chiron.engines.model import EngineModel, StepTable
from chiron.engines.profile import Profile
from chiron.fleet.model import ColdStart, FleetModel
from chiron.gateway.reporting.event_writer import EventLogSettings, EventWriter
from chiron.gateway.reporting.journal import LiveJournal
from chiron.gateway.reporting.live_result import LiveRecorder, RecorderSettings
from chiron.policies.registry import make_policy
from chiron.telemetry.advice import log_facts

WALL_S = 1_800_000_000.0
"""Unix time at the start of every run here."""
CHAT = RequestClass(name="chat", kind="interactive", ttft_s=1.0, itl_s=0.05)
NIGHT = RequestClass(name="night", kind="batch", deadline_s=600.0)
MODEL = "m0"
PROFILE = Profile(
    name="small",
    model=MODEL,
    gpu="g",
    tp=1,
    engine="e",
    h_ms=12.0,
    w0_ms=0.0,
    f_ms_per_token=0.05,
    c_ms_per_context_token=0.0001,
    q_ms_per_token_squared=0.0,
    kv_capacity_tokens=40_000,
    kv_bytes_per_token=1_000,
    max_num_seqs=16,
    max_num_batched_tokens=512,
    price_per_gpu_hour=2.0,
)


class LivePlane:
    """Wired and begun; requests are numbered in order of ``submit``."""

    def __init__(
        self, log: Path | None = None, *, rows_max: int = 1000, policy: str = "chiron", advise: bool = False
    ) -> None:
        self.clock = VirtualClock()
        kind = InstanceKind(
            name="small",
            gpu="g",
            gpus=1,
            price_per_gpu_hour=2.0,
            kv_capacity_tokens=PROFILE.kv_capacity_tokens,
            max_num_seqs=PROFILE.max_num_seqs,
        )
        spec = ModelSpec(name=MODEL, kinds=(kind,), min_instances=1, max_instances=4)
        cold_start = ColdStart(
            node_start_s=1.0,
            model_load_s=4.0,
            warm_load_s=2.0,
            warm_for_s=30.0,
            jitter=0.0,
        )
        self.engines: dict[int, EngineModel] = {}
        self.fleet = FleetModel(clock=self.clock, cold_start=cold_start, seed=1, make_engine=self._engine)
        self.policy = make_policy(policy, None)
        self.recorder = LiveRecorder(
            models=(spec,), classes=(CHAT, NIGHT), settings=RecorderSettings(rows_max=rows_max, points_max=5000)
        )
        writer = None
        if log is not None:
            facts = {"policy": policy, **log_facts([spec], [CHAT, NIGHT], advise=advise)}
            writer = EventWriter(EventLogSettings(path=log, flush_s=0.02), wall_origin_s=WALL_S, facts=facts)
        self.journal = LiveJournal(writer=writer, recorder=self.recorder)
        self.plane = ControlPlane(
            clock=self.clock,
            fleet=self.fleet,
            journal=self.journal,
            models=(spec,),
            classes=(CHAT, NIGHT),
            actuators=NullActuators() if advise else None,
            policy=self.policy,
            observer=self.journal.observe,
        )
        self.recorder.open_requests = self.plane.unfinished
        self.fleet.listener = self.plane
        self.requests: list[Request] = []
        self.plane.adopt(MODEL, 1, self.fleet.attach_running)
        self.plane.begin()
        self.clock.call_later(1.0, self._scrape)

    def submit(self, cls: RequestClass, at_s: float, tokens_in: int = 100, tokens_out: int = 20) -> Request:
        """Arrives at ``at_s``, which must not have passed."""
        self.clock.run_until(at_s)
        request = Request(len(self.requests), MODEL, cls, at_s, tokens_in, tokens_out)
        self.requests.append(request)
        self.plane.submit(request)
        return request

    def rush(self, seconds: float, per_s: float = 20.0, night: int = 200) -> None:
        """A batch of ``night`` requests, then chat for some seconds."""
        start_s = self.clock.now_s
        for _ in range(night):
            self.submit(NIGHT, start_s, 400, 80)
        for number in range(int(seconds * per_s)):
            self.submit(CHAT, start_s + 1.0 + number / per_s, 200, 40)

    def _engine(self, instance: Instance) -> EngineModel:
        engine = EngineModel(
            clock=self.clock,
            instance=instance,
            profile=PROFILE,
            times=StepTable(PROFILE),
            listener=self.plane,
            kv_seconds_per_token=0.0,
            step_mode=False,
        )
        self.engines[instance.id] = engine
        return engine

    def _scrape(self) -> None:
        self.plane.sampled([self.engines[number].sample() for number in self.fleet.engines])
        self.clock.call_later(1.0, self._scrape)
