"""The official ``openai`` client of a server without TLS."""

from __future__ import annotations

from typing import Any

import openai


def official_client(url: str, key: str = "none", **options: Any) -> openai.OpenAI:
    """It tries nothing again, unless told to, and reads no certificates: all those of the world take it 50 ms."""
    settings = {"max_retries": 0, "timeout": 60, "http_client": openai.DefaultHttpxClient(verify=False)} | options
    return openai.OpenAI(base_url=f"{url}/v1", api_key=key, **settings)
