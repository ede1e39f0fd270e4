"""How long a round of a pipeline takes, and what it is for each stage (``engines.pipeline`` says why)."""

from __future__ import annotations

from collections.abc import Sequence
from math import ceil, inf, nan

from chiron.core.specs import PipelineKind
from chiron.engines.model import ROUND, StepTable
from chiron.engines.profile import Profile


class StageTimes:
    """One stage's coefficients, ready for use; shared by all pipelines of a kind."""

    __slots__ = ("kv_capacity_tokens", "max_num_seqs", "profile", "table")

    def __init__(self, profile: Profile) -> None:
        self.profile = profile
        self.table = StepTable(profile)
        self.kv_capacity_tokens = profile.kv_capacity_tokens
        self.max_num_seqs = profile.max_num_seqs

    def base_s(self, tokens: int) -> float:
        base = self.table.base
        return base[tokens] if tokens < len(base) else self.profile.base_s(tokens)


class Replica:
    """What one replica of a stage holds."""

    __slots__ = ("attention", "batch", "context", "dead", "draining", "kv", "number", "sequences", "stage", "tokens")

    def __init__(self, stage: int, number: int) -> None:
        self.stage = stage
        self.number = number
        self.draining = False
        self.dead = False
        """With the KV on it: it goes as one that drains, and its sequences begin again from their tokens."""
        self.sequences = 0
        """All that have a place here."""
        self.batch = 0
        """Those that decode."""
        self.context = 0
        """Their contexts, less ``batch`` for each step of the engine: constant while nobody joins or leaves."""
        self.kv = 0
        """Tokens of KV of all others."""
        self.tokens = 0
        """Prompt tokens here in the round that is planned, and their attention work."""
        self.attention = 0


class Stage:
    """The replicas of one stage, and what they have done."""

    __slots__ = (
        "busiest_s",
        "busy_s",
        "charge_growth_s",
        "charge_s",
        "passes",
        "replicas",
        "round_passes",
        "start_s",
        "starting",
        "waiting",
    )

    def __init__(self) -> None:
        self.replicas: list[Replica] = []
        self.starting: list[int] = []
        self.start_s = nan
        self.busy_s = 0.0
        self.passes = 0
        self.charge_s = 0.0
        """Work of all its replicas in the first step of the segment, or in the round with prompts."""
        self.charge_growth_s = 0.0
        self.round_passes = 0
        self.busiest_s = 0.0
        """Of these, on its busiest replica."""
        self.waiting = 0.0


class Rounds:
    """Of one pipeline. It writes into each ``Stage`` what a round is for it."""

    __slots__ = ("_kind", "_stages", "_times", "tokens")

    def __init__(self, kind: PipelineKind, times: Sequence[StageTimes], stages: list[Stage]) -> None:
        self.tokens = 0
        """Of the round that was looked at last."""
        self._kind = kind
        self._times = times
        self._stages = stages

    def candidates(
        self, *, batch: int, context: int, prompt: int, attention: int, step: int
    ) -> list[tuple[float, float]]:
        """All that a round may wait for: seconds of the next, and how much longer each further one takes. ``batch``
        sequences decode, whose contexts are ``context`` tokens together; ``prompt`` tokens of prompts, and their
        ``attention`` work, go with them; ``step``: how many the engine has done."""
        tokens = batch + prompt
        used = [sum(1 for each in stage.replicas if each.batch or each.tokens) for stage in self._stages]
        kind, stages, last = self._kind, self._times, len(self._stages) - 1
        attention_s = [times.table.c * context + times.table.q * attention for times in stages]
        micro_batches = self.choose_micro_batches(tokens, attention_s, used)
        each = ceil(tokens / micro_batches)
        way_s = way_growth_s = 0.0
        found: list[tuple[float, float]] = []
        self.tokens = tokens
        for number, stage in enumerate(self._stages):
            times = stages[number]
            table = times.table
            c, q = table.c, table.q
            way_s += times.base_s(each) + (c * context / micro_batches + q * attention / micro_batches)
            way_growth_s += c * batch / micro_batches
            most = ceil(micro_batches / used[number])
            stage.charge_s = stage.charge_growth_s = stage.busiest_s = 0.0
            stage.round_passes = 0
            for replica in stage.replicas:
                here = replica.batch + replica.tokens
                if not here:
                    continue
                passes = min(most, here)
                own = replica.context + replica.batch * step
                busy_s = times.base_s(ceil(here / passes)) * passes + (c * own + q * replica.attention)
                work = ((busy_s + ROUND) - ROUND, (c * replica.batch + ROUND) - ROUND)
                stage.charge_s += work[0]
                stage.charge_growth_s += work[1]
                stage.busiest_s = max(stage.busiest_s, work[0])
                stage.round_passes += passes
                found.append(work)
                if number < last and kind.token_bytes:
                    found.append(((here * kind.token_bytes / kind.hop_bytes_per_s + ROUND) - ROUND, 0.0))
        if last:
            way_s += (last + 1) * kind.hop_s + last * (each * kind.token_bytes / kind.hop_bytes_per_s)
        found.append(((way_s + ROUND) - ROUND, (way_growth_s + ROUND) - ROUND))
        self._note_waiting(batch, way_s)
        return found

    def _note_waiting(self, batch: int, way_s: float) -> None:
        """Who is not on the way waits for the busiest stage: by Little's law its share of the round."""
        busiest_s = max(stage.busiest_s for stage in self._stages)
        for stage in self._stages:
            queued = stage.busiest_s == busiest_s > way_s
            stage.waiting = batch * (1.0 - way_s / busiest_s) if queued else 0.0

    def choose_micro_batches(self, tokens: int, attention_s: Sequence[float], used: Sequence[int]) -> int:
        """Those with which a round is shortest if all were spread evenly; the fewest of equals. ``attention_s``: of all
        sequences, by stage."""
        kind, widest, last = self._kind, max(used), len(used) - 1
        chosen, shortest_s = widest, inf
        for count in range(widest, self._micro_batches_max(widest) + 1, widest):
            if count > max(widest, tokens):
                break
            each = ceil(tokens / count)
            transfer_s = each * kind.token_bytes / kind.hop_bytes_per_s if last else 0.0
            way_s = (last + 1) * kind.hop_s + last * transfer_s if last else 0.0
            busiest_s = 0.0
            for times, whole_s, replicas in zip(self._times, attention_s, used, strict=True):
                pass_s = times.base_s(each) + whole_s / count
                way_s += pass_s
                busiest_s = max(busiest_s, ceil(count / replicas) * max(pass_s, transfer_s))
            if max(way_s, busiest_s) < shortest_s:
                chosen, shortest_s = count, max(way_s, busiest_s)
        return chosen

    def _micro_batches_max(self, widest: int) -> int:
        stages = len(self._stages)
        return max(widest, self._kind.micro_batches_max or (2 * stages * widest if stages > 1 else 1))
