"""Regular expressions, as far as text that matches them can be made: what ``pattern`` and ``format`` of a JSON schema
ask for.

Understood are characters, ``.``, classes, groups, alternatives and repeats; ``^`` and ``$`` where they are the ends.
Look-around, back references and word boundaries are errors: they say what text must not be, and nobody can make text
from that. A text that matches as a whole matches anywhere too, so a pattern without anchors is kept as well.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

REPEAT_MAX = 1000
"""Of one part, as written."""
SIZE_MAX = 10_000
"""Characters of the least text that matches."""
_DEPTH_MAX = 32
_PATTERN_CHARS_MAX = 2000
_LAST = 0x10FFFF
_SURROGATES = (0xD800, 0xDFFF)


class PatternError(Exception):
    """The message says what is not understood, and where."""


@dataclass(frozen=True, slots=True)
class Chars:
    """One character of these ranges, both ends included, in order and apart."""

    ranges: tuple[tuple[int, int], ...]


@dataclass(frozen=True, slots=True)
class Chain:
    parts: tuple[Pattern, ...]


@dataclass(frozen=True, slots=True)
class Either:
    options: tuple[Pattern, ...]


@dataclass(frozen=True, slots=True)
class Repeat:
    part: Pattern
    least: int
    most: int | None


Pattern = Chars | Chain | Either | Repeat


@lru_cache(maxsize=256)
def read_pattern(text: str) -> Pattern:
    """Raises PatternError."""
    if len(text) > _PATTERN_CHARS_MAX:
        raise PatternError(f"it has {len(text)} characters; at most {_PATTERN_CHARS_MAX} are allowed")
    reader = _Reader(text)
    pattern = reader.either(0)
    if reader.at < len(text):
        raise PatternError(f"')' at {reader.at} closes nothing")
    least, _ = length(pattern)
    if least > SIZE_MAX:
        raise PatternError(f"what matches it has {least} characters at least; at most {SIZE_MAX} are allowed")
    return pattern


def length(pattern: Pattern, cap: int | None = None) -> tuple[int, int | None]:
    """The fewest and the most characters of what matches; None: no limit. ``cap``: of repeats that have no end."""
    if isinstance(pattern, Chars):
        return 1, 1
    if isinstance(pattern, Repeat):
        least, most = length(pattern.part, cap)
        times = pattern.most if pattern.most is not None or cap is None else max(pattern.least, cap)
        if most == 0 or times == 0:
            return 0, 0
        return least * pattern.least, None if most is None or times is None else most * times
    bounds = [length(part, cap) for part in (pattern.parts if isinstance(pattern, Chain) else pattern.options)]
    mosts = [most for _, most in bounds]
    known = [most for most in mosts if most is not None]
    if isinstance(pattern, Chain):
        return sum(least for least, _ in bounds), None if len(known) < len(mosts) else sum(known)
    return min(least for least, _ in bounds), None if len(known) < len(mosts) else max(known)


def capped(pattern: Pattern, cap: int) -> Pattern:
    """The same, but what repeats without end does so ``cap`` times at most, or as often as it must."""
    if isinstance(pattern, Chars):
        return pattern
    if isinstance(pattern, Repeat):
        most = max(pattern.least, cap) if pattern.most is None else pattern.most
        return Repeat(capped(pattern.part, cap), pattern.least, most)
    if isinstance(pattern, Chain):
        return Chain(tuple(capped(part, cap) for part in pattern.parts))
    return Either(tuple(capped(option, cap) for option in pattern.options))


def within(pattern: Pattern, least: int, most: int | None) -> Pattern | None:
    """A pattern whose every match is also ``least`` to ``most`` characters long; None: not found."""
    if most is not None and length(pattern)[1] is None:
        # The largest cap under which nothing grows too long.
        low, high = 0, most
        while low < high:
            middle = (low + high + 1) // 2
            longest = length(pattern, middle)[1]
            low, high = (middle, high) if longest is not None and longest <= most else (low, middle - 1)
        pattern = capped(pattern, low)
    shortest, longest = length(pattern)
    if most is not None and (longest is None or longest > most):
        return None
    if shortest < least:
        if isinstance(pattern, Chain) and len(pattern.parts) == 1:
            pattern = pattern.parts[0]
        # One character over and over is the case that people write: [a-z]* with a least length.
        if not isinstance(pattern, Repeat) or length(pattern.part) != (1, 1):
            return None
        if pattern.most is not None and pattern.most < least:
            return None
        return Repeat(pattern.part, least, pattern.most)
    return pattern


def chars(*ranges: tuple[int, int]) -> Chars:
    """The characters in any of the ranges."""
    merged: list[tuple[int, int]] = []
    for low, high in sorted(ranges):
        if merged and low <= merged[-1][1] + 1:
            merged[-1] = (merged[-1][0], max(high, merged[-1][1]))
        else:
            merged.append((low, high))
    return Chars(tuple(merged))


def without(some: Chars, others: Chars) -> Chars:
    """Those of ``some`` that are not among ``others``."""
    left = list(some.ranges)
    for low, high in others.ranges:
        cut = []
        for first, last in left:
            if last < low or first > high:
                cut.append((first, last))
                continue
            if first < low:
                cut.append((first, low - 1))
            if last > high:
                cut.append((high + 1, last))
        left = cut
    return Chars(tuple(left))


def _ords(text: str) -> Chars:
    return chars(*((ord(char), ord(char)) for char in text))


_ALL = without(chars((0x20, _LAST)), Chars((_SURROGATES,)))
"""Control characters are left out of what is not named."""
_DIGITS = chars((0x30, 0x39))
_WORD = chars((0x30, 0x39), (0x41, 0x5A), (0x5F, 0x5F), (0x61, 0x7A))
_SPACE = _ords(" \t\n\r\f\v")
_CLASSES = {
    "d": _DIGITS,
    "w": _WORD,
    "s": _ords(" "),
    "D": without(_ALL, _DIGITS),
    "W": without(_ALL, _WORD),
    "S": without(_ALL, _SPACE),
}
_CONTROLS = {"n": "\n", "r": "\r", "t": "\t", "f": "\f", "v": "\v"}
_SPECIAL = "()[]{}*+?|^$.\\"


class _Reader:
    """Reads a pattern from its beginning on; ``at`` is where it is."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.at = 0

    def either(self, depth: int) -> Pattern:
        if depth > _DEPTH_MAX:
            raise PatternError(f"its groups are nested deeper than {_DEPTH_MAX} levels")
        options = [self._chain(depth)]
        while self._next("|"):
            options.append(self._chain(depth))
        return options[0] if len(options) == 1 else Either(tuple(options))

    def _chain(self, depth: int) -> Pattern:
        parts: list[Pattern] = []
        if depth == 0:
            self._next("^")
        while self.at < len(self.text) and self.text[self.at] not in "|)":
            if depth == 0 and self._ends():
                break
            parts.append(self._repeat(self._atom(depth)))
        return parts[0] if len(parts) == 1 else Chain(tuple(parts))

    def _ends(self) -> bool:
        if self.text[self.at] == "$" and self.text[self.at + 1 : self.at + 2] in ("", "|"):
            self.at += 1
            return True
        return False

    def _atom(self, depth: int) -> Pattern:
        char = self.text[self.at]
        self.at += 1
        if char == ".":
            return _ALL
        if char == "[":
            return self._class()
        if char == "\\":
            return self._escape(_CLASSES)
        if char == "(":
            return self._group(depth)
        if char in _SPECIAL and char not in "]}":
            raise self._error(f"{char!r}", 1)
        return _ords(char)

    def _group(self, depth: int) -> Pattern:
        start = self.at
        if self._next("?"):
            if self.text.startswith(("P<", "<"), self.at) and not self.text.startswith(("<=", "<!"), self.at):
                end = self.text.find(">", self.at)
                if end < 0:
                    raise self._error("a group's name")
                self.at = end + 1
            elif not self._next(":"):
                raise self._error(f"'(?{self.text[self.at : self.at + 1]}'", 2)
        inner = self.either(depth + 1)
        if not self._next(")"):
            raise PatternError(f"'(' at {start - 1} is not closed")
        return inner

    def _repeat(self, part: Pattern) -> Pattern:
        if self.at >= len(self.text):
            return part
        char = self.text[self.at]
        bounds: tuple[int, int | None]
        if char in "*+?":
            self.at += 1
            bounds = (1 if char == "+" else 0, 1 if char == "?" else None)
        elif char == "{":
            bounds = self._counts()
        else:
            return part
        self._next("?")  # Lazy or not, the same texts match.
        if self.at < len(self.text) and self.text[self.at] in "*+?{":
            raise self._error("a repeat of a repeat")
        return Repeat(part, *bounds)

    def _counts(self) -> tuple[int, int | None]:
        end = self.text.find("}", self.at)
        first, comma, last = self.text[self.at + 1 : end].partition(",") if end > 0 else ("", "", "")
        if not (first.isascii() and first.isdigit()) or (last and not (last.isascii() and last.isdigit())):
            raise self._error("'{'")
        if len(first) > 4 or len(last) > 4 or int(first) > REPEAT_MAX or (last and int(last) > REPEAT_MAX):
            raise self._error(f"a repeat of more than {REPEAT_MAX}")
        least = int(first)
        most = (int(last) if last else None) if comma else least
        if most is not None and most < least:
            raise self._error("a repeat whose ends are the wrong way round")
        self.at = end + 1
        return least, most

    def _class(self) -> Chars:
        start, negated = self.at - 1, self._next("^")
        found: list[tuple[int, int]] = []
        while self.at < len(self.text) and (self.text[self.at] != "]" or not found):
            low = self._class_char()
            if len(low.ranges) == 1 and low.ranges[0][0] == low.ranges[0][1] and self._is_range():
                self.at += 1
                high = self._class_char()
                if len(high.ranges) != 1 or high.ranges[0][0] < low.ranges[0][0]:
                    raise self._error("a range whose ends are the wrong way round")
                found.append((low.ranges[0][0], high.ranges[0][1]))
            else:
                found += low.ranges
        if not self._next("]"):
            raise PatternError(f"'[' at {start} is not closed")
        named = without(chars(*found), Chars((_SURROGATES,)))
        left = without(_ALL, named) if negated else named
        if not left.ranges:
            raise PatternError(f"the class at {start} has no character")
        return left

    def _is_range(self) -> bool:
        return self.text.startswith("-", self.at) and self.text[self.at + 1 : self.at + 2] not in ("", "]")

    def _class_char(self) -> Chars:
        char = self.text[self.at : self.at + 1]
        self.at += 1
        if char == "\\":
            return self._escape(_CLASSES)
        if not char or (char == "[" and self.text.startswith(":", self.at)):
            raise self._error("a class of characters by name")
        return _ords(char)

    def _escape(self, classes: dict[str, Chars]) -> Chars:
        char = self.text[self.at : self.at + 1]
        self.at += 1
        if char in classes and char:
            return classes[char]
        if char in _CONTROLS:
            return _ords(_CONTROLS[char])
        for letter, digits in (("x", 2), ("u", 4)):
            code = self.text[self.at : self.at + digits]
            if char == letter and len(code) == digits and all(c in "0123456789abcdefABCDEF" for c in code):
                self.at += digits
                if _SURROGATES[0] <= int(code, 16) <= _SURROGATES[1]:
                    raise self._error("half a surrogate pair")
                return _ords(chr(int(code, 16)))
        if not char or char.isalnum():
            raise self._error(f"'\\{char}'", 2)
        return _ords(char)

    def _next(self, wanted: str) -> bool:
        if self.text.startswith(wanted, self.at):
            self.at += len(wanted)
            return True
        return False

    def _error(self, what: str, back: int = 0) -> PatternError:
        return PatternError(f"{what} at {max(0, self.at - back)} is not understood")
