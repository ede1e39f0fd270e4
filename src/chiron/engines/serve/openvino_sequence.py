"""A request inside the embedded engine: one sequence of tokens."""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf
from typing import Any

from chiron.engines.serve.answer import TokenLogprob
from chiron.engines.serve.call_text import CallText
from chiron.engines.serve.http import Choice
from chiron.engines.serve.openai import FinishReason, GenerationRequest
from chiron.engines.serve.openvino_model import BLOCK_TOKENS
from chiron.engines.serve.text import TextStream

Tokens = SequenceOf[TokenLogprob]


class Sequence:
    """Its tokens, its text, and where it is in the pipeline."""

    __slots__ = (
        "arrival_s",
        "call",
        "choice",
        "config",
        "constrained",
        "generated",
        "handle",
        "id",
        "last_s",
        "number",
        "prefill_left",
        "prefilling",
        "prompt",
        "request",
        "siblings",
        "text",
        "tokens_max",
    )

    def __init__(
        self,
        *,
        id: int,
        request: GenerationRequest,
        number: int,
        choice: Choice,
        prompt: list[int],
        tokens_max: int,
        text: TextStream,
        config: Any,
        constrained: bool,
        call: CallText | None,
        arrival_s: float,
    ) -> None:
        """``number``: which of the choices for its prompt."""
        self.id = id
        self.request = request
        self.number = number
        self.choice = choice
        self.prompt = prompt
        self.tokens_max = tokens_max
        self.text = text
        self.config = config
        self.constrained = constrained
        """A grammar holds it, and the pipeline can only hold to a grammar from its beginning on: once in, it stays."""
        self.call = call
        """Its text is a call of a tool."""
        self.siblings: list[Sequence] = [self]
        """All of the same answer."""
        self.generated = list(request.resume_token_ids)
        """Tokens from the very beginning."""
        self.prefill_left = 0
        """Tokens to prefill before it decodes; an estimate."""
        self.prefilling = False
        """In the pipeline, which has not drawn a token for it yet."""
        self.handle: Any = None
        self.arrival_s = arrival_s
        self.last_s: float | None = None
        """When the last token was delivered, by the loop's clock."""

    @property
    def context(self) -> int:
        return len(self.prompt) + len(self.generated)

    @property
    def blocks_wanted(self) -> int:
        """KV for the next two steps; of one that cannot leave and come back, for all."""
        most = len(self.prompt) + self.tokens_max
        tokens = most if self.constrained else min(self.context + 2, most)
        return -(-tokens // BLOCK_TOKENS)

    def step(self, new: list[int], text: str, logprobs: Tokens) -> None:
        """Hand out what a step generated."""
        if self.call is None:
            self.choice.step(text, self._resumable(new), logprobs=logprobs)
            return
        calls = self.call.feed(text)
        if calls:
            self.choice.step("", (), calls)

    def finish(self, new: list[int], reason: FinishReason, text: str = "", logprobs: Tokens = ()) -> None:
        text += self.text.flush()
        if self.call is None:
            self.choice.finish(text, self._resumable(new), reason, len(self.generated), logprobs=logprobs)
            return
        calls = self.call.feed(text) + self.call.end(complete=reason == "stop")
        self.choice.finish("", (), "tool_calls" if reason == "stop" else reason, len(self.generated), calls)

    def _resumable(self, token_ids: list[int]) -> list[int]:
        """Token ids are given for what can be gone on with."""
        return [] if self.constrained else token_ids
