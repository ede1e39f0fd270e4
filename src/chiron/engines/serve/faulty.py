"""A faulty engine: a server that returns what no engine should, to test what runs in front of engines.

    python -m chiron.engines.serve.faulty --port 8001 --seed 1

It answers health checks, and everything else with nonsense drawn from ``--seed``: usage that cannot be, metrics that
are not finite or go backwards, streams whose events are of no known shape, odd statuses and headers. Every answer is
HTTP, and most are JSON. ``--valid-share 0.5`` gives valid answers half of the time, so that requests go on coming.
"""

from __future__ import annotations

import argparse
import asyncio
import json
from collections.abc import Sequence
from random import Random
from typing import Any

from chiron.engines.rows import ENGINES
from chiron.engines.serve.http import serve_until_stopped
from chiron.engines.serve.options import real, whole
from chiron.net.loop import run_on_loop
from chiron.net.server import Incoming

NUMBERS: tuple[Any, ...] = (
    *(0, 1, -1, 7, 10**9, 10**12, 2**53, 2**63 - 1, 2**63, 2**64 - 1, -(2**63), 99999999999999999999),
    *(0.5, -0.0, 1e300, -1e300, 1e-300, True, False, None, "7", "NaN", "", [], [5], {}, {"n": 5}),
)
"""What stands where a number should."""
FIGURES = (
    "0",
    "1",
    "-1",
    "0.5",
    "1e300",
    "-1e300",
    "1e308",
    "NaN",
    "+Inf",
    "-Inf",
    "1" * 400,
    "5e-324",
    "",
    "x",
    "1e9999",
)
"""What stands where a metric's value should."""
STATUSES = (
    200,
    200,
    200,
    200,
    200,
    201,
    204,
    206,
    299,
    304,
    400,
    404,
    418,
    429,
    451,
    499,
    500,
    503,
    529,
    599,
    600,
    999,
)
HEADERS = (
    (b"retry-after", b"99999999999999999999"),
    (b"retry-after", b"-1"),
    (b"retry-after", b"Thu, 01 Jan 1970 00:00:00 GMT"),
    (b"x-request-id", b"\xff\xfe"),
    (b"x-long", b"x" * 8192),
    (b"content-type", b""),
    (b"content-encoding", b"gzip"),
)
_MODELS: tuple[Any, ...] = (
    {"object": "list", "data": [{"id": "m"}]},
    {"data": [{"id": 5}, {"id": None}, {}, 7, {"id": "x" * 5000}]},
    {"data": "m"},
    {"data": [["m"]]},
    [],
    "m",
    None,
)


class FaultyEngine:
    """What it says next, by its seed."""

    def __init__(self, seed: int = 0, *, valid_share: float = 0.0, names: Sequence[str] = ("m",)) -> None:
        """``valid_share``: the share of answers that are as they should be."""
        self._draw = Random(f"{seed}:lies")
        self._valid_share = valid_share
        self._names = tuple(names)

    def handle(self, incoming: Incoming) -> None:
        if incoming.method == b"POST":
            self._answer(incoming)
        elif incoming.path == "/metrics":
            incoming.respond(200, self.metrics().encode(), b"text/plain; version=0.0.4")
        elif incoming.path == "/v1/models":
            # Also a health check, so it is 200.
            listed = {"object": "list", "data": [{"id": name, "object": "model"} for name in self._names]}
            incoming.respond(200, json.dumps(listed if self._draws_valid() else self._draw.choice(_MODELS)).encode())
        else:
            incoming.respond(200, b"{}")

    def metrics(self) -> str:
        """Every figure that any engine is asked for, with values that cannot be."""
        names = sorted({name for row in ENGINES.values() for known in row.metrics.values() for name in known})
        lines = []
        for name in names:
            metric, _, label = name.partition("/")
            for _ in range(self._draw.randint(0, 2)):
                value = self._draw.choice(FIGURES)
                labels = f'{{{label}="{value}"}}' if label else self._draw.choice(("", '{engine="0"}', '{engine="1"}'))
                lines.append(f"{metric}{labels} {1 if label else value}")
        self._draw.shuffle(lines)
        return "\n".join(lines) + "\n"

    def event(self, *, chat: bool) -> bytes:
        """One event of a stream."""
        draw = self._draw

        def number() -> Any:
            return draw.choice(NUMBERS)

        delta: Any = draw.choice(({"content": "x"}, {"content": number()}, {"role": number(), "tool_calls": number()}))
        tool = {"index": number(), "id": number(), "function": {"name": "f", "arguments": number()}}
        delta = draw.choice((delta, delta, number(), {"tool_calls": [tool]}))
        choice = {
            "index": draw.choice((0, 0, number())),
            "finish_reason": draw.choice((None, "stop", "length", number())),
        }
        choice |= {"delta": delta} if chat else {"text": draw.choice(("x", number()))}
        choice |= draw.choice(({}, {"token_ids": [1, 2]}, {"token_ids": [number()]}, {"logprobs": number()}))
        body: Any = {"id": "c", "created": number(), "model": number(), "choices": [choice]}
        body = draw.choice((body, body, body, {**body, "choices": number()}, {"error": number()}, number()))
        if isinstance(body, dict) and draw.random() < 0.3:
            body = {**body, "usage": self.usage()}
        data = json.dumps(body).encode()
        ends = (b"\n\n", b"\n\n", b"\n\n", b"\r\n\r\n", b"\r\r", b"\n", b"")
        return draw.choice((b"data: ", b"data: ", b"data:", b"event: x\ndata: ", b": ", b"")) + data + draw.choice(ends)

    def usage(self) -> Any:
        draw = self._draw
        said = {f"{kind}_tokens": draw.choice(NUMBERS) for kind in ("prompt", "completion", "total")}
        return draw.choice((said, said, said, {**said, "prompt_tokens_details": said}, draw.choice(NUMBERS)))

    def _draws_valid(self) -> bool:
        return self._draw.random() < self._valid_share

    def _answer(self, incoming: Incoming) -> None:
        draw, chat = self._draw, incoming.path.endswith("/chat/completions")
        try:
            wants_stream = bool(json.loads(incoming.body).get("stream"))
        except (ValueError, AttributeError):
            wants_stream = False
        valid = self._draws_valid()
        status = 200 if valid else draw.choice(STATUSES)
        headers = [] if valid else draw.sample(HEADERS, draw.randint(0, 2))
        said = {"role": "assistant", "content": "x"} if chat else "x"
        whole = {"index": 0, ("message" if chat else "text"): said, "finish_reason": "stop"}
        body: dict[str, Any] = {"id": "c", "object": "x", "created": 1, "model": "m", "choices": [whole]}
        body["usage"] = {"prompt_tokens": 1, "completion_tokens": 1, "total_tokens": 2} if valid else self.usage()
        if not wants_stream or status >= 300 or status == 204:
            text = json.dumps(body).encode()
            if status >= 300:
                text = draw.choice((b"", b"no JSON", b'{"error": 5}', b'{"error": {"message": 5, "code": []}}', text))
            incoming.respond(status, text, headers=headers)
            return
        incoming.start(status, [(b"content-type", b"text/event-stream"), *headers])
        if valid:
            choice = {"index": 0, ("delta" if chat else "text"): said, "finish_reason": "stop"}
            incoming.write(b"data: " + json.dumps({**body, "choices": [choice]}).encode() + b"\n\n")
        else:
            for _ in range(draw.randint(0, 5)):
                incoming.write(self.event(chat=chat))
        if valid or draw.random() < 0.7:
            incoming.write(b"data: [DONE]\n\n")
        incoming.finish()


def main() -> None:
    parser = argparse.ArgumentParser(prog="chiron.engines.serve.faulty", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=whole(0, 65_535), default=0, help="0: a free one")
    parser.add_argument("--seed", type=whole(0), default=0)
    parser.add_argument("--valid-share", type=real(0.0, 1.0), default=0.0, help="share of valid answers")
    parser.add_argument("--served-model-name", nargs="+", default=["m"])
    options = parser.parse_args()
    engine = FaultyEngine(options.seed, valid_share=options.valid_share, names=options.served_model_name)
    run_on_loop(serve_until_stopped(engine, host=options.host, port=options.port, failed=asyncio.Event()))


if __name__ == "__main__":
    main()
