"""A request inside the embedded engine."""

from __future__ import annotations

from typing import Any

from chiron.engines.serve.front import Reply
from chiron.engines.serve.openai import FinishReason, GenerationRequest, Usage
from chiron.engines.serve.openvino_model import BLOCK_TOKENS
from chiron.engines.serve.text import TextStream


class Sequence:
    """Its tokens, its text, and where it is in the pipeline."""

    __slots__ = (
        "arrival_s",
        "config",
        "generated",
        "handle",
        "id",
        "last_s",
        "prefill_left",
        "prefilling",
        "prompt",
        "reply",
        "request",
        "text",
        "tokens_max",
    )

    def __init__(
        self,
        *,
        id: int,
        request: GenerationRequest,
        reply: Reply,
        prompt: list[int],
        tokens_max: int,
        text: TextStream,
        config: Any,
        arrival_s: float,
    ) -> None:
        self.id = id
        self.request = request
        self.reply = reply
        self.prompt = prompt
        self.tokens_max = tokens_max
        self.text = text
        self.config = config
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
        """KV for the next two steps."""
        tokens = min(self.context + 2, len(self.prompt) + self.tokens_max)
        return -(-tokens // BLOCK_TOKENS)

    def finish(self, new: list[int], reason: FinishReason, text: str = "") -> None:
        usage = Usage(prompt_tokens=len(self.prompt), completion_tokens=len(self.generated))
        self.reply.finish(text + self.text.flush(), new, reason, usage)
