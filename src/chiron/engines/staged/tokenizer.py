"""Text to tokens and back, and conversations to prompts, by the files of a Hugging Face directory."""

from __future__ import annotations

import json
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from chiron.engines.serve.openai import Message
from chiron.engines.serve.text import token_bytes
from chiron.engines.serve.tools import Tool
from chiron.engines.staged.errors import StagedModelError


class ModelTokenizer:
    """Of one model."""

    def __init__(self, directory: Path) -> None:
        """Raises StagedModelError, or ImportError without ``tokenizers``."""
        try:
            from tokenizers import Tokenizer
        except ImportError as error:
            raise ImportError(f"a head needs tokenizers ({error}): pip install 'chiron-serving[staged]'") from None
        file = directory / "tokenizer.json"
        try:
            described = json.loads(file.read_text(encoding="utf-8"))
            self._tokenizer = Tokenizer.from_file(str(file))
            # Saved by who trained it; a prompt is taken whole, or refused.
            self._tokenizer.no_truncation()
            self._tokenizer.no_padding()
        except Exception as error:  # The library raises no other.
            raise StagedModelError(f"{file}: cannot be read as a tokenizer: {error}") from None
        self.vocabulary = _table(self._tokenizer.get_vocab(with_added_tokens=True), described)
        """Bytes of each token, by id."""
        said = _read(directory / "tokenizer_config.json")
        self._template = _template(directory, said)
        self._names = {key: _token_text(said.get(key)) for key in ("bos_token", "eos_token", "pad_token", "unk_token")}
        self.eos_ids = _ids(_read(directory / "generation_config.json").get("eos_token_id"))
        """Further end tokens, which generation_config.json names."""

    @property
    def chats(self) -> bool:
        return self._template is not None

    def encode(self, text: str, *, special: bool) -> list[int]:
        """``special``: with the model's begin token, where it has one."""
        # Unlike encode, this lets other threads run.
        return list(self._tokenizer.encode_batch([text], add_special_tokens=special)[0].ids)

    def chat(self, messages: Sequence[Message], tools: Sequence[Tool] = ()) -> str:
        """Raises ValueError when they do not go through the model's template."""
        from jinja2 import TemplateError

        try:
            return str(
                self._template.render(
                    messages=[_said(message) for message in messages],
                    tools=[tool.definition for tool in tools] or None,
                    add_generation_prompt=True,
                    **self._names,
                )
            )
        except (TemplateError, TypeError, KeyError, ArithmeticError) as error:
            raise ValueError(str(error)) from None


def _template(directory: Path, config: dict[str, Any]) -> Any:
    """Templates come with models, so they run in a sandbox."""
    try:
        from jinja2 import TemplateError
        from jinja2.ext import loopcontrols
        from jinja2.sandbox import ImmutableSandboxedEnvironment
    except ImportError as error:
        raise ImportError(f"a head needs jinja2 ({error}): pip install 'chiron-serving[staged]'") from None
    file = directory / "chat_template.jinja"
    text = file.read_text(encoding="utf-8") if file.exists() else config.get("chat_template")
    if isinstance(text, list):
        named = {each.get("name"): each.get("template") for each in text if isinstance(each, dict)}
        text = named.get("default")
    if not isinstance(text, str):
        return None

    def fail(message: str) -> None:
        raise TemplateError(message)

    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols])
    environment.filters["tojson"] = lambda value, indent=None: json.dumps(value, ensure_ascii=False, indent=indent)
    environment.globals["raise_exception"] = fail
    environment.globals["strftime_now"] = lambda form: datetime.now(UTC).strftime(form)
    try:
        return environment.from_string(text)
    except TemplateError as error:
        raise StagedModelError(f"{directory}: its chat template cannot be read: {error}") from None


def _table(vocabulary: dict[str, int], described: dict[str, Any]) -> list[bytes]:
    special = {each["id"] for each in described.get("added_tokens") or [] if each.get("special")}
    if _byte_level(described):
        letters = {letter: bytes([byte]) for byte, letter in _byte_letters().items()}
        table = [b""] * (max(vocabulary.values(), default=-1) + 1)
        for token, id in vocabulary.items():
            if id not in special:
                table[id] = b"".join(letters.get(letter) or letter.encode() for letter in token)
        return table
    return token_bytes({token.encode(): id for token, id in vocabulary.items()}, special)


def _byte_level(described: dict[str, Any]) -> bool:
    """Whether tokens write bytes as letters."""
    decoder = described.get("decoder") or {}
    parts = decoder.get("decoders") or [decoder]
    return any(part.get("type") == "ByteLevel" for part in parts)


def _byte_letters() -> dict[int, str]:
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = (byte for byte in range(256) if byte not in printable)
    return {byte: chr(byte) for byte in printable} | {byte: chr(256 + n) for n, byte in enumerate(others)}


def _said(message: Message) -> dict[str, Any]:
    """A message as chat templates expect it."""
    said: dict[str, Any] = {
        "role": "system" if message.role == "developer" else message.role,
        "content": message.content,
    }
    if message.calls:
        said["tool_calls"] = [
            {"id": c.id, "type": "function", "function": {"name": c.name, "arguments": _object(c.arguments)}}
            for c in message.calls
        ]
    if message.call_id:
        said["tool_call_id"] = message.call_id
    return said


def _object(arguments: str) -> Any:
    try:
        return json.loads(arguments)
    except (ValueError, RecursionError):
        return arguments


def _read(file: Path) -> dict[str, Any]:
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise StagedModelError(f"{file}: cannot be read: {error}") from None
    return found if isinstance(found, dict) else {}


def _token_text(given: Any) -> str:
    if isinstance(given, dict):
        given = given.get("content")
    return given if isinstance(given, str) else ""


def _ids(given: Any) -> tuple[int, ...]:
    ids = given if isinstance(given, list) else [given]
    return tuple(each for each in ids if type(each) is int)
