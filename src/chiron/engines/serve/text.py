"""Tokens to text as they come: never half a character, never part of a stop string.

A ``TextStream`` is a function of the tokens it was fed and of nothing else, so feeding it the tokens of an interrupted
answer brings it to where that answer was, held back bytes included.
"""

from __future__ import annotations

import codecs
import re
from collections.abc import Collection, Iterable, Mapping, Sequence

_SENTENCEPIECE_SPACE = "▁".encode()
_BYTE_TOKEN = re.compile(rb"<0x([0-9A-Fa-f]{2})>")


def token_bytes(vocabulary: Mapping[bytes, int], special: Collection[int]) -> list[bytes]:
    """The bytes that each token stands for, by id; special tokens stand for none.

    Byte-level vocabularies list the bytes themselves. SentencePiece ones write a space as U+2581 and lone bytes as
    ``<0x0A>``, which is how they are told apart.
    """
    sentencepiece = b"<0x0A>" in vocabulary
    table = [b""] * (max(vocabulary.values(), default=-1) + 1)
    for token, id in vocabulary.items():
        if id in special:
            continue
        if sentencepiece:
            byte = _BYTE_TOKEN.fullmatch(token)
            token = bytes.fromhex(byte[1].decode()) if byte else token.replace(_SENTENCEPIECE_SPACE, b" ")
        table[id] = token
    return table


class TextStream:
    """Text of one answer."""

    __slots__ = ("_decoder", "_held", "_stops", "_table", "stopped")

    def __init__(self, table: Sequence[bytes], stops: Sequence[str] = ()) -> None:
        self._table = table
        self._stops = stops
        # Bytes that are no UTF-8 become U+FFFD; those that may become a character wait.
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._held = ""
        self.stopped = False
        """A stop string has come: the text ends before it."""

    def feed(self, token_ids: Iterable[int]) -> str:
        """The text that is certain now."""
        if self.stopped:
            return ""
        table = self._table
        # Models have rows beyond their tokenizer's vocabulary and draw one of them now and then.
        data = b"".join(table[id] for id in token_ids if id < len(table))
        return self._release(self._decoder.decode(data))

    def flush(self) -> str:
        """What was held back, at the end."""
        if self.stopped:
            return ""
        text = self._release(self._decoder.decode(b"", final=True))
        if not self.stopped:
            text, self._held = text + self._held, ""
        return text

    def _release(self, new: str) -> str:
        text = self._held + new
        if not self._stops:
            return text
        found = [at for at in (text.find(stop) for stop in self._stops) if at >= 0]
        if found:
            self.stopped = True
            self._held = ""
            return text[: min(found)]
        keep = max(_overlap(text, stop) for stop in self._stops)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of ``text`` that a stop string could begin with."""
    for length in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:length]):
            return length
    return 0
