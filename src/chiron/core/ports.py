"""What the control plane asks of the world, and what the world tells it.

Every port is a few methods with two implementations or more: simulated and live ones of what the control plane asks,
the control plane itself and whatever stands in front of it (a relay, a test) of what it is told. Calls never block;
what follows from them comes back later, as a call on a port of the other direction. ``Engine`` is in ``types``, beside
the instance that has one.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Protocol

from chiron.core.stages import PipelineSample
from chiron.core.types import Decision, Engine, Instance, Request, Sample

__all__ = [
    "BatchAnnouncements",
    "Completions",
    "Ends",
    "Engine",
    "EngineEvents",
    "Fleet",
    "FleetEvents",
    "FleetLimits",
    "Journal",
    "Queues",
    "RemoteEngineEvents",
    "RemoteFleetEvents",
    "Samples",
    "SleeperEvents",
    "Sleepers",
    "StageSamples",
    "StagedEngine",
    "TokenBudgetEngine",
]

# -- what the control plane asks -------------------------------------------------------------------------------------


class Fleet(Protocol):
    """Creates and removes instances."""

    def create(self, instance: Instance) -> None:
        """Start an instance. Answered by ``instance_ready`` or ``instance_failed``."""

    def remove(self, instance: Instance) -> None:
        """Stop an instance at once; it is drained already."""


class Sleepers(Protocol):
    """A fleet whose instances can sleep: the process lives, its weights wait in host memory, and its GPUs are free for
    others. A sleeper is no instance any more; the next ``Fleet.create`` of its kind wakes it."""

    def sleep(self, instance: Instance) -> None:
        """Put a drained instance to sleep, or stop it where there is no room for a sleeper. Likewise one that is still
        waking, of a fleet that has said so by its ``source``: once it is awake. Answered by ``instance_asleep``, or by
        ``instance_failed``."""

    def keep_asleep(self, kind: str, most: int) -> None:
        """Stop sleepers of a kind, by its name, beyond so many."""


class StagedEngine(Protocol):
    """What an engine that is a pipeline can be asked besides."""

    def scale(self, replicas: Sequence[int]) -> None:
        """How many replicas each stage is to have from now on, first stage first. New ones are used once they are up;
        those that go take no new sequence, and end when they have none."""


class TokenBudgetEngine(Protocol):
    """What an engine of a kind with a ``live_token_budget`` can be asked besides."""

    def set_max_num_batched_tokens(self, max_num_batched_tokens: int) -> None:
        """Tokens of each step that begins from now on: one of each sequence that decodes, the rest prefill."""


class Ends(Protocol):
    """The clients that wait for requests."""

    def ended(self, request: Request) -> None:
        """Its ``outcome`` is set; nothing more will happen to it. Called once for each request, after the journal."""


class Journal(Protocol):
    """Hears everything worth remembering, and changes nothing."""

    wants_events: bool
    """Whether ``event`` is called for requests: it costs time on the path of each. For instances it always is."""

    def decided(self, now_s: float, decision: Decision) -> None: ...

    def ended(self, request: Request) -> None:
        """Its ``outcome`` is set; nothing more will happen to it."""

    def event(self, now_s: float, name: str, request: Request | None, instance: Instance | None) -> None:
        """``arrival``, ``dispatch``, ``first_token``, ``evicted``, ``ended`` with the request; ``created``,
        ``ready``, ``draining``, ``gone``, ``failed`` with the instance."""


# -- what the control plane is told ----------------------------------------------------------------------------------


class Completions(Protocol):
    """Requests come and are taken back."""

    def submit(self, request: Request) -> None:
        """A request arrives. It ends exactly once, in ``Ends.ended``."""

    def cancel(self, request: Request) -> None:
        """Its client does not want it any more. Queued work is dropped, running work is stopped at the next step."""

    def cut_off(self, request: Request) -> None:
        """It has waited or run for too long: Chiron's fault, and load that was not served."""


class BatchAnnouncements(Protocol):
    """Batch work that is still in a store: known to the planner, and not running yet."""

    def announce_batch(
        self, model: str, deadline_s: float, cls: str, requests: int, input_tokens: int, input_square: float
    ) -> None:
        """So much more of it (negative: less). ``deadline_s`` is absolute; what was announced for one (deadline, class)
        must be taken off as it was put on."""


class Queues(Protocol):
    """What an admission limit needs to know of the requests that wait for an instance."""

    def clients_waiting(self, model: str, *, interactive: bool) -> int:
        """Whose clients wait, interactive or flex. Items of jobs are not among them."""

    def shed_lost(self, model: str) -> bool:
        """End one that cannot be served in time any more, so that another can take its place in the queue. False: there
        is none."""


class EngineEvents(Protocol):
    """What every engine tells of the requests that it runs. Whatever comes late, twice or not at all, each placement
    ends once; what is told of an earlier placement than ``Request.epoch`` says must not come here."""

    def first_token(self, request: Request) -> None:
        """Its prefill is over. After an eviction without saved KV this comes again."""

    def finished(self, request: Request) -> None:
        """A complete answer; ``tokens_done`` is its length."""

    def evicted(self, request: Request) -> None:
        """The engine has released it; ``tokens_done`` and saved KV are up to date."""

    def refused(self, request: Request, reason: str) -> None:
        """The engine says that something is wrong with the request."""


class RemoteEngineEvents(EngineEvents, Protocol):
    """The same of an engine behind a connection, which may be lost or answer what it should not."""

    def prefilled(self, request: Request) -> None:
        """Its prefill is presumably over: the first token of an answer in one piece cannot be seen."""

    def failed(self, request: Request, reason: str) -> None:
        """The engine cannot run this request at all."""

    def lost(self, request: Request) -> None:
        """The engine gave it up without an answer, and lives on. It runs again, here or elsewhere, a few times."""

    def avoid(self, instance: Instance, for_s: float) -> None:
        """Dispatch nothing there for a while: it loses requests, though it may be alive."""


class Samples(Protocol):
    """What scrapes of engines bring."""

    def sampled(self, samples: Iterable[Sample]) -> None:
        """A round of scrapes. Of many instances it is not taken at once: samples are asked for as they are taken."""

    def capacity_told(self, instance: Instance, kv_capacity_tokens: int) -> None:
        """An engine has told how much KV it has."""


class StageSamples(Protocol):
    """What scrapes of pipelines bring."""

    def stages_sampled(self, instance: Instance, sample: PipelineSample) -> None: ...


class FleetEvents(Protocol):
    """What a fleet tells of the instances that it was asked for."""

    def instance_ready(self, instance: Instance, engine: Engine) -> None: ...

    def instance_failed(self, instance: Instance) -> None:
        """It is gone with all it held, or its start failed."""


class SleeperEvents(Protocol):
    """What a fleet whose instances can sleep tells besides."""

    def instance_asleep(self, instance: Instance) -> None:
        """Its GPUs are free. Whether it sleeps or was stopped, ``kinds_asleep`` has said."""

    def kinds_asleep(self, asleep: Mapping[str, int]) -> None:
        """How many sleepers of each kind there are now, by name; none of a kind that is not named."""


class RemoteFleetEvents(Protocol):
    """What a fleet that is not Chiron's alone tells besides."""

    def instance_leaving(self, instance: Instance) -> None:
        """It will be taken away soon, by the platform or by somebody else: to be drained, and replaced."""


class FleetLimits(Protocol):
    """What a live fleet tells of kinds of which there are more instances than asked for, or cannot be as many."""

    def kinds_limited(self, most: Mapping[str, int]) -> None:
        """How many instances there can be now, of all such kinds, by name: some endpoints are down, or starts fail.
        Starts beyond it give way to other kinds that have room."""

    def kinds_found(self, found: Mapping[str, int]) -> None:
        """How many instances run that nobody has asked for, by name of their kind: to be taken over. Nothing is removed
        because it is unknown; what is not needed is drained by a later plan, with its reason."""
