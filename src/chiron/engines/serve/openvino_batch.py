"""Which sequences are in OpenVINO's pipeline, and when they may leave it.

The pipeline files a block of KV under its tokens when it begins to write it. Whoever left inside a block would leave it
filed as complete, and whoever came with the same beginning later would read KV that was never written. So a sequence
keeps its place to its prefill's end, even if nobody wants its answer any more.

The pipeline is never left short of KV, as it then files blocks under the wrong tokens too, or drops all that it runs.
Before that the youngest sequences are given back, except those that a grammar holds, which could not go on: all the KV
that they may come to want is theirs from the start.
"""

from __future__ import annotations

from chiron.engines.serve.openvino_model import BLOCK_TOKENS, Model
from chiron.engines.serve.openvino_sequence import Sequence
from chiron.engines.serve.prefix import PrefixCache


class Batch:
    """The sequences in the pipeline, and the KV that they want."""

    def __init__(self, model: Model) -> None:
        self.running: list[Sequence] = []
        """Those whose answers are wanted, oldest first."""
        self.leaving: list[Sequence] = []
        """Left by their clients, and yet to come to the end of their prefill."""
        self._model = model
        self._cache = PrefixCache(block_tokens=BLOCK_TOKENS, blocks_max=model.kv_blocks)
        self._freeing_blocks = 0
        """KV of those that have left the pipeline, which the next step frees at its end."""

    @property
    def inside(self) -> list[Sequence]:
        return [*self.leaving, *self.running]

    @property
    def size(self) -> int:
        return len(self.running) + len(self.leaving)

    @property
    def kv_used_tokens(self) -> int:
        return sum(sequence.context - sequence.prefill_left for sequence in self.inside)

    # -- in ------------------------------------------------------------------------------------------------------

    def has_room(self, sequence: Sequence) -> bool:
        """Whether its KV fits in, and leaves each of those inside a block to grow."""
        if not self.size and not self._freeing_blocks:
            return True
        wanted = self._blocks_wanted() + self._freeing_blocks + sequence.blocks_wanted
        return wanted + self.size <= self._model.kv_blocks

    def enter(self, sequence: Sequence) -> int:
        """Into the pipeline; returns the tokens whose KV it finds there."""
        context = [*sequence.prompt, *sequence.generated]
        cached = self._cache.cached(context)
        sequence.prefill_left = len(context) - cached
        sequence.handle = self._model.start(sequence.id, context, sequence.config)
        sequence.prefilling = True
        self.running.append(sequence)
        return cached

    def stepped(self) -> None:
        """The pipeline has run a step."""
        self._freeing_blocks = 0
        for sequence in self.inside:
            sequence.prefilling = sequence.prefilling and not sequence.handle.can_read()

    # -- out -----------------------------------------------------------------------------------------------------

    def leave(self, sequence: Sequence) -> None:
        """Out of the pipeline: it is at its end there, or no block of it is half written."""
        self.running.remove(sequence)
        self._let_go(sequence)

    def cancel(self, sequence: Sequence) -> None:
        """The client of a running sequence has left."""
        if self._may_leave(sequence):
            self.leave(sequence)
        else:
            self.running.remove(sequence)
            self.leaving.append(sequence)

    def let_leave(self) -> None:
        """Those that had to stay for the rest of their prefill go once it is over."""
        for sequence in self.leaving.copy():
            if not sequence.prefilling or sequence.handle.get_status().name != "RUNNING":
                self.leaving.remove(sequence)
                self._let_go(sequence)

    def give_back(self) -> Sequence | None:
        """Take out the youngest that may leave, if KV is short; None if there is enough, or nobody may.

        There must be enough for the step after the next too: what leaves now is freed by the next.
        """
        if self._blocks_wanted() <= self._model.kv_blocks:
            return None
        for sequence in reversed(self.running):
            if not sequence.constrained and self._may_leave(sequence):
                self.leave(sequence)
                return sequence
        return None

    def clear(self) -> None:
        """Forget all, of a pipeline that failed."""
        self.running.clear()
        self.leaving.clear()

    def _blocks_wanted(self) -> int:
        return sum(sequence.blocks_wanted for sequence in self.inside)

    def _may_leave(self, sequence: Sequence) -> bool:
        """Whether no block of it is half written."""
        if not sequence.prefilling:
            return True
        # Prefills go one after another: this one has not begun while another before it goes on.
        before = self.running[: self.running.index(sequence)]
        return any(other.prefilling for other in [*self.leaving, *before])

    def _let_go(self, sequence: Sequence) -> None:
        """A sequence that is not at its end in the pipeline ends at the next step."""
        if not sequence.prefilling:
            # The last token was drawn but not run, so its KV is not there.
            self._cache.add([*sequence.prompt, *sequence.generated[:-1]])
        if sequence.handle.get_status().name == "RUNNING":
            self._freeing_blocks += sequence.blocks_wanted
            sequence.handle.cancel()
