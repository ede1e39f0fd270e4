"""Calls of tools out of a text that a grammar held to the form of one (``grammar.call_grammar``)."""

from __future__ import annotations

from collections.abc import Sequence

from chiron.engines.serve.answer import CallPiece
from chiron.engines.serve.schemas.grammar import call_opening


class CallText:
    """Takes a text as it comes; gives what is certain of the call in it."""

    __slots__ = ("_arguments", "_id", "_openings", "_text")

    def __init__(self, names: Sequence[str], *, id: str) -> None:
        self._openings = {call_opening(name): name for name in names}
        self._id = id
        self._text = ""
        self._arguments = False
        """The opening is over."""

    def feed(self, text: str) -> list[CallPiece]:
        self._text += text
        pieces = []
        if not self._arguments:
            opening = next((each for each in self._openings if self._text.startswith(each)), None)
            if opening is None:
                return []
            self._arguments = True
            self._text = self._text[len(opening) :]
            pieces.append(CallPiece(0, "", self._id, self._openings[opening]))
        # The very last character closes the call, and is no part of its arguments.
        if len(self._text) > 1:
            pieces.append(CallPiece(0, self._text[:-1]))
            self._text = self._text[-1:]
        return pieces

    def end(self, *, complete: bool) -> list[CallPiece]:
        """What is left when nothing more comes."""
        if complete or not self._arguments or not self._text:
            return []
        return [CallPiece(0, self._text)]
