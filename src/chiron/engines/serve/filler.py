"""The text of an emulated engine: common words in an order that depends on the prompt alone.

One word is one token, and its place in the list is its id. Where JSON or a call of a tool is asked for, it is made up
to fit the schema and cut into tokens of four characters. The answer is a function of the request and the server's seed,
so an answer that was interrupted goes on, here or on another instance, as if it had not been. Likelihoods of tokens
are made up too.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from hashlib import blake2b
from itertools import accumulate
from math import log
from random import Random

from chiron.engines.serve.answer import CallPiece, TokenLogprob
from chiron.engines.serve.openai import FinishReason, GenerationRequest
from chiron.engines.serve.schemas.made_up import make_up
from chiron.engines.serve.vocabulary import WORDS

_SPACED = tuple(f" {word}" for word in WORDS)
_COUNT = len(WORDS)
_TWO_CALLS = 0.25
"""How often an answer calls two tools, where it may."""
CANDIDATES = 32
"""Apart by this many are the places that made-up alternatives are drawn from."""

BYTES_PER_TOKEN = 4
"""Text is not tokenized: this many bytes of a prompt count as one token, which is about right for English."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LengthSettings:
    """How long answers are that nobody asked to be of a certain length: lognormal, the usual shape."""

    mean_tokens: float = 200.0
    sigma: float = 0.7
    """Of the logarithm; 0 makes all answers equally long."""
    seed: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Output:
    """An answer, known before it begins: that is what emulating means."""

    digest: int
    tokens: int
    """Counted from the request's very beginning."""
    finish_reason: FinishReason
    chars: int | None = None
    """Where a stop string cuts the text; None: nowhere."""
    script: tuple[str, ...] | None = None
    """Text of each token, where it is not just words."""
    calls: tuple[CallPiece, ...] | None = None
    """What each token says of calls of tools, where that is the answer."""

    @property
    def plain(self) -> bool:
        """Just words."""
        return self.script is None and self.calls is None

    def ids(self, start: int, end: int) -> list[int]:
        """Tokens ``start`` to ``end`` (not included); those of JSON are made up like the rest."""
        return token_ids(self.digest, start, end)

    def text(self, start: int, end: int) -> str:
        """What those tokens say, stop strings or not."""
        if self.calls is not None:
            return ""
        if self.script is not None:
            return "".join(self.script[start:end])
        return text_of(self.ids(start, end), first=start == 0)


def prompt_tokens(request: GenerationRequest, prompt: str | tuple[int, ...]) -> int:
    """Of one of the request's prompts. Token ids are counted; text is estimated by its bytes."""
    if isinstance(prompt, tuple):
        return len(prompt)
    texts = [prompt]
    for m in request.messages:
        texts += (m.role, m.content, *(text for call in m.calls for text in (call.name, call.arguments)))
    size = sum(len(text.encode(errors="surrogatepass")) for text in texts) + request.prompt_bytes_besides
    return max(1, size // BYTES_PER_TOKEN)


def plan_output(
    request: GenerationRequest, prompt: str | tuple[int, ...], choice: int, tokens_max: int, lengths: LengthSettings
) -> Output:
    """The answer to one of a request's prompts, which may be at most ``tokens_max`` long; ``choice`` is which of its
    ``n``. Raises SchemaError."""
    said = [(m.role, m.content, *((m.calls,) if m.calls else ())) for m in request.messages]
    key = repr((said, prompt, request.seed, lengths.seed, *((choice,) if choice else ())))
    digest = int.from_bytes(blake2b(key.encode(errors="surrogatepass"), digest_size=8).digest(), "big")
    called = calls_of(request, digest)
    if called:
        pieces = call_pieces(called, digest)
        reason: FinishReason = "tool_calls" if len(pieces) <= tokens_max else "length"
        return Output(digest=digest, tokens=min(len(pieces), tokens_max), finish_reason=reason, calls=pieces)
    script = None if request.json is None else cut(make_up(request.json, Random(digest)))
    if script is not None:
        drawn = len(script)
    else:
        drawn = tokens_max + 1 if request.ignore_eos else _draw(digest, lengths)
    tokens = min(drawn, tokens_max)
    output = Output(
        digest=digest, tokens=tokens, finish_reason="stop" if drawn <= tokens_max else "length", script=script
    )
    return _stopped(output, request.stop) if request.stop else output


def _stopped(output: Output, stops: tuple[str, ...]) -> Output:
    text = output.text(0, output.tokens)
    found = [(text.find(stop), len(stop)) for stop in stops if stop in text]
    if not found:
        return output
    start, length = min(found)
    if output.script is None:
        # A space begins each token but the first, so spaces tell how many tokens the text up to there takes.
        tokens = text[: start + length].count(" ") + 1
    else:
        ends = accumulate(map(len, output.script))
        tokens = next(i for i, end in enumerate(ends, 1) if end >= start + length)
    return replace(output, tokens=tokens, finish_reason="stop", chars=start)


def cut(text: str) -> tuple[str, ...]:
    """The tokens of text that is not words."""
    return tuple(text[at : at + BYTES_PER_TOKEN] for at in range(0, len(text), BYTES_PER_TOKEN))


def calls_of(request: GenerationRequest, digest: int) -> list[tuple[str, str]]:
    """The calls that an answer makes: names of tools, and their arguments as JSON. Raises SchemaError.

    Where a model may choose it calls, once a turn: after a tool's result it has its say. Two are called now and then
    where that is allowed.
    """
    tools = request.tools
    if tools.mode == "none" or (tools.mode == "auto" and request.after_tools):
        return []
    random = Random(f"tools:{digest}")
    count = 2 if tools.several and len(tools.allowed) > 1 and random.random() < _TWO_CALLS else 1
    return [(tool.name, make_up(tool.arguments, random)) for tool in random.sample(tools.allowed, count)]


def call_pieces(calls: Sequence[tuple[str, str]], digest: int) -> tuple[CallPiece, ...]:
    """What each token says of them."""
    pieces = []
    for index, (name, arguments) in enumerate(calls):
        pieces.append(CallPiece(index, "", f"call_{digest:016x}{index}", name))
        pieces += [CallPiece(index, piece) for piece in cut(arguments)]
    return tuple(pieces)


def logprobs(output: Output, start: int, end: int, top: int) -> list[TokenLogprob]:
    """Made-up likelihoods of tokens, each the likeliest of ``top`` in its place; the same whenever they are asked."""
    found = []
    for at in range(start, end):
        others = token_ids(output.digest + 1, at * CANDIDATES, at * CANDIDATES + top)
        value = -(token_ids(output.digest + 2, at, at + 1)[0] + 1) / (2 * _COUNT)
        said = output.text(at, at + 1).encode()
        likely = {said: value}
        for i, id in enumerate(others):
            likely.setdefault(_SPACED[id].encode(), value - 1.0 - i)
        found.append(TokenLogprob(said, value, tuple(likely.items())[:top]))
    return found


def prompt_logprobs(pieces: Sequence[str], top: int) -> list[TokenLogprob]:
    """Made-up likelihoods of a prompt's tokens; the first has none, as nothing comes before it."""
    found = []
    for at, piece in enumerate(pieces):
        token = piece.encode(errors="replace")
        value = -(1.0 + at % 7)
        found.append(TokenLogprob(token, value if at else None, ((token, value),) if at and top else ()))
    return found


def spelled(prompt: str | tuple[int, ...]) -> tuple[str, ...]:
    """A prompt's text, token by token."""
    if isinstance(prompt, str):
        return cut(prompt)
    return tuple(WORDS[id % _COUNT] if at == 0 else _SPACED[id % _COUNT] for at, id in enumerate(prompt))


def token_ids(digest: int, start: int, end: int) -> list[int]:
    """Tokens ``start`` to ``end`` (not included) of an answer."""
    return [((digest + index * index) * 2_654_435_761 >> 16) % _COUNT for index in range(start, end)]


def text_of(ids: Sequence[int], *, first: bool) -> str:
    """The text of tokens; ``first``: they begin the answer."""
    if len(ids) == 1:
        return WORDS[ids[0]] if first else _SPACED[ids[0]]
    text = "".join([_SPACED[id] for id in ids])
    return text[1:] if first else text


def _draw(digest: int, lengths: LengthSettings) -> int:
    sigma = lengths.sigma
    mu = log(lengths.mean_tokens) - sigma * sigma / 2
    return max(1, round(Random(f"{lengths.seed}:{digest}").lognormvariate(mu, sigma)))
