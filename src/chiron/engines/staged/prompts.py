"""What a request says, as tokens: its prompts, or the conversation by the model's chat template."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence as SequenceOf

from chiron.engines.serve.openai import GenerationRequest
from chiron.engines.serve.request_error import RequestError
from chiron.engines.serve.text import TextStream
from chiron.engines.staged.tokenizer import ModelTokenizer

log = logging.getLogger("chiron.staged")

_LETTERS_PER_TOKEN = 16
"""Text of a prompt has fewer, nearly always. Of one that has more, and so would not fit the context, only as much is
tokenised at first as shows that."""


class PromptReader:
    """For one model. ``read`` may run on a thread of its own."""

    def __init__(self, tokenizer: ModelTokenizer, *, vocabulary: int, len_max: int) -> None:
        """``vocabulary``: how many tokens the model knows; ``len_max``: the most of a prompt and its answer."""
        self._tokenizer = tokenizer
        self._vocabulary = vocabulary
        self._len_max = len_max

    def read(self, request: GenerationRequest) -> tuple[list[list[int]], list[str]]:
        """Prompts as tokens, and as the text to echo if that is asked: made once for all choices of a prompt."""
        prompts = self._prompts(request)
        if not request.echo or request.resume_token_ids:
            return prompts, []
        return prompts, [given if isinstance(given, str) else self._text(given) for given in request.prompts]

    def _prompts(self, request: GenerationRequest) -> list[list[int]]:
        if not request.chat:
            return [self._prompt(prompt) for prompt in request.prompts]
        if not self._tokenizer.chats:
            raise RequestError("This model has no chat template; use /v1/completions.", param="messages")
        try:
            text = self._tokenizer.chat(request.messages, request.tools.offered if request.tools.mode != "none" else ())
        except ValueError as error:
            log.warning("%d messages do not go through the model's chat template: %s", len(request.messages), error)
            raise RequestError("messages do not fit this model's chat template.", param="messages") from None
        return [self._encoded(text, "messages")]

    def _prompt(self, prompt: str | tuple[int, ...]) -> list[int]:
        if isinstance(prompt, str):
            return self._encoded(prompt, "prompt")
        self.check_tokens("prompt", prompt)
        return list(prompt)

    def _encoded(self, text: str, where: str) -> list[int]:
        self._refuse_endless(text, where)
        # A chat template writes the begin token itself.
        tokens = self._tokenizer.encode(text, special=where == "prompt")
        if not tokens:
            raise RequestError(f"{where} is empty; it must hold at least one token.", param=where)
        return tokens

    def _refuse_endless(self, text: str, where: str) -> None:
        """Minutes of tokenising, while other long prompts wait, for a prompt that cannot fit."""
        most = self._len_max
        begin = text[: _LETTERS_PER_TOKEN * most]
        if len(begin) < len(text) and len(self._tokenizer.encode(begin, special=False)) > 2 * most:
            raise RequestError(
                f"This model's maximum context length is {most} tokens; the request's {where} of {len(text)} "
                "characters has more.",
                code="context_length_exceeded",
                param=where,
            )

    def check_tokens(self, field: str, tokens: SequenceOf[int]) -> None:
        largest, allowed = max(tokens, default=0), self._vocabulary - 1
        if largest > allowed:
            raise RequestError(f"{field} holds token {largest}; this model's are 0 to {allowed}.", param=field)

    def _text(self, tokens: SequenceOf[int]) -> str:
        stream = TextStream(self._tokenizer.vocabulary)
        return stream.feed(tokens) + stream.flush()


def letters(request: GenerationRequest) -> int:
    """Of all that has to be tokenised, and token ids that have to become text again."""
    if request.chat:
        calls = [call for message in request.messages for call in message.calls]
        return (
            sum(len(message.content or "") for message in request.messages)
            + sum(len(call.name) + len(call.arguments) for call in calls)
            + sum(len(json.dumps(tool.definition)) for tool in request.tools.offered)
        )
    return sum(len(prompt) for prompt in request.prompts if request.echo or isinstance(prompt, str))
