"""The official ``openai`` client before a running ``chiron serve``."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

import pytest

from edge_site import SECRETS, edge_site
from fault_site import FaultSite
from official_client import official_client

openai = pytest.importorskip("openai")

CASCADES = """
[models.sure]
cascade = { first = "small", then = "big", threshold = -0.5 }
[models.unsure]
cascade = { first = "small", then = "big", threshold = 0 }
"""
"""Emulated engines say log-probabilities of -0.5 to 0."""
SAY: Any = [{"role": "user", "content": "Say something."}]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[FaultSite]:
    with edge_site(tmp_path_factory.mktemp("openai"), extra=CASCADES) as running:
        yield running


def client(site: FaultSite, key: str = "all", **options: Any) -> Any:
    return official_client(site.url, SECRETS.get(key, key), **options)


@pytest.fixture
def api(site: FaultSite) -> Iterator[Any]:
    with client(site) as found:
        yield found


@pytest.mark.parametrize("tier", ["auto", "flex"])
def test_chat_in_one_piece(api: Any, tier: str) -> None:
    answer = api.chat.completions.create(
        model="big", messages=SAY, max_tokens=7, service_tier=tier, extra_body={"ignore_eos": True}
    )
    assert (answer.object, answer.model, answer.usage.completion_tokens) == ("chat.completion", "big", 7)
    assert answer.usage.total_tokens == 7 + answer.usage.prompt_tokens
    (choice,) = answer.choices
    assert (choice.message.role, choice.finish_reason, bool(choice.message.content)) == ("assistant", "length", True)
    assert answer.id


@pytest.mark.parametrize("tier", ["auto", "flex"])
@pytest.mark.parametrize("usage", [False, True])
def test_chat_as_a_stream(api: Any, tier: str, usage: bool) -> None:
    options = {"stream_options": {"include_usage": True}} if usage else {}
    chunks = list(
        api.chat.completions.create(
            model="big", messages=SAY, max_tokens=9, stream=True, service_tier=tier,
            extra_body={"ignore_eos": True}, **options
        )
    )  # fmt: skip
    text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    ends = [c.choices[0].finish_reason for c in chunks if c.choices and c.choices[0].finish_reason]
    told = [c.usage for c in chunks if c.usage]
    assert text
    assert ends == ["length"]
    assert [u.completion_tokens for u in told] == ([9] if usage else [])
    assert {c.object for c in chunks} == {"chat.completion.chunk"}


@pytest.mark.parametrize(("model", "answers"), [("sure", "small"), ("unsure", "big")])
def test_a_cascade(api: Any, model: str, answers: str) -> None:
    asked = {"model": model, "max_tokens": 30, "extra_body": {"ignore_eos": True}}
    whole = api.chat.completions.create(messages=SAY, **asked)
    assert (whole.model, whole.usage.completion_tokens, whole.choices[0].logprobs) == (answers, 30, None)
    chunks = list(api.chat.completions.create(messages=SAY, stream=True, **asked))
    assert {chunk.model for chunk in chunks} == {answers}
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert [c.choices[0].finish_reason for c in chunks if c.choices and c.choices[0].finish_reason] == ["length"]
    text = api.completions.create(prompt="Say something.", logprobs=2, **asked)
    assert (text.model, len(text.choices[0].logprobs.top_logprobs[3])) == (answers, 2)


@pytest.mark.parametrize("prompt", ["Say something.", [1, 2, 3]])
@pytest.mark.parametrize("tier", [{}, {"service_tier": "flex"}])
def test_completions(api: Any, prompt: Any, tier: dict[str, str]) -> None:
    body = {"ignore_eos": True, **tier}
    answer = api.completions.create(model="small", prompt=prompt, max_tokens=6, extra_body=body)
    assert (answer.object, answer.usage.completion_tokens, bool(answer.choices[0].text)) == ("text_completion", 6, True)
    chunks = list(api.completions.create(model="small", prompt=prompt, max_tokens=6, stream=True, extra_body=body))
    assert "".join(chunk.choices[0].text for chunk in chunks)
    assert [c.choices[0].finish_reason for c in chunks if c.choices[0].finish_reason] == ["length"]


def test_fields_of_the_engines_own_reach_it(api: Any) -> None:
    answer = api.chat.completions.create(
        model="gpt-4o", messages=SAY, max_tokens=4, extra_body={"return_token_ids": True, "ignore_eos": True}
    )
    assert len(answer.choices[0].model_extra["token_ids"]) == 4


def test_models(site: FaultSite, api: Any) -> None:
    assert [model.id for model in api.models.list()] == ["big", "gpt-4o", "small", "sure", "unsure"]
    alias = api.models.retrieve("gpt-4o")
    assert (alias.id, alias.model_extra) == ("gpt-4o", {"root": "big"})
    with pytest.raises(openai.NotFoundError):
        api.models.retrieve("nope")
    with client(site, "small-only") as other:
        assert [model.id for model in other.models.list()] == ["small"]


@pytest.mark.parametrize(
    ("key", "fields", "error", "code"),
    [
        ("nobody", {}, "AuthenticationError", "invalid_api_key"),
        ("all", {"model": "nope"}, "NotFoundError", "model_not_found"),
        ("all", {"messages": []}, "BadRequestError", None),
        ("all", {"max_tokens": -1}, "BadRequestError", None),
        ("all", {"extra_headers": {"x-chiron-class": "gold"}}, "BadRequestError", None),
        ("small-only", {}, "PermissionDeniedError", "permission_denied"),
        ("chat-only", {"service_tier": "flex"}, "PermissionDeniedError", "permission_denied"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_errors_are_the_clients_own(
    site: FaultSite, key: str, fields: dict[str, Any], error: str, code: str | None, stream: bool
) -> None:
    asked = {"model": "big", "messages": SAY, "max_tokens": 5, "stream": stream, **fields}
    with client(site, key) as api, pytest.raises(getattr(openai, error)) as caught:
        api.chat.completions.create(**asked)
    assert caught.value.code == code
    assert caught.value.type
    assert caught.value.message


def test_rate_limits_are_waited_out_by_the_client_itself(site: FaultSite) -> None:
    with client(site, "few") as api:
        for _ in range(2):
            api.chat.completions.create(model="big", messages=SAY, max_tokens=2)
        with pytest.raises(openai.RateLimitError) as caught:
            api.chat.completions.create(model="big", messages=SAY, max_tokens=2)
    assert caught.value.code == "rate_limit_exceeded"
    assert int(caught.value.response.headers["retry-after-ms"]) > 0
    assert caught.value.response.headers["retry-after"]


@pytest.mark.slow
def test_many_at_once_and_some_that_are_left(site: FaultSite) -> None:
    async def main() -> None:
        async with openai.AsyncOpenAI(base_url=site.url + "/v1", api_key=SECRETS["all"], max_retries=0) as api:

            async def one(number: int) -> int:
                stream = await api.chat.completions.create(
                    model="big", messages=SAY, max_tokens=30, stream=True, extra_body={"ignore_eos": True},
                    stream_options={"include_usage": True},
                )  # fmt: skip
                async for chunk in stream:
                    if number % 5 == 0:
                        await stream.close()
                        return 0
                    if chunk.usage:
                        return int(chunk.usage.completion_tokens)
                raise AssertionError("no usage")

            assert sorted(await asyncio.gather(*(one(number) for number in range(40)))) == [0] * 8 + [30] * 32

    asyncio.run(main())
