"""What an emulated engine says: common words in an order that depends on the prompt alone.

One word is one token, and its place in the list is its id. The answer is a function of the prompt, the request's seed
and the server's seed, so an answer that was interrupted goes on, here or on another instance, as if it had not been.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b
from math import log
from random import Random

from chiron.engines.serve.openai import FinishReason, GenerationRequest

_TEXT = (
    "a about after all also and any as at back because been before but by can come could day do down each end "
    "even few first for from get give go good great hand has have he her here high him his home how I if in into "
    "is it its just keep know large last left life like line little long look made make man many may me more most "
    "much must my never new next night no not now number of off old on one only open or other our out over own "
    "part people place point right said same saw say see set she side small so some still such take tell than "
    "that the their them then there these they thing think this time to together too turn two under until up us "
    "use very want was water way we well went were what when where which while who why will with word work world "
    "would year you your"
)
_WORDS = tuple(_TEXT.split())
_SPACED = tuple(f" {word}" for word in _WORDS)
_COUNT = len(_WORDS)

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


def prompt_tokens(request: GenerationRequest) -> int:
    """Token ids are counted; text is estimated by its bytes."""
    if isinstance(request.prompt, tuple):
        return len(request.prompt)
    texts = [request.prompt, *(text for m in request.messages for text in (m.role, m.content))]
    return max(1, sum(len(text.encode(errors="surrogatepass")) for text in texts) // BYTES_PER_TOKEN)


def plan_output(request: GenerationRequest, tokens_max: int, lengths: LengthSettings) -> Output:
    """The answer to a request that may be at most ``tokens_max`` long."""
    said = [(m.role, m.content) for m in request.messages]
    key = repr((said, request.prompt, request.seed, lengths.seed)).encode(errors="surrogatepass")
    digest = int.from_bytes(blake2b(key, digest_size=8).digest(), "big")
    drawn = tokens_max + 1 if request.ignore_eos else _draw(digest, lengths)
    tokens = min(drawn, tokens_max)
    reason: FinishReason = "stop" if drawn <= tokens_max else "length"
    if request.stop:
        text = text_of(token_ids(digest, 0, tokens), first=True)
        found = [(text.find(stop), len(stop)) for stop in request.stop if stop in text]
        if found:
            start, length = min(found)
            # A space begins each token but the first, so spaces tell how many tokens the text up to there takes.
            tokens = text[: start + length].count(" ") + 1
            return Output(digest=digest, tokens=tokens, finish_reason="stop", chars=start)
    return Output(digest=digest, tokens=tokens, finish_reason=reason)


def token_ids(digest: int, start: int, end: int) -> list[int]:
    """Tokens ``start`` to ``end`` (not included) of an answer."""
    return [((digest + index * index) * 2_654_435_761 >> 16) % _COUNT for index in range(start, end)]


def text_of(ids: Sequence[int], *, first: bool) -> str:
    """The text of tokens; ``first``: they begin the answer."""
    if len(ids) == 1:
        return _WORDS[ids[0]] if first else _SPACED[ids[0]]
    text = "".join([_SPACED[id] for id in ids])
    return text[1:] if first else text


def _draw(digest: int, lengths: LengthSettings) -> int:
    sigma = lengths.sigma
    mu = log(lengths.mean_tokens) - sigma * sigma / 2
    return max(1, round(Random(f"{lengths.seed}:{digest}").lognormvariate(mu, sigma)))
