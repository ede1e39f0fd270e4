"""Whether a gateway, or one of its models, should be sent requests, and why not: ``GET /ready``."""

from __future__ import annotations

from collections.abc import Sequence

from chiron.control.snapshot import Readers
from chiron.gateway.relay.admission import Models
from chiron.gateway.relay.front import Front
from chiron.gateway.relay.outages import Outages
from chiron.gateway.settings import ModelSettings
from chiron.net.clock import LiveClock


class Readiness:
    """Of one gateway."""

    def __init__(
        self,
        configured: Sequence[ModelSettings],
        *,
        clock: LiveClock,
        front: Front,
        models: Models,
        outages: Outages,
        plane: Readers,
    ) -> None:
        self._configured = configured
        self._clock = clock
        self._front = front
        self._models = models
        self._outages = outages
        self._plane = plane

    def gateway(self) -> str:
        """Why a load balancer should send nobody here; models that scale to zero are no reason."""
        if self._front.draining:
            return "draining"
        lacking = [self._lack(model.name) for model in self._configured if model.min_instances]
        return "; ".join(filter(None, lacking))

    def model(self, model: str) -> tuple[bool, str]:
        """Whether it is worth sending requests for this model here, and how it stands with it in words."""
        if self._front.draining:
            return False, "draining"
        served = self._models.named(model)
        if served is not None and served.settings.cascade is not None:
            return self.model(served.settings.cascade.then)  # It answers whatever the other does.
        why = self._lack(model)
        if why and (self._models.by_name[model].settings.min_instances or model in self._outages.now):
            return False, why
        return True, "ready" if not why else "scaled to zero: the first request starts an instance"

    def _lack(self, model: str) -> str:
        """Why no instance of a model is ready; "" if one is."""
        if self._plane.is_served(model):
            return ""
        outage = self._outages.now.get(model)
        held = f"no instance is ready of {model}: {self._outages.why_held(model, self._clock.elapsed_s())}"
        return outage.reason if outage is not None else held
