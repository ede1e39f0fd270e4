"""Bodies, prompts and clients that are too much: refused by name, and the streams of others go on."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
from collections.abc import Sequence
from typing import Any

import pytest

from reference import recorded
from staged_models import need_torch, prompts, tiny

need_torch()

from chiron.engines.serve.http import EngineServer  # noqa: E402
from chiron.engines.staged import head_engine  # noqa: E402
from chiron.engines.staged.head import HeadServer, body_limits  # noqa: E402
from chiron.net.connection import Connection  # noqa: E402
from chiron.net.server import serve  # noqa: E402
from staged_site import StagedSite, announce, request, staged_site, until  # noqa: E402

PROMPT = prompts(3, seed=0)[0]
CONTEXT = 2048
CHOICES = 4
WORDS = "word and " * 60_000
"""Of 540,000 letters."""


def test_a_body_may_be_as_long_as_what_fits_the_context_and_not_much_longer() -> None:
    async def main() -> None:
        async with staged_site(tiny(), ("0-3",)) as site:
            limits = body_limits(CONTEXT)
            server = await serve(HeadServer(site.engine, EngineServer(site.engine, ["tiny"], {})).handle, limits=limits)
            try:
                fits = {"model": "tiny", "prompt": [1] * (CONTEXT - 4), "max_tokens": 2}
                assert (await request(server.port, "/v1/completions", fits))[0] == 200
                status, said = await announce(server.port, limits.body_max_bytes + 1)
                assert (status, json.loads(said)["error"]["code"]) == (413, "request_too_large")
            finally:
                await server.close(0.0)

    asyncio.run(main())
    assert body_limits(1 << 30).body_max_bytes == 32 << 20


def test_a_batch_of_prompts_fits_into_a_body() -> None:
    """As evaluations send them: 128 prompts of nearly the whole context."""
    body = json.dumps({"model": "tiny", "prompt": ["word " * 4000] * 128, "max_tokens": 16})
    assert 2_500_000 < len(body) < body_limits(4096).body_max_bytes


def counted(site: StagedSite) -> list[int]:
    """Letters of each text that is tokenised from now on."""
    letters: list[int] = []
    encode = site.engine.tokenizer.encode

    def counting(text: str, *, special: bool) -> list[int]:
        letters.append(len(text))
        return encode(text, special=special)

    site.engine.tokenizer.encode = counting  # type: ignore[method-assign]
    return letters


@pytest.mark.parametrize("chat", [False, True])
def test_of_a_prompt_that_cannot_fit_only_a_part_is_tokenised(chat: bool) -> None:
    async def main() -> None:
        async with staged_site(tiny(), ("0-3",)) as site:
            letters = counted(site)
            asked: dict[str, Any] = {"model": "tiny", "max_tokens": 2}
            if chat:
                path, asked["messages"] = "/v1/chat/completions", [{"role": "user", "content": WORDS}]
            else:
                path, asked["prompt"] = "/v1/completions", WORDS
            status, said = await site.post(path, asked)
            assert (status, json.loads(said)["error"]["code"]) == (400, "context_length_exceeded")
            assert "maximum context length is 2048 tokens" in json.loads(said)["error"]["message"]
            assert letters == [16 * CONTEXT]

    asyncio.run(main())


def test_token_ids_that_are_echoed_become_text_once_and_many_of_them_in_a_thread(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """However many choices there are: each look-up takes time in which no stream gets a token."""
    monkeypatch.setattr(head_engine, "LETTERS_AT_ONCE", 100)

    async def main() -> None:
        async with staged_site(tiny(), ("0-3",)) as site:
            made: list[tuple[int, bool]] = []
            text = site.engine._prompts._text

            def counting(tokens: Sequence[int]) -> str:
                made.append((len(tokens), threading.current_thread() is threading.main_thread()))
                return text(tokens)

            monkeypatch.setattr(site.engine._prompts, "_text", counting)
            for length, on_the_loop in ((100, True), (101, False)):
                prompt = (PROMPT * length)[:length]
                asked = {"model": "tiny", "prompt": prompt, "n": 8, "echo": True, "max_tokens": 1, "seed": 0}
                status, said = await site.post("/v1/completions", asked)
                assert status == 200
                answers = [choice["text"] for choice in json.loads(said)["choices"]]
                assert len(answers) == 8
                assert all(answer.startswith(text(prompt[:-1])) for answer in answers)
                assert made == [(length, on_the_loop)]
                made.clear()

    asyncio.run(main())


async def reads_nothing(site: StagedSite) -> tuple[socket.socket, Connection]:
    """A client with small buffers that asks for long answers, and the server's end of its connection."""
    assert site.server is not None
    silent = socket.socket()
    silent.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    silent.setblocking(False)
    await asyncio.get_running_loop().sock_connect(silent, ("127.0.0.1", site.server.port))
    here = silent.getsockname()
    await until(lambda: any(each.peer == here for each in site.server.connections))
    (there,) = [each for each in site.server.connections if each.peer == here]
    there._transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
    there._transport.set_write_buffer_limits(high=8192)
    asked = {"model": "tiny", "prompt": PROMPT, "max_tokens": 1900, "n": CHOICES, "stream": True, "ignore_eos": True}
    body = json.dumps(asked).encode()
    data = b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n" % len(body) + body
    await asyncio.get_running_loop().sock_sendall(silent, data)
    return silent, there


def test_a_stream_goes_on_beside_them_to_the_same_tokens() -> None:
    """Beside prompts that are too long, too many of them, tools, odd numbers, and a reader that reads nothing."""
    odd: list[dict[str, Any]] = [
        {"prompt": WORDS},
        {"prompt": [[1]] * 100_000},
        {"prompt": [1 << 62]},
        {"prompt": [-1]},
        {"prompt": "a", "max_tokens": 1e300},
        {"prompt": "a", "temperature": float("nan")},
        {"prompt": "a", "seed": 1 << 70},
        {"prompt": "a", "stop": ["x" * 257]},
        {"prompt": "a", "n": 1 << 40},
    ]

    async def main() -> None:
        async with staged_site(tiny(), ("0-1", "2-3")) as site:
            assert site.server is not None
            streaming = asyncio.ensure_future(site.complete(PROMPT, 24))
            silent, slow = await reads_nothing(site)
            answers = await asyncio.gather(*(site.post("/v1/completions", {"model": "tiny", **o}) for o in odd))
            assert [status for status, _ in answers] == [400] * len(odd)
            tools = [{"type": "function", "function": {"name": f"f{i}", "description": "d" * 100}} for i in range(999)]
            talk = {"model": "tiny", "messages": [{"role": "user", "content": "a"}], "tools": tools, "max_tokens": 2}
            assert (await site.post("/v1/chat/completions", talk))[0] == 400
            assert await streaming == recorded("llama")[0]
            async with asyncio.timeout(60.0):
                while not slow.write_paused:
                    await asyncio.sleep(0.01)
                held, drawn = slow._transport.get_write_buffer_size(), site.engine.totals.generation_tokens
                while site.engine.totals.generation_tokens < drawn + 5 * CHOICES:
                    await asyncio.sleep(0.01)
            assert slow._transport.get_write_buffer_size() <= held, "what it does not read waits as text, not as events"
            silent.close()
            await until(lambda: not site.engine.pipeline.running)

    asyncio.run(main())
