"""A cascade behind relays that outlive their brain, in virtual time."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from chiron.gateway.relay.admission import Models
from chiron.gateway.settings import CascadeSettings
from chiron.policies.cascade import CascadeRule
from outliving_site import CHAT, OutlivingSite
from real_path import served


class CascadeSite(OutlivingSite):
    """Its engines say no log-probabilities: the second model, here the same, is always asked."""

    def __init__(
        self,
        *,
        first_wait_s: float | None = None,
        after_tokens: int = 0,
        logprob: float | None = None,
        **settings: Any,
    ) -> None:
        """``logprob``: of each token, if they say it after all."""
        self._first_wait_s = first_wait_s
        self._after_tokens = after_tokens
        super().__init__(**settings)
        for engine in self.engines:
            engine.logprob = logprob

    def models(self) -> Models:
        made = served("c", {"chat": CHAT})
        rule = CascadeRule(after_tokens=self._after_tokens)
        asked = CascadeSettings(first="m0", then="m0", rule=rule, first_wait_s=self._first_wait_s)
        made.settings = replace(made.settings, cascade=asked)
        return Models(super().models().by_name, {"c": made})
