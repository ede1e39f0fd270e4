"""What happens at one instance, told to the brain."""

from __future__ import annotations

from typing import Protocol

from chiron.gateway.port import messages as m
from chiron.gateway.relay.uplink.brain_link import BrainLink
from chiron.gateway.relay.uplink.item import RelayedItem
from chiron.gateway.relay.upstream import Placement, UpstreamFailure


class Runs(Protocol):
    """Who keeps the placements of this relay."""

    def began(self, placed: Placement) -> None:
        """Its first token is here."""

    def ended(self, placed: Placement, message: m.Answered | m.Lost | m.Evicted) -> None:
        """It has ended, and the brain was told, if there is one."""

    def tell_made(self) -> None:
        """How far answers have come that are collected."""


class RunTeller:
    """What happens at one instance, told to the brain. Implements ``RunReports`` and ``Counts``."""

    def __init__(self, link: BrainLink, runs: Runs, instance: int) -> None:
        self.tokens = 0
        self.held_tokens = 0
        self._link = link
        self._runs = runs
        self._instance = instance
        self._told = 0
        self.counted = True
        """The brain knows the instance."""

    def first_token(self, placed: Placement) -> None:
        placed.told = True
        self._runs.began(placed)
        self._link.post(m.FirstToken(placed.number, placed.tokens))

    def answered(self, placed: Placement, status: int, tokens: int, prompt_tokens: int) -> None:
        self.tell_counts()
        message = m.Answered(placed.number, status, tokens, prompt_tokens, placed.tokens)
        call = placed.request.payload
        if isinstance(call, RelayedItem) and (status < 300 or call.refused):
            self._link.post(call.result(placed.request.id))
        self._link.post(message)
        self._runs.ended(placed, message)

    def lost(self, placed: Placement, failure: UpstreamFailure, *, connect: bool, visible: bool, kept: int) -> None:
        self.tell_counts()
        placed.request.payload.error = failure
        words = failure.message[: m.TEXT_MAX]
        message = m.Lost(placed.number, failure.status, words, connect, visible, kept, placed.tokens)
        self._link.send(message)
        self._runs.ended(placed, message)

    def evicted(self, placed: Placement, kept: int) -> None:
        self.tell_counts()
        message = m.Evicted(placed.number, kept, placed.tokens)
        self._link.send(message)
        self._runs.ended(placed, message)

    def fell_silent(self, placed: Placement, since_s: float) -> None:
        self.tell_counts()
        self._link.post(m.Silent(placed.number, max(0.0, self._link.clock.now_s - since_s), placed.tokens))

    def spoke_again(self, placed: Placement) -> None:
        placed.silent = False
        self._link.post(m.Spoke(placed.number, placed.tokens))

    def tell_counts(self) -> None:
        """Before anything that says how many tokens a run has made, so that sums agree."""
        if self.tokens != self._told:
            if self.counted:
                self._link.post(m.Counted(self._instance, self.tokens - self._told))
            self._told = self.tokens

    def forget_counts(self) -> None:
        """The brain is told how far each run has come."""
        self._told = self.tokens


class PromptTeller(RunTeller):
    """Tells of each block of tokens at once, in the order in which all happens."""

    @property
    def held_tokens(self) -> int:
        return 0

    @held_tokens.setter
    def held_tokens(self, value: int) -> None:
        if value:
            self.tell_counts()
            self._runs.tell_made()
