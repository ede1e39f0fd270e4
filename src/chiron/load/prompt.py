"""Prompts of a wanted length: filler text, or token ids.

How many bytes make a token depends on the server's tokenizer, and a chat template adds tokens of its own. Both are
learned from the ``usage`` of its answers: tokens = overhead + bytes / bytes_per_token, a line through what was seen.
Every prompt begins with words of its own, so that a prefix cache does not answer for the engine.
"""

from __future__ import annotations

from functools import lru_cache

from chiron.workload.seeds import generator
from chiron.workload.types import Ints

WORDS = """
time year people way day man thing woman life child world school state family student group country problem hand
part place case week company system program question work government number night point home water room mother area
money story fact month lot right study book eye job word business issue side kind head house service friend father
power hour game line end member law car city community name president team minute idea kid body information back
parent face others level office door health person art war history party result change morning reason research girl
guy moment air teacher force education foot boy age policy process music market sense nation plan college interest
death experience effect use class control field development role effort rate heart drug show leader light voice
wife police mind price report decision son view relationship town road arm difference value building action season
society tax director position player record paper space ground form event official matter
""".split()  # noqa: SIM905 - words are easier to read than a list of strings
POOL_BYTES = 1 << 20
TOKEN_ID_FIRST, TOKEN_ID_LAST = 100, 255
"""Three digits each, so that ids are as wide as they are many, and in every vocabulary: low ids stand for bytes."""

_BYTES_PER_TOKEN = 5.5
_OVERHEAD_TOKENS = 8.0
_PER_TOKEN_MIN, _PER_TOKEN_MAX = 0.2, 50.0
"""Bounds of what is believed: a server that counts otherwise is not counting text."""


class Filler:
    """Where each row of a plan begins in the pools of text and of token ids."""

    def __init__(self, seed: int, rows: int) -> None:
        self._seed = seed
        self._starts: Ints = generator(seed, "prompt starts").integers(0, POOL_BYTES // 4, max(rows, 1))

    def text(self, row: int, size: int) -> bytes:
        """``size`` bytes of words that need no escaping in JSON; it begins with the row's number."""
        head = b"%d " % row
        return head + _slice(_text_pool(self._seed), int(self._starts[row]), max(1, size - len(head)))

    def token_ids(self, row: int, count: int) -> bytes:
        """``count`` token ids as the inside of a JSON array."""
        return _slice(_id_pool(self._seed), 4 * int(self._starts[row]), 4 * count)[:-1]


@lru_cache(maxsize=1)
def _text_pool(seed: int) -> bytes:
    chosen = generator(seed, "prompt text").integers(0, len(WORDS), POOL_BYTES // 5)
    return " ".join(map(WORDS.__getitem__, chosen.tolist())).encode()[:POOL_BYTES]


@lru_cache(maxsize=1)
def _id_pool(seed: int) -> bytes:
    ids = generator(seed, "prompt ids").integers(TOKEN_ID_FIRST, TOKEN_ID_LAST + 1, POOL_BYTES // 4)
    return b"".join(b"%d," % one for one in ids.tolist())


class TokenMeter:
    """Bytes that make a wanted number of tokens, learned by least squares from what a server counted."""

    __slots__ = ("_n", "_x", "_xx", "_xy", "_y")

    def __init__(self) -> None:
        self._n = self._x = self._y = self._xx = self._xy = 0.0

    def observe(self, size: int, tokens: int) -> None:
        """The server counted ``tokens`` in a prompt with ``size`` bytes of filler."""
        self._n += 1
        self._x += size
        self._y += tokens
        self._xx += size * size
        self._xy += size * tokens

    def line(self) -> tuple[float, float]:
        """Overhead in tokens, and bytes per token; defaults for common tokenizers before anything was seen."""
        if not self._n:
            return _OVERHEAD_TOKENS, _BYTES_PER_TOKEN
        spread = self._xx - self._x * self._x / self._n
        if spread > 1e-6 * self._xx:
            slope = (self._xy - self._x * self._y / self._n) / spread
        else:
            # One length only: it says nothing about the overhead.
            slope = max(0.0, self._y / self._n - _OVERHEAD_TOKENS) / (self._x / self._n)
        slope = min(max(slope, 1 / _PER_TOKEN_MAX), 1 / _PER_TOKEN_MIN)
        return max(0.0, (self._y - slope * self._x) / self._n), 1 / slope

    def size(self, tokens: int) -> int:
        """Bytes of filler for a prompt of ``tokens``."""
        overhead, per_token = self.line()
        return max(1, round((tokens - overhead) * per_token))


def _slice(pool: bytes, start: int, size: int) -> bytes:
    piece = pool[start : start + size]
    while len(piece) < size:
        piece += pool[: size - len(piece)]
    return piece
