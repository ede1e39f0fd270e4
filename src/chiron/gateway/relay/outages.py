"""Models without an instance that can serve them, and the errors that their clients get.

A request without an instance is held while one is really coming: a start is under way, or one will be tried. It is
refused at once (503, with the reason and Retry-After) while none can come: no endpoint has ever answered, or start
after start of an engine fails. Endpoints that have answered and answer no more are given ``outage_wait_s`` to return.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass

from chiron.control.snapshot import ModelSnapshot, Readers
from chiron.core.types import InstanceKind
from chiron.fleet.port import FleetReport, Trouble
from chiron.gateway.relay.errors import ApiError, unavailable

log = logging.getLogger("chiron.gateway")


@dataclass(frozen=True, slots=True, kw_only=True)
class Outage:
    """Nothing can serve a model now."""

    reason: str
    """For clients: without addresses and without what engines print."""
    retry_s: float
    """When there may be news."""

    def refusal(self) -> ApiError:
        return unavailable(self.reason, self.retry_s)


class Outages:
    """``now`` has an outage for each model that nothing can serve, as of the last ``look``."""

    def __init__(
        self,
        *,
        plane: Readers,
        report: Callable[[], FleetReport],
        outage_wait_s: float = 30.0,
        retry_after_s: float = 1.0,
        changed: Callable[[str, Outage | None], None] = lambda model, outage: None,
    ) -> None:
        """``report``: the state of the fleet; ``changed`` is called when an outage begins or ends."""
        self.now: dict[str, Outage] = {}
        self._plane = plane
        self._report = report
        self._outage_wait_s = outage_wait_s
        self._retry_after_s = retry_after_s
        self._changed = changed
        self._served_s: dict[str, float] = {}
        """When a model last had an instance that was ready."""
        self._why: dict[str, str] = {}
        """What requests wait for, by model, as of ``_why_s``: many ask at the same time."""
        self._why_s = -1.0

    def look(self, now_s: float) -> None:
        """Now and then."""
        report = None
        for model in self._plane.snapshot().models:
            name = model.spec.name
            if model.is_ready:
                self._served_s[name] = now_s
                found = None
            else:
                report = self._report() if report is None else report
                found = self._outage(model, report, now_s)
            before = self.now.get(name)
            if found is not None:
                self.now[name] = found
            elif before is not None:
                del self.now[name]
            if (found is None) != (before is None):
                self._tell(name, found)

    def refusal(self, model: str) -> ApiError | None:
        """Why a request that has just come for this model is not held; None: it is."""
        outage = self.now.get(model)
        return None if outage is None or self._plane.is_served(model) else outage.refusal()

    def why_held(self, model: str, now_s: float) -> str:
        """What a request that waits for an instance of this model waits for."""
        if self._why_s != now_s:
            self._why_s, self._why = now_s, {}
        why = self._why.get(model)
        if why is None:
            why = self._why[model] = _why_held(self._plane.model_snapshot(model), now_s)
        return why

    def _outage(self, model: ModelSnapshot, report: FleetReport, now_s: float) -> Outage | None:
        coming = {i.kind.name: i.kind for i in model.instances}
        # Without any instance the next tick asks for one of the first kind that has room.
        kinds = list(coming.values()) or list(model.spec.kinds)
        troubles = []
        for kind in kinds:
            trouble = self._trouble(model, kind, report, now_s)
            if trouble is None:
                return None
            troubles.append(trouble)
        reasons = "; ".join(dict.fromkeys(trouble.reason for trouble in troubles))
        retry_s = max(self._retry_after_s, min(trouble.retry_s for trouble in troubles))
        return Outage(reason=f"No instance of {model.spec.name!r} can serve this now: {reasons}.", retry_s=retry_s)

    def _trouble(self, model: ModelSnapshot, kind: InstanceKind, report: FleetReport, now_s: float) -> Trouble | None:
        """Why no instance of this kind comes; None: one may come."""
        known = report.kinds.get(kind.name)
        trouble = known.trouble if known is not None else None
        if trouble is None:
            return None
        if trouble.outside:
            if model.cold_starts_seen:  # It may have come and gone between two looks.
                self._served_s.setdefault(model.spec.name, now_s)
            served_s = self._served_s.get(model.spec.name)
            return None if served_s is not None and now_s - served_s < self._outage_wait_s else trouble
        if not model.spec.min_instances and trouble.retry_s <= 0.0:
            return None  # A start is tried again only for a new request.
        return trouble

    def _tell(self, model: str, outage: Outage | None) -> None:
        if outage is None:
            log.warning("model %r can be served again", model)
        else:
            log.warning("requests for model %r are refused (503): %s", model, outage.reason)
        self._changed(model, outage)


def _why_held(model: ModelSnapshot, now_s: float) -> str:
    began = [i.began_s for i in model.instances if i.state == "starting"]
    ready = sum(1 for i in model.instances if i.state == "ready")
    parts = []
    if ready:
        parts.append(f"{ready} instance{'s are' if ready > 1 else ' is'} busy")
    if began:
        usual = f", it usually takes {model.cold_start_s:.0f} s" if model.cold_starts_seen else ""
        parts.append(f"{len(began)} being started (for {max(0.0, now_s - min(began)):.0f} s{usual})")
    return "; ".join(parts) or "no instance yet"
